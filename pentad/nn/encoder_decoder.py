"""Encoder-decoder language models: the encoder reads a source; the decoder attends to it and generates text.

Legend: N rows of decoder tokens, M rows of encoder tokens, D width of the residual stream, V vocabulary size.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from pentad.nn.attention import Attention
from pentad.nn.batch import Batch
from pentad.nn.decoder import Config, Decoder, Stack
from pentad.nn.linear import HeadLinear
from pentad.nn.moe.routers import Routing


class ScaledLinear(HeadLinear):
    """A head without a bias whose logits are multiplied by `scale`: T5's, for a tied embedding with values near 1."""

    def __init__(self, in_features: int, out_features: int, *, scale: float) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.scale = scale

    def forward(self, x_ND: Tensor) -> Tensor:
        return super().forward(x_ND) * self.scale


class EncoderDecoder(Decoder):
    """A decoder with cross-attention, and the encoder whose output it attends to.

    Args:
        encoder: the encoder; it may share the embedding.
        embed, norm, head, tied, config: see `Decoder`.
        layers: the decoder's blocks.
        start_id: the first token of the decoder.
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

        If the batch has pages, the keys and values of the decoder's cross-attention are written to them. The pages can
        then be the ``context`` of any number of decoder batches.

        Args:
            ids_M: int64 [M], token ids.
            batch: the layout of the rows.
            checkpointing: see `forward`.

        Returns:
            Hidden states [M, D], which `forward` takes as ``context_MD``, and each layer's routing.
        """
        hidden_MD, routings = self.encoder.forward_with_routing(ids_M, batch, checkpointing=checkpointing)
        if batch.kv is not None:
            for part in self.cross_attentions:
                part.write_context(hidden_MD, batch.kv)
        return hidden_MD, routings
