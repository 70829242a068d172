"""Sparse upcycling (arXiv:2212.05055): a dense model's numbers as those of a mixture of experts.

Each expert is the dense feed-forward layer, and all else stays. A token's weights add up to 1, as Mixtral normalizes
them, so whichever experts it goes to, the mixture computes what the dense model did.

The router is random, not zero. Equal experts give it no gradient: what makes them differ is that each sees other
tokens; with zeros the same `top_k` would see all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pentad.build import meta_network, parameter_names
from pentad.errors import BadInput
from pentad.models.language import llama, mistral, mixtral
from pentad.models.language.decoder_only import DecoderConfig
from pentad.weights.config import read_config
from pentad.weights.keytable import Value
from pentad.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from pentad.models.family import Family
    from pentad.nn.decoder import Decoder
    from pentad.weights.checkpoint import Checkpoint

FAMILIES = (llama.FAMILY, mistral.FAMILY)
"""Families whose networks equal Mixtral's but for the experts."""

ROUTER_STD = 0.02
"""Of a router's numbers: the paper's, and what transformers begins a Mixtral with."""


@dataclass(frozen=True)
class Upcycling:
    """What a dense model is to become.

    Attributes:
        experts: in each layer.
        top_k: how many of them a token passes through.
        seed: of the routers' numbers; equal seeds give equal files.
    """

    experts: int = 8
    top_k: int = 2
    seed: int = 0


def mixture_network(checkpoint: Checkpoint, family: Family, dense: DecoderConfig, upcycling: Upcycling) -> Decoder:
    """The mixture that a dense network becomes, on the meta device.

    Args:
        checkpoint: the dense model's; its path starts error messages.
        family: the dense network's.
        dense: its config.
        upcycling: how many experts it gets.

    Raises:
        BadInput: a family other than `FAMILIES`, a model with biases, or impossible numbers of experts.
    """
    path = checkpoint.path
    if family not in FAMILIES:
        names = " or ".join(one.names.family for one in FAMILIES)
        raise BadInput(f"{path}: a {family.names.family} model can't be upcycled to a Mixtral; expected {names}")
    if biases := [name for name in ("attention_bias", "mlp_bias") if getattr(dense, name, False)]:
        raise BadInput(f"{path}: this model has biases ({', '.join(biases)}), which a Mixtral has no place for")
    experts = {"num_local_experts": upcycling.experts, "num_experts_per_tok": upcycling.top_k}
    config = read_config(mixtral.MixtralConfig, {**asdict(dense), **experts}, path).resolve(checkpoint)
    return meta_network(config)


def mixture_values(
    mixture: nn.Module, dense: Mapping[str, Callable[[], Value]], upcycling: Upcycling
) -> dict[str, tuple[str, Callable[[], Value]]]:
    """Where a mixture's numbers come from: by its tensors' names, the name of the dense one, and what gives the value.

    (A router has the name of the norm before it, as what it is made for.) Experts are one tensor in memory, shown
    several times.
    """
    values: dict[str, tuple[str, Callable[[], Value]]] = {}
    for name in parameter_names(mixture):
        if name.endswith(".router.weight"):
            norm = name.replace(".feedforward.router.", ".feedforward_norm.")
            shape = tuple(mixture.get_parameter(name).shape)
            values[name] = norm, partial(_router, shape, upcycling.seed, name)
        elif ".experts." in name:
            one = name.replace(".experts.", ".")
            values[name] = one, partial(_repeated, dense[one], upcycling.experts)
        else:
            values[name] = name, dense[name]
    return values


def _repeated(source: Callable[[], Value], count: int) -> Tensor:
    value = source()
    matrix = value.dequantize() if isinstance(value, QuantizedTensor) else value
    return matrix.expand(count, *matrix.shape)


def _router(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """float32, the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(Random(f"{seed} {name}").getrandbits(63))
    return torch.randn(shape, generator=generator) * ROUTER_STD
