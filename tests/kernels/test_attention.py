"""Attention over paged keys and values, against float64 loops."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pentad.kernels import CachePools, Tokens, pool_dim
from pentad.nn.batch import SequenceLayout
from tests.helpers.plain import plain_attention
from tests.helpers.programs import attended, every_isa, needs_kernels

pytestmark = needs_kernels
SHAPES = [(9, 3, 64), (4, 2, 8), (1, 1, 16), (6, 6, 80), (8, 1, 32), (14, 2, 128), (2, 1, 256), (10, 2, 18)]
EXACT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.int8: 2e-2}


class Cached:
    """A cache of one layer, with sequences in pages of random order."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, page: int = 32
    ) -> None:
        self.shape = heads, kv_heads, head_dim
        shape = 64 * page, kv_heads, pool_dim(head_dim, dtype)
        unwritten = -1 if dtype == torch.int8 else torch.nan  # four bytes of -1 are a NaN too
        pools = [torch.full(shape, unwritten, dtype=dtype) for _ in range(2)]
        self.pools = CachePools(pools[:1], pools[1:], page)
        self.free = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
        self.pages: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def run(self, rows: Sequence[tuple[int, Tensor]], dropped: int = 0, **options: object) -> Tensor:
        """Run the sequences' next rows of queries, keys and values; returns [N, heads, head_dim]."""
        heads, kv_heads, dim = self.shape
        projected = torch.cat([x for _, x in rows])
        work, at = [], 0
        for name, x in rows:
            past, pages = self.lengths.setdefault(name, 0), self.pages.setdefault(name, [])
            while len(pages) * self.pools.page_size < past + len(x):
                pages.append(self.free.pop())
            table = torch.stack((torch.ones(past + len(x), dim // 2), torch.zeros(past + len(x), dim // 2)), 1)
            dropped_pages = dropped // self.pools.page_size
            work.append(Tokens(range(at, at + len(x)), past, dropped, pages[dropped_pages:], table))
            at += len(x)
            self.lengths[name] = past + len(x)
        return attended(projected, work, self.pools, heads, kv_heads, dim, **options).view(-1, heads, dim)  # type: ignore[arg-type]


def random_rows(shape: tuple[int, int, int], count: int, seed: int = 0) -> Tensor:
    heads, kv_heads, dim = shape
    return torch.randn(count, (heads + 2 * kv_heads) * dim, generator=torch.Generator().manual_seed(seed))


def exact(shape: tuple[int, int, int], x: Tensor, window: int | None = None) -> Tensor:
    """Compute one whole sequence in float64: [N, heads, head_dim]."""
    heads, kv_heads, dim = shape
    q, k, v = x.view(len(x), -1, dim).double().split([heads, kv_heads, kv_heads], 1)
    rows = SequenceLayout.of([len(x)])
    return plain_attention(q, k, v, rows, rows, causal=True, window=window)


@every_isa
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_matches_float64(shape: tuple[int, int, int], isa: str) -> None:
    for dtype, bound in EXACT.items():
        x = random_rows(shape, 70)
        y = Cached(*shape, dtype).run([(0, x)], isa=isa)
        assert (y - exact(shape, x)).abs().max() <= bound * 4


@every_isa
@pytest.mark.parametrize("window", [None, 1, 40, 200])
def test_chunks_threads_and_page_sizes_do_not_change_the_bits(window: int | None, isa: str) -> None:
    """Other sequences in the same step don't change them either."""
    shape = (6, 2, 32)
    x, other = random_rows(shape, 300), random_rows(shape, 40, seed=1)
    whole = Cached(*shape).run([(0, x)], window=window, isa=isa)
    assert (whole[:140] - exact(shape, x[:140], window)).abs().max() <= 1e-5
    for sizes, threads, page in (([7, 1, 2, 3, 4, 5], 1, 16), ([256, 44], 4, 32), ([127, 4, 3, 90], 2, 128)):
        cached, at, out = Cached(*shape, page=page), 0, []
        for i in range(300):
            chunk = x[at : at + sizes[i % len(sizes)]]
            if not len(chunk):
                break
            rows = [(0, chunk)]
            if i % 3 == 1 and 2 * (i // 3) + 2 <= 40:
                rows.insert(i % 2, (1, other[2 * (i // 3) : 2 * (i // 3) + 2]))
            y = cached.run(rows, window=window, threads=threads, isa=isa)
            out.append(y[2:] if rows[0][0] else y[: len(chunk)])
            at += len(chunk)
        assert torch.equal(torch.cat(out), whole)


@every_isa
def test_pages_outside_a_window_are_not_read(isa: str) -> None:
    shape, window = (4, 2, 16), 50
    x = random_rows(shape, 200)
    whole = Cached(*shape).run([(0, x)], window=window, isa=isa)
    cached = Cached(*shape)
    cached.run([(0, x[:190])], window=window, isa=isa)
    for page in cached.pages[0][:4]:
        cached.pools.keys[0][page * 32 : (page + 1) * 32] = torch.nan
    y = cached.run([(0, x[190:])], dropped=128, window=window, isa=isa)
    assert torch.equal(y, whole[190:])


@every_isa
def test_a_sequence_with_nan_affects_no_other_sequence(isa: str) -> None:
    shape = (4, 2, 16)
    x, bad = random_rows(shape, 40), random_rows(shape, 40, seed=1)
    bad[7] = torch.nan
    alone = Cached(*shape).run([(0, x)], isa=isa)
    y = Cached(*shape).run([(1, bad), (0, x)], isa=isa)
    assert torch.equal(y[40:], alone)
    assert y[7:40].isnan().all()


@every_isa
def test_scores_of_any_size(isa: str) -> None:
    """Softmax neither overflows nor divides by 0."""
    shape = (2, 1, 16)
    for scale in (0.0, 1e-20, 30.0, 1e4):
        x = random_rows(shape, 150) * scale
        y = Cached(*shape).run([(0, x)], isa=isa)
        assert torch.isfinite(y).all()
        assert (y - exact(shape, x)).abs().max() <= 1e-5 * max(scale, 1)


@every_isa
def test_rotation(isa: str) -> None:
    """Queries and keys are rotated, half-split, with the table's row of their position."""
    heads, kv_heads, dim = shape = (4, 2, 16)
    x = random_rows(shape, 20)
    angles = torch.rand(20, dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    table = torch.stack((angles.cos(), angles.sin()), 1)
    cached = Cached(*shape)
    y = attended(x, [Tokens(range(20), 0, 0, [5], table)], cached.pools, *shape, isa=isa).view(20, heads, dim)
    q, k, v = x.view(20, -1, dim).double().split([heads, kv_heads, kv_heads], 1)
    cos, sin = (torch.cat((t, t), -1)[:, None].double() for t in (angles.cos(), angles.sin()))

    def rotated(z: Tensor) -> Tensor:
        return z * cos + torch.cat((-z[..., dim // 2 :], z[..., : dim // 2]), -1) * sin

    rows = SequenceLayout.of([20])
    assert (y - plain_attention(rotated(q), rotated(k), v, rows, rows, causal=True)).abs().max() <= 1e-5
