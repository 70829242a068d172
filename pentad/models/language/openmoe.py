"""OpenMoE (arXiv:2402.01739) as published for PyTorch; in every fourth or sixth block a token takes two of the experts.

This follows the code that the checkpoints come with: ColossalAI's examples/language/openmoe/model and colossalai/moe.
Where that isn't what a Llama does, a part or an argument says so: scores not divided by sqrt(D) (`Attention.scale`),
gates of twice the width (`GatedSwiGLU`), a dense layer behind each mixture (`ExtraFeedforwardBlock`), probabilities as
they are (`softmax_top_k`), capacities (`EvenCapacity`), queries that run ahead in decoding (`AheadRope`; off by
default). Two differences remain: capacities are a sequence's in a step, not a padded batch's; and the port lets queries
see position 0 whatever the mask says, which matters to padding alone. Not verified: the Hugging Face hub's configs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pentad.errors import BadInput
from pentad.models.language.config import (
    ArchitectureNames,
    DecoderConfig,
    check_experts,
    read_decoder_config,
    renamed,
    written_values,
)
from pentad.models.language.key_rules import hf_ignored, hf_rules
from pentad.nn.attention import Attention
from pentad.nn.block import ExtraFeedforwardBlock, PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import GatedSwiGLU
from pentad.nn.moe.dispatch import EvenCapacity
from pentad.nn.moe.experts import GatedSwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import softmax_top_k
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import AheadRope, Rope
from pentad.nn.rope_scaling import scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, Rule, Stacked, Transposed

OLDER = ("topk", "capacity_factor_train", "capacity_factor_eval", "min_capacity", "drop_tks")
OLDER_NAMES = {"gated": "mlp_gated", **{name: f"router_{name}" for name in OLDER}}
"""Those in ColossalAI's openmoe_8b_config.json -> today's."""


@dataclass(frozen=True)
class OpenMoeConfig(DecoderConfig):
    """What the forward pass reads of a published ``config.json``, under its names there and with their defaults."""

    hidden_act: str = "swiglu"
    rms_norm_eps: float = 1e-6
    num_experts: int = field(kw_only=True)
    moe_layer_interval: int = field(kw_only=True)
    router_topk: int = 2
    router_capacity_factor_train: float = 1.25
    router_capacity_factor_eval: float = 2.0
    router_min_capacity: int = 4
    router_drop_tks: bool = True  # in evaluation; training always does
    mlp_gated: bool = True
    query_ahead_at_decode: int = field(default=0, metadata={"least": 0})  # published by none; 1 decodes like the port

    ACTIVATIONS = ("swiglu",)


class OpenMoe(Decoder):
    """Attention and a doubly gated layer or a mixture of them, each behind an RMSNorm."""

    def __init__(self, config: OpenMoeConfig) -> None:
        c = config
        super().__init__(
            nn.Embedding(c.vocab_size, c.hidden_size),
            _blocks(c),
            RMSNorm(c.hidden_size, c.rms_norm_eps),
            nn.Linear(c.hidden_size, c.vocab_size, bias=False),
            tied=c.tie_word_embeddings,
            config=c,
        )


def _blocks(c: OpenMoeConfig) -> Iterator[PreNormBlock]:
    rope = Rope(c.head_dim, c.rope_theta, scaling(c.rope_parameters))
    query_rope = AheadRope(rope, c.query_ahead_at_decode) if c.query_ahead_at_decode else None
    for layer in range(c.num_hidden_layers):
        attention = Attention(
            c.hidden_size,
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            rope=rope,
            query_rope=query_rope,
            layer=layer,
            scale=1.0,
        )
        norms = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(3))
        dense = GatedSwiGLU(c.hidden_size, c.intermediate_size)
        if (layer + 1) % c.moe_layer_interval:
            yield PreNormBlock(next(norms), attention, next(norms), dense)
        else:
            yield ExtraFeedforwardBlock(next(norms), attention, next(norms), _mixture(c), next(norms), dense)


def _mixture(c: OpenMoeConfig) -> MixtureOfExperts:
    factors = c.router_capacity_factor_train, c.router_capacity_factor_eval
    train, run = (EvenCapacity(c.router_topk * f, c.num_experts, c.router_min_capacity) for f in factors)
    return MixtureOfExperts(
        Router(c.hidden_size, c.num_experts),
        GatedSwiGLUExperts(c.num_experts, c.hidden_size, c.intermediate_size),
        softmax_top_k,
        top_k=c.router_topk,
        capacity=run if c.router_drop_tks else None,
        training_capacity=train,
    )


def config_from(checkpoint: Checkpoint) -> OpenMoeConfig:
    """The config of a checkpoint, from ``config.json``."""
    path = checkpoint.path
    if checkpoint.format != "hf":
        raise BadInput(f"{path}: no {checkpoint.format} files of openmoe are known")
    config = read_decoder_config(OpenMoeConfig, renamed(checkpoint, OLDER_NAMES))
    check_experts(config, config.num_experts, config.router_topk, path)
    if not config.mlp_gated:
        raise BadInput(f"{path}: mlp_gated is false; this family's layers are gated")
    return config


def key_tables(config: OpenMoeConfig, format: str) -> list[KeyTable]:
    """The names of the network's modules in Hugging Face folders: the port's, and those of its rewriting without
    ColossalAI (github.com/pingzhili/openmoe-pt, whose model_type is "openmoe")."""
    if format != "hf":
        return []
    mlp, ours = "model.layers.*.mlp", "layers.*.feedforward"
    rules = [*hf_rules(), Rule("layers.*.extra_norm", "model.layers.*.pre_extra_mlp_layernorm")]
    stacked = [Rule(f"{ours}.router", f"{mlp}.gate_weight", bare=True)]
    singly = [Rule(f"{ours}.router", f"{mlp}.gate")]
    for part, theirs in (("gate_proj", "wi_gate"), ("up_proj", "wi_up"), ("down_proj", "wo")):
        rules.append(Rule(f"layers.*.extra_feedforward.{part}", f"model.layers.*.extra_mlp.{part}"))
        stacked.append(Rule(f"{ours}.experts.{part}", f"{mlp}.experts.{theirs}", Transposed(), bare=True))
        each = tuple(f"{mlp}.experts.{e}.{part}" for e in range(config.num_experts))
        singly.append(Rule(f"{ours}.experts.{part}", each, Stacked()))
    return [KeyTable([*rules, *layout], hf_ignored(config.tie_word_embeddings)) for layout in (stacked, singly)]


def write_config(config: OpenMoeConfig, format: str) -> dict[str, Any]:
    """The config as Hugging Face's files spell it, which call the model a Llama and only its class by its name."""
    return written_values(config, format, ArchitectureNames("llama", "OpenMoeForCausalLM"))


build = OpenMoe
