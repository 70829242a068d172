"""Mixtral 8x7B (arXiv:2401.04088): Mistral with eight feed-forward layers as experts; each token uses two.

The parts of the mixture are in `pentad.nn.moe`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from pentad.models.family import ArchitectureNames, Family
from pentad.models.language import key_rules
from pentad.models.language.decoder_only import PreNormDecoder, check_experts, self_attention
from pentad.models.language.mistral import MistralConfig
from pentad.nn.moe.experts import SwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import mixtral_top_k
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import Concat, Flattened, KeyTable, Rule, Stacked

ROUTER, EXPERTS = "layers.*.feedforward.router", "layers.*.feedforward.experts"
W_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""An expert's matrices in Mistral's and Hugging Face's files -> pentad's names."""
GGUF_NAMES = {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"}
"""An expert's matrices in GGUF files -> pentad's names."""


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(MistralConfig):
    """Mixtral's fields beyond Mistral's."""

    max_position_embeddings: int = 131072
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def resolve(self, checkpoint: Checkpoint) -> Self:
        check_experts(self, self.num_local_experts, self.num_experts_per_tok, checkpoint.path)
        return super().resolve(checkpoint)


class Mixtral(PreNormDecoder):
    """Grouped-query attention, and a mixture of SwiGLU experts, each after an RMSNorm."""

    def __init__(self, config: MixtralConfig) -> None:
        hidden, experts = config.hidden_size, config.num_local_experts
        super().__init__(
            config,
            lambda layer, rope: self_attention(config, layer, rope, window=config.sliding_window),
            lambda: MixtureOfExperts(
                Router(hidden, experts),
                SwiGLUExperts(experts, hidden, config.intermediate_size),
                mixtral_top_k,
                top_k=config.num_experts_per_tok,
            ),
        )


def _hf(config: MixtralConfig) -> list[KeyTable]:
    """The published files, and the layout of transformers 5 in memory."""
    layer, fused = "model.layers.*.block_sparse_moe", "model.layers.*.mlp"
    separate = _separate_experts(layer + ".experts.{expert}.{matrix}", W_NAMES, config)
    halves = Concat((config.intermediate_size,) * 2, axis=1)
    stacked = [
        Rule((f"{EXPERTS}.gate_proj", f"{EXPERTS}.up_proj"), f"{fused}.experts.gate_up_proj", halves, bare=True),
        Rule(f"{EXPERTS}.down_proj", f"{fused}.experts.down_proj", bare=True),
    ]
    layouts = [Rule(ROUTER, f"{layer}.gate"), *separate], [Rule(ROUTER, f"{fused}.gate"), *stacked]
    return [key_rules.hf_table(config, *layout) for layout in layouts]


def _gguf(config: MixtralConfig) -> list[KeyTable]:
    """Current files with stacked experts, and early files with separate ones."""
    router = Rule(ROUTER, "blk.*.ffn_gate_inp")
    stacked = [Rule(f"{EXPERTS}.{ours}", f"blk.*.ffn_{theirs}_exps") for theirs, ours in GGUF_NAMES.items()]
    separate = _separate_experts("blk.*.ffn_{matrix}.{expert}", GGUF_NAMES, config)
    return [key_rules.gguf_table(config, router, *experts, interleaved=True) for experts in (stacked, separate)]


def _consolidated(config: MixtralConfig) -> list[KeyTable]:
    """Files with separate experts, and the later consolidated.NN.pt with stacked ones."""
    layer, stack = "layers.*.feed_forward", "layers.*.block_sparse_moe"
    separate = _separate_experts(layer + ".experts.{expert}.{matrix}", W_NAMES, config)
    flat, transposed = (Flattened(config.num_local_experts, transposed=transposed) for transposed in (False, True))
    stacked = [
        Rule(f"{EXPERTS}.{ours}", f"{stack}.{theirs}", transposed if theirs == "w2" else flat, bare=True)
        for theirs, ours in W_NAMES.items()
    ]
    layouts = [Rule(ROUTER, f"{layer}.gate"), *separate], [Rule(ROUTER, f"{stack}.gate"), *stacked]
    return [key_rules.consolidated_table(config, *layout) for layout in layouts]


def _separate_experts(pattern: str, names: Mapping[str, str], config: MixtralConfig) -> list[Rule]:
    """Rules for layouts with a separate tensor for each expert's matrix."""
    experts = range(config.num_local_experts)
    return [
        Rule(f"{EXPERTS}.{ours}", tuple(pattern.format(matrix=theirs, expert=e) for e in experts), Stacked())
        for theirs, ours in names.items()
    ]


def recognizes(checkpoint: Checkpoint) -> bool:
    """Mixtral's GGUF files are "llama" with experts; its params.json has ``moe`` or ``num_experts``."""
    config = checkpoint.config
    match checkpoint.format:
        case "gguf":
            return config.get("general.architecture") == "llama" and bool(config.get("llama.expert_count"))
        case "consolidated":
            return bool(config.get("moe")) or "num_experts" in config
    return config.get("model_type") == "mixtral"


FAMILY = Family(
    MixtralConfig,
    Mixtral,
    key_tables={"hf": _hf, "gguf": _gguf, "consolidated": _consolidated},
    names=ArchitectureNames("mixtral", "MixtralForCausalLM", gguf="llama"),
    recognizes=recognizes,
)
