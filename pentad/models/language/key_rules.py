"""Rules for tensor names in files, shared by most decoder-only families. A family adds its own rules to these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pentad.models.language.decoder_only import DecoderConfig
from pentad.weights.keytable import Identity, KeyTable, Rule, UnpermuteRope

Layouts = Callable[[DecoderConfig], list[KeyTable]]


def hf(*rules: Rule) -> Layouts:
    """Rules for Hugging Face folders."""
    return lambda config: [KeyTable([*hf_rules(), *rules], hf_ignored(config))]


def gguf(*rules: Rule, interleaved: bool = False) -> Layouts:
    """Rules for GGUF files; only architecture "llama" has interleaved queries and keys."""
    return lambda config: [KeyTable([*gguf_rules(config, interleaved=interleaved), *rules], GGUF_IGNORED)]


def consolidated(*rules: Rule) -> Layouts:
    """Rules for Meta's and Mistral's consolidated files."""
    return lambda config: [KeyTable([*consolidated_rules(config), *rules], CONSOLIDATED_IGNORED)]


GGUF_IGNORED = (r"rope_freqs\.weight",)  # read with the config
CONSOLIDATED_IGNORED = (r"(.*\.)?rope\.freqs",)


def hf_rules() -> list[Rule]:
    layer = "model.layers.*"
    return [
        Rule("embed", "model.embed_tokens"),
        Rule("layers.*.attention_norm", f"{layer}.input_layernorm"),
        *(Rule(f"layers.*.attention.{p}_proj", f"{layer}.self_attn.{p}_proj") for p in "qkvo"),
        Rule("layers.*.feedforward_norm", f"{layer}.post_attention_layernorm"),
        *(Rule(f"layers.*.feedforward.{p}_proj", f"{layer}.mlp.{p}_proj") for p in ("gate", "up", "down")),
        Rule("norm", "model.norm"),
        Rule("head", "lm_head"),
    ]


def hf_ignored(config: DecoderConfig) -> Sequence[str]:
    """Tensors that are computed, and the copy of a tied head."""
    return [r".*\.rotary_emb\.inv_freq", *([r"lm_head\.weight"] if config.tie_word_embeddings else [])]


def gguf_rules(config: DecoderConfig, *, interleaved: bool = False) -> list[Rule]:
    queries, keys = _unpermute(config) if interleaved else (Identity(), Identity())
    return [
        Rule("embed", "token_embd"),
        Rule("layers.*.attention_norm", "blk.*.attn_norm"),
        Rule("layers.*.attention.q_proj", "blk.*.attn_q", queries),
        Rule("layers.*.attention.k_proj", "blk.*.attn_k", keys),
        Rule("layers.*.attention.v_proj", "blk.*.attn_v"),
        Rule("layers.*.attention.o_proj", "blk.*.attn_output"),
        Rule("layers.*.feedforward_norm", "blk.*.ffn_norm"),
        *(Rule(f"layers.*.feedforward.{p}_proj", f"blk.*.ffn_{p}") for p in ("gate", "up", "down")),
        Rule("norm", "output_norm"),
        Rule("head", "output"),
    ]


def consolidated_rules(config: DecoderConfig) -> list[Rule]:
    queries, keys = _unpermute(config)
    feedforward = {"gate": "w1", "up": "w3", "down": "w2"}
    return [
        Rule("embed", "tok_embeddings"),
        Rule("layers.*.attention_norm", "layers.*.attention_norm"),
        Rule("layers.*.attention.q_proj", "layers.*.attention.wq", queries),
        Rule("layers.*.attention.k_proj", "layers.*.attention.wk", keys),
        *(Rule(f"layers.*.attention.{p}_proj", f"layers.*.attention.w{p}") for p in "vo"),
        Rule("layers.*.feedforward_norm", "layers.*.ffn_norm"),
        *(Rule(f"layers.*.feedforward.{p}_proj", f"layers.*.feed_forward.{w}") for p, w in feedforward.items()),
        Rule("norm", "norm"),
        Rule("head", "output"),
    ]


def _unpermute(config: DecoderConfig) -> tuple[UnpermuteRope, UnpermuteRope]:
    return UnpermuteRope(config.num_attention_heads), UnpermuteRope(config.num_key_value_heads)
