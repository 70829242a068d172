"""phi-1, phi-1.5 and phi-2 (arXiv:2306.11644, 2309.05463): small models whose point is what they were taught.

GPT-J's block: attention and an MLP side by side behind one LayerNorm; biases, the head's too; partly rotated heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from pentad.errors import BadInput
from pentad.models.language.config import ArchitectureNames, DecoderConfig, read_decoder_config, renamed, written_values
from pentad.models.language.key_rules import gguf_rules, hf_ignored, hf_rules
from pentad.nn.attention import Attention
from pentad.nn.block import ParallelBlock
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import GeluMLP
from pentad.nn.norm import LayerNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import Concat, KeyTable, Rule

OLDER_NAMES = {  # of the configs of 2023
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
}


@dataclass(frozen=True)
class PhiConfig(DecoderConfig):
    """What the forward pass reads of a published ``config.json``, under its names there and with their defaults."""

    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    qk_layernorm: bool = False
    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("gelu_new", "gelu_pytorch_tanh")

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that RoPE rotates."""
        return 2 * round(self.head_dim * self.partial_rotary_factor / 2)


class Phi(Decoder):
    """Attention with partly rotated heads, and an MLP, both behind one LayerNorm."""

    def __init__(self, config: PhiConfig) -> None:
        c = config
        rope = Rope(c.rotary_dim, c.rope_theta, scaling(c.rope_parameters))
        super().__init__(
            nn.Embedding(c.vocab_size, c.hidden_size),
            (
                ParallelBlock(
                    LayerNorm(c.hidden_size, c.layer_norm_eps),
                    Attention(
                        c.hidden_size,
                        heads=c.num_attention_heads,
                        kv_heads=c.num_key_value_heads,
                        head_dim=c.head_dim,
                        rope=rope,
                        layer=layer,
                        bias=True,
                        output_bias=True,
                        q_norm=LayerNorm(c.head_dim, c.layer_norm_eps) if c.qk_layernorm else None,
                        k_norm=LayerNorm(c.head_dim, c.layer_norm_eps) if c.qk_layernorm else None,
                    ),
                    GeluMLP(c.hidden_size, c.intermediate_size),
                )
                for layer in range(c.num_hidden_layers)
            ),
            LayerNorm(c.hidden_size, c.layer_norm_eps),
            nn.Linear(c.hidden_size, c.vocab_size),
            tied=c.tie_word_embeddings,
            config=c,
        )


def config_from(checkpoint: Checkpoint) -> PhiConfig:
    """The config of a checkpoint, from ``config.json``, today's or one of 2023, or GGUF metadata."""
    checkpoint = renamed(checkpoint, OLDER_NAMES)
    said, path = checkpoint.config, checkpoint.path
    width = said.get("intermediate_size") or (4 * said["n_embd"] if isinstance(said.get("n_embd"), int) else None)
    config = read_decoder_config(PhiConfig, checkpoint, **({} if width is None else {"intermediate_size": width}))
    rotary = said.get("rotary_dim", said.get("phi2.rope.dimension_count", config.rotary_dim))
    if not isinstance(rotary, int) or not 0 < rotary <= config.head_dim or rotary % 2:
        raise BadInput(f"{path}: RoPE can't rotate {str(rotary)[:40]} of a head's {config.head_dim} numbers, in pairs")
    return replace(config, partial_rotary_factor=rotary / config.head_dim)


def key_tables(config: PhiConfig, format: str) -> list[KeyTable]:
    """The names of the network's modules in Hugging Face folders, today's and two of 2023, and in GGUF files."""
    layers = range(config.num_hidden_layers)
    groups = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    joined = Concat(tuple(count * config.head_dim for count in groups))
    match format:
        case "hf":
            today = [
                *hf_rules(),
                Rule("layers.*.norm", "model.layers.*.input_layernorm"),
                *(Rule(f"layers.*.attention.{p}_norm", f"model.layers.*.self_attn.{p}_layernorm") for p in "qk"),
                Rule("layers.*.attention.o_proj", "model.layers.*.self_attn.dense"),
                Rule("layers.*.feedforward.up_proj", "model.layers.*.mlp.fc1"),
                Rule("layers.*.feedforward.down_proj", "model.layers.*.mlp.fc2"),
                Rule("norm", "model.final_layernorm"),
            ]
            table = KeyTable(today, ignored=hf_ignored(config.tie_word_embeddings))
            if config.qk_layernorm:  # which the others don't have
                return [table]
            return [
                table,
                _table_of_2023("transformer.embd", [f"transformer.h.{i}" for i in layers], "lm_head", joined),
                _table_of_2023("layers.0", [f"layers.{i + 1}" for i in layers], f"layers.{len(layers) + 1}", joined),
            ]
        case "gguf" if not config.qk_layernorm:
            rules = [*gguf_rules(), Rule("layers.*.norm", "blk.*.attn_norm")]
            qkv = Rule(tuple(f"layers.*.attention.{p}_proj" for p in "qkv"), "blk.*.attn_qkv", joined)
            return [KeyTable(rules), KeyTable([*rules, qkv])]
    return []


def _table_of_2023(embed: str, layers: list[str], head: str, joined: Concat) -> KeyTable:
    """The files of Microsoft's own code; in the oldest the embedding and the head are counted among the layers."""
    rules = [Rule("embed", f"{embed}.wte"), Rule("norm", f"{head}.ln"), Rule("head", f"{head}.linear")]
    for i, layer in enumerate(layers):
        rules += [
            Rule(f"layers.{i}.norm", f"{layer}.ln"),
            Rule(tuple(f"layers.{i}.attention.{p}_proj" for p in "qkv"), f"{layer}.mixer.Wqkv", joined),
            Rule(f"layers.{i}.attention.o_proj", f"{layer}.mixer.out_proj"),
            Rule(f"layers.{i}.feedforward.up_proj", f"{layer}.mlp.fc1"),
            Rule(f"layers.{i}.feedforward.down_proj", f"{layer}.mlp.fc2"),
        ]
    return KeyTable(rules, ignored=[r".*\.rotary_emb\.inv_freq"])


def write_config(config: PhiConfig, format: str) -> dict[str, Any]:
    """The config as files of a format spell it."""
    return written_values(config, format, ArchitectureNames("phi", "PhiForCausalLM", gguf="phi2"))


build = Phi
