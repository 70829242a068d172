"""Attention on a grid, on each instruction set, equals plain torch; parts that don't fit are refused."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pentad.kernels import grid, isas
from pentad.kernels.binding import limit

pytestmark = pytest.mark.skipif(not isas() or not limit("MAX_GRID_SIDE"), reason="there are no kernels for grids")


def plain(rows: list[Tensor], positions: Tensor, padding: list[Tensor], side: int, window: int) -> Tensor:
    """The windows one by one, in float64."""
    dim = positions.shape[2]
    images = [x.double().view(-1, side, side, x.shape[1] // dim, dim) for x in rows]
    out = torch.zeros_like(images[0])
    at = torch.arange(window)
    vectors_2RRD = positions.double()[:, at[:, None] - at + window - 1]
    for top in range(0, side, window):
        for left in range(0, side, window):
            inside = (slice(None), slice(top, top + window), slice(left, left + window))
            q, k, v = (pad.double().view(-1, dim).expand(len(out), window, window, -1, -1).clone() for pad in padding)
            for cells, image in zip((q, k, v), images, strict=True):
                height, width = image[inside].shape[1:3]
                cells[:, :height, :width] = image[inside]
            scores = torch.einsum("byxhd,bYXhd->bhyxYX", q, k) * dim**-0.5
            scores += torch.einsum("byxhd,yYd->bhyxY", q, vectors_2RRD[0])[..., None]
            scores += torch.einsum("byxhd,xXd->bhyxX", q, vectors_2RRD[1])[..., None, :]
            shares = scores.flatten(-2).softmax(-1).view(scores.shape)
            out[inside] = torch.einsum("bhyxYX,bYXhd->byxhd", shares, v)[:, :height, :width]
    return out.view(rows[0].shape)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(
    ("images", "side", "window", "heads", "dim"),
    [(2, 8, 3, 2, 16), (1, 20, 14, 2, 32), (1, 33, 33, 1, 80), (3, 1, 1, 1, 128), (1, 10, 64, 1, 16)],
)
def test_grids_and_windows(isa: str, images: int, side: int, window: int, heads: int, dim: int) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(images * side**2, heads * dim) for _ in range(3)]
    positions, padding = 0.3 * torch.randn(2, 2 * window - 1, dim), [torch.randn(1, heads * dim) for _ in range(3)]
    found = grid.attend(*rows, *positions, *padding[1:], side=side, window=window, isa=isa)
    expected = plain(rows, positions, padding, side, window)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


def test_large_scores_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [1000 * torch.randn(400, 32) for _ in range(3)]
    positions, zeros = torch.randn(2, 27, 16), torch.zeros(1, 32)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(grid.attend(*rows, *positions, zeros, zeros, side=20, window=14))
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    q, zeros = torch.zeros(9, 32), torch.zeros(1, 32)
    assert not grid.supports(q, 65, 16)
    assert not grid.supports(q.bfloat16(), 3, 16)
    with pytest.raises(ValueError, match="whole images"):
        grid.attend(q, q, q, *torch.zeros(2, 5, 16), zeros, zeros, side=2, window=3)
    with pytest.raises(ValueError, match="no kernel"):
        grid.attend(q, q, q, *torch.zeros(2, 5, 8), zeros, zeros, side=3, window=3)
    with pytest.raises(ValueError, match="differ"):
        grid.attend(q, q[:4], q, *F.pad(q[:5, :16], (0, 0))[None].expand(2, -1, -1), zeros, zeros, side=3, window=3)
