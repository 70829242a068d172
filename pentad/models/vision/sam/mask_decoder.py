"""Segment Anything's mask decoder: masks and their quality, from an image's map and prompts.

Legend: P prompts, T rows (tokens) of a prompt, N = S * S rows of an image, D width, H heads, M masks, U = 4 * S.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pentad.nn.attention import attention
from pentad.nn.batch import SequenceLayout
from pentad.nn.norm import LayerNorm


class ImageRows(NamedTuple):
    """An image's map as a layer of the transformer reads it; X is P, or 1 if it is the same for all prompts.

    Attributes:
        rows_XND, placed_XND: without and with positions.
        keys_XNI, values_XNI: the projections of the layer's attention from tokens; None to save them, where the image
            is another one for each prompt.
    """

    rows_XND: Tensor
    placed_XND: Tensor
    keys_XNI: Tensor | None = None
    values_XNI: Tensor | None = None

    @classmethod
    def of(cls, rows_XND: Tensor, positions_ND: Tensor) -> "ImageRows":
        """Without projections."""
        return cls(rows_XND, rows_XND + positions_ND)


class MaskDecoder(nn.Module):
    """A transformer between the prompts' tokens and the image; each mask is a linear function of the upscaled image,
    which a network of its own computes from the mask's token.

    Args:
        width: D.
        depth, heads, hidden: of the transformer.
        downsample: how many times narrower the attention between tokens and image is than D.
        eps: of the transformer's norms but the last.
        masks: the masks for an ambiguous prompt; there is one more, for prompts that say enough.
        iou_depth, iou_hidden: layers and width of the network that predicts the masks' quality.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        downsample: int,
        eps: float,
        masks: int,
        iou_depth: int,
        iou_hidden: int,
    ) -> None:
        super().__init__()
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(masks + 1, width)
        self.transformer = TwoWayTransformer(width, depth, heads, hidden, downsample, eps)
        self.output_upscaling = nn.ModuleDict(
            {
                "0": nn.ConvTranspose2d(width, width // 4, 2, 2),
                "1": LayerNorm(width // 4, 1e-6),
                "3": nn.ConvTranspose2d(width // 4, width // 8, 2, 2),
            }
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(width, width, width // 8, 3) for _ in range(masks + 1))
        self.iou_prediction_head = MLP(width, iou_hidden, masks + 1, iou_depth)

    @property
    def first_attention(self) -> "CrossAttention":
        """The first one from tokens to the image."""
        layer = self.transformer.layers[0]
        assert isinstance(layer, TwoWayBlock)
        return layer.cross_attn_token_to_image

    def project(self, image: ImageRows) -> ImageRows:
        """Add the first layer's projections, which many prompts for one image share."""
        attention = self.first_attention
        return image._replace(keys_XNI=attention.k_proj(image.placed_XND), values_XNI=attention.v_proj(image.rows_XND))

    def forward(
        self, image: ImageRows, positions_ND: Tensor, sparse_PTD: Tensor, *, multimask: bool | None
    ) -> tuple[Tensor, Tensor]:
        """Predict the masks of each prompt.

        Args:
            image: its map plus what the prompt encoder returns for it; of all prompts, or one for each.
            positions_ND: of its patches.
            sparse_PTD: the prompts' rows.
            multimask: True for the masks of an ambiguous prompt, False for the one of a clear prompt, None for all,
                the latter first.

        Returns:
            Logits [P, M, U, U], and each mask's predicted IoU [P, M].
        """
        chosen = slice(int(multimask or 0), 1 if multimask is False else len(self.output_hypernetworks_mlps))
        own_XD = torch.cat((self.iou_token.weight, self.mask_tokens.weight))
        tokens_PTD = torch.cat((own_XD.expand(len(sparse_PTD), -1, -1), sparse_PTD), 1)
        tokens_PTD, image_PND = self.transformer(tokens_PTD, image, positions_ND, answers=1 + chosen.stop)
        iou_PM: Tensor = self.iou_prediction_head(tokens_PTD[:, 0])[:, chosen]
        side = math.isqrt(image_PND.shape[1])
        networks = list(enumerate(self.output_hypernetworks_mlps, 1))[chosen]
        weights_PMC = torch.stack([network(tokens_PTD[:, index]) for index, network in networks], 1)
        logits_PMR = weights_PMC @ self._upscaled(image_PND).transpose(1, 2)
        parts = logits_PMR.view(*weights_PMC.shape[:2], side, side, 2, 2, 2, 2)
        return parts.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(*weights_PMC.shape[:2], 4 * side, 4 * side), iou_PM

    def _upscaled(self, image_PND: Tensor) -> Tensor:
        """Each row of the image becomes 16 rows, of 2 by 2 parts with 2 by 2 parts each, [P, 16 * N, D / 8]."""
        first, norm, second = self.output_upscaling.values()
        return F.gelu(_split(F.gelu(norm(_split(image_PND, first))), second))


def _split(x_PND: Tensor, layer: nn.Module) -> Tensor:
    """A transposed convolution whose stride is its kernel, on rows: each becomes those of 2 by 2 parts."""
    assert isinstance(layer, nn.ConvTranspose2d)
    assert layer.bias is not None
    matrix_DX = layer.weight.permute(0, 2, 3, 1).flatten(1)
    return F.linear(x_PND, matrix_DX.T, layer.bias.repeat(4)).view(len(x_PND), -1, layer.out_channels)


class TwoWayTransformer(nn.Module):
    """Tokens and image attend to each other by turns; positions are added to queries and keys each time."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, downsample: int, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(width, heads, hidden, downsample, eps, positions=layer > 0) for layer in range(depth)
        )
        self.final_attn_token_to_image = CrossAttention(width, width // downsample, heads)
        self.norm_final_attn = LayerNorm(width, 1e-5)

    def forward(
        self, tokens_PTD: Tensor, image: ImageRows, positions_ND: Tensor, *, answers: int
    ) -> tuple[Tensor, Tensor]:
        """The first tokens and the image after all layers, [P, answers, D] and [P, N, D].

        Args:
            tokens_PTD: the tokens, which are also their own positions.
            image: for the first layer.
            positions_ND: of the image.
            answers: how many tokens are needed.
        """
        positions_PTD = tokens_PTD
        for layer in self.layers:
            tokens_PTD, image = layer(tokens_PTD, image, positions_PTD, positions_ND)
        tokens_PTD, positions_PTD = tokens_PTD[:, :answers], positions_PTD[:, :answers]
        seen_PTD = self.final_attn_token_to_image(tokens_PTD + positions_PTD, image.placed_XND, image.rows_XND)
        return self.norm_final_attn(tokens_PTD + seen_PTD), image.rows_XND


class TwoWayBlock(nn.Module):
    """Tokens attend to each other, then to the image, pass an MLP, and the image attends to them; norms come last.

    Args:
        width, heads, hidden, downsample, eps: see `MaskDecoder`.
        positions: False for the first block, whose self-attention has neither positions nor a residual.
    """

    def __init__(self, width: int, heads: int, hidden: int, downsample: int, eps: float, *, positions: bool) -> None:
        super().__init__()
        self.positions = positions
        self.self_attn = CrossAttention(width, width, heads)
        self.norm1 = LayerNorm(width, eps)
        self.cross_attn_token_to_image = CrossAttention(width, width // downsample, heads)
        self.norm2 = LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(width, hidden), "lin2": nn.Linear(hidden, width)})
        self.norm3 = LayerNorm(width, eps)
        self.norm4 = LayerNorm(width, eps)
        self.cross_attn_image_to_token = CrossAttention(width, width // downsample, heads)

    def forward(
        self, x_PTD: Tensor, image: ImageRows, positions_PTD: Tensor, positions_ND: Tensor
    ) -> tuple[Tensor, ImageRows]:
        if self.positions:
            q_PTD = x_PTD + positions_PTD
            x_PTD = x_PTD + self.self_attn(q_PTD, q_PTD, x_PTD)
        else:
            x_PTD = self.self_attn(x_PTD, x_PTD, x_PTD)
        x_PTD = self.norm1(x_PTD)
        x_PTD = self.norm2(x_PTD + self._look(x_PTD + positions_PTD, image))
        x_PTD = self.norm3(x_PTD + self.mlp["lin2"](F.relu(self.mlp["lin1"](x_PTD))))
        seen_PND = self.cross_attn_image_to_token(image.placed_XND, x_PTD + positions_PTD, x_PTD)
        rows_PND = self.norm4(image.rows_XND + seen_PND)
        return x_PTD, ImageRows.of(rows_PND, positions_ND)

    def _look(self, q_PTD: Tensor, image: ImageRows) -> Tensor:
        """The tokens' attention to the image."""
        attention = self.cross_attn_token_to_image
        if image.keys_XNI is None or image.values_XNI is None:
            seen_PTD: Tensor = attention(q_PTD, image.placed_XND, image.rows_XND)
            return seen_PTD
        return attention.attend(attention.q_proj(q_PTD), image.keys_XNI, image.values_XNI)


class CrossAttention(nn.Module):
    """Multi-head attention whose queries, keys and values are three inputs.

    Args:
        dim: width of the inputs and the output, D.
        inner: width of all heads together, H * d.
        heads: H.
    """

    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, inner // heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Inputs [P, rows, D]; queries, or keys and values, may have one entry for all prompts.

        Between few tokens and an image the projections of the image's rows would be most of the work. The weights are
        multiplied into the tokens instead.
        """
        few = min(q.shape[1], k.shape[1]) <= self.head_dim
        if few and q.shape[1] < k.shape[1]:
            return self._from_tokens(q, k, v)
        if few and q.shape[1] > k.shape[1]:
            return self._from_image(q, k, v)
        return self.attend(self.q_proj(q), self.k_proj(k), self.v_proj(v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`forward` of inputs that are projected."""
        prompts = max(len(q), len(k))
        out = self._attend(self._split(q).expand(prompts, -1, -1, -1), self._split(k), self._split(v))
        projected: Tensor = self.out_proj(out.reshape(prompts, q.shape[1], -1))
        return projected

    def _from_tokens(self, q_PTD: Tensor, k_XND: Tensor, v_XND: Tensor) -> Tensor:
        """A head's query times its part of the keys' projection is a query for the image's rows as they are. (The
        keys' bias adds the same to all scores of a query.)"""
        k_HdD, v_HdD = (part.weight.view(self.heads, self.head_dim, -1) for part in (self.k_proj, self.v_proj))
        q_PYD = torch.einsum("pthd,hdD->pthD", self._split(self.q_proj(q_PTD)), k_HdD).flatten(1, 2)
        seen = self._attend(q_PYD[:, :, None], k_XND[:, :, None], v_XND[:, :, None])
        seen_PTHD = seen.view(*q_PTD.shape[:2], self.heads, -1)
        out_PTX = torch.einsum("pthD,hdD->pthd", seen_PTHD, v_HdD).flatten(2)
        projected: Tensor = self.out_proj(out_PTX + self.v_proj.bias)
        return projected

    def _from_image(self, q_XND: Tensor, k_PTD: Tensor, v_PTD: Tensor) -> Tensor:
        """A head's key times its part of the queries' projection is a key for the image's rows as they are; its value
        times its part of the output's projection is a part of the output."""
        k_PTHd, v_PTHd = self._split(self.k_proj(k_PTD)), self._split(self.v_proj(v_PTD))
        q_HdD, o_DHd = self.q_proj.weight.view(*k_PTHd.shape[2:], -1), self._split(self.out_proj.weight)
        keys_PDY = torch.einsum("pthd,hdD->pDth", k_PTHd, q_HdD).flatten(2)
        bias_P1Y = torch.einsum("pthd,hd->pth", k_PTHd, self._split(self.q_proj.bias)).flatten(1)[:, None]
        values_PTHD = torch.einsum("pthd,Dhd->pthD", v_PTHd, o_DHd)
        values_PYD = (values_PTHD + self.out_proj.bias / self.heads).flatten(1, 2)  # a head's shares add up to 1
        scale, q_PND = self.head_dim**-0.5, q_XND.expand(len(k_PTD), -1, -1)
        scores_PNY = torch.baddbmm(bias_P1Y, q_PND, keys_PDY, beta=scale, alpha=scale)
        shares_PNTH = scores_PNY.view(*scores_PNY.shape[:2], -1, self.heads).softmax(2)
        return shares_PNTH.flatten(2) @ values_PYD

    def _split(self, x: Tensor) -> Tensor:
        """[..., H * d] -> [..., H, d]."""
        return x.view(*x.shape[:-1], self.heads, self.head_dim)

    def _attend(self, q_PQHD: Tensor, k_XKHD: Tensor, v_XKHD: Tensor) -> Tensor:
        """Attention of all prompts, [P * Q, H, D]; X is P, or 1 if the keys are the same for all prompts."""
        (prompts, count), (entries, keys) = q_PQHD.shape[:2], k_XKHD.shape[:2]
        layouts = SequenceLayout.of([prompts * count // entries] * entries), SequenceLayout.of([keys] * entries)
        q, k, v = (x.flatten(0, 1) for x in (q_PQHD, k_XKHD, v_XKHD))
        return attention(q, k, v, *layouts, scale=self.head_dim**-0.5)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (depth - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out
