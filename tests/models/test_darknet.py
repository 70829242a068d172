"""Networks of .cfg files: outputs are OpenCV's; the layers that OpenCV can't run are computed one by one here."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from pentad import weights
from pentad.build import build
from pentad.models.vision.darknet import Darknet, DarknetConfig, Reorg
from pentad.weights.darknet import Header
from pentad.weights.darknet_cfg import parse
from tests.helpers.darknet_files import net, section, v1, v2, v3, v4, write


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(path: Path) -> Darknet:
    network = build(weights.open(path))
    assert isinstance(network, Darknet)
    return network


def image(network: Darknet, batch: int = 1) -> Tensor:
    return torch.rand(batch, *network.cfg.shape)


@pytest.mark.parametrize("text", [v2(), v3(), v4()], ids=["v2", "v3", "v4"])
def test_predictions_are_opencvs(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    network = load(path)
    x = image(network)
    peer = cv2.dnn.readNetFromDarknet(str(path), str(path.with_suffix(".weights")))
    peer.setInput(x.numpy())
    theirs = np.concatenate(peer.forward(peer.getUnconnectedOutLayersNames()))
    boxes, objectness, scores = (one[0].numpy() for one in network(x))
    centers = np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1)
    np.testing.assert_allclose(centers, theirs[:, :4], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(objectness, theirs[:, 4], atol=1e-4)
    kept = theirs[:, 5:] > 0  # OpenCV has run NMS in a region layer
    np.testing.assert_allclose(scores[kept], theirs[:, 5:][kept], atol=1e-4)
    assert kept.mean() > 0.7
    assert scores.std() > 0.05


@pytest.mark.parametrize("local", [False, True], ids=["paper", "released"])
@pytest.mark.parametrize("header", [Header(), Header(minor=1), Header(major=1001)], ids=str)
def test_version_1(tmp_path: Path, local: bool, header: Header) -> None:
    path = write(tmp_path, v1(local=local), header=header)
    content = np.frombuffer(path.with_suffix(".weights").read_bytes()[len(header.pack()) :], "<f4")
    network = load(path)
    x = image(network, 2)
    (out,) = network.outputs(x)
    body = Darknet(DarknetConfig(cfg=v1(local=local).partition("[dropout]")[0])).eval()
    body.load_state_dict(network.state_dict(), strict=False)
    body.requires_grad_(False)
    (features,) = body.outputs(x)
    inputs = features.flatten(1).numpy()
    matrix = content[-117 * inputs.shape[1] :].reshape(117, -1)
    if header.transposed:
        matrix = content[-117 * inputs.shape[1] :].reshape(-1, 117).T
    bias = content[-117 * inputs.shape[1] - 117 :][:117]
    np.testing.assert_allclose(out.flatten(1).numpy(), inputs @ matrix.T + bias, atol=1e-4)
    boxes, _, scores = network.decode([out])
    for cell, anchor in ((0, 0), (5, 1), (8, 1)):  # as Darknet's get_detection_detections
        numbers = out[1].flatten().tolist()
        objectness = numbers[9 * 3 + cell * 2 + anchor]
        bx, by, bw, bh = numbers[9 * 5 + (cell * 2 + anchor) * 4 :][:4]
        cx, cy, width, height = (bx + cell % 3) / 3, (by + cell // 3) / 3, bw**2, bh**2
        expected = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
        assert boxes[1, cell * 2 + anchor].tolist() == pytest.approx(expected, abs=1e-5)
        classes = [objectness * one for one in numbers[cell * 3 : cell * 3 + 3]]
        assert scores[1, cell * 2 + anchor].tolist() == pytest.approx(classes, abs=1e-5)


def test_local_layers_have_weights_for_each_place(tmp_path: Path) -> None:
    text = net(6, 5, 2) + section("local", filters=3, size=3, stride=2, pad=1, activation="linear")
    network = load(write(tmp_path, text))
    x = image(network)
    (out,) = network.outputs(x)
    layer = network.layers[0]
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))[0]
    for row in range(3):
        for column in range(3):
            patch = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3].flatten()
            expected = layer.weight[row * 3 + column] @ patch + layer.bias[:, row, column]
            torch.testing.assert_close(out[0, :, row, column], expected)


def test_reorg_reads_memory_as_darknet_does() -> None:
    channels, height, width, s = 8, 4, 6, 2
    x = torch.arange(float(channels * height * width)).view(1, channels, height, width)
    (layer,) = parse(net(width, height, channels) + section("reorg", stride=s)).layers
    out, flat, expected = Reorg(layer)(x), x.flatten().tolist(), []
    for k in range(channels):  # Darknet's loop
        for j in range(height):
            for i in range(width):
                c, offset = k % (channels // s**2), k // (channels // s**2)
                expected.append(flat[i * s + offset % s + width * s * (j * s + offset // s + height * s * c)])
    assert out.shape == (1, channels * s**2, height // s, width // s)
    assert out.flatten().tolist() == expected


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(2, 1, None), (2, 2, None), (3, 2, None), (5, 1, None), (3, 2, 0)]
)
def test_maxpool_pads_as_darknet_does(size: int, stride: int, padding: int | None) -> None:
    more = {} if padding is None else {"padding": padding}
    text = net(7, 6) + section("maxpool", size=size, stride=stride, **more)
    network = Darknet(DarknetConfig(cfg=text))
    x = torch.randn(1, 3, 6, 7)
    (out,) = network.outputs(x)
    padding = size - 1 if padding is None else padding
    height, width = (6 + padding - size) // stride + 1, (7 + padding - size) // stride + 1
    assert out.shape == (1, 3, height, width)
    for i in range(height):
        for j in range(width):
            top, left = i * stride - padding // 2, j * stride - padding // 2
            window = x[0, :, max(top, 0) : top + size, max(left, 0) : left + size]
            assert torch.equal(out[0, :, i, j], window.amax((1, 2)))


def test_classifiers_run_too() -> None:
    text = net(8, 8) + section("convolutional", filters=4, size=1, activation="linear") + section("avgpool")
    text += section("softmax", groups=1) + section("cost", type="sse")
    (out,) = build(DarknetConfig(cfg=text), seed=1).outputs(torch.rand(2, 3, 8, 8))
    assert out.shape == (2, 4, 1, 1)
    torch.testing.assert_close(out.sum(1), torch.ones(2, 1, 1))


def test_shortcuts_keep_the_channels_of_the_first_layer(tmp_path: Path) -> None:
    text = net(8, 8)
    for filters in (4, 6):
        text += section("convolutional", filters=filters, size=1, activation="linear")
    text += section("shortcut", **{"from": -2, "activation": "linear"})
    text += section("shortcut", **{"from": 0, "activation": "leaky"}) + section(
        "convolutional", filters=4, size=1, activation="linear"
    )
    text += section("shortcut", **{"from": -3, "activation": "linear"})
    path = write(tmp_path, text)
    network = load(path)
    x = image(network)
    (out,) = network.outputs(x)
    peer = cv2.dnn.readNetFromDarknet(str(path), str(path.with_suffix(".weights")))
    peer.setInput(x.numpy())
    np.testing.assert_allclose(out.numpy(), peer.forward(), atol=1e-5)


def test_training_has_gradients_and_the_seed_decides_weights() -> None:
    config = DarknetConfig(cfg=v4())
    network, again = build(config, trainable=True, seed=3), build(config, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), again.parameters(), strict=True))
    loss = sum(out.square().mean() for out in network.outputs(torch.rand(2, 3, 48, 48)))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
