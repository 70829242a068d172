"""Grouped matmuls: inputs that torch's operator refuses use a loop, and unused experts' weights aren't read."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.nn.moe.experts import Experts, GroupedLinear, MLPExperts, SwiGLUExperts, grouped_linear

COUNTS = [3, 0, 4, 0, 1]


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


def by_loop(x_SI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
    owners = [e for e, count in enumerate(counts) for _ in range(count)]
    return torch.stack([weight_EOI[e] @ x for e, x in zip(owners, x_SI, strict=True)])


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each call of torch's operator."""
    calls: list[int] = []
    operator = F.grouped_mm

    def counted(*args: Tensor, **options: Tensor) -> Tensor:
        calls.append(1)
        return operator(*args, **options)

    monkeypatch.setattr(F, "grouped_mm", counted)
    return calls


def shifted(tensor: Tensor) -> Tensor:
    """Copy a tensor to memory that is not aligned to 16 bytes."""
    return torch.cat((torch.zeros(1, dtype=tensor.dtype), tensor.flatten()))[1:].view(tensor.shape)


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("counts", [COUNTS, [0, 7, 0, 0, 0], [40, 0, 50, 1, 2]], ids=["few", "one expert", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_matches_the_loop(dtype: torch.dtype, counts: list[int], learning: bool, uses: list[int]) -> None:
    x, weight = torch.randn(sum(counts), 16).to(dtype), torch.randn(5, 24, 16).to(dtype).requires_grad_(learning)
    y = grouped_linear(x, weight, ends_of(counts)).detach()
    assert uses == [1]
    assert y.dtype == dtype
    loose = {} if dtype == torch.float32 else {"rtol": 0.01, "atol": 0.05}
    torch.testing.assert_close(y.float(), by_loop(x.float(), weight.detach().float(), counts), **loose)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_uses_the_operator_for_both_products(rows: int, uses: list[int]) -> None:
    """The second product accepts the first one's strides: torch calls any strides of a single row contiguous."""
    experts, x = MLPExperts(5, 16, 24), torch.randn(rows, 16)
    y = experts(x, ends_of([0, 0, rows, 0, 0]))
    torch.testing.assert_close(y, (x @ experts.up_proj.weight[2].T).relu() @ experts.down_proj.weight[2].T)
    assert uses == [1, 1]


def test_rows_that_are_not_contiguous(uses: list[int]) -> None:
    x, weight = torch.randn(8, 33)[:, ::2][:, :16], torch.randn(5, 24, 16)
    torch.testing.assert_close(grouped_linear(x, weight, ends_of(COUNTS)), by_loop(x, weight, COUNTS))
    assert uses == [1]


REFUSED = {
    "float64": lambda x, w: (x.double(), w.double()),
    "narrow rows": lambda x, w: (x[:, :15].contiguous(), w[:, :, :15].contiguous()),
    "narrow outputs": lambda x, w: (x, w[:, :23]),
    "mapped rows": lambda x, w: (shifted(x), w),
    "mapped weights": lambda x, w: (x, shifted(w)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_some_torch_versions_refuse(case: str, uses: list[int]) -> None:
    x, weight = REFUSED[case](torch.randn(8, 16), torch.randn(5, 24, 16))
    x.requires_grad_()
    weight.requires_grad_()
    y, expected = grouped_linear(x, weight, ends_of(COUNTS)), by_loop(x, weight, COUNTS)
    assert not uses
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, (x, weight), direction),
        torch.autograd.grad(expected, (x, weight), direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows(dtype: torch.dtype) -> None:
    x, weight = torch.randn(0, 16, dtype=dtype), torch.randn(5, 24, 16, dtype=dtype, requires_grad=True)
    y = grouped_linear(x, weight, ends_of([0] * 5))
    assert y.shape == (0, 24)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert not gradient.any()


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_any_stride(transposed: bool, uses: list[int]) -> None:
    """The gradient of a sum is expanded (stride 0); the gradient of a transposition is transposed."""
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(5, 24, 16, requires_grad=True)
    y, expected = grouped_linear(x, weight, ends_of(COUNTS)), by_loop(x, weight, COUNTS)
    other = torch.randn(24, 8)
    for ours, theirs in zip(
        torch.autograd.grad((y.T * other if transposed else y).sum(), (x, weight)),
        torch.autograd.grad((expected.T * other if transposed else expected).sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert uses == [1]


def test_transposed_weights_are_used_without_a_copy(uses: list[int]) -> None:
    """The down projections of Mixtral's stacked files are transposed."""
    x, weight = torch.randn(8, 16), torch.randn(5, 16, 24).transpose(1, 2)
    torch.testing.assert_close(grouped_linear(x, weight, ends_of(COUNTS)), by_loop(x, weight, COUNTS))
    assert uses == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("width", [512, 511], ids=["by the operator", "by the loop"])
def test_weights_of_other_experts_are_not_read(tmp_path: Path, width: int) -> None:
    """After a step that chose one of 16 experts, one of the file's 16 MiB is resident."""
    path = tmp_path / "weight"
    with open(path, "wb") as file:
        file.truncate(16 * 512 * 512 * 4)
    stack = torch.from_file(str(path), shared=True, size=16 * 512 * 512).view(16, 512, 512)[:, :, :width]
    with torch.inference_mode():
        grouped_linear(torch.randn(2, width), stack, ends_of([0] * 5 + [2] + [0] * 10))
    entry = Path("/proc/self/smaps").read_text().partition(str(path))[2]
    match = re.search(r"^Rss:\s+(\d+) kB", entry, re.MULTILINE)
    assert match is not None
    assert 900 < int(match[1]) < 3000


def test_swiglu_and_mlp_experts_match_the_loop() -> None:
    torch.manual_seed(0)
    x, ends = torch.randn(8, 16), ends_of(COUNTS)
    swiglu, mlp, gelu = SwiGLUExperts(5, 16, 24), MLPExperts(5, 16, 24), MLPExperts(5, 16, 24, F.gelu)
    gate, up = (by_loop(x, part.weight, COUNTS) for part in (swiglu.gate_proj, swiglu.up_proj))
    torch.testing.assert_close(swiglu(x, ends), by_loop(F.silu(gate) * up, swiglu.down_proj.weight, COUNTS))
    for part, activation in ((mlp, F.relu), (gelu, F.gelu)):
        hidden = activation(by_loop(x, part.up_proj.weight, COUNTS))
        torch.testing.assert_close(part(x, ends), by_loop(hidden, part.down_proj.weight, COUNTS))
    assert "experts=5, in_features=16, out_features=24" in repr(swiglu)
    assert 0.2 < float(GroupedLinear(4, 16, 512).weight.detach().max()) <= 0.25  # 1 / sqrt(16), as nn.Linear's


@torch.inference_mode()
@pytest.mark.parametrize(
    "counts",
    [[5, 0, 3, 0, 4], [0, 12, 0, 0, 0], [1, 1, 1, 1, 8], [4, 4, 4, 0, 0], [2, 2, 2, 2, 2], [0, 0, 0, 0, 9]],
    ids=str,
)
@pytest.mark.parametrize("cls", [SwiGLUExperts, MLPExperts])
def test_experts_run_in_slabs_of_rows(cls: type[Experts], counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x, ends = cls(5, 16, 24), torch.randn(sum(counts), 16), ends_of(counts)  # type: ignore[call-arg]
    whole, seen, compute = experts(x, ends), [], experts.compute

    def seeing(x_SD: Tensor, ends_E: Tensor, which: slice) -> Tensor:
        seen.append((len(x_SD), len(range(5)[which])))
        return compute(x_SD, ends_E, which)

    monkeypatch.setattr("pentad.nn.moe.experts.SLAB_ROWS", 4)
    monkeypatch.setattr(experts, "compute", seeing)
    torch.testing.assert_close(experts(x, ends), whole)
    assert sum(rows for rows, _ in seen) == sum(counts)
    assert all(0 < rows <= 4 for rows, _ in seen)
    assert len(seen) <= sum(counts) // 4 + sum(count > 0 for count in counts)


@torch.inference_mode()
def test_slabs_of_16_bit_rows_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs are whole blocks, so that oneDNN compiles few kernels. The product is W x^T, so that oneDNN doesn't reorder
    the weights into tiles."""
    counts = [32 * count for count in (40, 0, 12, 3, 1)]
    experts, ends, sizes = MLPExperts(5, 16, 24).bfloat16(), ends_of(counts), []
    x, compute, operator = torch.randn(sum(counts), 16).bfloat16(), experts.compute, F.grouped_mm

    def seeing(x_SD: Tensor, ends_E: Tensor, which: slice) -> Tensor:
        sizes.append(len(x_SD))
        return compute(x_SD, ends_E, which)

    def watched(one: Tensor, other: Tensor, *, offs: Tensor) -> Tensor:
        assert one.data_ptr() in [
            each.data_ptr() for part in (experts.up_proj, experts.down_proj) for each in part.weight
        ]
        return operator(one, other, offs=offs)

    monkeypatch.setattr(experts, "compute", seeing)
    monkeypatch.setattr(F, "grouped_mm", watched)
    y = experts(x, ends)
    assert sizes == [320, 320, 320, 320, 192, 192, 128]
    up, down = experts.up_proj.weight.float(), experts.down_proj.weight.float()
    hidden = by_loop(x.float(), up, counts).relu().bfloat16().float()
    torch.testing.assert_close(y.float(), by_loop(hidden, down, counts), rtol=0.02, atol=0.02)


def test_training_runs_all_experts_in_one_slab(monkeypatch: pytest.MonkeyPatch, uses: list[int]) -> None:
    monkeypatch.setattr("pentad.nn.moe.experts.SLAB_ROWS", 1)
    MLPExperts(5, 16, 24)(torch.randn(8, 16), ends_of(COUNTS)).sum().backward()
    assert uses == [1, 1]
