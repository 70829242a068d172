"""Darknet networks written back as .cfg, .weights and .names files."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pentad import BadInput, weights
from pentad.build import build
from pentad.convert import convert
from pentad.models.vision.darknet import Darknet
from pentad.vision.darknet_files import export_darknet
from pentad.weights.darknet import Header
from tests.helpers.darknet_files import v1, v3, write


def test_a_conversion_writes_the_newest_version(tmp_path: Path) -> None:
    source = write(tmp_path, v1(), header=Header(0, 1, 0, 7))
    done = convert(source, tmp_path / "out" / "new.cfg", to="darknet")
    assert [path.name for path in done.files] == ["new.cfg", "new.weights", "new.names"]
    again, before = weights.open(done.path), weights.open(source)
    assert again.config["header"] == Header(seen=7)
    assert again.config["names"] == before.config["names"] == ("class 0", "class 1", "class 2")
    assert all(torch.equal(again.tensors[name].read(), entry.read()) for name, entry in before.tensors.items())


def test_a_trained_network_is_read_by_opencv(tmp_path: Path) -> None:
    network = build(weights.open(write(tmp_path, v3())), trainable=True)
    assert isinstance(network, Darknet)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    images = torch.rand(2, *network.cfg.shape)
    sum(out.square().mean() for out in network.outputs(images)).backward()
    optimizer.step()
    cfg, *_ = export_darknet(network, tmp_path / "trained.cfg", seen=2)
    peer = cv2.dnn.readNetFromDarknet(str(cfg), str(cfg.with_suffix(".weights")))
    peer.setInput(images[:1].numpy())
    theirs = np.concatenate(peer.forward(peer.getUnconnectedOutLayersNames()))
    with torch.no_grad():
        ours = network.eval()(images[:1])
    np.testing.assert_allclose(ours.objectness_BN[0].numpy(), theirs[:, 4], atol=1e-4)
    assert weights.open(cfg).config["header"].seen == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("new", {}, r"expected a name that ends in \.cfg"),
        ("new.cfg", {"quantize": "q8_0"}, "expected no --quantize"),
        ("tiny.cfg", {}, "exists already"),
    ],
)
def test_bad_conversions(tmp_path: Path, name: str, options: dict[str, str], message: str) -> None:
    source = write(tmp_path, v3())
    with pytest.raises(BadInput, match=message):
        convert(source, tmp_path / name, to="darknet", **options)  # type: ignore[arg-type]


def test_a_cfg_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.cfg").write_text(v3())
    with pytest.raises(BadInput, match=r"a \.cfg file without \.weights"):
        convert(tmp_path / "x.cfg", tmp_path / "y.cfg", to="darknet")
