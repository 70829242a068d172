"""YOLOX (arXiv:2107.08430): CSPDarknet, PAFPN and a decoupled head without anchors, nano to x.

The files are the published state dicts (.pth); parts have their names.

Legend: B images [3, H, W]; N cells of all three strides; K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family, ModelConfig
from pentad.models.vision.config import count_layers, sizes
from pentad.nn.boxes import to_corners
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, Rule
from pentad.weights.labels import COCO

STRIDES = 8, 16, 32
PRIOR = 0.01
"""The score that a new head gives to every class and cell."""
_WIDTHS = 256, 512, 1024  # channels at the three strides


@dataclass(frozen=True, kw_only=True)
class YOLOXConfig(ModelConfig):
    """Sizes of a YOLOX; the names are those of the published experiments.

    Attributes:
        depth, width: factors of the blocks' number and of the channels (L has 1 and 1).
        depthwise: 3 by 3 convolutions are depthwise and then 1 by 1 (nano).
        test_size: height and width that images are fitted into.
        id2label: the classes' names by index.
    """

    depth: float = 1 / 3
    width: float = 0.5
    depthwise: bool = False
    test_size: tuple[int, int] = (640, 640)
    id2label: Mapping[str, str] = field(default_factory=lambda: {str(i): label for i, label in enumerate(COCO)})

    @property
    def names(self) -> tuple[str, ...]:
        """The classes' names."""
        return tuple(self.id2label[str(i)] for i in range(len(self.id2label)))

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path, count = checkpoint.path, len(self.id2label)
        if not count or {*self.id2label} != {str(i) for i in range(count)}:
            raise BadInput(f"{path}: id2label has keys {[*self.id2label][:4]}; expected 0 to {max(count, 1) - 1}")
        if not 0 < self.depth <= 4 or not 0 < self.width <= 4 or int(64 * self.width) < 1:
            raise BadInput(f"{path}: depth {self.depth} and width {self.width}; expected factors up to 4")
        if len(self.test_size) != 2 or any(side % STRIDES[-1] or not 0 < side <= 4096 for side in self.test_size):
            raise BadInput(f"{path}: test_size is {[*self.test_size]}; expected two multiples of 32 up to 4096")
        return self

    def to_hf(self) -> dict[str, Any]:
        return {**super().to_hf(), "label2id": {label: int(i) for i, label in self.id2label.items()}}


