"""Llama (arXiv:2302.13971, 2307.09288, 2407.21783), and what has its architecture: TinyLlama, SmolLM2.

A pre-norm transformer: RMSNorm, grouped-query attention with rotary positions, SwiGLU, no biases as published.
Legend: N tokens in the batch, M rows whose logits are wanted, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.nn.attention import Attention
from pentad.nn.batch import Batch
from pentad.nn.block import PreNormBlock
from pentad.nn.feedforward import SwiGLU
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.config import LARGEST, read_config
from pentad.weights.keytable import HalfSplit, KeyTable, Rule


@dataclass(frozen=True)
class LlamaConfig:
    """What the forward pass reads of a published ``config.json``, under its names there and with their defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # as many as num_attention_heads
    head_dim: int = 0  # hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = "silu"


class Llama(nn.Module):
    """``model(batch)`` gives hidden states, ``model.head(hidden)`` the logits of those rows that are wanted."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        c = self.config = config
        rope = Rope(c.head_dim, c.rope_theta, scaling(c.rope_parameters))
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(
            PreNormBlock(
                RMSNorm(c.hidden_size, c.rms_norm_eps),
                Attention(
                    c.hidden_size,
                    heads=c.num_attention_heads,
                    kv_heads=c.num_key_value_heads,
                    head_dim=c.head_dim,
                    rope=rope,
                    layer=layer,
                    bias=c.attention_bias,
                    output_bias=c.attention_bias,
                ),
                RMSNorm(c.hidden_size, c.rms_norm_eps),
                SwiGLU(c.hidden_size, c.intermediate_size, bias=c.mlp_bias),
            )
            for layer in range(c.num_hidden_layers)
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[None, ...]]:
        """Hidden states [N, D] after the last norm, and each layer's `aux`."""
        x_ND = self.embed(batch.ids).float()  # the residual stream is float32, whatever the weights are
        aux = []
        for block in self.layers:
            x_ND, a = block(x_ND, batch)
            aux.append(a)
        return self.norm(x_ND), tuple(aux)


def config_from(checkpoint: Checkpoint) -> LlamaConfig:
    """The config of a checkpoint, from ``config.json`` or from GGUF metadata."""
    values = _from_gguf(checkpoint) if checkpoint.format == "gguf" else _from_hf(checkpoint.config)
    config = read_config(LlamaConfig, values, checkpoint.path)
    heads = config.num_attention_heads
    groups = config.num_key_value_heads or heads
    head_dim = config.head_dim or config.hidden_size // heads
    if config.hidden_act not in ("silu", "swish"):
        raise BadInput(f"{checkpoint.path}: hidden_act is {config.hidden_act!r}; Llama's SwiGLU has 'silu'")
    if heads % groups or head_dim % 2 or heads * head_dim > LARGEST:
        raise BadInput(
            f"{checkpoint.path}: {heads} heads of {head_dim} numbers can't share {groups} key/value heads"
            " and rotate in pairs"
        )
    rope = scaling(config.rope_parameters, checkpoint.path)
    rope.frequencies(config.rope_theta, head_dim, 1)  # refuses divisors of another number
    return replace(config, num_key_value_heads=groups, head_dim=head_dim)


def _from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(rope) if isinstance(rope, Mapping) else {"rope_type": rope}  # refused by name
    length = config.get("max_position_embeddings", 2048)
    trained = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or length
    return {
        **config,
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta"),
        "rope_parameters": {
            **rope,
            "max_position_embeddings": length,
            "original_max_position_embeddings": trained,
        },
    }


def _from_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    meta, tensors = checkpoint.config, checkpoint.tensors
    if meta.get("llama.expert_count"):
        raise BadInput(f"{checkpoint.path}: this is a mixture of experts (Mixtral), which is not supported yet")
    if meta.get("llama.rope.scaling.attn_factor", 1.0) != 1.0:
        raise BadInput(f"{checkpoint.path}: llama.rope.scaling.attn_factor is not 1, which is not supported")
    rope: dict[str, Any]
    if "rope_freqs.weight" in tensors:
        divisors = tensors["rope_freqs.weight"].read()
        rope = {"rope_type": "divisors", "divisors": getattr(divisors, "tolist", list)()}
    elif "llama.rope.scale_linear" in meta:  # how files of 2023 had it
        rope = {"rope_type": "linear", "factor": meta["llama.rope.scale_linear"]}
    else:
        rope = {
            "rope_type": "default" if (kind := meta.get("llama.rope.scaling.type")) == "none" else kind,
            "factor": meta.get("llama.rope.scaling.factor"),
            "original_max_position_embeddings": meta.get("llama.rope.scaling.original_context_length"),
        }
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None,
        "hidden_size": meta.get("llama.embedding_length"),
        "intermediate_size": meta.get("llama.feed_forward_length"),
        "num_hidden_layers": meta.get("llama.block_count"),
        "num_attention_heads": meta.get("llama.attention.head_count"),
        "num_key_value_heads": meta.get("llama.attention.head_count_kv"),
        "head_dim": meta.get("llama.attention.key_length") or meta.get("llama.rope.dimension_count"),
        "rms_norm_eps": meta.get("llama.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.get("llama.context_length"),
        "rope_theta": meta.get("llama.rope.freq_base"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def key_table(config: LlamaConfig, format: str) -> KeyTable:
    """The names of the network's modules in Hugging Face folders ("hf") and in GGUF files ("gguf")."""
    if format == "gguf":
        queries, keys = HalfSplit(config.num_attention_heads), HalfSplit(config.num_key_value_heads)
        return KeyTable(
            [
                Rule("embed", "token_embd"),
                Rule("layers.*.attention_norm", "blk.*.attn_norm"),
                Rule("layers.*.attention.q_proj", "blk.*.attn_q", queries),
                Rule("layers.*.attention.k_proj", "blk.*.attn_k", keys),
                Rule("layers.*.attention.v_proj", "blk.*.attn_v"),
                Rule("layers.*.attention.o_proj", "blk.*.attn_output"),
                Rule("layers.*.feedforward_norm", "blk.*.ffn_norm"),
                Rule("layers.*.feedforward.gate_proj", "blk.*.ffn_gate"),
                Rule("layers.*.feedforward.up_proj", "blk.*.ffn_up"),
                Rule("layers.*.feedforward.down_proj", "blk.*.ffn_down"),
                Rule("norm", "output_norm"),
                Rule("head", "output"),
            ],
            ignored=[r"rope_freqs\.weight"],  # read by the config
        )
    attention, feedforward = "model.layers.*.self_attn", "model.layers.*.mlp"
    return KeyTable(
        [
            Rule("embed", "model.embed_tokens"),
            Rule("layers.*.attention_norm", "model.layers.*.input_layernorm"),
            *(Rule(f"layers.*.attention.{p}_proj", f"{attention}.{p}_proj") for p in "qkvo"),
            Rule("layers.*.feedforward_norm", "model.layers.*.post_attention_layernorm"),
            *(Rule(f"layers.*.feedforward.{p}_proj", f"{feedforward}.{p}_proj") for p in ("gate", "up", "down")),
            Rule("norm", "model.norm"),
            Rule("head", "lm_head"),
        ],
        # computed, not learned; and a head that is tied is sometimes stored a second time
        ignored=[
            r".*\.rotary_emb\.inv_freq",
            *([r"lm_head\.weight"] if config.tie_word_embeddings else []),
        ],
    )


build = Llama
