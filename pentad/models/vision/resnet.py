"""ResNet (arXiv:1512.03385) with the stride in the 3 by 3 convolution ("v1.5"), as a classifier and as a backbone.

The files are those of torchvision (resnet18 … resnet152) and transformers (ResNetForImageClassification).

Legend: B images [C, H, W]; V classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family
from pentad.models.vision.config import ClassifierConfig, Preprocessing, count_layers, sizes, timm_labels
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, Rule

Norm = Callable[[int], nn.Module]
"""A number of channels -> a norm for them."""

EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(ClassifierConfig):
    """The fields of a published ``config.json`` that the network reads, with their defaults (ResNet-50)."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    downsample_in_bottleneck: bool = False

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(size=256, crop=224)

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path = checkpoint.path
        if self.layer_type not in EXPANSION:
            raise BadInput(f"{path}: layer_type is {self.layer_type!r}; expected {' or '.join(EXPANSION)}")
        if self.hidden_act != "relu" or self.downsample_in_first_stage or self.downsample_in_bottleneck:
            raise BadInput(f"{path}: hidden_act or downsample_in_… differ from torchvision's ResNets: not supported")
        if not self.depths or len(self.depths) != len(self.hidden_sizes) or sum(self.depths) > 1000:
            raise BadInput(f"{path}: depths {[*self.depths][:8]} don't fit hidden_sizes {list(self.hidden_sizes)[:8]}")
        return super().resolve(checkpoint)


class Block(nn.Module):
    """x + f(x), then ReLU; f is two 3 by 3 convolutions ("basic"), or 1 by 1, 3 by 3, 1 by 1 ("bottleneck").

    Parts have torchvision's names.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, kind: str, norm: Norm) -> None:
        super().__init__()
        middle = channels // EXPANSION[kind]
        bottleneck = kind == "bottleneck"
        self.conv1 = _conv(in_channels, middle, 1 if bottleneck else 3, 1 if bottleneck else stride)
        self.bn1 = norm(middle)
        self.conv2 = _conv(middle, middle, 3, stride if bottleneck else 1)
        self.bn2 = norm(middle)
        if bottleneck:
            self.conv3 = _conv(middle, channels, 1)
            self.bn3 = norm(channels)
        self.bottleneck = bottleneck
        self.downsample = None
        if stride > 1 or in_channels != channels:
            self.downsample = nn.Sequential(_conv(in_channels, channels, 1, stride), norm(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)), inplace=True)
        y_BCHW = self.bn2(self.conv2(y_BCHW))
        if self.bottleneck:
            y_BCHW = self.bn3(self.conv3(F.relu(y_BCHW, inplace=True)))
        y_BCHW += x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return F.relu(y_BCHW, inplace=True)


def _conv(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)


class Backbone(nn.Module):
    """The convolutional stages ``layer1`` … ``layer4``.

    Args:
        config: the sizes.
        norm: makes the norms.
    """

    def __init__(self, config: ResNetConfig, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        channels = config.embedding_size
        self.conv1 = nn.Conv2d(config.num_channels, channels, 7, 2, 3, bias=False)
        self.bn1 = norm(channels)
        self.stages = [f"layer{i}" for i in range(1, len(config.depths) + 1)]
        for number, (name, depth, size) in enumerate(zip(self.stages, config.depths, config.hidden_sizes, strict=True)):
            blocks = []
            for i in range(depth):
                blocks.append(Block(channels, size, 2 if number and not i else 1, config.layer_type, norm))
                channels = size
            self.add_module(name, nn.Sequential(*blocks))

    def features(self, images_BCHW: Tensor) -> list[Tensor]:
        """The output of each stage, at strides 4, 8, 16 and 32."""
        x_BCHW = F.max_pool2d(F.relu(self.bn1(self.conv1(images_BCHW)), inplace=True), 3, 2, 1)
        outputs = []
        for name in self.stages:
            x_BCHW = self.get_submodule(name)(x_BCHW)
            outputs.append(x_BCHW)
        return outputs


class ResNet(Backbone):
    """The stages, and a linear head on their mean."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.config = config
        self.head = nn.Linear(config.hidden_sizes[-1], config.num_labels) if config.num_labels else nn.Identity()

    def forward(self, images_BCHW: Tensor, *, checkpointing: str = "none") -> Tensor:
        """The logits [B, V]; without a head the pooled channels."""
        logits_BV: Tensor = self.head(self.pooled(images_BCHW))
        return logits_BV

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """What the head sees, [B, channels of the last stage]."""
        return self.features(images_BCHW)[-1].mean((2, 3))


