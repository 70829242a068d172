"""Small .cfg files of each version of YOLO, with every layer type that the published ones use, and random weights."""

import math
from pathlib import Path

import numpy as np

from pentad.weights.darknet import Header, slices
from pentad.weights.darknet_cfg import parse


def section(name: str, **options: object) -> str:
    lines = (f"{key}={value}" for key, value in options.items())
    return f"[{name}]\n" + "".join(f"{line}\n" for line in lines) + "\n"


def conv(filters: int, size: int = 3, stride: int = 1, activation: str = "leaky", norm: int = 1, **more: object) -> str:
    options = {"filters": filters, "size": size, "stride": stride, "pad": 1, "activation": activation}
    return section("convolutional", batch_normalize=norm, **options, **more)


def net(width: int, height: int, channels: int = 3) -> str:
    return section("net", width=width, height=height, channels=channels, learning_rate=0.001)


def pool(size: int = 2, stride: int = 2) -> str:
    return section("maxpool", size=size, stride=stride)


def route(*layers: int, **more: object) -> str:
    return section("route", layers=",".join(map(str, layers)), **more)


def yolo(mask: str, classes: int = 3, **more: object) -> str:
    anchors = "4,6, 9,8, 12,20, 20,16, 30,34, 40,30"
    return section("yolo", mask=mask, anchors=anchors, num=6, classes=classes, thresh=0.0, **more)


def v1(*, local: bool = False) -> str:
    """The paper's head (two connected layers), or that of the released yolov1.cfg (local and connected)."""
    head = section("local", filters=6, size=3, stride=1, pad=1, activation="leaky") if local else ""
    head += "" if local else section("connected", output=32, activation="leaky")
    head += section("dropout", probability=0.5) + section("connected", output=9 * (2 * 5 + 3), activation="linear")
    detection = section("detection", classes=3, coords=4, side=3, num=2, softmax=0, sqrt=1, rescore=1)
    body = conv(8, 7, 2) + pool() + conv(16) + pool() + conv(12, 1) + conv(16, 3, 2)
    return net(48, 48) + body + head + detection


def v2() -> str:
    anchors = "1.3,1.7, 3.1,4.0, 0.6,0.9"
    region = section(
        "region", anchors=anchors, classes=3, coords=4, num=3, softmax=1, thresh=0.0, bias_match=1, classfix=1
    )
    body = conv(8) + pool() + conv(16) + conv(16, activation="relu", norm=0) + pool() + conv(12)
    return (
        net(64, 48)
        + body
        + route(-3)
        + section("reorg", stride=2)
        + route(-1, -3)
        + conv(24, 1, 1, "linear", 0)
        + region
    )


def v3() -> str:
    body = (
        conv(8) + conv(16, 3, 2) + conv(8, 1) + conv(16) + section("shortcut", **{"from": -3, "activation": "linear"})
    )
    body += pool() + conv(24) + pool(2, 1) + conv(16, 1) + conv(24, 1, 1, "linear", 0) + yolo("3,4,5")
    up = (
        route(-3)
        + conv(8, 1)
        + section("upsample", stride=2)
        + route(-1, 4)
        + conv(24, 1, 1, "linear", 0)
        + yolo("0,1,2")
    )
    return net(64, 48) + body + up


def v4() -> str:
    """Cross-stage parts, grouped and depthwise convolutions, mish and swish, spatial pyramid pooling."""
    body = (
        conv(8, activation="mish")
        + conv(16, 3, 2, "mish")
        + route(-1, groups=2, group_id=1)
        + conv(8, activation="swish")
    )
    body += conv(8, 3, 1, "mish", groups=8) + route(-1, -2) + conv(16, 1, 1, "mish", groups=2) + route(-6, -1)
    spp = pool(3, 1) + route(-2) + pool(5, 1) + route(-4) + pool(9, 1) + route(-1, -3, -5, -6)
    head = conv(16, 1, 2) + conv(24, 1, 1, "logistic", 0) + yolo("3,4,5", scale_x_y=1.05)
    return net(48, 48) + body + spp + head


def write(folder: Path, text: str, name: str = "tiny", header: Header | None = None, seed: int = 0) -> Path:
    """Write x.cfg and x.weights; statistics and activations have about unit size."""
    random = np.random.default_rng(seed)
    path = folder / f"{name}.cfg"
    path.write_text(text)
    content = [(header or Header()).pack()]
    for one in slices(parse(text)):
        leaf = one.name.partition(".norm.")[2]
        if leaf in ("weight", "running_var"):
            values = random.uniform(0.5, 1.5, one.shape)
        else:
            values = random.normal(
                0, 0.1 if len(one.shape) == 1 else 1.4 / math.sqrt(math.prod(one.shape[1:])), one.shape
            )
        content.append(values.astype("<f4").tobytes())
    path.with_suffix(".weights").write_bytes(b"".join(content))
    return path
