"""OpenMoE (arXiv:2402.01739) as published for PyTorch; in every fourth or sixth block a token uses two experts.

This follows the published code: ColossalAI's examples/language/openmoe/model and colossalai/moe. Differences from Llama
are explicit parts or arguments: scores not divided by sqrt(D) (`Attention.scale`), gates of twice the width
(`GatedSwiGLU`), a dense layer after each mixture (`ExtraFeedforwardBlock`), unnormalized router probabilities
(`softmax_top_k`), capacities (`EvenCapacity`).

Three differences from the published code remain. In decoding steps of one token the published code rotates the query as
if it were one position later; flaxformer, which trained the checkpoints, does not. It computes capacities from a padded
batch; pentad computes them from one sequence's tokens in a step. It lets queries attend to position 0 even if the mask
excludes it, which matters only with padding. The configs on the Hugging Face hub are not verified.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import DecoderOnly, PreNormConfig, check_experts, self_attention
from pentad.nn.block import ExtraFeedforwardBlock, PreNormBlock
from pentad.nn.feedforward import GatedSwiGLU
from pentad.nn.moe.dispatch import EvenCapacity
from pentad.nn.moe.experts import GatedSwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import softmax_top_k
from pentad.nn.norm import RMSNorm
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, Rule, Stacked, Transposed

ROUTER_FIELDS = ("topk", "capacity_factor_train", "capacity_factor_eval", "min_capacity", "drop_tks")


@dataclass(frozen=True, kw_only=True)
class OpenMoeConfig(PreNormConfig):
    """OpenMoE's fields beyond the shared ones."""

    hidden_act: str = "swiglu"
    num_experts: int
    moe_layer_interval: int
    router_topk: int = 2
    router_capacity_factor_train: float = 1.25
    router_capacity_factor_eval: float = 2.0
    router_min_capacity: int = 4
    router_drop_tks: bool = True  # in evaluation; in training tokens are always dropped
    mlp_gated: bool = True

    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("swiglu",)
    OLD_HF_NAMES: ClassVar[Mapping[str, str]] = {
        "gated": "mlp_gated",
        **{name: f"router_{name}" for name in ROUTER_FIELDS},
    }
    """The names in ColossalAI's openmoe_8b_config.json."""

    def resolve(self, checkpoint: Checkpoint) -> Self:
        check_experts(self, self.num_experts, self.router_topk, checkpoint.path)
        if not self.mlp_gated:
            raise BadInput(f"{checkpoint.path}: mlp_gated is false; expected true")
        return super().resolve(checkpoint)


class OpenMoe(DecoderOnly):
    """Attention, and a doubly gated layer or a mixture of them, each after an RMSNorm."""

    def __init__(self, config: OpenMoeConfig) -> None:
        super().__init__(config, _blocks(config), RMSNorm(config.hidden_size, config.rms_norm_eps))


def _blocks(c: OpenMoeConfig) -> Iterator[PreNormBlock]:
    rope = c.rope()
    for layer in range(c.num_hidden_layers):
        attention = self_attention(c, layer, rope, scale=1.0)
        norms = (RMSNorm(c.hidden_size, c.rms_norm_eps) for _ in range(3))
        dense = GatedSwiGLU(c.hidden_size, c.intermediate_size)
        if (layer + 1) % c.moe_layer_interval:
            yield PreNormBlock(next(norms), attention, next(norms), dense)
        else:
            yield ExtraFeedforwardBlock(next(norms), attention, next(norms), _mixture(c), next(norms), dense)


def _mixture(c: OpenMoeConfig) -> MixtureOfExperts:
    factors = c.router_capacity_factor_train, c.router_capacity_factor_eval
    training, inference = (EvenCapacity(c.router_topk * f, c.num_experts, c.router_min_capacity) for f in factors)
    return MixtureOfExperts(
        Router(c.hidden_size, c.num_experts),
        GatedSwiGLUExperts(c.num_experts, c.hidden_size, c.intermediate_size),
        softmax_top_k,
        top_k=c.router_topk,
        capacity=inference if c.router_drop_tks else None,
        training_capacity=training,
    )


def _hf(config: OpenMoeConfig) -> list[KeyTable]:
    """The published files, and those of github.com/pingzhili/openmoe-pt, whose model_type is "openmoe"."""
    mlp, ours = "model.layers.*.mlp", "layers.*.feedforward"
    rules = [Rule("layers.*.extra_norm", "model.layers.*.pre_extra_mlp_layernorm")]
    stacked = [Rule(f"{ours}.router", f"{mlp}.gate_weight", bare=True)]
    separate = [Rule(f"{ours}.router", f"{mlp}.gate")]
    for part, theirs in (("gate_proj", "wi_gate"), ("up_proj", "wi_up"), ("down_proj", "wo")):
        rules.append(Rule(f"layers.*.extra_feedforward.{part}", f"model.layers.*.extra_mlp.{part}"))
        stacked.append(Rule(f"{ours}.experts.{part}", f"{mlp}.experts.{theirs}", Transposed(), bare=True))
        each = tuple(f"{mlp}.experts.{e}.{part}" for e in range(config.num_experts))
        separate.append(Rule(f"{ours}.experts.{part}", each, Stacked()))
    return [key_rules.hf_table(config, *rules, *layout) for layout in (stacked, separate)]


def init_std(config: OpenMoeConfig, name: str) -> float:
    """ColossalAI's router and experts (`reset_parameters` in colossalai/moe/experts.py and layers.py)."""
    if ".experts." in name or ".router." in name:
        return math.sqrt(0.1 / (config.intermediate_size if "down_proj" in name else config.hidden_size))
    return config.initializer_range


def recognizes(checkpoint: Checkpoint) -> bool:
    """The published config.json has model_type "llama" but its own architecture."""
    config = checkpoint.config
    architectures = config.get("architectures")
    listed = isinstance(architectures, list) and "OpenMoeForCausalLM" in architectures
    return checkpoint.format == "hf" and (listed or config.get("model_type") == "openmoe")


FAMILY = Family(
    OpenMoeConfig,
    OpenMoe,
    key_tables={"hf": _hf},
    names=ArchitectureNames("openmoe", "OpenMoeForCausalLM", model_type="llama"),
    recognizes=recognizes,
    init_std=init_std,
)
