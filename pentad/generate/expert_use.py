"""A text's way through a mixture's experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pentad.errors import BadInput, PentadError
from pentad.nn.batch import pack
from pentad.nn.decoder import Decoder
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.nn.moe.layer import MixtureOfExperts
from pentad.nn.moe.statistics import Usage, usage, usage_by_token


@dataclass(frozen=True)
class ExpertUse:
    """Which experts took which of a text's tokens.

    Attributes:
        tokens: how many there are.
        layers: the numbers of the layers that have experts -> what those did.
        frequent: the ids that occur most often, and how often each does.
        by_token: layer -> int64 [len(frequent), E], how often each expert took each of these.
    """

    tokens: int
    layers: dict[int, Usage]
    frequent: list[tuple[int, int]]
    by_token: dict[int, Tensor]


@torch.inference_mode()
def expert_use(
    network: Decoder,
    ids: Sequence[int],
    *,
    window: int = 1024,
    frequent: int = 24,
) -> ExpertUse:
    """Run a text through a network, piece by piece, and count.

    Of an encoder-decoder the encoder reads it, and its layers are what is looked at.

    Args:
        network: with a mixture of experts in some of its layers.
        ids: the text's tokens.
        window: how many of them are a sequence, which sees nothing of those before.
        frequent: how many kinds of token to look at one by one.

    Raises:
        BadInput: there are no experts, or no tokens.
        PentadError: a router's decisions are not numbers.
    """
    if not has_experts(network):
        raise BadInput("this is a dense model: it has no experts")
    if not ids:
        raise BadInput("the text is empty: there is no token for an expert to take")
    most = Counter(ids).most_common(frequent)
    wanted = torch.tensor([token for token, _ in most])
    layers: dict[int, Usage] = {}
    by_token: dict[int, Tensor] = {}
    for start in range(0, len(ids), window):
        ids_N, batch = pack(ids[start : start + window], device=network.device)
        read = network.encode if isinstance(network, EncoderDecoder) else network.forward_with_routing
        for layer, routing in enumerate(read(ids_N, batch)[1]):
            if routing is None:
                continue
            if not routing.logits.isfinite().all():
                raise PentadError(f"the router of layer {layer} gives no numbers: the weights are damaged")
            here, taken = usage(routing), usage_by_token(routing, ids_N, wanted)
            layers[layer] = layers[layer] + here if layer in layers else here
            by_token[layer] = by_token[layer] + taken if layer in by_token else taken
    return ExpertUse(len(ids), layers, most, by_token)


def has_experts(network: nn.Module) -> bool:
    """Whether any layer is a mixture (of an encoder-decoder: of the encoder's)."""
    reader = network.encoder if isinstance(network, EncoderDecoder) else network
    return any(isinstance(part, MixtureOfExperts) for part in reader.modules())
