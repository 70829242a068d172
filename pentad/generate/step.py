"""One step of a language model: tokens of some sequences in, the logits of the wanted rows out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from pentad.nn.attention import Attention
from pentad.nn.batch import Batch
from pentad.nn.cache import CachedSequence, PagedCache
from pentad.nn.decoder import Decoder
from pentad.nn.rope_scaling import DefaultRope

Work = Sequence[tuple[CachedSequence, Sequence[int]]]
"""Sequences and the next tokens of each."""


def lay_out(cache: PagedCache, work: Work) -> tuple[Tensor, Batch]:
    """Reserve room for the next tokens, and lay them end to end: int64 [N], and their batch."""
    ids = torch.tensor([token for _, tokens in work for token in tokens], dtype=torch.int64)
    return ids.to(cache.keys[0].device), cache.batch([(sequence, len(tokens)) for sequence, tokens in work])


class Step(Protocol):
    """Executes steps of a network: by plain torch, or by the kernels.

    Attributes:
        network: the network.
        cache: keys and values of the sequences that it runs.
        backend: how it executes, and why: "as plain torch: a part has a hook".
    """

    network: Decoder
    cache: PagedCache
    backend: str

    def rope_scaling_key(self, length: int) -> int:
        """Sequences admitted with lengths of one key may share cached keys."""

    def refresh(self) -> Step:
        """Itself, or a new step with an empty cache if the network has changed since this one was made."""

    def single_threaded(self) -> AbstractContextManager[None]:
        """A context for choosing tokens: small torch operations that gain nothing from threads."""

    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        """Run the tokens and keep them in the cache.

        Args:
            work: sequences and their next tokens.
            wanted: rows of the batch, that is of all those tokens laid end to end, whose logits to compute.

        Returns:
            float32 [len(wanted), vocab].
        """


class PlainStep:
    """Executes steps by calling the network, in plain torch, and owns the cache that they fill.

    Args:
        network: a decoder-only language model of `pentad.models`.
        cache_dtype: of keys and values; the network's dtype by default.
        page_size: tokens a page.
        why: the reason that the kernels don't run it.
        replan: asked by `refresh` for a step of the kernels; None if plain torch was asked for.
    """

    def __init__(
        self,
        network: Decoder,
        *,
        cache_dtype: torch.dtype | None = None,
        page_size: int = 256,
        why: str = "as was asked for",
        replan: Callable[[], Step | None] | None = None,
    ) -> None:
        self.network = network
        self.backend = f"as plain torch: {why}"
        self._replan = replan
        layers = [part for part in network.modules() if isinstance(part, Attention)]
        rope = layers[0].rope
        self._scaling = DefaultRope() if rope is None else rope.scaling
        windows = [layer.window for layer in layers]
        self.cache = PagedCache(
            len(layers),
            layers[0].kv_heads,
            layers[0].head_dim,
            dtype=cache_dtype or network.dtype,
            device=network.device,
            page_size=page_size,
            window=None if None in windows else max(w for w in windows if w is not None),
        )

    def rope_scaling_key(self, length: int) -> int:
        return self._scaling.scaling_key(length)

    def refresh(self) -> Step:
        return (self._replan and self._replan()) or self

    def single_threaded(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.inference_mode()
    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        hidden_ND = self.network(*lay_out(self.cache, work))
        for sequence, ids in work:
            self.cache.advance(sequence, len(ids))
        if list(wanted) != list(range(len(hidden_ND))):
            hidden_ND = hidden_ND[torch.tensor(wanted, dtype=torch.int64, device=hidden_ND.device)]
        logits: Tensor = self.network.head(hidden_ND)
        return logits.float()
