"""ResNet equals torchvision's and transformers', as a classifier and as a backbone."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

import pentad
import tests.helpers.torchvision_stub  # noqa: F401
from pentad.build import build
from pentad.models.vision import resnet
from pentad.nn.conv import FrozenBatchNorm2d
from tests.helpers.images import assert_close, images, network_of, randomized

torchvision: Any = import_module("torchvision")


@torch.no_grad()
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_logits_equal_those_of_transformers(tmp_path: Path, layer_type: str) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 1], layer_type=layer_type, num_labels=3)
    peer, x = randomized(ResNetForImageClassification(config)), images(2, 3, 64, 64)
    peer.save_pretrained(tmp_path)
    network = network_of(tmp_path)
    assert_close(network(x), peer(x).logits)


@torch.no_grad()
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_files_of_torchvision(tmp_path: Path, block: str) -> None:
    module = torchvision.models.resnet
    peer: Any = randomized(module.ResNet(getattr(module, block), [1, 2, 1, 1], num_classes=7))
    torch.save(peer.state_dict(), tmp_path / "resnet.pth")
    x, network = images(1, 3, 64, 64), network_of(tmp_path / "resnet.pth")
    assert_close(network(x), peer(x))


@torch.no_grad()
def test_a_frozen_batch_norm_equals_torchvisions() -> None:
    for eps in (0.0, 1e-5):
        peer = randomized(torchvision.ops.FrozenBatchNorm2d(8, eps=eps))
        ours, x = FrozenBatchNorm2d(8, eps), images(2, 8, 4, 4)
        ours.load_state_dict(peer.state_dict())
        assert_close(ours.train()(x), peer(x))
        assert not list(ours.parameters())


def test_a_new_network_trains() -> None:
    config = resnet.ResNetConfig(embedding_size=8, hidden_sizes=(16, 32), depths=(1, 1), num_labels=3)
    network = build(config, seed=1, trainable=True)
    network(images(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert {float(p.detach().min()) for n, p in network.named_parameters() if n.endswith("bn1.weight")} == {1.0}


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet", "depths": [1], "hidden_sizes": [8, 8]}')
    with pytest.raises(pentad.BadInput, match=r"depths \[1\] don't fit hidden_sizes \[8, 8\]"):
        network_of(tmp_path)
