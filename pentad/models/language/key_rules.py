"""Rules for tensor names in files, shared by most decoder-only families. A family adds its own rules to these."""

from collections.abc import Callable
from typing import Any

from pentad.models.language.decoder_only import DecoderConfig
from pentad.weights.keytable import Identity, KeyTable, Rule, UnpermuteRope

Layouts = Callable[[Any], list[KeyTable]]


def hf(*rules: Rule) -> Layouts:
    """The layout of Hugging Face folders, with a family's own rules."""
    return lambda config: [hf_table(config, *rules)]


def gguf(*rules: Rule, interleaved: bool = False) -> Layouts:
    """The layout of GGUF files; only architecture "llama" has interleaved queries and keys."""
    return lambda config: [gguf_table(config, *rules, interleaved=interleaved)]


def hf_table(config: DecoderConfig, *rules: Rule) -> KeyTable:
    layer = "model.layers.*"
    shared = [
        Rule("embed", "model.embed_tokens"),
        Rule("layers.*.attention_norm", f"{layer}.input_layernorm"),
        *(Rule(f"layers.*.attention.{p}_proj", f"{layer}.self_attn.{p}_proj") for p in "qkvo"),
        Rule("layers.*.feedforward_norm", f"{layer}.post_attention_layernorm"),
        *(Rule(f"layers.*.feedforward.{p}_proj", f"{layer}.mlp.{p}_proj") for p in ("gate", "up", "down")),
        Rule("norm", "model.norm"),
        Rule("head", "lm_head"),
    ]
    return KeyTable([*shared, *rules], hf_ignored(config))


def hf_ignored(config: DecoderConfig) -> list[str]:
    """Tensors that the network computes, and the copy of a tied head."""
    return [r".*\.rotary_emb\.inv_freq", *([r"lm_head\.weight"] if config.tie_word_embeddings else [])]


def gguf_table(config: DecoderConfig, *rules: Rule, interleaved: bool = False) -> KeyTable:
    queries, keys = _unpermute(config) if interleaved else (Identity(), Identity())
    shared = [
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
    return KeyTable([*shared, *rules], [r"rope_freqs\.weight"])  # read with the config


def consolidated_table(config: DecoderConfig, *rules: Rule) -> KeyTable:
    """The layout of Meta's and Mistral's consolidated files."""
    queries, keys = _unpermute(config)
    feedforward = {"gate": "w1", "up": "w3", "down": "w2"}
    shared = [
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
    return KeyTable([*shared, *rules], [r"(.*\.)?rope\.freqs"])


def _unpermute(config: DecoderConfig) -> tuple[UnpermuteRope, UnpermuteRope]:
    return UnpermuteRope(config.num_attention_heads), UnpermuteRope(config.num_key_value_heads)
