"""How a mixture's routers distribute the tokens of a text over the experts."""

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
    """The load of each expert for one text.

    Attributes:
        tokens: number of tokens in the text.
        layers: layer number -> the experts' usage, for each layer with experts.
        frequent: the most frequent token ids and their counts.
        by_token: layer -> int64 [len(frequent), E], how often each of these ids went to each expert.
    """

    tokens: int
    layers: dict[int, Usage]
    frequent: list[tuple[int, int]]
    by_token: dict[int, Tensor]


@torch.inference_mode()
def expert_use(network: Decoder, ids: Sequence[int], *, window: int = 1024, frequent: int = 24) -> ExpertUse:
    """Run a text through a network in windows, and count the routers' decisions.

    An encoder-decoder reads the text with its encoder; only the encoder's layers are counted.

    Args:
        network: a network with a mixture of experts in some layers.
        ids: the text's tokens.
        window: tokens per window. Each window is a separate sequence.
        frequent: how many of the most frequent ids to count one by one.

    Raises:
        BadInput: the network has no experts, or the text no tokens.
        PentadError: router logits are not numbers.
    """
    if not has_experts(network):
        raise BadInput("this is a dense model: it has no experts")
    if not ids:
        raise BadInput("the text is empty; expected at least one token")
    counts = Counter(ids).most_common(frequent)
    counted_ids = torch.tensor([token for token, _ in counts])
    layers: dict[int, Usage] = {}
    by_token: dict[int, Tensor] = {}
    for start in range(0, len(ids), window):
        ids_N, batch = pack(ids[start : start + window], device=network.device)
        forward = network.encode if isinstance(network, EncoderDecoder) else network.forward_with_routing
        for layer, routing in enumerate(forward(ids_N, batch)[1]):
            if routing is None:
                continue
            if not routing.logits.isfinite().all():
                raise PentadError(f"router logits of layer {layer} are not numbers: the weights are damaged")
            total, by_id = usage(routing), usage_by_token(routing, ids_N, counted_ids)
            layers[layer] = layers[layer] + total if layer in layers else total
            by_token[layer] = by_token[layer] + by_id if layer in by_token else by_id
    return ExpertUse(len(ids), layers, counts, by_token)


def has_experts(network: nn.Module) -> bool:
    """True if any layer, or any layer of the encoder, is a mixture of experts."""
    stack = network.encoder if isinstance(network, EncoderDecoder) else network
    return any(isinstance(part, MixtureOfExperts) for part in stack.modules())
