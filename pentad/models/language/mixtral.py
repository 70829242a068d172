"""Mixtral 8x7B (arXiv:2401.04088): Mistral's block, whose feed-forward layer is eight, of which a token takes two.

The mixture is put together in `Mixtral` from the parts in `pentad.nn.moe`. In GGUF files Mixtral is called "llama".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pentad.models.language.config import ArchitectureNames, check_experts, read_decoder_config, written_values
from pentad.models.language.key_rules import consolidated_rules, gguf_rules, hf_ignored, hf_rules
from pentad.models.language.mistral import MistralConfig
from pentad.nn.attention import Attention
from pentad.nn.block import PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.moe.experts import SwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import mixtral_top_k
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.nn.rope_scaling import scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import Concat, Flattened, KeyTable, Rule, Stacked, UnpermuteRope

ROUTER, EXPERTS = "layers.*.feedforward.router", "layers.*.feedforward.experts"
MISTRALS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""An expert's matrices in Mistral's files and Hugging Face's -> here."""
GGUFS = {"gate": "gate_proj", "down": "down_proj", "up": "up_proj"}
"""The same in GGUF files."""


@dataclass(frozen=True)
class MixtralConfig(MistralConfig):
    """What the forward pass reads of a published ``config.json``, under its names there and with their defaults."""

    max_position_embeddings: int = 131072
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    num_local_experts: int = 8
    num_experts_per_tok: int = 2


class Mixtral(Decoder):
    """Grouped-query attention, and a mixture of SwiGLUs, each behind an RMSNorm."""

    def __init__(self, config: MixtralConfig) -> None:
        c = config
        rope = Rope(c.head_dim, c.rope_theta, scaling(c.rope_parameters))
        super().__init__(
            nn.Embedding(c.vocab_size, c.hidden_size),
            (
                PreNormBlock(
                    RMSNorm(c.hidden_size, c.rms_norm_eps),
                    Attention(
                        c.hidden_size,
                        heads=c.num_attention_heads,
                        kv_heads=c.num_key_value_heads,
                        head_dim=c.head_dim,
                        rope=rope,
                        layer=layer,
                        window=c.sliding_window,
                    ),
                    RMSNorm(c.hidden_size, c.rms_norm_eps),
                    MixtureOfExperts(
                        Router(c.hidden_size, c.num_local_experts),
                        SwiGLUExperts(c.num_local_experts, c.hidden_size, c.intermediate_size),
                        mixtral_top_k,
                        top_k=c.num_experts_per_tok,
                    ),
                )
                for layer in range(c.num_hidden_layers)
            ),
            RMSNorm(c.hidden_size, c.rms_norm_eps),
            nn.Linear(c.hidden_size, c.vocab_size, bias=False),
            tied=c.tie_word_embeddings,
            config=c,
        )


def config_from(checkpoint: Checkpoint) -> MixtralConfig:
    """The config of a checkpoint, from ``config.json``, GGUF metadata or ``params.json``."""
    config = read_decoder_config(MixtralConfig, checkpoint)
    check_experts(config, config.num_local_experts, config.num_experts_per_tok, checkpoint.path)
    return config


def key_tables(config: MixtralConfig, format: str) -> list[KeyTable]:
    """The names of the network's modules in files of a format, each of which has had two layouts."""
    count, hidden = config.num_local_experts, config.intermediate_size
    queries, keys = UnpermuteRope(config.num_attention_heads), UnpermuteRope(config.num_key_value_heads)
    match format:
        case "gguf":
            rules, ignored = gguf_rules(queries, keys), [r"rope_freqs\.weight"]
            router = Rule(ROUTER, "blk.*.ffn_gate_inp")
            stacked = [Rule(f"{EXPERTS}.{ours}", f"blk.*.ffn_{theirs}_exps") for theirs, ours in GGUFS.items()]
            singly = _one_by_one("blk.*.ffn_{part}.{expert}", GGUFS, count)  # of the first months
            layouts = [[router, *stacked], [router, *singly]]
        case "consolidated":
            rules, ignored = consolidated_rules(queries, keys), [r"rope\.freqs"]
            layer, later = "layers.*.feed_forward", "layers.*.block_sparse_moe"  # the latter in consolidated.NN.pt
            singly = _one_by_one(layer + ".experts.{expert}.{part}", MISTRALS, count)
            stacked = [
                Rule(f"{EXPERTS}.{ours}", f"{later}.{theirs}", Flattened(count, transposed=theirs == "w2"), bare=True)
                for theirs, ours in MISTRALS.items()
            ]
            layouts = [[Rule(ROUTER, f"{layer}.gate"), *singly], [Rule(ROUTER, f"{later}.gate"), *stacked]]
        case _:
            rules, ignored = hf_rules(), hf_ignored(config.tie_word_embeddings)
            layer, later = "model.layers.*.block_sparse_moe", "model.layers.*.mlp"  # transformers 5's, in memory
            singly = _one_by_one(layer + ".experts.{expert}.{part}", MISTRALS, count)
            gate_and_up = (f"{EXPERTS}.gate_proj", f"{EXPERTS}.up_proj")
            stacked = [
                Rule(gate_and_up, f"{later}.experts.gate_up_proj", Concat((hidden, hidden), axis=1), bare=True),
                Rule(f"{EXPERTS}.down_proj", f"{later}.experts.down_proj", bare=True),
            ]
            layouts = [[Rule(ROUTER, f"{layer}.gate"), *singly], [Rule(ROUTER, f"{later}.gate"), *stacked]]
    return [KeyTable([*rules, *layout], ignored=ignored) for layout in layouts]


def _one_by_one(pattern: str, parts: Mapping[str, str], count: int) -> list[Rule]:
    """Rules for layouts in which each expert's matrices are tensors of their own."""
    return [
        Rule(f"{EXPERTS}.{ours}", tuple(pattern.format(part=part, expert=e) for e in range(count)), Stacked())
        for part, ours in parts.items()
    ]


def write_config(config: MixtralConfig, format: str) -> dict[str, Any]:
    """The config as files of a format spell it."""
    values = written_values(config, format, ArchitectureNames("mixtral", "MixtralForCausalLM", gguf="llama"))
    if format == "consolidated":
        values["moe"] = {"num_experts": config.num_local_experts, "num_experts_per_tok": config.num_experts_per_tok}
    return values


build = Mixtral
