"""Convolution plans: each operation, on each instruction set, equals torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.kernels import isas
from pentad.kernels.convolution import ACTIVATIONS, ConvolutionPlan, max_size

pytestmark = pytest.mark.skipif(not max_size(), reason="there are no kernels with convolutions")
TORCH = {
    "linear": lambda x: x,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "relu": F.relu,
    "mish": F.mish,
    "swish": F.silu,
    "logistic": torch.sigmoid,
}


def nhwc(image_BCHW: Tensor) -> Tensor:
    return image_BCHW.permute(0, 2, 3, 1)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "stride", "groups"),
    [(3, 16, 3, 1, 1), (3, 8, 3, 2, 1), (5, 21, 1, 1, 1), (70, 130, 3, 1, 1), (40, 36, 5, 2, 4), (6, 6, 1, 2, 1)],
)
def test_convolutions(isa: str, threads: int, inputs: int, outputs: int, size: int, stride: int, groups: int) -> None:
    x = torch.randn(2, inputs, 11, 17)
    weight, bias = torch.randn(outputs, inputs // groups, size, size) / size, torch.randn(outputs)
    expected = F.leaky_relu(F.conv2d(x, weight, bias, stride, size // 2, 1, groups), 0.1)
    other = torch.randn_like(expected)
    plan = ConvolutionPlan(threads, isa)
    source, add = plan.input(2, 11, 17, inputs), plan.input(*nhwc(other).shape)
    out = plan.image(*nhwc(expected).shape)
    options = {"stride": stride, "padding": size // 2, "groups": groups}
    plan.convolve(source, out, weight, bias, **options, activation="leaky", add=add)
    plan.keep(out)
    plan.run(nhwc(x), nhwc(other))
    torch.testing.assert_close(plan.view(out), nhwc(expected + other), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("channels", "size", "stride"), [(8, 3, 1), (24, 5, 1), (19, 3, 2)])
def test_depthwise_convolutions(isa: str, channels: int, size: int, stride: int) -> None:
    x, weight, bias = torch.randn(2, channels, 13, 19), torch.randn(channels, 1, size, size), torch.randn(channels)
    expected = nhwc(F.relu(F.conv2d(x, weight, bias, stride, size // 2, 1, channels)))
    plan = ConvolutionPlan(2, isa)
    source, out = plan.input(2, 13, 19, channels), plan.image(*expected.shape)
    options = {"stride": stride, "padding": size // 2, "groups": channels}
    plan.convolve(source, out, weight, bias, **options, activation="relu")
    plan.keep(out)
    plan.run(nhwc(x))
    torch.testing.assert_close(plan.view(out), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa: str, activation: str) -> None:
    x = torch.linspace(-30, 30, 5 * 7 * 11).view(1, 5, 7, 11)
    plan = ConvolutionPlan(1, isa)
    source, out, summed = plan.input(1, 5, 7, 11), plan.image(1, 5, 7, 11), plan.image(1, 5, 7, 11)
    plan.convolve(source, out, torch.eye(11)[:, :, None, None], torch.zeros(11), activation=activation)
    plan.repeat(source, summed, add=source, activation=activation)
    plan.keep(out)
    plan.keep(summed)
    plan.run(x)
    torch.testing.assert_close(plan.view(out), TORCH[activation](x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plan.view(summed), TORCH[activation](2 * x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("isa", isas())
def test_pooling_copies_and_parts_of_images(isa: str) -> None:
    x = torch.randn(2, 6, 9, 20)
    plan = ConvolutionPlan(2, isa)
    source, joined = plan.input(2, 6, 9, 20), plan.image(2, 12, 18, 21)
    plan.repeat(source.part(3, 13), joined.part(0, 13), times=2)
    pooled = plan.image(2, 6, 9, 8)
    plan.maxpool(source.part(12, 8), pooled, 3, 1, 1)
    plan.repeat(pooled, joined.part(13, 8), times=2)
    plan.keep(joined)
    plan.run(x)
    channels = x.permute(0, 3, 1, 2)
    expected = torch.cat((channels[:, 3:16], F.max_pool2d(channels[:, 12:], 3, 1, 1)), 1)
    assert torch.equal(plan.view(joined), nhwc(F.interpolate(expected, scale_factor=2)))


def test_memory_is_reused_and_results_do_not_depend_on_threads() -> None:
    results = []
    for threads in (1, 2, 4):
        plan = ConvolutionPlan(threads)
        image = plan.input(1, 16, 16, 8)
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            before, image = image, plan.image(1, 16, 16, 8)
            plan.convolve(before, image, torch.randn(8, 8, 3, 3, generator=generator) / 9, torch.zeros(8), padding=1)
        plan.keep(image)
        plan.run(torch.ones(1, 16, 16, 8))
        results.append(plan.view(image).clone())
        assert plan._memory.numel() < 5 * 16 * 16 * 8
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_windows_have_a_limit() -> None:
    plan = ConvolutionPlan(1)
    source = plan.input(1, 40, 40, 1)
    with pytest.raises(ValueError, match=f"size is {max_size() + 1}; expected at most"):
        plan.maxpool(source, plan.image(1, 40, 40, 1), max_size() + 1, 1, 8)