class BaseConv(nn.Module):
    """Convolution, batch norm and SiLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x_BCHW)), inplace=True)


class DWConv(nn.Module):
    """A depthwise convolution, then one of 1 by 1."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = BaseConv(in_channels, in_channels, kernel, stride, groups=in_channels)
        self.pconv = BaseConv(in_channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.pconv(self.dconv(x_BCHW))
        return out_BCHW


class Focus(nn.Module):
    """The four pixels of each 2 by 2 square become channels."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = BaseConv(4 * in_channels, channels, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        parts = [x_BCHW[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        out_BCHW: Tensor = self.conv(torch.cat(parts, 1))
        return out_BCHW


class Bottleneck(nn.Module):
    def __init__(self, channels: int, shortcut: bool, conv: type[BaseConv | DWConv]) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1)
        self.conv2 = conv(channels, channels, 3)
        self.shortcut = shortcut

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW: Tensor = self.conv2(self.conv1(x_BCHW))
        return y_BCHW + x_BCHW if self.shortcut else y_BCHW


class CSPLayer(nn.Module):
    """Two halves of the channels, one of them through bottlenecks (arXiv:1911.11929)."""

    def __init__(
        self, in_channels: int, channels: int, count: int, conv: type[BaseConv | DWConv], *, shortcut: bool = True
    ) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = BaseConv(in_channels, half, 1)
        self.conv2 = BaseConv(in_channels, half, 1)
        self.conv3 = BaseConv(2 * half, channels, 1)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut, conv) for _ in range(count)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        deep_BCHW, shallow_BCHW = self.conv1(x_BCHW), self.conv2(x_BCHW)
        out_BCHW: Tensor = self.conv3(torch.cat((self.m(deep_BCHW), shallow_BCHW), 1))
        return out_BCHW


class SPPBottleneck(nn.Module):
    """Maxima over 5, 9 and 13 pixels beside the input (spatial pyramid pooling, arXiv:1406.4729)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels // 2, 1)
        self.conv2 = BaseConv(channels // 2 * 4, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv1(x_BCHW)
        maxima = [x_BCHW]
        for _ in range(3):  # a maximum over 5 of a maximum over 5 is one over 9
            maxima.append(F.max_pool2d(maxima[-1], 5, 1, 2))
        out_BCHW: Tensor = self.conv2(torch.cat(maxima, 1))
        return out_BCHW


class CSPDarknet(nn.Module):
    """The features at strides 8, 16 and 32."""

    def __init__(self, config: YOLOXConfig, conv: type[BaseConv | DWConv]) -> None:
        super().__init__()
        base, depth = int(config.width * 64), max(round(config.depth * 3), 1)
        layer = partial(CSPLayer, conv=conv)
        self.stem = Focus(3, base)
        self.dark2 = nn.Sequential(conv(base, 2 * base, 3, 2), layer(2 * base, 2 * base, depth))
        self.dark3 = nn.Sequential(conv(2 * base, 4 * base, 3, 2), layer(4 * base, 4 * base, 3 * depth))
        self.dark4 = nn.Sequential(conv(4 * base, 8 * base, 3, 2), layer(8 * base, 8 * base, 3 * depth))
        self.dark5 = nn.Sequential(
            conv(8 * base, 16 * base, 3, 2),
            SPPBottleneck(16 * base),
            layer(16 * base, 16 * base, depth, shortcut=False),
        )

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x3_BCHW = self.dark3(self.dark2(self.stem(images_BCHW)))
        x4_BCHW = self.dark4(x3_BCHW)
        return x3_BCHW, x4_BCHW, self.dark5(x4_BCHW)


class PAFPN(nn.Module):
    """Features of coarser levels go up, and those of finer levels down again (arXiv:1803.01534)."""

    def __init__(self, config: YOLOXConfig, conv: type[BaseConv | DWConv]) -> None:
        super().__init__()
        small, middle, large = (int(width * config.width) for width in _WIDTHS)
        layer = partial(CSPLayer, count=round(3 * config.depth), conv=conv, shortcut=False)
        self.backbone = CSPDarknet(config, conv)
        self.lateral_conv0 = BaseConv(large, middle, 1)
        self.C3_p4 = layer(2 * middle, middle)
        self.reduce_conv1 = BaseConv(middle, small, 1)
        self.C3_p3 = layer(2 * small, small)
        self.bu_conv2 = conv(small, small, 3, 2)
        self.C3_n3 = layer(2 * small, middle)
        self.bu_conv1 = conv(middle, middle, 3, 2)
        self.C3_n4 = layer(2 * middle, large)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x3_BCHW, x4_BCHW, x5_BCHW = self.backbone(images_BCHW)
        top_BCHW = self.lateral_conv0(x5_BCHW)
        up4_BCHW = self.C3_p4(torch.cat((_twice(top_BCHW), x4_BCHW), 1))
        reduced_BCHW = self.reduce_conv1(up4_BCHW)
        out3_BCHW = self.C3_p3(torch.cat((_twice(reduced_BCHW), x3_BCHW), 1))
        out4_BCHW = self.C3_n3(torch.cat((self.bu_conv2(out3_BCHW), reduced_BCHW), 1))
        out5_BCHW = self.C3_n4(torch.cat((self.bu_conv1(out4_BCHW), top_BCHW), 1))
        return out3_BCHW, out4_BCHW, out5_BCHW


def _twice(x_BCHW: Tensor) -> Tensor:
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


class Head(nn.Module):
    """Classes, and boxes with objectness, from separate convolutions at each stride."""

    def __init__(self, config: YOLOXConfig, conv: type[BaseConv | DWConv]) -> None:
        super().__init__()
        width, classes = int(256 * config.width), len(config.id2label)
        self.stems = nn.ModuleList(BaseConv(int(channels * config.width), width, 1) for channels in _WIDTHS)
        self.cls_convs = nn.ModuleList(_pair(conv, width) for _ in STRIDES)
        self.reg_convs = nn.ModuleList(_pair(conv, width) for _ in STRIDES)
        self.cls_preds = nn.ModuleList(nn.Conv2d(width, classes, 1) for _ in STRIDES)
        self.reg_preds = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in STRIDES)
        self.obj_preds = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in STRIDES)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        levels = []
        for i, x_BCHW in enumerate(features):
            x_BCHW = self.stems[i](x_BCHW)
            classes_BKHW = self.cls_preds[i](self.cls_convs[i](x_BCHW))
            regions_BCHW = self.reg_convs[i](x_BCHW)
            box_B4HW, object_B1HW = self.reg_preds[i](regions_BCHW), self.obj_preds[i](regions_BCHW)
            levels.append(torch.cat((box_B4HW, object_B1HW, classes_BKHW), 1).flatten(2))
        return torch.cat(levels, 2).transpose(1, 2)


