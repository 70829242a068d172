"""Sparse upcycling (arXiv:2212.05055): initialize a mixture of experts from a dense model.

Each expert is a copy of the dense feed-forward layer; all other weights stay. A token's router weights add up to 1 (as
in Mixtral), so the mixture computes the same as the dense model, whichever experts a token uses.

The router is random, not zero. Equal experts give the router no gradient, and become different only by seeing different
tokens. With a zero router the same `top_k` experts would see all tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from random import Random

import torch
from torch import Tensor, nn

from pentad.build import meta_decoder, parameter_names
from pentad.errors import BadInput
from pentad.models.family import Family
from pentad.models.language import llama, mistral, mixtral
from pentad.models.language.decoder_only import DecoderConfig
from pentad.nn.decoder import Decoder
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.config import read_config
from pentad.weights.keytable import Value
from pentad.weights.quantized import QuantizedTensor

FAMILIES = (llama.FAMILY, mistral.FAMILY)
"""Families whose networks differ from Mixtral's only in the experts."""

ROUTER_STD = 0.02
"""Standard deviation of router weights, as in the paper and in transformers' Mixtral."""


@dataclass(frozen=True)
class Upcycling:
    """Options of upcycling.

    Attributes:
        experts: number of experts per layer.
        top_k: experts per token.
        seed: seed of the routers; equal seeds give equal files.
    """

    experts: int = 8
    top_k: int = 2
    seed: int = 0


def mixture_network(checkpoint: Checkpoint, family: Family, dense: DecoderConfig, upcycling: Upcycling) -> Decoder:
    """Build the mixture for a dense network on the meta device.

    Args:
        checkpoint: the dense checkpoint; its path begins error messages.
        family: the dense network's family.
        dense: its config.
        upcycling: the options.

    Raises:
        BadInput: the family is not in `FAMILIES`, the model has biases, or the numbers of experts are impossible.
    """
    path = checkpoint.path
    if family not in FAMILIES:
        names = " or ".join(one.names.family for one in FAMILIES)
        raise BadInput(f"{path}: a {family.names.family} model can't be upcycled to a Mixtral; expected {names}")
    if biases := [name for name in ("attention_bias", "mlp_bias") if getattr(dense, name, False)]:
        raise BadInput(f"{path}: this model has biases ({', '.join(biases)}); Mixtral supports none")
    experts = {"num_local_experts": upcycling.experts, "num_experts_per_tok": upcycling.top_k}
    config = read_config(mixtral.MixtralConfig, {**asdict(dense), **experts}, path).resolve(checkpoint)
    return meta_decoder(config)


def mixture_values(
    mixture: nn.Module, dense: Mapping[str, Callable[[], Value]], upcycling: Upcycling
) -> dict[str, tuple[str, Callable[[], Value]]]:
    """Map the names of a mixture's tensors to dense tensors: the dense tensor's name, and a function for the value.

    A router is mapped to the norm before it, and is stored in the norm's dtype. The experts of a layer are one
    tensor in memory, expanded.
    """
    values: dict[str, tuple[str, Callable[[], Value]]] = {}
    for name in parameter_names(mixture):
        if name.endswith(".router.weight"):
            norm = name.replace(".feedforward.router.", ".feedforward_norm.")
            shape = tuple(mixture.get_parameter(name).shape)
            values[name] = norm, partial(_router, shape, upcycling.seed, name)
        elif ".experts." in name:
            dense_name = name.replace(".experts.", ".")
            values[name] = dense_name, partial(_repeated, dense[dense_name], upcycling.experts)
        else:
            values[name] = name, dense[name]
    return values


def _repeated(source: Callable[[], Value], count: int) -> Tensor:
    value = source()
    matrix = value.dequantize() if isinstance(value, QuantizedTensor) else value
    return matrix.expand(count, *matrix.shape)


def _router(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    """A router's weight in float32; every call returns the same values."""
    generator = torch.Generator().manual_seed(Random(f"{seed} {name}").getrandbits(63))
    return torch.randn(shape, generator=generator) * ROUTER_STD
