"""Networks that Darknet's .cfg files describe: YOLO, versions 1 (arXiv:1506.02640), 2 (1612.08242), 3 (1804.02767) and
4 (2004.10934), and their small forms.

Legend: B images, C channels, H and W the image or a grid; N boxes, K classes; A anchors of a grid cell.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.models.family import ArchitectureNames, Family, ModelConfig
from pentad.weights import darknet_cfg
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.darknet_cfg import HEADS, Layer
from pentad.weights.keytable import KeyTable, Rule

EPS = 1e-6  # OpenCV's; Darknet adds it to the standard deviation, AlexeyAB's fork adds 1e-5 to the variance


@dataclass(frozen=True, kw_only=True)
class DarknetConfig(ModelConfig):
    """A .cfg file.

    Attributes:
        cfg: its text.
        names: labels of the classes.
    """

    cfg: str
    names: tuple[str, ...] = ()


class Predictions(NamedTuple):
    """What a network says of a batch of images, before boxes are chosen.

    Attributes:
        boxes_BN4: x0, y0, x1, y1 as shares of the image's width and height.
        objectness_BN: the probability that there is an object.
        scores_BNK: objectness times the probability of each class.
    """

    boxes_BN4: Tensor
    objectness_BN: Tensor
    scores_BNK: Tensor


class Activation(nn.Module):
    """One of Darknet's activations.

    Args:
        name: one of `pentad.weights.darknet_cfg.ACTIVATIONS`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        match self.name:
            case "leaky":
                return F.leaky_relu(x, 0.1)
            case "relu":
                return F.relu(x)
            case "mish":
                return F.mish(x)
            case "swish":
                return F.silu(x)
            case "logistic":
                return x.sigmoid()
        return x


class Convolutional(nn.Conv2d):
    """Convolution, batch norm and activation."""

    def __init__(self, layer: Layer) -> None:
        normed = bool(layer.batch_normalize)
        channels = layer.input_shape[0], layer.filters
        super().__init__(*channels, layer.size, layer.stride, layer.padding, groups=layer.groups, bias=not normed)
        self.norm = nn.BatchNorm2d(layer.filters, EPS) if normed else None
        self.activation = Activation(layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        activated: Tensor = self.activation(x if self.norm is None else self.norm(x))
        return activated


class Connected(nn.Linear):
    """A matrix over all numbers of the input, batch norm and activation."""

    def __init__(self, layer: Layer) -> None:
        normed = bool(layer.batch_normalize)
        super().__init__(math.prod(layer.input_shape), layer.output, bias=not normed)
        self.norm = nn.BatchNorm1d(layer.output, EPS) if normed else None
        self.activation = Activation(layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.flatten(1))
        activated: Tensor = self.activation(x if self.norm is None else self.norm(x))
        return activated[:, :, None, None]


class Local(nn.Module):
    """A convolution with weights of its own at each place of the output."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.window = {"kernel_size": layer.size, "stride": layer.stride, "padding": layer.padding}
        places, inputs = layer.shape[1] * layer.shape[2], layer.input_shape[0] * layer.size**2
        self.weight = nn.Parameter(torch.empty(places, layer.filters, inputs))
        self.bias = nn.Parameter(torch.empty(layer.shape))
        self.activation = Activation(layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, **self.window).permute(2, 1, 0)  # places, inputs, B
        out = torch.bmm(self.weight, patches).permute(2, 1, 0)
        activated: Tensor = self.activation(out.reshape(-1, *self.bias.shape) + self.bias)
        return activated


class MaxPool(nn.Module):
    """Maximum pooling; of an odd padding the larger half is on the right and below."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.size, self.stride, before = layer.size, layer.stride, layer.padding // 2
        # Windows end where Darknet's end; padding beyond them, which would add a row, is cut.
        after = [
            (out - 1) * layer.stride + layer.size - before - side
            for out, side in zip(layer.shape[1:], layer.input_shape[1:], strict=True)
        ]
        self.padding = before, after[1], before, after[0]

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.padding
        if left == right == top == bottom and 2 * left <= self.size:
            return F.max_pool2d(x, self.size, self.stride, left)
        return F.max_pool2d(F.pad(x, self.padding, value=-math.inf), self.size, self.stride)


class AveragePool(nn.Module):
    """The mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Route(nn.Module):
    """Channels of several layers one after the other, or one group of them."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.groups, self.group = layer.groups, layer.group_id

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.groups > 1:
            inputs = tuple(x.chunk(self.groups, 1)[self.group] for x in inputs)
        return torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]


