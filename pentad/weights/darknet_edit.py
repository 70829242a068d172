"""A .cfg file for other classes, or for another size of images."""

from collections.abc import Mapping
from itertools import pairwise

from pentad.errors import BadInput
from pentad.weights.darknet_cfg import read_sections


def adapted(text: str, classes: int, size: int | None = None) -> str:
    """The text with detection layers for another number of classes, and the convolutions before them.

    Args:
        text: of a .cfg file with [yolo] or [region] layers.
        classes: the number of classes.
        size: height and width of images; None to keep them.

    Raises:
        BadInput: it is no .cfg file, or it has other detection layers.
    """
    sections = read_sections(text)
    changes: dict[int, dict[str, int]] = {}  # line of the section -> options
    for before, section in pairwise(sections):
        if section.name not in ("yolo", "region"):
            continue
        if before.name != "convolutional":
            raise BadInput(f"line {section.line}: [{section.name}] follows [{before.name}]; expected a convolution")
        options = section.options
        anchors = len(options["mask"].split(",")) if "mask" in options else int(options.get("num", 1))
        changes[section.line] = {"classes": classes}
        changes[before.line] = {"filters": anchors * (classes + 5)}
    if not changes:
        raise BadInput("has no [yolo] or [region] layer; only these can be trained for other classes")
    if size is not None:
        changes[sections[0].line] = {"width": size, "height": size}
    return _edited(text, changes)


def _edited(text: str, changes: Mapping[int, Mapping[str, int]]) -> str:
    """The text with some sections' options set; new ones follow the section's name."""
    lines, left = list[str](), dict[str, int]()
    for number, line in enumerate(text.splitlines(), 1):
        bare = "".join(line.split())
        if bare.startswith("["):
            lines += [f"{name}={value}" for name, value in left.items()]
            left = dict(changes.get(number, {}))
        name = bare.partition("=")[0]
        lines.append(f"{name}={left.pop(name)}" if name in left else line)
    return "\n".join([*lines, *(f"{name}={value}" for name, value in left.items())]) + "\n"