def _pair(conv: type[BaseConv | DWConv], width: int) -> nn.Sequential:
    return nn.Sequential(conv(width, width, 3), conv(width, width, 3))


class Cells(NamedTuple):
    """The cells of all strides: [N] each."""

    x_N: Tensor
    y_N: Tensor
    stride_N: Tensor


class YOLOX(nn.Module):
    """The network. For training see `pentad.train.objectives.yolox`."""

    def __init__(self, config: YOLOXConfig) -> None:
        super().__init__()
        self.config = config
        conv = DWConv if config.depthwise else BaseConv
        self.backbone = PAFPN(config, conv)
        self.head = Head(config, conv)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """For each cell the box (see `decode`), and logits of objectness and the classes.

        Args:
            images_BCHW: blue, green, red from 0 to 255; H and W are multiples of 32.

        Returns:
            [B, N, 5 + K].
        """
        out_BNO: Tensor = self.head(self.backbone(images_BCHW))
        return out_BNO


def cells(height: int, width: int, device: torch.device | str = "cpu") -> Cells:
    """The cells of an image of this size."""
    parts = []
    for stride in STRIDES:
        rows, columns = torch.meshgrid(
            torch.arange(height // stride, device=device), torch.arange(width // stride, device=device), indexing="ij"
        )
        parts.append((columns.flatten(), rows.flatten(), torch.full_like(rows.flatten(), stride)))
    return Cells(*(torch.cat(part) for part in zip(*parts, strict=True)))


def decode(out_BN4: Tensor, at: Cells) -> Tensor:
    """Boxes x0, y0, x1, y1 in the network's pixels: a cell's box is centered near its corner, as large as exp(w, h)."""
    center_BN2 = out_BN4[..., :2] + torch.stack((at.x_N, at.y_N), -1)
    return to_corners(torch.cat((center_BN2, out_BN4[..., 2:4].exp()), -1) * at.stride_N[:, None])


def _recognizes(checkpoint: Checkpoint) -> bool:
    if "model_type" in checkpoint.config:
        return str(checkpoint.config["model_type"]) == "yolox"
    return {"backbone.backbone.stem.conv.conv.weight", "head.cls_preds.0.weight"} <= checkpoint.tensors.keys()


def _read_config(checkpoint: Checkpoint) -> YOLOXConfig:
    """The config of a published file, read off its tensors; nano and tiny are tested at 416 pixels."""
    width = sizes(checkpoint, "backbone.backbone.stem.conv.conv.weight")[0] / 64
    classes = sizes(checkpoint, "head.cls_preds.0.weight")[0]
    names = COCO if classes == len(COCO) else tuple(f"class {i}" for i in range(classes))
    return YOLOXConfig(
        depth=count_layers(checkpoint, "backbone.C3_p4.m.") / 3,
        width=width,
        depthwise="backbone.bu_conv1.dconv.conv.weight" in checkpoint.tensors,
        test_size=(416, 416) if width < 0.5 else (640, 640),
        id2label={str(i): name for i, name in enumerate(names)},
    )


@torch.no_grad()
def _initialize(network: YOLOX, config: YOLOXConfig, generator: torch.Generator) -> None:
    """As published: torch's own initialization, and heads that give `PRIOR`."""
    for name, part in network.named_modules():
        if isinstance(part, nn.Conv2d):
            bound = part.weight[0].numel() ** -0.5
            for parameter in part.parameters():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
            if part.bias is not None and ("cls_preds" in name or "obj_preds" in name):
                part.bias.fill_(-math.log((1 - PRIOR) / PRIOR))
        elif isinstance(part, nn.BatchNorm2d):
            part.reset_parameters()


def _tables(config: YOLOXConfig) -> list[KeyTable]:
    rules = [Rule("backbone", "backbone"), Rule("head", "head")]
    return [KeyTable(rules, ignored=[r".*num_batches_tracked"], prefix="")]


FAMILY = Family(
    YOLOXConfig,
    YOLOX,
    key_tables={"hf": _tables, "state_dict": _tables},
    names=ArchitectureNames("yolox", "YOLOX"),
    recognizes=_recognizes,
    task="detect",
    read_config=_read_config,
    initialize=_initialize,
)
