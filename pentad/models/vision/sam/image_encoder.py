"""Segment Anything's image encoder: a ViT with windows (arXiv:2203.16527), whose output is a map of an image.

Legend: B images, N = S * S patches of an image, W windows, Q queries, K keys, H heads, D width of a head or of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pentad.kernels import grid
from pentad.nn.attention import Attention
from pentad.nn.batch import Batch
from pentad.nn.block import DropPathBlock, run_blocks
from pentad.nn.feedforward import GeluMLP
from pentad.nn.linear import project
from pentad.nn.norm import LayerNorm, LayerNorm2d


class ImageEncoder(nn.Module):
    """Blocks whose attention sees a window of the image, or now and then all of it; then two convolutions.

    Args:
        side: S; images have `side` * `patch` pixels a side.
        patch: pixels a side of a patch.
        channels: of the images.
        width, depth, heads, hidden: of the blocks.
        eps: of the blocks' norms.
        qkv_bias: whether queries, keys and values have a bias.
        window: patches a side of a window.
        global_layers: the numbers of the blocks that see all of the image.
        out: channels of the map.
        drop_path: stochastic depth of the last block, in training; the rate grows linearly from 0.
    """

    def __init__(
        self,
        *,
        side: int,
        patch: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        eps: float,
        qkv_bias: bool,
        window: int,
        global_layers: tuple[int, ...],
        out: int,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, width))
        self.layers = nn.ModuleList(
            DropPathBlock(
                LayerNorm(width, eps),
                GridAttention(width, heads, side, 0 if layer in global_layers else window, qkv_bias),
                LayerNorm(width, eps),
                GeluMLP(width, hidden, approximate="none"),
                drop_path * layer / max(1, depth - 1),
            )
            for layer in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(width, out, 1, bias=False),
            LayerNorm2d(out, 1e-6),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out, 1e-6),
        )

    def forward(self, images_BCHW: Tensor, *, checkpointing: str = "none") -> Tensor:
        """Normalized images, padded to a square at the right and the bottom -> maps [B, out, S, S]."""
        x_BSSD = self.patch_embed(images_BCHW).permute(0, 2, 3, 1) + self.pos_embed
        batch = Batch.of(*[x_BSSD.shape[1] ** 2] * len(x_BSSD), device=x_BSSD.device)
        x_ND, _ = run_blocks(self.layers, x_BSSD.flatten(0, 2), batch, checkpointing=checkpointing)
        maps_BDSS: Tensor = self.neck(x_ND.view(x_BSSD.shape).permute(0, 3, 1, 2))
        return maps_BDSS


class GridAttention(Attention):
    """Attention among the patches of a window, or of the whole image.

    Args:
        dim: width of the residual stream.
        heads: H.
        side: S.
        window: patches a side of a window; 0 for the whole image. Windows that reach beyond the image are filled with
            zeros, which are keys like any other.
        bias: whether queries, keys and values have a bias.
    """

    def __init__(self, dim: int, heads: int, side: int, window: int, bias: bool) -> None:
        position_bias = DecomposedBias(window or side, dim // heads)
        options = {"causal": False, "bias": bias, "output_bias": True, "position_bias": position_bias}
        super().__init__(dim, heads=heads, head_dim=dim // heads, **options)  # type: ignore[arg-type]
        self.side = side
        self.grid_window = window

    def forward(self, x_ND: Tensor, batch: Batch, context_MD: Tensor | None = None) -> Tensor:
        """Rows of patches [N, dim], image by image, row by row -> the same."""
        position_bias = self.position_bias
        assert isinstance(position_bias, DecomposedBias)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not traced and not torch.is_grad_enabled() and grid.supports(x_ND, position_bias.side, self.head_dim):
            padding = project(x_ND.new_zeros(1, x_ND.shape[1]), self.k_proj, self.v_proj)
            attended_ND = grid.attend(
                *project(x_ND, self.q_proj, self.k_proj, self.v_proj),
                *(position_bias.rel_pos_h, position_bias.rel_pos_w, *padding),
                side=self.side,
                window=position_bias.side,
            )
            out_ND: Tensor = self.o_proj(attended_ND)
            return out_ND
        if not self.grid_window:
            return super().forward(x_ND, batch)
        side, window = self.side, self.grid_window
        count = -(-side // window)
        missing = count * window - side
        grid_BSSD = F.pad(x_ND.view(len(batch.layout), side, side, -1), (0, 0, 0, missing, 0, missing))
        split = grid_BSSD.unflatten(1, (count, window)).unflatten(3, (count, window))  # type: ignore[no-untyped-call]
        lengths = [window**2] * (len(batch.layout) * count**2)
        windows = batch.memo(("windows", window), lambda: Batch.of(*lengths, device=x_ND.device))
        y_ND = super().forward(split.transpose(2, 3).flatten(0, 4), windows)
        split = y_ND.view(len(batch.layout), count, count, window, window, -1).transpose(2, 3)
        return split.flatten(3, 4).flatten(1, 2)[:, :side, :side].flatten(0, 2)


class DecomposedBias(nn.Module):
    """Relative positions in two dimensions (MViTv2, arXiv:2112.01526): the query times a learned vector for the
    difference of rows, plus the query times one for the difference of columns.

    The bias is made for a block of queries at a time, so all of it is never in memory.

    Args:
        side: rows and columns, R.
        head_dim: D.
    """

    def __init__(self, side: int, head_dim: int) -> None:
        super().__init__()
        self.side = side
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_dim))

    def forward(self, batch: Batch) -> Callable[[Tensor, range, range], Tensor]:
        """The bias for sequences of `side` * `side` rows, as `attention` takes it."""

        def bias(q_BHQD: Tensor, at_q: range, at_k: range) -> Tensor:
            at_Q = torch.arange(at_q.start, at_q.stop, device=q_BHQD.device)
            by_row = self._along(q_BHQD, at_Q // self.side, self.rel_pos_h)
            by_column = self._along(q_BHQD, at_Q % self.side, self.rel_pos_w)
            return (by_row[..., :, None] + by_column[..., None, :]).flatten(-2)

        return bias

    def _along(self, q_BHQD: Tensor, at_Q: Tensor, vectors: Tensor) -> Tensor:
        """Queries times the vectors of their differences to each of R positions along one axis, [B, H, Q, R]."""
        differences_QR = at_Q[:, None] - torch.arange(self.side, device=at_Q.device) + self.side - 1
        return torch.einsum("bhqd,qrd->bhqr", q_BHQD, vectors[differences_QR])
