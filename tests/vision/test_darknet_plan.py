"""Darknet networks on the CPU kernels give torch's outputs; what the kernels lack runs in torch."""

from pathlib import Path

import pytest
import torch

from pentad import weights
from pentad.build import build
from pentad.kernels.convolution import max_size
from pentad.models.vision.darknet import Darknet
from pentad.vision.darknet import DarknetPredictor
from pentad.vision.darknet_plan import DarknetPlan
from tests.helpers.darknet_files import conv, net, pool, route, section, v1, v2, v3, v4, write, yolo

needs_kernels = pytest.mark.skipif(not max_size(), reason="there are no kernels with convolutions")


def load(folder: Path, text: str) -> Darknet:
    network = build(weights.open(write(folder, text)))
    assert isinstance(network, Darknet)
    return network


def joins() -> str:
    """Concatenations of concatenations, of a layer twice, of groups, of a shortcut; a dropout before a shortcut."""
    text = net(32, 32) + conv(8, 3, 2) + conv(8) + section("dropout", probability=0.5)
    text += section("shortcut", **{"from": -3, "activation": "linear"}) + route(-1, -1, 0) + conv(12, 1)
    text += route(-1, -2) + pool(2, 1) + route(-1, groups=2, group_id=1) + route(-1, 0)
    text += section("upsample", stride=2) + route(-1, -1)
    return (
        text
        + conv(8)
        + section("shortcut", **{"from": -3, "activation": "leaky"})
        + conv(24, 1, 1, "linear", 0)
        + yolo("0,1,2")
    )


@needs_kernels
@pytest.mark.parametrize("text", [v3(), v4(), joins()], ids=["v3", "v4", "joins"])
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_are_torchs(tmp_path: Path, text: str, batch: int) -> None:
    network = load(tmp_path, text)
    assert DarknetPlan.supports(network)
    images = torch.rand(batch, *network.cfg.shape)
    plan = DarknetPlan(network, batch, 2)
    for _ in range(2):  # the second run finds the memory as the first has left it
        for ours, expected in zip(plan.run(images), network.outputs(images), strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@needs_kernels
def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    network = load(tmp_path, v3())
    predict = DarknetPredictor(network)
    images = torch.rand(1, *network.cfg.shape)
    before = [x.clone() for x in predict._outputs(images)]
    with torch.no_grad():
        network.layers[0].weight.mul_(2)
        network.layers[1].norm.running_var.add_(1)
    for ours, old, expected in zip(predict._outputs(images), before, network.outputs(images), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours, old, atol=1e-2)


@torch.inference_mode()
def test_networks_built_in_inference_mode(tmp_path: Path) -> None:
    network = load(tmp_path, v3())
    images = torch.rand(1, *network.cfg.shape)
    for ours, expected in zip(DarknetPredictor(network)._outputs(images), network.outputs(images), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_what_the_kernels_lack_runs_in_torch(tmp_path: Path) -> None:
    for text in (v1(), v2()):
        network = load(tmp_path, text)
        assert not DarknetPlan.supports(network)
        images = torch.rand(2, *network.cfg.shape)
        for ours, expected in zip(DarknetPredictor(network)._outputs(images), network.outputs(images), strict=True):
            torch.testing.assert_close(ours, expected)
    network = load(tmp_path, v4())
    network.layers[0].register_forward_hook(lambda *_: None)
    assert not DarknetPlan.supports(network)
    assert not DarknetPlan.supports(load(tmp_path, v4()).train())
    assert not DarknetPlan.supports(load(tmp_path, v4()).bfloat16())
