"""Darknet's .cfg files: the options and the shape of every layer.

The format is that of pjreddie's Darknet and AlexeyAB's fork, which Yolo-Fastest uses too. Options that only training
reads stay texts; options that would change the network in ways that pentad doesn't know are refused.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pentad.errors import BadInput

ACTIVATIONS = ("linear", "leaky", "relu", "mish", "swish", "logistic")
HEADS = ("region", "yolo", "detection")
MAX_CHANNELS, MAX_SIDE, MAX_LAYERS = 1 << 17, 1 << 14, 4096
MAX_NUMBERS = 1 << 31
"""The largest output of a layer, and the largest weight."""

Shape = tuple[int, int, int]
"""Channels, height, width."""


@dataclass(frozen=True)
class Section:
    """One section as it stands in the file: its name, its line, and its options as texts."""

    name: str
    line: int
    options: Mapping[str, str]


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        kind: the section's name.
        line: the section's line in the file.
        options: the options that inference reads, checked, with Darknet's defaults.
        inputs: the numbers of the layers whose outputs it takes; -1 is the image.
        input_shape: shape of the output of the first of them; all channels of a route.
        shape: shape of its own output.
        texts: all options as they stand in the file.
    """

    kind: str
    line: int
    options: Mapping[str, Any]
    inputs: tuple[int, ...]
    input_shape: Shape
    shape: Shape
    texts: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        """An option by its name."""
        try:
            return self.__dict__["options"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Network:
    """A whole file.

    Attributes:
        shape: channels, height and width of the image.
        layers: the layers.
        texts: the options of ``[net]`` as they stand in the file.
    """

    shape: Shape
    layers: tuple[Layer, ...]
    texts: Mapping[str, str]


def parse(text: str) -> Network:
    """Read the text of a .cfg file.

    Raises:
        BadInput: the text is no .cfg file, or it describes no network; the message names line and option.
    """
    first, *rest = read_sections(text)
    net = {name: read(first, name) for name, read in _NET.items()}
    shape = net["channels"], net["height"], net["width"]
    layers: list[Layer] = []
    if not rest:
        raise BadInput("has a [net] section only; expected layers")
    if len(rest) > MAX_LAYERS:
        raise BadInput(f"has {len(rest):,} layers; expected at most {MAX_LAYERS:,}")
    for section in rest:
        layers.append(_layer(section, layers, shape))
    return Network(shape, tuple(layers), first.options)


def read_sections(text: str) -> list[Section]:
    """Split a file into its sections, ``[net]`` first. As in Darknet the first of two equal options counts."""
    sections: list[Section] = []
    options: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = "".join(line.split())
        if line.startswith("["):
            if not (match := re.fullmatch(r"\[(\w+)\](#.*)?", line)):
                raise BadInput(f"line {number} is {line[:40]!r}; expected a section such as [convolutional]")
            options = {}
            sections.append(Section(_NAMES.get(match[1], match[1]), number, options))
        elif line and line[0] not in "#;\0":
            name, equals, value = line.partition("=")
            if not equals or not name:
                raise BadInput(f"line {number} is {line[:40]!r}; expected option=value")
            if not sections:
                raise BadInput(f"line {number} comes before the first section; expected [net]")
            options.setdefault(name, value.partition("#")[0])
    if not sections or sections[0].name != "net":
        start = f"begins with [{sections[0].name}]" if sections else "has no sections"
        raise BadInput(f"{start}; expected a Darknet .cfg file, which begins with [net]")
    return sections


def _refuse(section: Section, problem: str) -> BadInput:
    return BadInput(f"line {section.line}, [{section.name[:40]}]: {problem}")


Reader = Callable[[Section, str], Any]
"""Reads and checks one option of a section."""


def _whole(default: int | None, low: int = 1, high: int = MAX_CHANNELS) -> Reader:
    def read(section: Section, name: str) -> int:
        text = section.options.get(name)
        if text is None and default is not None:
            return default
        value = int(text) if text is not None and re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
        if value is None or not low <= value <= high:
            given = "is missing" if text is None else f"is {text[:40]}"
            raise _refuse(section, f"{name} {given}; expected a whole number from {low} to {high:,}")
        return value

    return read


def _flag(default: int = 0) -> Reader:
    return _whole(default, 0, 1)


def _number(default: float) -> Reader:
    def read(section: Section, name: str) -> float:
        values: tuple[float, ...] = _numbers()(section, name) if name in section.options else (default,)
        if len(values) != 1:
            raise _refuse(section, f"{name} is {section.options[name][:40]}; expected one number")
        return values[0]

    return read


def _numbers(whole: bool = False) -> Reader:
    def read(section: Section, name: str) -> tuple[float, ...] | None:
        text = section.options.get(name)
        if text is None:
            return None
        try:
            values = tuple(int(one) if whole else float(one) for one in text.strip(",").split(","))
        except ValueError:
            values = ()
        if not values or not all(abs(value) < 1e6 for value in values):  # also False for NaN
            what = "whole numbers" if whole else "numbers"
            raise _refuse(section, f"{name} is {text[:40]}; expected {what} with commas between them")
        return values

    return read


def _activation(default: str) -> Reader:
    def read(section: Section, name: str) -> str:
        value = section.options.get(name, default)
        if value not in ACTIVATIONS:
            raise _refuse(section, f"{name} is {value[:40]}; expected one of {', '.join(ACTIVATIONS)}")
        return value

    return read


_NET: Mapping[str, Reader] = {
    "width": _whole(None, 1, MAX_SIDE),
    "height": _whole(None, 1, MAX_SIDE),
    "channels": _whole(3),
}
_SIDE = _whole(1, 1, MAX_SIDE)
_OPTIONS: Mapping[str, Mapping[str, Reader]] = {
    "convolutional": {
        "filters": _whole(None),
        "size": _whole(1, 1, 255),
        "stride": _SIDE,
        "pad": _flag(),
        "padding": _whole(0, 0, 255),
        "groups": _whole(1),
        "batch_normalize": _flag(),
        "activation": _activation("logistic"),
    },
    "local": {
        "filters": _whole(None),
        "size": _whole(1, 1, 255),
        "stride": _SIDE,
        "pad": _flag(),
        "activation": _activation("logistic"),
    },
    "connected": {"output": _whole(None), "batch_normalize": _flag(), "activation": _activation("logistic")},
    "maxpool": {"size": _whole(0, 1, 255), "stride": _SIDE, "padding": _whole(-1, 0, 255)},
    "avgpool": {},
    "route": {"layers": _numbers(whole=True), "groups": _whole(1), "group_id": _whole(0, 0)},
    "shortcut": {"from": _numbers(whole=True), "activation": _activation("linear")},
    "upsample": {"stride": _whole(2, 1, 64), "scale": _number(1.0)},
    "reorg": {"stride": _whole(1, 1, 64)},
    "dropout": {"probability": _number(0.5)},
    "softmax": {"groups": _whole(1), "temperature": _number(1.0)},
    "cost": {},
    "region": {
        "classes": _whole(20),
        "num": _whole(1, 1, 1000),
        "coords": _whole(4, 4, 4),
        "anchors": _numbers(),
        "softmax": _flag(),
    },
    "yolo": {
        "classes": _whole(20),
        "num": _whole(1, 1, 1000),
        "mask": _numbers(whole=True),
        "anchors": _numbers(),
        "scale_x_y": _number(1.0),
        "new_coords": _flag(),
    },
    "detection": {
        "classes": _whole(1),
        "num": _whole(1, 1, 1000),
        "side": _whole(7, 1, 1000),
        "coords": _whole(4, 4, 4),
        "softmax": _flag(),
        "sqrt": _flag(),
    },
}
_NEUTRAL: Mapping[str, Mapping[str, str]] = {
    "convolutional": dict.fromkeys(("binary", "xnor", "flipped", "antialiasing", "share_index"), "0")
    | {"dilation": "1"}
    | dict.fromkeys(("assisted_excitation", "sway", "rotate", "stretch", "stretch_sway"), "0"),
    "maxpool": {"maxpool_depth": "0", "antialiasing": "0"},
    "shortcut": {"weights_type": "none", "alpha": "1", "beta": "1"},
    "reorg": {"reverse": "0", "flatten": "0", "extra": "0"},
    "softmax": {"tree": "", "spatial": "0"},
    "region": {"tree": "", "map": "", "background": "0"},
    "yolo": {"map": ""},
}
"""Options that pentad doesn't know, with the value that leaves the network as it is without them."""
_NAMES = {"conv": "convolutional", "conn": "connected", "max": "maxpool", "avg": "avgpool", "soft": "softmax"}
_NAMES |= {"network": "net"}


def _layer(section: Section, before: Sequence[Layer], image: Shape) -> Layer:
    """Check one section, given the layers before it."""
    kind = section.name
    if kind not in _OPTIONS:
        raise _refuse(section, f"unknown layer; known layers: {', '.join(_OPTIONS)}")
    for name, neutral in _NEUTRAL.get(kind, {}).items():
        if (value := section.options.get(name, neutral)) not in (neutral, f"{neutral}.", f"{neutral}.0"):
            raise _refuse(section, f"{name} is {value[:40]}, which pentad doesn't support")
    options = {name: read(section, name) for name, read in _OPTIONS[kind].items() if name != "size"}
    if "size" in _OPTIONS[kind]:
        default = options["stride"] if kind == "maxpool" else 1
        options["size"] = _whole(default, 1, 255)(section, "size")
    inputs = _inputs(section, options, len(before))
    shapes = [before[number].shape if number >= 0 else image for number in inputs]
    channels, height, width = shapes[0]
    if kind == "route":
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            sizes = ", ".join(f"{shape[2]}x{shape[1]}" for shape in shapes)
            raise _refuse(section, f"its layers have the sizes {sizes}; expected equal ones")
        channels = sum(shape[0] for shape in shapes)
    if kind == "shortcut" and shapes[1][1:] != shapes[0][1:]:
        sizes = f"{width}x{height} and {shapes[1][2]}x{shapes[1][1]}"
        raise _refuse(section, f"adds layers of {sizes}; expected equal sizes")
    entered = channels, height, width
    shape = _shape(section, options, entered)
    if min(shape) < 1:
        raise _refuse(section, f"leaves nothing of its input of {width}x{height}")
    if math.prod(shape) >= MAX_NUMBERS or max(shape) > MAX_NUMBERS // 2:
        raise _refuse(section, f"its output is {' x '.join(map(str, shape))} numbers; expected less than 2^31")
    if kind == "connected" and math.prod(entered) * shape[0] >= MAX_NUMBERS:
        raise _refuse(section, f"its weight is {math.prod(entered):,} x {shape[0]:,}; expected less than 2^31")
    return Layer(kind, section.line, options, inputs, entered, shape, section.options)


def _inputs(section: Section, options: dict[str, Any], number: int) -> tuple[int, ...]:
    """The numbers of the layers that a layer takes."""
    name = {"route": "layers", "shortcut": "from"}.get(section.name)
    if name is None:
        return (number - 1,)
    if options[name] is None:
        raise _refuse(section, f"{name} is missing; expected numbers of layers")
    if name == "from" and len(options[name]) > 1:
        raise _refuse(section, f"from is {section.options[name][:40]}; expected one layer")
    found = [one if one >= 0 else number + one for one in options[name]]
    for given, one in zip(options[name], found, strict=True):
        if not 0 <= one < number:
            there = f"there are layers 0 to {number - 1} before it" if number else "there is none before it"
            raise _refuse(section, f"{name} is {given}; expected an earlier layer: {there}")
    return (*found,) if name == "layers" else (number - 1, *found)


def _shape(section: Section, options: dict[str, Any], entered: Shape) -> Shape:
    """The shape of a layer's output; completes options that depend on the input."""
    kind, (channels, height, width) = section.name, entered
    stride = options.get("stride", 1)
    if kind in ("convolutional", "local"):
        groups, size = options.get("groups", 1), options["size"]
        if channels % groups or options["filters"] % groups:
            problem = f"groups is {groups}, which doesn't divide {channels} channels and {options['filters']} filters"
            raise _refuse(section, problem)
        if kind == "local":
            options["padding"] = options["pad"]
        elif options["pad"]:
            options["padding"] = size // 2
        height, width = ((side + 2 * options["padding"] - size) // stride + 1 for side in (height, width))
        if kind == "local" and height * width * options["filters"] * channels * size**2 >= MAX_NUMBERS:
            raise _refuse(section, "its weights are too many; expected less than 2^31 numbers")
        return options["filters"], height, width
    if kind == "maxpool":
        if options["padding"] < 0:
            options["padding"] = options["size"] - 1
        if options["padding"] >= 2 * options["size"]:
            raise _refuse(section, f"padding is {options['padding']}; expected less than twice the size")
        return channels, *((side + options["padding"] - options["size"]) // stride + 1 for side in (height, width))
    if kind == "avgpool":
        return channels, 1, 1
    if kind == "route":
        groups = options["groups"]
        if channels % groups or options["group_id"] >= groups:
            raise _refuse(section, f"group {options['group_id']} of {groups} is no part of {channels} channels")
        return channels // groups, height, width
    if kind == "upsample":
        return channels, height * stride, width * stride
    if kind == "reorg":
        if channels % stride**2 or height % stride or width % stride:
            raise _refuse(section, f"stride is {stride}; expected one that divides {channels} x {height} x {width}")
        return channels * stride**2, height // stride, width // stride
    if kind == "connected":
        return options["output"], 1, 1
    if kind == "softmax" and math.prod(entered) % options["groups"]:
        raise _refuse(section, f"groups is {options['groups']}, which doesn't divide {math.prod(entered)} numbers")
    if kind in HEADS:
        _check_head(section, options, entered)
    return entered


def _check_head(section: Section, options: dict[str, Any], entered: Shape) -> None:
    kind, classes, num = section.name, options["classes"], options["num"]
    if kind == "detection":
        expected = options["side"] ** 2 * (num * 5 + classes)
        if math.prod(entered) != expected:
            raise _refuse(
                section, f"its input is {math.prod(entered)} numbers; expected side² (5 num + classes) = {expected}"
            )
        return
    anchors = options["anchors"]
    if anchors is None and kind == "region":
        options["anchors"] = anchors = (0.5,) * 2 * num
    if anchors is None or len(anchors) != 2 * num or min(anchors) <= 0:
        count = "missing" if anchors is None else f"{len(anchors)} numbers"
        raise _refuse(
            section, f"anchors is {count}; expected {2 * num}, all above 0: a width and a height for each of num"
        )
    if kind == "yolo":
        mask = options["mask"] = options["mask"] or tuple(range(num))
        if not all(0 <= one < num for one in mask):
            raise _refuse(section, f"mask is {section.options['mask'][:40]}; expected numbers from 0 to {num - 1}")
        num = len(mask)
    if entered[0] != num * (classes + 5):
        expected = f"{num} anchors x ({classes} classes + 5) = {num * (classes + 5)}"
        raise _refuse(section, f"its input has {entered[0]} channels; expected {expected}")