class Shortcut(nn.Module):
    """The sum of two layers; channels that only one of them has are the first layer's, or are left out."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.activation = Activation(layer.activation)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        extra = x.shape[1] - other.shape[1]
        if extra > 0:
            other = F.pad(other, (0, 0, 0, 0, 0, extra))
        activated: Tensor = self.activation(x + other[:, : x.shape[1]])
        return activated


class Upsample(nn.Module):
    """Each pixel becomes a square."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stride, self.scale = layer.stride, layer.scale

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=self.stride, mode="nearest")
        return x if self.scale == 1 else x * self.scale


class Reorg(nn.Module):
    """Space to depth in Darknet's order: it reads its input as if that had fewer channels and larger sides."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.stride = layer.stride

    def forward(self, x: Tensor) -> Tensor:
        (batch, channels, height, width), s = x.shape, self.stride
        blocks = x.reshape(batch, channels // s**2, height, s, width, s)  # sides s times as large
        return blocks.permute(0, 3, 5, 1, 2, 4).reshape(batch, channels * s**2, height // s, width // s)


class Softmax(nn.Module):
    """Softmax over groups of all numbers."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.groups, self.temperature = layer.groups, layer.temperature

    def forward(self, x: Tensor) -> Tensor:
        groups: Tensor = x.reshape(len(x), self.groups, -1) / self.temperature
        return groups.softmax(2).view_as(x)


class AnchorHead(nn.Module):
    """The layers ``region`` (version 2) and ``yolo`` (3 and 4): boxes relative to the cells of a grid and to anchors.

    Attributes:
        layer: its section, which losses read, too.
        anchors: width and height of each anchor, in cells (``region``) or pixels.
    """

    def __init__(self, layer: Layer, image: darknet_cfg.Shape) -> None:
        super().__init__()
        self.layer, self.image = layer, image
        pairs = list(zip(layer.anchors[::2], layer.anchors[1::2], strict=True))
        self.is_yolo = layer.kind == "yolo"
        self.anchors = [pairs[number] for number in layer.mask] if self.is_yolo else pairs
        self.scale_xy = layer.scale_x_y if self.is_yolo else 1.0
        self.new_coords = self.is_yolo and bool(layer.new_coords)

    def raw(self, x: Tensor) -> Tensor:
        """The layer's input as [B, H, W, A, 5 + K]: x, y, width, height, objectness, classes."""
        batch, _, height, width = x.shape
        return x.permute(0, 2, 3, 1).reshape(batch, height, width, len(self.anchors), -1)

    def forward(self, x: Tensor) -> Predictions:
        raw = self.raw(x).float()
        scores = raw[..., 4:] if self.new_coords else raw[..., 4:].sigmoid()
        objectness, classes = scores[..., :1], scores[..., 1:]
        if not self.is_yolo and self.layer.softmax:
            classes = raw[..., 5:].softmax(-1)
        boxes = self.boxes(raw[..., :4])
        return Predictions(boxes.flatten(1, 3), objectness.flatten(1), (objectness * classes).flatten(1, 3))

    def boxes(self, raw: Tensor) -> Tensor:
        """Boxes as shares of the image, of the same shape [B, H, W, A, 4] as the raw numbers."""
        height, width = raw.shape[1:3]
        offset = raw[..., :2] if self.new_coords else raw[..., :2].sigmoid()
        offset = offset * self.scale_xy - (self.scale_xy - 1) / 2
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cells = torch.stack((x, y), -1)[:, :, None].to(raw)
        centers = (cells + offset) / raw.new_tensor((width, height))
        unit = (self.image[2], self.image[1]) if self.is_yolo else (width, height)
        anchors = raw.new_tensor(self.anchors) / raw.new_tensor(unit)
        sizes = (raw[..., 2:] ** 2 * 4 if self.new_coords else raw[..., 2:].exp()) * anchors
        return torch.cat((centers - sizes / 2, centers + sizes / 2), -1)


