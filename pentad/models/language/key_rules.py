"""Where most decoder-only language models keep their tensors, in each kind of file; a family's table extends these."""

from __future__ import annotations

from pentad.weights.keytable import Identity, Operation, Rule


def hf_rules() -> list[Rule]:
    """Hugging Face folders."""
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


def hf_ignored(tied: bool) -> list[str]:
    """What is computed, not learned; and a head that is tied to the embedding is sometimes stored a second time."""
    return [r".*\.rotary_emb\.inv_freq", *([r"lm_head\.weight"] if tied else [])]


def gguf_rules(queries: Operation = Identity(), keys: Operation = Identity()) -> list[Rule]:  # noqa: B008 - they have no state
    """GGUF files of most architectures; only "llama" has interleaved queries and keys."""
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


def consolidated_rules(queries: Operation, keys: Operation) -> list[Rule]:
    """Meta's files and Mistral's: w1 is the gate, w3 the other factor, w2 the way down."""
    return [
        Rule("embed", "tok_embeddings"),
        Rule("layers.*.attention_norm", "layers.*.attention_norm"),
        Rule("layers.*.attention.q_proj", "layers.*.attention.wq", queries),
        Rule("layers.*.attention.k_proj", "layers.*.attention.wk", keys),
        Rule("layers.*.attention.v_proj", "layers.*.attention.wv"),
        Rule("layers.*.attention.o_proj", "layers.*.attention.wo"),
        Rule("layers.*.feedforward_norm", "layers.*.ffn_norm"),
        Rule("layers.*.feedforward.gate_proj", "layers.*.feed_forward.w1"),
        Rule("layers.*.feedforward.up_proj", "layers.*.feed_forward.w3"),
        Rule("layers.*.feedforward.down_proj", "layers.*.feed_forward.w2"),
        Rule("norm", "norm"),
        Rule("head", "output"),
    ]
