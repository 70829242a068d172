"""YOLOX: a reference written from the paper's code, parameter counts, and the published nano's tensors and boxes."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import pentad
from pentad.build import build
from pentad.errors import BadInput
from pentad.models.vision.yolox import YOLOX, BaseConv, YOLOXConfig, cells, decode
from pentad.nn.boxes import pairwise_iou
from pentad.vision.preprocess import yolox_letterbox
from tests.helpers.shared_data import shared_data

SIZES = {"nano": (1 / 3, 0.25, True), "tiny": (1 / 3, 0.375, False), "s": (1 / 3, 0.5, False)}


def config(size: str, classes: int = 80, side: int = 64) -> YOLOXConfig:
    depth, width, depthwise = SIZES[size]
    labels = {str(i): f"label {i}" for i in range(classes)}
    return YOLOXConfig(depth=depth, width=width, depthwise=depthwise, id2label=labels, test_size=(side, side))


def made(size: str, classes: int = 80, side: int = 64) -> YOLOX:
    """A network whose norms change their inputs."""
    network = build(config(size, classes, side), seed=1)
    assert isinstance(network, YOLOX)
    generator = torch.Generator().manual_seed(0)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value, least in ((part.running_mean, -0.3), (part.running_var, 0.5), (part.weight, 0.7)):
                value.data.uniform_(least, least + 0.6, generator=generator)
    return network.eval()


@pytest.mark.parametrize(("size", "count"), [("nano", 912_159), ("tiny", 5_055_855), ("s", 8_968_255)])
def test_published_numbers_of_parameters(size: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in YOLOX(config(size)).parameters()) == count


class Reference:
    """The network as functions of its state dict."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        if f"{name}.dconv.conv.weight" in self.state:
            return self.conv(f"{name}.pconv", self.conv(f"{name}.dconv", x, stride))
        weight = self.state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])
        norm = [self.state[f"{name}.bn.{n}"] for n in ("running_mean", "running_var", "weight", "bias")]
        mean, var, scale, shift = (values[:, None, None] for values in norm)
        y = (x - mean) / (var + 1e-3).sqrt() * scale + shift
        return y * y.sigmoid()

    def csp(self, name: str, x: Tensor, shortcut: bool) -> Tensor:
        deep, i = self.conv(f"{name}.conv1", x), 0
        while f"{name}.m.{i}.conv1.conv.weight" in self.state:
            y = self.conv(f"{name}.m.{i}.conv2", self.conv(f"{name}.m.{i}.conv1", deep))
            deep, i = deep + y if shortcut else y, i + 1
        return self.conv(f"{name}.conv3", torch.cat([deep, self.conv(f"{name}.conv2", x)], 1))

    def __call__(self, x: Tensor) -> Tensor:
        at = "backbone.backbone"
        corners = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        x = self.conv(f"{at}.stem.conv", torch.cat(corners, 1))
        features = []
        for number in (2, 3, 4, 5):
            x = self.conv(f"{at}.dark{number}.0", x, 2)
            if number == 5:
                y = self.conv(f"{at}.dark5.1.conv1", x)
                pools = [y] + [F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13)]
                x = self.conv(f"{at}.dark5.1.conv2", torch.cat(pools, 1))
            x = self.csp(f"{at}.dark{number}.{2 if number == 5 else 1}", x, number != 5)
            features.append(x)
        _, x2, x1, x0 = features
        up = nn.Upsample(scale_factor=2)
        fpn0 = self.conv("backbone.lateral_conv0", x0)
        f0 = self.csp("backbone.C3_p4", torch.cat([up(fpn0), x1], 1), False)
        fpn1 = self.conv("backbone.reduce_conv1", f0)
        pan2 = self.csp("backbone.C3_p3", torch.cat([up(fpn1), x2], 1), False)
        pan1 = self.csp("backbone.C3_n3", torch.cat([self.conv("backbone.bu_conv2", pan2, 2), fpn1], 1), False)
        pan0 = self.csp("backbone.C3_n4", torch.cat([self.conv("backbone.bu_conv1", pan1, 2), fpn0], 1), False)
        rows = []
        for k, x in enumerate((pan2, pan1, pan0)):
            x = self.conv(f"head.stems.{k}", x)
            branch = {}
            for name in ("cls", "reg"):
                branch[name] = self.conv(f"head.{name}_convs.{k}.1", self.conv(f"head.{name}_convs.{k}.0", x))
            for y in range(x.shape[2]):
                for c in range(x.shape[3]):
                    parts = []
                    for pred, source in (("reg", "reg"), ("obj", "reg"), ("cls", "cls")):
                        w, b = (self.state[f"head.{pred}_preds.{k}.{n}"] for n in ("weight", "bias"))
                        parts.append(branch[source][0, :, y, c] @ w[:, :, 0, 0].T + b)
                    box, stride = parts[0], 8 << k
                    center = (box[:2] + torch.tensor([c, y])) * stride
                    half = box[2:].exp() * stride / 2
                    rows.append(torch.cat([center - half, center + half, *parts[1:]]))
        return torch.stack(rows)