class GridHead(nn.Module):
    """The layer ``detection`` (version 1): a few boxes and one distribution of classes for each cell of a grid.

    The input has all cells' classes, then the objectness of all boxes, then all boxes.
    """

    def __init__(self, layer: Layer, image: darknet_cfg.Shape) -> None:
        super().__init__()
        self.layer = layer

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classes [B, S, K], objectness [B, S, A] and boxes [B, S, A, 4] of the S cells, row by row."""
        cells, classes, num = self.layer.side**2, self.layer.classes, self.layer.num
        parts = torch.split(x.flatten(1).float(), [cells * classes, cells * num, cells * num * 4], 1)
        classes_BSK = parts[0].reshape(-1, cells, classes)
        if self.layer.softmax:
            classes_BSK = classes_BSK.softmax(2)
        return classes_BSK, parts[1].reshape(-1, cells, num), parts[2].reshape(-1, cells, num, 4)

    def forward(self, x: Tensor) -> Predictions:
        classes_BSK, objectness_BSA, raw_BSA4 = self.raw(x)
        scores = objectness_BSA[..., None] * classes_BSK[:, :, None]
        return Predictions(self.boxes(raw_BSA4).flatten(1, 2), objectness_BSA.flatten(1), scores.flatten(1, 2))

    def boxes(self, raw_BSA4: Tensor) -> Tensor:
        """Boxes as shares of the image, of the same shape."""
        side = self.layer.side
        cells = torch.arange(side**2, device=raw_BSA4.device)
        corner = torch.stack((cells % side, cells // side), -1)[:, None]
        centers = (raw_BSA4[..., :2] + corner) / side
        sizes = raw_BSA4[..., 2:] ** (2 if self.layer.sqrt else 1)
        return torch.cat((centers - sizes / 2, centers + sizes / 2), -1)


def _module(layer: Layer, image: darknet_cfg.Shape) -> nn.Module:
    match layer.kind:
        case "avgpool":
            return AveragePool()
        case "dropout":
            return nn.Dropout(layer.probability)
        case "cost":
            return nn.Identity()
        case "detection":
            return GridHead(layer, image)
        case "region" | "yolo":
            return AnchorHead(layer, image)
    part: nn.Module = _PARTS[layer.kind](layer)
    return part


_PARTS: Mapping[str, Any] = {
    "convolutional": Convolutional,
    "connected": Connected,
    "local": Local,
    "maxpool": MaxPool,
    "route": Route,
    "shortcut": Shortcut,
    "upsample": Upsample,
    "reorg": Reorg,
    "softmax": Softmax,
}


class Darknet(nn.Module):
    """The network of a .cfg file.

    Attributes:
        config: the file.
        cfg: the parsed file.
        layers: one module for each section after ``[net]``.
        last_use: for each layer, the number of the last layer that takes its output.
    """

    def __init__(self, config: DarknetConfig) -> None:
        super().__init__()
        self.config = config
        self.cfg = darknet_cfg.parse(config.cfg)
        self.layers = nn.ModuleList(_module(layer, self.cfg.shape) for layer in self.cfg.layers)
        self.last_use = {source: number for number, layer in enumerate(self.cfg.layers) for source in layer.inputs}
        self.heads = [number for number, layer in enumerate(self.cfg.layers) if layer.kind in HEADS]

    def outputs(self, images_BCHW: Tensor) -> list[Tensor]:
        """The inputs of the detection layers, or the last layer's output if there are none.

        Args:
            images_BCHW: red, green, blue from 0 to 1, of the height and width of the .cfg file.
        """
        kept: dict[int, Tensor] = {-1: images_BCHW}
        found = []
        for number, (layer, module) in enumerate(zip(self.cfg.layers, self.layers, strict=True)):
            inputs = [kept[source] for source in layer.inputs]
            if number in self.heads:
                found.append(inputs[0])
                kept[number] = inputs[0]
            else:
                kept[number] = module(*inputs)
            for source in layer.inputs:
                if self.last_use[source] == number:
                    kept.pop(source, None)
        return found if self.heads else [kept[len(self.layers) - 1]]

    def forward(self, images_BCHW: Tensor) -> Predictions:
        """All boxes that the detection layers predict; for `images_BCHW` see `outputs`."""
        return self.decode(self.outputs(images_BCHW))

    def decode(self, outputs: list[Tensor]) -> Predictions:
        """Boxes of the detection layers, from their inputs."""
        parts = [self.layers[number](x) for number, x in zip(self.heads, outputs, strict=True)]
        return Predictions(*(torch.cat(one, 1) for one in zip(*parts, strict=True)))


def _read_config(checkpoint: Checkpoint) -> DarknetConfig:
    return DarknetConfig(cfg=checkpoint.config["cfg"], names=tuple(checkpoint.config["names"]))


@torch.no_grad()
def _initialize(network: Darknet, config: DarknetConfig, generator: torch.Generator) -> None:
    """Draw weights as Darknet does: uniform (convolutional, local) or normal with the variance 2 / inputs."""
    for module in network.modules():
        if isinstance(module, Convolutional | Connected | Local):
            inputs = module.weight[0].numel() if not isinstance(module, Local) else module.weight.shape[2]
            bound = math.sqrt(2 / inputs)
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.reset_parameters()


FAMILY = Family(
    config=DarknetConfig,
    network=Darknet,
    key_tables={
        "darknet": lambda config: [KeyTable([Rule("layers.*", "layers.*"), Rule("layers.*.norm", "layers.*.norm")])]
    },
    names=ArchitectureNames("darknet", "Darknet"),
    recognizes=lambda checkpoint: checkpoint.format == "darknet",
    task="detect",
    read_config=_read_config,
    initialize=_initialize,
)
