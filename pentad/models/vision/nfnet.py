"""NFNet (arXiv:2102.06171): a ResNet without normalization layers, F0 to F7.

Weights are standardized in each forward pass (arXiv:2101.08692), activations scaled to keep the variance at 1, and each
residual branch starts at zero (SkipInit, arXiv:2002.10444). The files are timm's dm_nfnet_f0 … f6, DeepMind's weights.

Legend: B images [C, H, W]; V classes.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family
from pentad.models.vision.config import ClassifierConfig, Preprocessing, count_layers, sizes, timm_labels
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, Rule

GELU_GAIN = 1.7015043497085571
"""1 / the standard deviation of GELU of a standard normal variable."""
ATTENTION_GAIN = 2.0
"""Twice the output of squeeze-and-excitation, whose gate is 1/2 on average."""
CROPS = {1: 0.9, 2: 0.91, 3: 0.92, 4: 0.94, 5: 0.951, 6: 0.954, 7: 0.956, 8: 0.956}
TEST_SIZES = {1: 256, 2: 320, 3: 352, 4: 416, 5: 512, 6: 544, 7: 576, 8: 608}
"""Depth of the first stage -> the fraction of the side, and the size, at which F0 … F7 are evaluated."""


@dataclass(frozen=True, kw_only=True)
class NFNetConfig(ClassifierConfig):
    """Sizes of an NFNet; the defaults are F0's.

    Attributes:
        alpha: factor of each residual branch.
        group_size: channels of a group in the 3 by 3 convolutions.
        drop_path_rate: stochastic depth of the last block, in training; the rate grows linearly from 0.
    """

    num_channels: int = 3
    stem_size: int = 128
    hidden_sizes: tuple[int, ...] = (256, 512, 1536, 1536)
    depths: tuple[int, ...] = (1, 2, 6, 3)
    head_size: int = 3072
    group_size: int = 128
    alpha: float = 0.2
    std_conv_eps: float = 1e-5
    drop_path_rate: float = field(default=0.0, metadata={"least": 0})

    HEAD = "head.fc"

    @classmethod
    def variant(cls, number: int, **fields: Any) -> Self:
        """F0 to F7."""
        return cls(depths=tuple(depth * (number + 1) for depth in (1, 2, 6, 3)), **fields)

    @property
    def preprocessing(self) -> Preprocessing:
        """timm resizes to size / crop without keeping the aspect ratio ("squash"), and cuts out the center."""
        side = TEST_SIZES.get(self.depths[0], 256)
        resized = int(side / CROPS.get(self.depths[0], 0.9))
        return Preprocessing(size=(resized, resized), crop=side, resample="bicubic")

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path = checkpoint.path
        if not self.depths or len(self.depths) != len(self.hidden_sizes) or sum(self.depths) > 1000:
            raise BadInput(f"{path}: depths {[*self.depths][:8]} don't fit hidden_sizes {list(self.hidden_sizes)[:8]}")
        if self.stem_size % 8 or any(size % (2 * self.group_size) for size in self.hidden_sizes):
            raise BadInput(
                f"{path}: half of each of hidden_sizes {list(self.hidden_sizes)[:8]} can't be divided into"
                f" groups of {self.group_size}, or stem_size {self.stem_size} by 8"
            )
        return super().resolve(checkpoint)


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weight is standardized for each output channel, then scaled by ``gain / sqrt(fan-in)``.

    It pads as TensorFlow does ("SAME"): more at the end if the padding is odd.

    Args:
        in_channels, channels, kernel, stride, groups: as of any convolution.
        eps: added to the weight's variance.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, *, eps: float
    ) -> None:
        super().__init__(in_channels, channels, kernel, stride, groups=groups)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def standardized(self) -> Tensor:
        """The weight that multiplies."""
        scale = self.weight[0].numel() ** -0.5
        rows, gain = self.weight.flatten(1)[None], (self.gain * scale).flatten()
        out = F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=self.eps)
        return out.view_as(self.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            padding = kernel // 2
        else:
            rows, columns = (max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in x_BCHW.shape[2:])
            x_BCHW = F.pad(x_BCHW, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            padding = 0
        return F.conv2d(x_BCHW, self.standardized(), self.bias, stride, padding, groups=self.groups)


def scaled_gelu(x: Tensor) -> Tensor:
    """GELU with a variance of 1 for a standard normal input."""
    return F.gelu(x).mul_(GELU_GAIN) if not torch.is_grad_enabled() else F.gelu(x) * GELU_GAIN


class SqueezeExcite(nn.Module):
    """Channels weighted by a gate that is computed from their means (arXiv:1709.01507)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        gate_BC11: Tensor = self.fc2(F.relu(self.fc1(x_BCHW.mean((2, 3), keepdim=True))))
        return x_BCHW * gate_BC11.sigmoid()


