"""phi-1, phi-1.5 and phi-2 (arXiv:2306.11644, 2309.05463): small models trained on textbook-like data.

GPT-J's block: attention and an MLP in parallel after one LayerNorm, biases everywhere, and partial rotary embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import DecoderConfig, DecoderOnly, rotary_share, self_attention
from pentad.nn.block import ParallelBlock
from pentad.nn.feedforward import GeluMLP
from pentad.nn.norm import LayerNorm
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import Concat, KeyTable, Rule


@dataclass(frozen=True, kw_only=True)
class PhiConfig(DecoderConfig):
    """phi's fields beyond the shared ones."""

    intermediate_size: int = 0  # 4 * hidden_size
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    qk_layernorm: bool = False

    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("gelu_new", "gelu_pytorch_tanh")
    OLD_HF_NAMES: ClassVar[Mapping[str, str]] = {
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_key_value_heads",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layer_norm_eps",
        "activation_function": "hidden_act",
    }
    """The names in files of 2023."""

    @property
    def rotary_dim(self) -> int:
        return 2 * round(self.head_dim * self.partial_rotary_factor / 2)

    def resolve(self, checkpoint: Checkpoint) -> Self:
        intermediate_size = self.intermediate_size or 4 * self.hidden_size
        config = super(PhiConfig, replace(self, intermediate_size=intermediate_size)).resolve(checkpoint)
        key = "phi2.rope.dimension_count" if checkpoint.format == "gguf" else "rotary_dim"
        return replace(config, partial_rotary_factor=rotary_share(config, checkpoint, key))


class Phi(DecoderOnly):
    """Attention with partial rotary embedding, and an MLP, both after one LayerNorm."""

    def __init__(self, config: PhiConfig) -> None:
        c, rope = config, config.rope()

        def head_norm() -> LayerNorm | None:
            return LayerNorm(c.head_dim, c.layer_norm_eps) if c.qk_layernorm else None

        blocks = (
            ParallelBlock(
                LayerNorm(c.hidden_size, c.layer_norm_eps),
                self_attention(c, layer, rope, bias=True, output_bias=True, q_norm=head_norm(), k_norm=head_norm()),
                GeluMLP(c.hidden_size, c.intermediate_size),
            )
            for layer in range(c.num_hidden_layers)
        )
        super().__init__(c, blocks, LayerNorm(c.hidden_size, c.layer_norm_eps), head_bias=True)


QKV = tuple(f"attention.{p}_proj" for p in "qkv")


def _qkv(config: PhiConfig) -> Concat:
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return Concat(tuple(count * config.head_dim for count in heads))


def _hf(config: PhiConfig) -> list[KeyTable]:
    """Current folders, and two layouts of 2023, which have no norms on queries and keys."""
    rules = [
        Rule("layers.*.norm", "model.layers.*.input_layernorm"),
        *(Rule(f"layers.*.attention.{p}_norm", f"model.layers.*.self_attn.{p}_layernorm") for p in "qk"),
        Rule("layers.*.attention.o_proj", "model.layers.*.self_attn.dense"),
        Rule("layers.*.feedforward.up_proj", "model.layers.*.mlp.fc1"),
        Rule("layers.*.feedforward.down_proj", "model.layers.*.mlp.fc2"),
        Rule("norm", "model.final_layernorm"),
    ]
    current = key_rules.hf_table(config, *rules)
    if config.qk_layernorm:
        return [current]
    count = config.num_hidden_layers
    return [
        current,
        _table_of_2023(config, "transformer.embd", [f"transformer.h.{i}" for i in range(count)], "lm_head"),
        _table_of_2023(config, "layers.0", [f"layers.{i + 1}" for i in range(count)], f"layers.{count + 1}"),
    ]


def _gguf(config: PhiConfig) -> list[KeyTable]:
    """Files with separate or fused queries, keys and values; llama.cpp's phi has no norms on queries and keys."""
    if config.qk_layernorm:
        return []
    norm = Rule("layers.*.norm", "blk.*.attn_norm")
    fused = Rule(tuple(f"layers.*.{part}" for part in QKV), "blk.*.attn_qkv", _qkv(config))
    return [key_rules.gguf_table(config, norm), key_rules.gguf_table(config, norm, fused)]


def _table_of_2023(config: PhiConfig, embed: str, layers: list[str], head: str) -> KeyTable:
    """Files of Microsoft's code. In the oldest files the embedding and the head are numbered as layers."""
    rules = [Rule("embed", f"{embed}.wte"), Rule("norm", f"{head}.ln"), Rule("head", f"{head}.linear")]
    for i, layer in enumerate(layers):
        rules += [
            Rule(f"layers.{i}.norm", f"{layer}.ln"),
            Rule(tuple(f"layers.{i}.{part}" for part in QKV), f"{layer}.mixer.Wqkv", _qkv(config)),
            Rule(f"layers.{i}.attention.o_proj", f"{layer}.mixer.out_proj"),
            Rule(f"layers.{i}.feedforward.up_proj", f"{layer}.mlp.fc1"),
            Rule(f"layers.{i}.feedforward.down_proj", f"{layer}.mlp.fc2"),
        ]
    return KeyTable(rules, ignored=[r".*\.rotary_emb\.inv_freq"])


FAMILY = Family(
    PhiConfig,
    Phi,
    key_tables={"hf": _hf, "gguf": _gguf},
    names=ArchitectureNames("phi", "PhiForCausalLM", gguf="phi2", aliases=("phi-msft", "mixformer-sequential")),
)