COUNTERS = r".*num_batches_tracked"


def _torchvision(config: ResNetConfig) -> list[KeyTable]:
    return [KeyTable([Rule("head", "fc")], ignored=[COUNTERS], prefix="")]


def _hf(config: ResNetConfig) -> list[KeyTable]:
    parts = [("conv", "convolution"), ("bn", "normalization")]
    rules = [Rule("head", "classifier.1")]
    rules += [Rule(f"{ours}1", f"resnet.embedder.embedder.{theirs}") for ours, theirs in parts]
    for stage in range(len(config.depths)):
        layer, block = f"layer{stage + 1}.*", f"resnet.encoder.stages.{stage}.layers.*"
        for i, (ours, theirs) in enumerate(parts):
            rules += [Rule(f"{layer}.{ours}{n + 1}", f"{block}.layer.{n}.{theirs}") for n in range(3)]
            rules.append(Rule(f"layer{stage + 1}.0.downsample.{i}", f"{block[:-1]}0.shortcut.{theirs}"))
    return [KeyTable(rules, ignored=[COUNTERS]), *_torchvision(config)]


def recognizes(checkpoint: Checkpoint) -> bool:
    if "model_type" in checkpoint.config:
        return checkpoint.format == "hf" and checkpoint.config["model_type"] == "resnet"
    return {"conv1.weight", "layer1.0.conv2.weight", "layer1.0.bn1.running_var"} <= checkpoint.tensors.keys()


def stage_fields(checkpoint: Checkpoint, prefix: str = "") -> dict[str, Any]:
    """The sizes of a ResNet with torchvision's names, read off its tensors."""
    embedding, channels, *_ = sizes(checkpoint, f"{prefix}conv1.weight")
    kind = "bottleneck" if f"{prefix}layer1.0.conv3.weight" in checkpoint.tensors else "basic"
    last = "conv3" if kind == "bottleneck" else "conv2"
    depths = [count_layers(checkpoint, f"{prefix}layer{i}.") for i in range(1, 5)]
    stages = [i for i, depth in enumerate(depths, 1) if depth]
    return {
        "num_channels": channels,
        "embedding_size": embedding,
        "hidden_sizes": tuple(sizes(checkpoint, f"{prefix}layer{i}.0.{last}.weight")[0] for i in stages),
        "depths": tuple(filter(None, depths)),
        "layer_type": kind,
    }


def from_tensors(checkpoint: Checkpoint) -> ResNetConfig:
    """The config of torchvision's files, read off their tensors."""
    return ResNetConfig(**stage_fields(checkpoint), **timm_labels(checkpoint, "fc.weight"))


@torch.no_grad()
def initialize(network: nn.Module, config: ResNetConfig, generator: torch.Generator) -> None:
    """As in torchvision: He's normal distribution by the fan-out for convolutions, torch's own for the head."""
    initialize_parts(network, generator)


def initialize_parts(network: nn.Module, generator: torch.Generator) -> None:
    """He's normal distribution (by the fan-out) for convolutions, and torch's own for linear layers."""
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            weight = torch.empty(part.weight.shape)
            if isinstance(part, nn.Linear):
                bound = part.in_features**-0.5
                weight.uniform_(-bound, bound, generator=generator)
            else:
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)
            part.weight.copy_(weight)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, nn.BatchNorm2d):
            part.weight.fill_(1.0)
            part.bias.zero_()


FAMILY = Family(
    ResNetConfig,
    ResNet,
    key_tables={"hf": _hf, "state_dict": _torchvision},
    names=ArchitectureNames("resnet", "ResNetForImageClassification"),
    recognizes=recognizes,
    task="classify",
    read_config=from_tensors,
    initialize=initialize,
)
