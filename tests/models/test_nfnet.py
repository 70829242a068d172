"""NFNet equals timm's dm_nfnet, and adaptive clipping timm's."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tests.helpers.torchvision_stub  # noqa: F401
from pentad.build import build, meta_network
from pentad.models.vision.nfnet import NFNetConfig
from pentad.train.optimizers import clip_adaptively
from tests.helpers.images import assert_close, images, network_of, randomized

timm: Any = import_module("timm")

SMALL = {"depths": (1, 2), "channels": (32, 64), "stem_chs": 16, "group_size": 8, "num_features": 96}


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 55])
def test_logits_equal_those_of_timm(tmp_path: Path, size: int) -> None:
    peer = randomized(timm.create_model("dm_nfnet_f0", num_classes=5, **SMALL))
    torch.save(peer.state_dict(), tmp_path / "nfnet.pth")
    network, x = network_of(tmp_path / "nfnet.pth"), images(2, 3, size, size)
    assert_close(network(x), peer(x))


def test_the_sizes_of_f0() -> None:
    count = sum(p.numel() for p in meta_network(NFNetConfig.variant(0, num_labels=1000)).parameters())
    assert count == 71_489_284
    assert NFNetConfig.variant(7).depths == (8, 16, 48, 24)
    assert NFNetConfig.variant(0).preprocessing.crop == 256


def test_residual_branches_start_at_zero_and_learn() -> None:
    config = NFNetConfig(depths=(1, 1), hidden_sizes=(32, 64), stem_size=16, head_size=96, group_size=8, num_labels=5)
    network: Any = build(config, seed=1, trainable=True)
    x, block = images(2, 32, 8, 8), network.stages[0][0]
    assert torch.equal(block(x[:, :16]), block.downsample(torch.nn.functional.gelu(x[:, :16]) * 1.7015043497085571))
    network(images(2, 3, 64, 64)).square().sum().backward()
    assert float(block.skipinit_gain.grad.abs()) > 0
    block.drop_path, network.stages[1][0].drop_path = 0.5, 0.0
    with torch.no_grad():
        block.skipinit_gain.fill_(1.0)
        outputs = network(images(1, 3, 64, 64).expand(16, -1, -1, -1)).mul(1e4).round()
    assert len(outputs.unique(dim=0)) == 2


def test_adaptive_clipping_equals_timms() -> None:
    torch.manual_seed(0)
    ours = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Linear(5, 6), nn.Conv2d(4, 8, 1)])
    theirs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Linear(5, 6), nn.Conv2d(4, 8, 1)])
    theirs.load_state_dict(ours.state_dict())
    for number, (a, b) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
        a.grad = torch.randn_like(a) * 10.0 ** (number % 4 - 3)
        b.grad = a.grad.clone()
    ours[0].weight.grad[0] = theirs[0].weight.grad[0] = 0.0
    timm.utils.agc.adaptive_clip_grad(theirs.parameters())
    clip_adaptively(list(ours.parameters()))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert_close(a.grad, b.grad, 1e-6)
