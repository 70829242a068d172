"""The frame of an encoder-decoder language model: an encoder reads a source, and a decoder that attends to it writes.

Legend: N rows of a decoder's tokens, M rows of the encoder's, D width of the residual stream, V vocabulary.
"""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.attention import Attention
from pentad.nn.batch import Batch
from pentad.nn.decoder import Config, Decoder, Stack
from pentad.nn.moe.routers import Routing


class ScaledLinear(nn.Linear):
    """A linear layer of `scale` times its input, without a bias: T5's head, whose weight is an embedding with numbers
    near 1."""

    def __init__(self, in_features: int, out_features: int, *, scale: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND * self.scale, self.weight)


class EncoderDecoder(Decoder):
    """A decoder with cross-attention, and the encoder whose output it attends to.

    Args:
        encoder: reads the sources; it may share the embedding.
        embed, norm, head, tied, config: as of `Decoder`.
        layers: the decoder's.
        start_id: the token that the decoder begins with.
    """

    def __init__(
        self,
        encoder: Stack,
        embed: nn.Embedding,
        layers: Iterable[nn.Module],
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

    @property
    def cross_attentions(self) -> list[Attention]:
        """The decoder's cross-attention layers."""
        parts = [part for part in self.layers.modules() if isinstance(part, Attention)]
        return [part for part in parts if part.context_dim is not None]

    def encode(
        self, ids_M: Tensor, batch: Batch, *, checkpointing: str = "none"
    ) -> tuple[Tensor, tuple[Routing | None, ...]]:
        """Encode whole sources.

        If the batch has pages, the keys and values of the decoder's cross-attention are written there: the pages then
        serve as the ``context`` of any number of decoder batches.

        Args:
            ids_M: int64 [M], token ids.
            batch: says which rows are whose.
            checkpointing: as of `forward`.

        Returns:
            Hidden states [M, D], the ``context_MD`` of `forward`, and for each layer its router's decisions.
        """
        hidden_MD, routings = self.encoder.forward_with_routing(ids_M, batch, checkpointing=checkpointing)
        if batch.kv is not None:
            for part in self.cross_attentions:
                part.write_context(hidden_MD, batch.kv)
        return hidden_MD, routings