@pytest.mark.parametrize("size", ["nano", "s"])
@torch.inference_mode()
def test_outputs_equal_a_reference(size: str) -> None:
    network = made(size, classes=3)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 255
    out_BNO = network(image)
    ours = torch.cat((decode(out_BNO, cells(64, 96)), out_BNO[..., 4:]), -1)[0]
    theirs = Reference(network.state_dict())(image)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("wrapped", [False, True])
def test_published_state_dicts_open_in_place(tmp_path: Path, wrapped: bool) -> None:
    network = made("nano", classes=80)
    state = network.state_dict()
    torch.save({"model": state, "start_epoch": 3} if wrapped else state, tmp_path / "yolox_nano.pth")
    detector = pentad.load(tmp_path / "yolox_nano.pth")
    assert detector.network.config.depthwise
    assert detector.network.config.test_size == (416, 416)
    assert len(detector.labels) == 80
    assert detector.labels[16] == "dog"
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(detector.network(image), network(image))
    del state["head.stems.0.bn.weight"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(BadInput, match=r"bn\.weight"):
        pentad.load(tmp_path / "broken.pth")


def folded_onnx(path: Path) -> YOLOX:
    """The network with the tensors of an ONNX file, whose convolutions hold the batch norms."""
    graph = onnx.load(path).graph
    tensors = {one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in graph.initializer}
    given = [node.input[1:] for node in graph.node if node.op_type == "Conv"]
    network = build(config("nano", side=416))
    assert isinstance(network, YOLOX)
    used: list[nn.Module] = []
    hooks = [
        part.register_forward_hook(lambda part, *_: used.append(part))
        for part in network.modules()
        if isinstance(part, BaseConv) or (isinstance(part, nn.Conv2d) and part.bias is not None)
    ]
    network.eval()(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    for part, (weight, bias) in zip(used, given, strict=True):
        convolution = part.conv if isinstance(part, BaseConv) else part
        convolution.weight.data.copy_(tensors[weight])
        if isinstance(part, BaseConv):
            part.bn.weight.data.fill_((1 + part.bn.eps) ** 0.5)
            part.bn.bias.data.copy_(tensors[bias])
        else:
            part.bias.data.copy_(tensors[bias])
    return network


@torch.inference_mode()
def test_the_published_nano_gives_onnxruntimes_outputs_and_boxes(tmp_path: Path) -> None:
    path = shared_data("yolo/yolox_nano.onnx")
    network = folded_onnx(path)
    session = onnxruntime.InferenceSession(path)
    torch.save(network.state_dict(), tmp_path / "nano.pth")
    detector = pentad.load(tmp_path / "nano.pth")
    for name, expected in (("dog", {"dog", "bicycle", "car"}), ("horses", {"horse"}), ("person", {"person", "dog"})):
        photo = shared_data(f"photos/{name}.jpg")
        pixels = torch.from_numpy(np.array(Image.open(photo).convert("RGB"))).permute(2, 0, 1)
        fitted = yolox_letterbox(pixels, 416, 416)
        [theirs] = session.run(None, {"images": fitted.image[None].numpy()})
        out_NO = network(fitted.image[None])[0]
        ours = torch.cat((out_NO[:, :4], out_NO[:, 4:].sigmoid()), 1)
        assert (ours - torch.from_numpy(theirs[0])).abs().max() <= 1e-4 * ours.abs().max()
        [found] = detector.detect(photo, threshold=0.3)
        assert {one.label for one in found.detections} >= expected
        boxes = decode(torch.from_numpy(theirs), cells(416, 416))[0] / fitted.scale
        scores = torch.from_numpy(theirs[0, :, 4:5] * theirs[0, :, 5:])
        for one in found.detections:
            assert pairwise_iou(torch.tensor([one.box]), boxes).max() > 0.99
            assert (scores[:, one.label_id] - one.score).abs().min() < 1e-4


@pytest.mark.parametrize(
    ("fields", "facts"), [({"test_size": (60, 64)}, "60"), ({"depth": 0.0}, "depth"), ({"id2label": {}}, "id2label")]
)
def test_configs_that_are_refused(fields: dict, facts: str) -> None:
    with pytest.raises(BadInput, match=facts):
        build(YOLOXConfig(**fields))
