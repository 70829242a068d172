"""The head's losses in chunks: plain torch's values and gradients, without its logits."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pentad.nn.linear_loss import linear_cross_entropy, linear_log_probs

VOCABULARY, WIDTH = 301, 16
Loss = Callable[..., Tensor]


def chunked_cross_entropy(*arguments: Any) -> Tensor:
    return linear_cross_entropy(*arguments)


def weighted_log_probs(*arguments: Any) -> Tensor:
    log_probs = linear_log_probs(*arguments)
    return (log_probs * torch.linspace(-1, 2, len(log_probs), dtype=log_probs.dtype)).sum()


def plain_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


def plain_weighted_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    log_probs = F.linear(hidden, weight, bias).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    return (log_probs * torch.linspace(-1, 2, len(log_probs))).sum()


PAIRS = [(chunked_cross_entropy, plain_cross_entropy), (weighted_log_probs, plain_weighted_log_probs)]
LOSSES = [chunked_cross_entropy, weighted_log_probs]


def inputs(rows: int, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[Any]:
    """hidden, weight, bias, targets; the floats require gradients."""
    shapes = [(rows, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    hidden, weight, added = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return [hidden, weight, added if bias else None, torch.randint(VOCABULARY, (rows,))]


def gradients(loss: Tensor, arguments: Sequence[Any]) -> list[Tensor]:
    return [*torch.autograd.grad(loss, [x for x in arguments if x is not None and x.requires_grad])]


def assert_close(ours: Sequence[Tensor], exact: Sequence[Tensor], bound: float) -> None:
    for one, other in zip(ours, exact, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 64, 65, 200])
@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_values_and_gradients_are_plain_torchs(ours: Loss, plain: Loss, rows: int, bias: bool) -> None:
    arguments = inputs(rows, bias)
    loss, exact = ours(*arguments, 64), plain(*arguments)
    assert_close([loss], [exact], 1e-6)
    assert_close(gradients(loss * 0.3, arguments), gradients(exact * 0.3, arguments), 1e-6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss: Loss, bias: bool) -> None:
    *floats, targets = inputs(5, bias, torch.float64)
    floats = [x for x in floats if x is not None]

    def compute(*floats: Tensor) -> Tensor:
        return loss(*(floats if bias else (*floats, None)), targets, 2)

    assert torch.autograd.gradcheck(compute, floats, fast_mode=True)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (1, 2)])
@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_a_frozen_input_gets_no_gradient(ours: Loss, plain: Loss, frozen: tuple[int, ...]) -> None:
    arguments = inputs(70)
    exact = gradients(plain(*arguments), arguments)
    for i in frozen:
        arguments[i].requires_grad_(False)
    ours(*arguments, 64).backward()
    for i, (x, gradient) in enumerate(zip(arguments[:3], exact, strict=True)):
        if i in frozen:
            assert x.grad is None
        else:
            assert_close([x.grad], [gradient], 1e-6)


@pytest.mark.parametrize("way", ["autocast", "bf16 inputs"])
@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_bfloat16_matmuls_are_as_close_as_plain_torchs(ours: Loss, plain: Loss, way: str) -> None:
    arguments = inputs(200)
    if way == "bf16 inputs":
        arguments[:3] = [x.detach().bfloat16().requires_grad_() for x in arguments[:3]]
    floats = [*(x.detach().float().requires_grad_() for x in arguments[:3]), arguments[3]]
    exact = plain(*floats)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = ours(*arguments, 64)
    assert loss.dtype == torch.float32
    assert_close([loss], [exact], 2e-3)
    for one, other, x in zip(gradients(loss, arguments), gradients(exact, floats), arguments[:3], strict=True):
        assert one.dtype == x.dtype
        assert (one.float() - other).norm() <= 0.01 * other.norm()


class Recorder(TorchDispatchMode):
    """Counts matmuls, and the most elements of any tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.matmuls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.matmuls += "mm" in func.__name__
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(ours: Loss, plain: Loss) -> None:
    arguments = inputs(1000)
    with Recorder() as chunked:
        ours(*arguments, 64).backward()
    assert chunked.elements == 64 * VOCABULARY
    with Recorder() as whole:
        plain(*arguments).backward()
    assert whole.elements == 1000 * VOCABULARY


def test_scaling_the_cross_entropy_copies_no_gradient() -> None:
    """A second copy of a large head's gradient would be the step's peak."""
    arguments = inputs(10)
    loss = linear_cross_entropy(*arguments) / 7
    saved = loss.grad_fn.next_functions[0][0].saved_tensors  # type: ignore[union-attr]
    addresses = [tensor.data_ptr() for tensor in saved]
    del saved
    loss.backward()
    assert [x.grad.data_ptr() for x in arguments[:3]] == addresses


def test_a_kept_graph_gives_its_gradients_twice() -> None:
    arguments = inputs(10)
    loss = linear_cross_entropy(*arguments) / 7
    first = torch.autograd.grad(loss, arguments[:3], retain_graph=True)
    again = torch.autograd.grad(loss, arguments[:3])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_inputs_give_equal_bits(loss: Loss) -> None:
    arguments = inputs(300)
    one, other = loss(*arguments), loss(*arguments)
    assert torch.equal(one, other)
    pairs = zip(gradients(one, arguments), gradients(other, arguments), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_gradients_only_the_value_is_computed(loss: Loss) -> None:
    arguments = inputs(300)
    value = loss(*arguments)
    with torch.no_grad(), Recorder() as recorder:
        silent = loss(*arguments, 100)
    assert not silent.requires_grad
    assert_close([silent], [value], 1e-6)
    assert recorder.matmuls == 3


def test_no_rows_are_a_loss_of_zero() -> None:
    arguments = inputs(0)
    loss = linear_cross_entropy(*arguments)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, arguments))
    assert linear_log_probs(*arguments).shape == (0,)


def test_large_logits_stay_finite() -> None:
    hidden, weight, bias, targets = inputs(20)
    arguments = [hidden.detach() * 1e4, weight, bias, targets]
    loss = linear_cross_entropy(*arguments)
    assert_close([loss], [plain_cross_entropy(*arguments)], 1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, arguments))