class Downsample(nn.Module):
    """The shortcut of a block that changes the size: average pooling, then a 1 by 1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, eps: float) -> None:
        super().__init__()
        self.stride = stride
        self.conv = StandardizedConv2d(in_channels, channels, 1, eps=eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.stride > 1:
            x_BCHW = F.avg_pool2d(x_BCHW, 2, self.stride, ceil_mode=True, count_include_pad=False)
        y_BCHW: Tensor = self.conv(x_BCHW)
        return y_BCHW


class Block(nn.Module):
    """shortcut + alpha * skipinit_gain * f(beta * gelu(x)), where 1 / beta is the input's standard deviation.

    Parts have timm's names.
    """

    def __init__(
        self, config: NFNetConfig, in_channels: int, channels: int, stride: int, beta: float, drop_path: float
    ) -> None:
        super().__init__()
        eps, middle = config.std_conv_eps, channels // 2
        groups = middle // config.group_size
        self.alpha, self.beta, self.drop_path = config.alpha, beta, drop_path
        changes = stride > 1 or in_channels != channels
        self.downsample = Downsample(in_channels, channels, stride, eps) if changes else None
        self.conv1 = StandardizedConv2d(in_channels, middle, 1, eps=eps)
        self.conv2 = StandardizedConv2d(middle, middle, 3, stride, groups, eps=eps)
        self.conv2b = StandardizedConv2d(middle, middle, 3, 1, groups, eps=eps)
        self.conv3 = StandardizedConv2d(middle, channels, 1, eps=eps)
        self.attn_last = SqueezeExcite(channels, channels // 2)
        self.skipinit_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = scaled_gelu(x_BCHW) * self.beta
        shortcut_BCHW = x_BCHW if self.downsample is None else self.downsample(y_BCHW)
        for conv in (self.conv1, self.conv2, self.conv2b):
            y_BCHW = scaled_gelu(conv(y_BCHW))
        y_BCHW = ATTENTION_GAIN * self.attn_last(self.conv3(y_BCHW))
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            y_BCHW = y_BCHW * y_BCHW.new_empty(len(y_BCHW), 1, 1, 1).bernoulli_(keep).div_(keep)
        out_BCHW: Tensor = y_BCHW * (self.skipinit_gain * self.alpha) + shortcut_BCHW
        return out_BCHW


class NFNet(nn.Module):
    """A stem of four convolutions, four stages, a wide 1 by 1 convolution, and a linear head on its mean."""

    def __init__(self, config: NFNetConfig) -> None:
        super().__init__()
        c = self.config = config
        eps = c.std_conv_eps
        widths = [c.num_channels, c.stem_size // 8, c.stem_size // 4, c.stem_size // 2, c.stem_size]
        convs = [
            StandardizedConv2d(before, after, 3, stride, eps=eps)
            for (before, after), stride in zip(pairwise(widths), (2, 1, 1, 2), strict=True)
        ]
        self.stem = nn.ModuleDict({f"conv{i + 1}": conv for i, conv in enumerate(convs)})
        channels, variance, stages, number, total = c.stem_size, 1.0, [], 0, sum(c.depths)
        for stage, (depth, size) in enumerate(zip(c.depths, c.hidden_sizes, strict=True)):
            blocks = []
            for i in range(depth):
                rate = c.drop_path_rate * number / max(1, total - 1)
                blocks.append(Block(c, channels, size, 2 if stage and not i else 1, variance**-0.5, rate))
                variance = (1.0 if i == 0 else variance) + c.alpha**2  # a shortcut with a convolution resets it
                channels, number = size, number + 1
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final_conv = StandardizedConv2d(channels, c.head_size, 1, eps=eps)
        self.head = nn.Linear(c.head_size, c.num_labels) if c.num_labels else nn.Identity()

    def forward(self, images_BCHW: Tensor, *, checkpointing: str = "none") -> Tensor:
        """The logits [B, V]; without a head the pooled channels."""
        logits_BV: Tensor = self.head(self.pooled(images_BCHW))
        return logits_BV

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """What the head sees, [B, head_size]."""
        x_BCHW = images_BCHW
        for i, conv in enumerate(self.stem.values()):
            x_BCHW = conv(scaled_gelu(x_BCHW) if i else x_BCHW)
        features_BCHW: Tensor = self.final_conv(self.stages(x_BCHW))
        return scaled_gelu(features_BCHW).mean((2, 3))


def _timm(config: NFNetConfig) -> list[KeyTable]:
    return [KeyTable([Rule("head", "head.fc")], prefix="")]


def recognizes(checkpoint: Checkpoint) -> bool:
    """timm's config.json has no model_type. Its nfnet_… without ``dm_`` pad otherwise, and have no skipinit_gain."""
    if "model_type" in checkpoint.config:
        return checkpoint.format == "hf" and checkpoint.config["model_type"] == "nfnet"
    return {"stem.conv4.gain", "stages.0.0.skipinit_gain", "final_conv.gain"} <= checkpoint.tensors.keys()


def from_tensors(checkpoint: Checkpoint) -> NFNetConfig:
    """The config of timm's files, read off their tensors."""
    stages = range(count_layers(checkpoint, "stages."))
    return NFNetConfig(
        **timm_labels(checkpoint, "head.fc.weight"),
        num_channels=sizes(checkpoint, "stem.conv1.weight")[1],
        stem_size=sizes(checkpoint, "stem.conv4.weight")[0],
        hidden_sizes=tuple(sizes(checkpoint, f"stages.{i}.0.conv3.weight")[0] for i in stages),
        depths=tuple(count_layers(checkpoint, f"stages.{i}.") for i in stages),
        head_size=sizes(checkpoint, "final_conv.weight")[0],
        group_size=sizes(checkpoint, "stages.0.0.conv2.weight")[1],
    )


@torch.no_grad()
def initialize(network: nn.Module, config: NFNetConfig, generator: torch.Generator) -> None:
    """As in timm: a variance of 1 / fan-in for convolutions, and a standard deviation of 0.01 for the head."""
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2 or name.endswith("gain"):
            parameter.fill_(1.0 if name.endswith(".gain") else 0.0)
        else:
            std = 0.01 if name.startswith("head.") else parameter[0].numel() ** -0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


FAMILY = Family(
    NFNetConfig,
    NFNet,
    key_tables={"hf": _timm, "state_dict": _timm},
    names=ArchitectureNames("nfnet", "NFNet"),
    recognizes=recognizes,
    task="classify",
    read_config=from_tensors,
    initialize=initialize,
)
