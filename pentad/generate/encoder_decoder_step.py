"""Decoding by an encoder-decoder: each source is encoded once, and read in every step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pentad.generate.engine import Engine, Generation, Request
from pentad.generate.step import Step, Work, lay_out
from pentad.nn.cache import CachedSequence, PagedCache
from pentad.nn.encoder_decoder import EncoderDecoder

ENCODED_TOGETHER = 4096  # rows of sources; what an encoder makes of more would take much memory


@dataclass(eq=False)
class SourcedSequence(CachedSequence):
    """A decoder's sequence, and the source that it looks at.

    Attributes:
        source_ids: the source's tokens.
        source: its place in `SourcedCache.sources`; empty until it is encoded.
    """

    source_ids: tuple[int, ...] = ()
    source: CachedSequence = field(default_factory=CachedSequence)


class SourcedCache(PagedCache):
    """A decoder's keys and values, and in `sources` those that its cross-attention has of what the encoder read."""

    def __init__(self, network: EncoderDecoder, dtype: torch.dtype, page_size: int) -> None:
        layers = network.cross_attentions
        heads, dim = layers[0].kv_heads, layers[0].head_dim
        device = network.device
        super().__init__(len(layers), heads, dim, dtype=dtype, device=device, page_size=page_size)
        self.sources = PagedCache(len(layers), heads, dim, dtype=dtype, device=device, page_size=page_size)

    def open_with(self, source_ids: Sequence[int]) -> SourcedSequence:
        """A new sequence that looks at a source, which the step that runs it first encodes."""
        return SourcedSequence(source_ids=tuple(source_ids))

    def clear(self) -> None:
        super().clear()
        self.sources.clear()

    def close(self, sequence: CachedSequence) -> None:
        super().close(sequence)
        self.sources.close(_sourced(sequence).source)


class EncoderDecoderStep(Step):
    """Executes steps of an encoder-decoder, in plain torch, and owns the cache that they fill.

    Args:
        network: an encoder-decoder of `pentad.models`.
        cache_dtype: what keys and values are kept in; the network's own dtype by default.
        page_size: tokens a page.
    """

    network: EncoderDecoder
    cache: SourcedCache

    def __init__(
        self, network: EncoderDecoder, *, cache_dtype: torch.dtype | None = None, page_size: int = 256
    ) -> None:
        self.network = network
        self.backend = "as plain torch: it is an encoder-decoder"
        self.cache = SourcedCache(network, cache_dtype or network.dtype, page_size)

    def rope_scaling_key(self, length: int) -> int:
        return 0  # there is no RoPE

    def refresh(self) -> EncoderDecoderStep:
        return self

    def single_threaded(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.inference_mode()
    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        sequences = [_sourced(sequence) for sequence, _ in work]
        self._encode([sequence for sequence in sequences if not sequence.source.length])
        read = self.cache.sources.batch([(sequence.source, 0) for sequence in sequences])
        ids_N, batch = lay_out(self.cache, work)
        hidden_ND = self.network(ids_N, replace(batch, context=read.kv))
        for sequence, ids in work:
            self.cache.advance(sequence, len(ids))
        rows = torch.tensor(wanted, dtype=torch.int64, device=hidden_ND.device)
        logits: Tensor = self.network.head(hidden_ND[rows])
        return logits.float()

    def _encode(self, sequences: Sequence[SourcedSequence]) -> None:
        """Write the keys and values of sources to their pages."""
        while sequences:
            rows, count = 0, 0
            while count < len(sequences) and (not count or rows + len(sequences[count].source_ids) <= ENCODED_TOGETHER):
                rows, count = rows + len(sequences[count].source_ids), count + 1
            now, sequences = sequences[:count], sequences[count:]
            self.network.encode(*lay_out(self.cache.sources, [(one.source, one.source_ids) for one in now]))
            for one in now:
                self.cache.sources.advance(one.source, len(one.source_ids))


class EncoderDecoderEngine(Engine):
    """Runs requests that have a source.

    The sequence that finished last keeps its source, so that another request for it doesn't encode it again.
    """

    executor: EncoderDecoderStep

    def _admit(self, request: Request) -> None:
        cache, request.sequence = self.executor.cache, None
        if self._kept is not None and isinstance(request, Generation):
            kept = _sourced(self._kept[1])
            if kept.source_ids == tuple(request.source or ()):
                cache.truncate(kept, 0)
                self._kept, request.sequence = None, kept
        if request.sequence is None:
            request.sequence = self._open(request)
        if isinstance(request, Generation):
            cache.reserve(request.sequence, len(request.prompt) + min(request.max_tokens, self.config.reserved_tokens))

    def _open(self, request: Request) -> CachedSequence:
        assert request.source is not None
        return self.executor.cache.open_with(request.source)


def _sourced(sequence: CachedSequence) -> SourcedSequence:
    assert isinstance(sequence, SourcedSequence)
    return sequence
