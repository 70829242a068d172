"""One step of a language model: run the next tokens of some sequences, and return logits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from pentad.generate.guards import has_hooks
from pentad.generate.requests import Request
from pentad.nn.attention import Attention
from pentad.nn.batch import Batch
from pentad.nn.block import ExtraFeedforwardBlock, ParallelBlock, PreNormBlock, rows_are_independent
from pentad.nn.cache import CachedSequence, PagedCache
from pentad.nn.decoder import Decoder
from pentad.nn.rope_scaling import DefaultRope

Work = Sequence[tuple[CachedSequence, Sequence[int]]]
"""Pairs of a sequence and its next tokens."""


def lay_out(cache: PagedCache, work: Work) -> tuple[Tensor, Batch]:
    """Reserve room for the next tokens and concatenate them: int64 [N], and their batch."""
    ids = torch.tensor([token for _, tokens in work for token in tokens], dtype=torch.int64)
    return ids.to(cache.keys[0].device), cache.batch([(sequence, len(tokens)) for sequence, tokens in work])


class Step(Protocol):
    """Executes steps of a network, in plain torch or with the kernels.

    Attributes:
        network: the network.
        cache: keys and values of its sequences.
        backend: what executes the steps, and why: "as plain torch: a part has a hook".
        exact: a token's logits have the same bits in any chunk, and beside any other sequences.
        batched_tokens: how many tokens of prompts a step should run.
    """

    network: Decoder
    cache: PagedCache
    backend: str
    exact: bool = False
    batched_tokens: int = 512

    def rope_scaling_key(self, length: int) -> int:
        """A key for a sequence's length. Sequences with equal keys have the same RoPE, and may share cached keys."""
        return 0

    def open(self, request: Request) -> CachedSequence:
        """A new sequence for a request."""
        return self.cache.open(len(request.prompt))

    def refresh(self) -> Step:
        """Return this step, or a new one with an empty cache if the network has changed."""
        return self

    def hidden_states(self) -> Tensor:
        """The hidden states after the final norm of the last call's wanted tokens: float32 [len(wanted), D]."""
        raise NotImplementedError

    def single_threaded(self) -> AbstractContextManager[None]:
        """A context for sampling, whose small torch operations gain nothing from threads."""
        return nullcontext()

    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        """Run the tokens and add them to the cache.

        Args:
            work: sequences and their next tokens.
            wanted: indices, into the concatenated tokens, of the tokens whose logits to compute.

        Returns:
            float32 [len(wanted), vocab].
        """


class PlainStep(Step):
    """Executes steps in plain torch by calling the network, and owns their cache.

    Args:
        network: a decoder-only language model of `pentad.models`.
        cache_dtype: dtype of keys and values; the network's dtype by default.
        page_size: tokens per page.
        why: why the kernels don't run the network.
        replan: makes a step of the kernels if the network has become suitable; None if plain torch was asked for.
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
        self._hidden_MD = torch.empty(0)
        if network.device.type == "cuda":
            self.batched_tokens = 8192  # fewer would leave the device waiting for the next operation's launch
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

    def hidden_states(self) -> Tensor:
        return self._hidden_MD.float()

    def refresh(self) -> Step:
        return (self._replan and self._replan()) or self

    @torch.inference_mode()
    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        ids_N, batch = lay_out(self.cache, work)
        rows = sorted(set(wanted)) or [0]  # SDPA refuses to attend from no row
        if len(rows) < len(ids_N) and self._can_narrow():
            hidden_MD = self.network.forward_rows(ids_N, batch, rows)
            wanted = [bisect_left(rows, row) for row in wanted]
        else:
            hidden_MD = self.network(ids_N, batch)
        for sequence, ids in work:
            self.cache.advance(sequence, len(ids))
        if list(wanted) != list(range(len(hidden_MD))):
            hidden_MD = hidden_MD[torch.tensor(wanted, dtype=torch.int64, device=hidden_MD.device)]
        self._hidden_MD = hidden_MD
        logits: Tensor = self.network.head(hidden_MD)
        return logits.float()

    def _can_narrow(self) -> bool:
        """True if the last block may compute the wanted rows only: it is of a known type, and no hook sees its rows."""
        network, last = self.network, self.network.layers[-1]
        known = type(last) in (PreNormBlock, ExtraFeedforwardBlock, ParallelBlock) and type(last.attention) is Attention
        return (
            known
            and type(network).forward is Decoder.forward
            and rows_are_independent(last)
            and not any(map(has_hooks, (network, network.norm, *last.modules())))
        )
