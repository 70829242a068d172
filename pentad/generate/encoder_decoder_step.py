"""Decoding with an encoder-decoder: each source is encoded once, and its keys and values are read in every step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pentad.generate.requests import Request
from pentad.generate.step import Step, Work, lay_out
from pentad.nn.cache import CachedSequence, PagedCache
from pentad.nn.encoder_decoder import EncoderDecoder

MAX_ENCODED_TOKENS = 4096  # source tokens in one call of the encoder, which bounds its memory


@dataclass(eq=False)
class SourcedSequence(CachedSequence):
    """A decoder's sequence and the source that it attends to.

    Attributes:
        source_ids: the source's tokens.
        source: their keys and values in `SourcedCache.sources`; empty until the source is encoded.
    """

    source_ids: tuple[int, ...] = ()
    source: CachedSequence = field(default_factory=CachedSequence)


class SourcedCache(PagedCache):
    """Keys and values of a decoder's self-attention; `sources` has the keys and values of its cross-attention."""

    def __init__(self, network: EncoderDecoder, dtype: torch.dtype, page_size: int) -> None:
        layers = network.cross_attentions
        heads, dim = layers[0].kv_heads, layers[0].head_dim
        device = network.device
        super().__init__(len(layers), heads, dim, dtype=dtype, device=device, page_size=page_size)
        self.sources = PagedCache(len(layers), heads, dim, dtype=dtype, device=device, page_size=page_size)

    def open_with(self, source_ids: Sequence[int]) -> SourcedSequence:
        """Open a sequence; the first step that runs it encodes the source."""
        return SourcedSequence(source_ids=tuple(source_ids))

    def fork(self, sequence: CachedSequence, length: int | None = None) -> SourcedSequence:
        made, one = super().fork(sequence, length), _sourced(sequence)
        source = self.sources.fork(one.source)
        return SourcedSequence(made.rope_length, made.pages, made.length, made.dropped, one.source_ids, source)

    def held_bytes(self, *sequences: CachedSequence) -> int:
        sources = [_sourced(sequence).source for sequence in sequences]
        return super().held_bytes(*sequences) + self.sources.held_bytes(*sources)

    def clear(self) -> None:
        super().clear()
        self.sources.clear()

    def close(self, sequence: CachedSequence) -> None:
        super().close(sequence)
        self.sources.close(_sourced(sequence).source)


class EncoderDecoderStep(Step):
    """Executes steps of an encoder-decoder in plain torch, and owns their cache.

    Args:
        network: an encoder-decoder of `pentad.models`.
        cache_dtype: dtype of keys and values; the network's dtype by default.
        page_size: tokens per page.
    """

    network: EncoderDecoder
    cache: SourcedCache

    def __init__(
        self, network: EncoderDecoder, *, cache_dtype: torch.dtype | None = None, page_size: int = 256
    ) -> None:
        self.network = network
        self.backend = "as plain torch: it is an encoder-decoder"
        self.cache = SourcedCache(network, cache_dtype or network.dtype, page_size)

    def open(self, request: Request) -> SourcedSequence:
        assert request.source is not None
        return self.cache.open_with(request.source)

    def hidden_states(self) -> Tensor:
        raise NotImplementedError("embeddings are those of decoder-only models")

    @torch.inference_mode()
    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        sequences = [_sourced(sequence) for sequence, _ in work]
        self._encode([sequence for sequence in sequences if not sequence.source.length])
        sources = self.cache.sources.batch([(sequence.source, 0) for sequence in sequences])
        ids_N, batch = lay_out(self.cache, work)
        hidden_ND = self.network(ids_N, replace(batch, context=sources.kv))
        for sequence, ids in work:
            self.cache.advance(sequence, len(ids))
        rows = torch.tensor(wanted, dtype=torch.int64, device=hidden_ND.device)
        logits: Tensor = self.network.head(hidden_ND[rows])
        return logits.float()

    def _encode(self, sequences: Sequence[SourcedSequence]) -> None:
        """Write the sources' keys and values to their pages."""
        while sequences:
            tokens, count = 0, 0
            while count < len(sequences):
                tokens += len(sequences[count].source_ids)
                if count and tokens > MAX_ENCODED_TOKENS:
                    break
                count += 1
            batch, sequences = sequences[:count], sequences[count:]
            self.network.encode(*lay_out(self.cache.sources, [(one.source, one.source_ids) for one in batch]))
            for one in batch:
                self.cache.sources.advance(one.source, len(one.source_ids))


def _sourced(sequence: CachedSequence) -> SourcedSequence:
    assert isinstance(sequence, SourcedSequence)
    return sequence
