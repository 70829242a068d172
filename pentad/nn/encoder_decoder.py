"""The frame of an encoder-decoder language model: an encoder reads a source, and a decoder that looks at it writes.

Legend: N rows of a decoder's tokens, M rows of the encoder's, H heads, D width of the residual stream or numbers of a
head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.attention import attention
from pentad.nn.batch import Batch, PagedKV, SequenceLayout
from pentad.nn.decoder import Config, Decoder
from pentad.nn.linear import project


class CrossAttention(nn.Module):
    """Attention to a source (arXiv:1706.03762, section 3.2.3), as T5 has it: scores are not divided by sqrt(D), and no
    projection has a bias.

    Args:
        dim: width of the residual stream, the encoder's too.
        heads, head_dim: H and D.
        layer: which of the source's pools is this layer's.
    """

    def __init__(self, dim: int, *, heads: int, head_dim: int, layer: int) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = heads
        self.head_dim = head_dim
        self.layer = layer
        self.q_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor:
        """[N, dim] -> [N, dim], each sequence's tokens over all of its source.

        Raises:
            ValueError: the batch has no source.
        """
        source = batch.source
        q_NHD = self.q_proj(x_ND).view(x_ND.shape[0], -1, self.head_dim)
        keys: SequenceLayout | PagedKV
        if source is None:
            raise ValueError("the batch of an encoder-decoder has no source: encode one first")
        if isinstance(source, PagedKV):
            k, v, keys = source.keys[self.layer], source.values[self.layer], source
        else:
            k, v = self._keys_and_values(source.hidden_MD)
            keys = source.rows
        q_NHD = q_NHD.to(k.dtype)  # pages may be kept in another
        y_NHD = attention(q_NHD, k, v, batch.rows, keys, scale=1.0).to(x_ND.dtype)
        out_ND: Tensor = self.o_proj(y_NHD.flatten(-2))
        return out_ND

    def write(self, hidden_MD: Tensor, pages: PagedKV) -> None:
        """Store the keys and values of an encoder's rows in pages."""
        pages.write(self.layer, *self._keys_and_values(hidden_MD))

    def _keys_and_values(self, hidden_MD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = project(hidden_MD, self.k_proj, self.v_proj)
        return k.view(k.shape[0], -1, self.head_dim), v.view(v.shape[0], -1, self.head_dim)


class CrossAttendingBlock(nn.Module):
    """x + attention(norm(x)), then x + cross_attention(norm(x)), then x + feedforward(norm(x)): T5's decoder's."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        cross_attention_norm: nn.Module,
        cross_attention: CrossAttention,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.cross_attention_norm = cross_attention_norm
        self.cross_attention = cross_attention
        self.feedforward_norm = feedforward_norm
        self.feedforward = feedforward

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, Any]:
        """float32 [N, dim] -> the same, and what a mixture's router decided for each token (None for a dense block)."""
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), batch)
        x_ND = x_ND + self.cross_attention(self.cross_attention_norm(x_ND), batch)
        y_ND, aux = self.feedforward(self.feedforward_norm(x_ND), batch)
        return x_ND + y_ND, aux


class ScaledLinear(nn.Linear):
    """Of an input times `scale`, without a bias: T5's head, whose weight is an embedding with numbers near 1."""

    def __init__(self, in_features: int, out_features: int, *, scale: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND * self.scale, self.weight)


class Encoder(nn.Module):
    """Blocks whose tokens all see each other.

    Args:
        embed: V rows of D numbers.
        layers: blocks, ``block(x, batch) -> (x, aux)``.
        norm: the last one.
    """

    def __init__(self, embed: nn.Embedding, layers: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Any, ...]]:
        """Hidden states [M, D] after the last norm, and each layer's `aux`."""
        x_MD = self.embed(batch.ids).float()  # the residual stream is float32, whatever the weights are
        aux = []
        for block in self.layers:
            x_MD, a = block(x_MD, batch)
            aux.append(a)
        return self.norm(x_MD), tuple(aux)


class EncoderDecoder(Decoder):
    """A decoder whose batches carry a source, and the encoder that makes it.

    Args:
        encoder: what reads; it may share the embedding.
        embed, norm, head, tied, config: as of `Decoder`.
        layers: the decoder's.
        start_id: the token that the decoder begins with.
    """

    def __init__(
        self,
        encoder: Encoder,
        embed: nn.Embedding,
        layers: Iterable[CrossAttendingBlock],
        norm: nn.Module,
        head: nn.Linear,
        *,
        tied: bool,
        config: Config,
        start_id: int,
    ) -> None:
        super().__init__(embed, layers, norm, head, tied=tied, config=config)
        self.encoder = encoder
        self.start_id = start_id

    def encode(self, batch: Batch) -> tuple[Tensor, tuple[Any, ...]]:
        """Hidden states [M, D] of sources, each whole, and each layer's `aux`.

        Where the batch has pages, the keys and values that the decoder's layers make of them are written there: then
        the pages are a decoder's `source` as often as it likes.
        """
        hidden_MD, aux = self.encoder(replace(batch, pages=None))
        if batch.pages is not None:
            for part in self.layers.modules():
                if isinstance(part, CrossAttention):
                    part.write(hidden_MD, batch.pages)
        return hidden_MD, aux
