"""A plan of convolutions on float32 images whose channels lie side by side (NHWC).

One call runs the whole plan. Buffers are reused as soon as their last reader has run.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.kernels.binding import CConvOp, ConvActivation, ConvKind, isas, library, limit

ACTIVATIONS = {"linear": ConvActivation.NONE, "leaky": ConvActivation.LEAKY, "relu": ConvActivation.RELU}
ACTIVATIONS |= {"mish": ConvActivation.MISH, "swish": ConvActivation.SWISH, "logistic": ConvActivation.LOGISTIC}
"""Names of activations; leaky has the slope 0.1."""


def max_size() -> int:
    """The largest window that the kernels support; 0 without kernels."""
    return limit("MAX_CONV_SIZE") if isas() else 0


@dataclass(eq=False)
class Memory:
    """A buffer's place in the plan's memory.

    Attributes:
        floats: its size.
        start: its first float, once placed.
        first, last: the first and the last operation that use it.
    """

    floats: int
    start: int = -1
    first: int = -1
    last: int = -1


@dataclass(frozen=True)
class Image:
    """A batch of images [batch, height, width, channels], or a part of its channels.

    Attributes:
        memory: where it is.
        offset: its first channel.
        stride: floats from pixel to pixel.
    """

    batch: int
    height: int
    width: int
    channels: int
    memory: Memory
    offset: int = 0
    stride: int = 0

    def part(self, first: int, count: int) -> Image:
        """Some of its channels."""
        return replace(self, offset=self.offset + first, channels=count)


@dataclass(frozen=True)
class _Op:
    fields: dict[str, int]
    source: Image
    out: Image
    other: Image | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass
class ConvolutionPlan:
    """Operations in order, and their memory.

    Args:
        threads: the number of threads.
        isa: one of `isas()`; the fastest by default.
    """

    threads: int
    isa: str | None = None
    _ops: list[_Op] = field(default_factory=list, init=False)
    _inputs: list[Image] = field(default_factory=list, init=False)
    _array: ctypes.Array[CConvOp] | None = field(default=None, init=False)

    def image(self, batch: int, height: int, width: int, channels: int) -> Image:
        """New images, for an operation to write."""
        pixels = batch * height * width
        return Image(batch, height, width, channels, Memory(pixels * channels), 0, channels)

    def input(self, batch: int, height: int, width: int, channels: int) -> Image:
        """New images that the caller of `run` gives."""
        image = self.image(batch, height, width, channels)
        image.memory.first, image.memory.last = 0, 0
        self._inputs.append(image)
        return image

    def keep(self, image: Image) -> None:
        """Keep images until the plan has run."""
        image.memory.last = 1 << 30

    def convolve(
        self,
        source: Image,
        out: Image,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        activation: str = "linear",
        add: Image | None = None,
    ) -> None:
        """out = activation(convolution of source) (+ add).

        Args:
            source, out, add: images.
            weight: as torch's `conv2d` takes it.
            bias: [output channels].
            stride, padding, groups: as `conv2d` takes them.
            activation: a key of `ACTIVATIONS`.
        """
        outputs, inputs, size, _ = weight.shape
        lanes, values = limit("LANES"), {"size": size, "stride": stride, "pad_top": padding, "pad_left": padding}
        values["activation"] = ACTIVATIONS[activation]
        if groups == source.channels == outputs:
            padded = F.pad(weight.detach().float().reshape(outputs, -1).T, (0, -outputs % lanes)).contiguous()
            self._add(ConvKind.DEPTHWISE, values, source, out, add, padded, bias)
            return
        if size == stride == 1 and padding == 0:  # pixels are independent of each other
            source, out = _flat(source), _flat(out)
        for group in range(groups):
            some = slice(group * outputs // groups, (group + 1) * outputs // groups)
            rows = F.pad(weight[some].detach().float(), (0, 0, 0, 0, 0, 0, 0, -(outputs // groups) % lanes))
            tiles = rows.reshape(-1, lanes, inputs, size * size).permute(0, 3, 2, 1).contiguous()
            place = some.start, outputs // groups
            other = add.part(*place) if add is not None else None
            self._add(
                ConvKind.CONVOLVE,
                values,
                source.part(group * inputs, inputs),
                out.part(*place),
                other,
                tiles,
                bias[some],
            )

    def maxpool(self, source: Image, out: Image, size: int, stride: int, padding: int) -> None:
        """out = the maxima of windows; `padding` is that on the left and above."""
        values = {"size": size, "stride": stride, "pad_top": padding, "pad_left": padding}
        self._add(ConvKind.MAXPOOL, values, source, out)

    def repeat(
        self, source: Image, out: Image, *, times: int = 1, add: Image | None = None, activation: str = "linear"
    ) -> None:
        """out = activation(source, each pixel `times` x `times`, + add); by default a copy."""
        self._add(ConvKind.REPEAT, {"size": times, "add_activation": ACTIVATIONS[activation]}, source, out, add)

    def _add(
        self,
        kind: ConvKind,
        values: dict[str, int],
        source: Image,
        out: Image,
        other: Image | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        if kind != ConvKind.REPEAT and values["size"] > limit("MAX_CONV_SIZE"):
            raise ValueError(f"size is {values['size']}; expected at most {limit('MAX_CONV_SIZE')}")
        number = len(self._ops)
        for image in (source, out, other):
            if image is not None:
                memory = image.memory
                memory.first, memory.last = number if memory.first < 0 else memory.first, max(memory.last, number)
        if bias is not None:
            bias = F.pad(bias.detach().float(), (0, -len(bias) % limit("LANES"))).contiguous()
        self._ops.append(_Op({"kind": kind, **values}, source, out, other, weight, bias))

    def _build(self) -> ctypes.Array[CConvOp]:
        """Place the buffers, and write the operations for the library."""
        memories = {
            id(image.memory): image.memory for op in self._ops for image in (op.source, op.out, op.other) if image
        }
        total = _place(sorted(memories.values(), key=lambda memory: (memory.first, -memory.floats)))
        slack, lanes = limit("LANES"), limit("LANES")
        widest = max(op.source.channels for op in self._ops)
        self._memory = torch.zeros(total + widest + 2 * slack)
        base, zeros = self._memory.data_ptr(), self._memory.data_ptr() + 4 * (total + lanes)

        def address(image: Image) -> int:
            return base + 4 * (image.memory.start + image.offset)

        array = (CConvOp * len(self._ops))()
        for c, op in zip(array, self._ops, strict=True):
            for name, value in op.fields.items():
                setattr(c, name, value)
            c.batch, c.in_height, c.in_width, c.in_channels = _shape(op.source)
            _, c.out_height, c.out_width, c.out_channels = _shape(op.out)
            c.in_stride, c.out_stride, c.in_, c.out = (
                op.source.stride,
                op.out.stride,
                address(op.source),
                address(op.out),
            )
            c.zeros = zeros
            if op.other is not None:
                c.add, c.add_stride = address(op.other), op.other.stride
            for name, tensor in (("weight", op.weight), ("bias", op.bias)):
                if tensor is not None:
                    setattr(c, name, tensor.data_ptr())
        return array

    def run(self, *images: Tensor) -> None:
        """Run all operations; `images` [batch, height, width, channels] go into the plan's inputs."""
        if self._array is None:
            self._array = self._build()
        for place, image in zip(self._inputs, images, strict=True):
            self.view(place).copy_(image)
        library().pentad_convolve(self._array, len(self._array), isas()[self.isa or next(iter(isas()))], self.threads)

    def view(self, image: Image) -> Tensor:
        """Images in the plan's memory, which the next run overwrites."""
        strides = image.height * image.width * image.stride, image.width * image.stride, image.stride, 1
        return self._memory.as_strided(_shape(image), strides, image.memory.start + image.offset)


def _flat(image: Image) -> Image:
    return replace(image, batch=1, height=1, width=image.batch * image.height * image.width)


def _shape(image: Image) -> tuple[int, int, int, int]:
    return image.batch, image.height, image.width, image.channels


def _place(memories: list[Memory]) -> int:
    """Give each buffer the lowest free place; returns the floats of all together."""
    placed: list[Memory] = []
    slack = limit("LANES")
    for memory in memories:
        live = sorted((one for one in placed if one.last >= memory.first), key=lambda one: one.start)
        start = 0
        for one in live:
            if start + memory.floats + slack <= one.start:
                break
            start = max(start, -(-(one.start + one.floats + slack) // 16) * 16)
        memory.start = start
        placed.append(memory)
    return max(memory.start + memory.floats for memory in memories)
