"""A picture of how experts are used: their load by layer, and the experts of the most frequent tokens.

Pillow draws it. Pillow is an optional dependency, so this module is imported only for a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pentad.errors import BadInput, PentadError

if TYPE_CHECKING:
    from pentad.generate.expert_use import ExpertUse

SCALE = 2  # pixels for each unit of length, so that the picture is sharp on a fine screen
WIDTH = 860
MARGIN = 28
ROW = 20
TOKENS_X = MARGIN + 150  # right edge of the column of tokens
INK, PALE, LINE = "#1b1b1b", "#636363", "#d0d0d0"
BLUES = ["#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b"]
"""From little to much. One hue that darkens can also be read by color-blind people (ColorBrewer's Blues)."""

Numbers = Sequence[Sequence[float]]
"""Rows of a heatmap."""


def require(path: Path) -> None:
    """Check that a picture can be drawn, before any work is done.

    Raises:
        BadInput: Pillow is missing, the file's name isn't that of a PNG, or its folder doesn't exist.
    """
    if path.suffix.lower() != ".png":
        raise BadInput(f"--out is {str(path)!r}; expected a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"{path}: the folder {path.parent} doesn't exist")
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise BadInput("a picture needs Pillow: pip install 'pentad[plot]'") from None


def draw(use: ExpertUse, names: Sequence[str], layers: Sequence[int], path: Path, *, title: str) -> None:
    """Write a PNG.

    Args:
        use: how the experts were used.
        names: of its frequent tokens, in ASCII.
        layers: up to three, whose routing of the frequent tokens is drawn.
        path: the file, which is replaced if it exists.
        title: the first line.

    Raises:
        PentadError: the file can't be written.
    """
    experts = max(len(usage.load) for usage in use.layers.values())
    tall = min(float(ROW), 480 / experts)  # height of an expert's row
    height = 5 * MARGIN + 130 + experts * tall + len(names) * ROW
    sheet = _Sheet(round(height))
    sheet.text(MARGIN, MARGIN, _cut(title, 90), 17)
    end = _load(sheet, MARGIN + 44, use, tall)
    _tokens(sheet, end + 2 * MARGIN, use, names, layers)
    try:
        sheet.image.quantize(256).save(path, optimize=True)
    except OSError as error:
        raise PentadError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def _load(sheet: _Sheet, y: float, use: ExpertUse, tall: float) -> float:
    """Draw layers from left to right, experts from top to bottom; returns the lower edge."""
    rows = [
        list(row)
        for row in zip(*((usage.load * len(usage.load)).tolist() for usage in use.layers.values()), strict=True)
    ]
    largest = max(2.0, *(max(row) for row in rows))
    sheet.heading(
        y, "Load of each expert, by layer; 1 is an even share", [(0, "0"), (1 / largest, "1"), (1, f"{largest:.1f}")]
    )
    x, y, wide = MARGIN + 52, y + 50, min(44.0, (WIDTH - 2 * MARGIN - 52) / len(use.layers))
    sheet.labels_above(x, y, wide, list(map(str, use.layers)))
    sheet.text(MARGIN, y - 10, "layer", 11, PALE, "lm")
    sheet.text(MARGIN, y + tall / 2, "expert", 11, PALE, "lm")
    sheet.labels_left(x, y, tall, [str(e) for e in range(len(rows))])
    sheet.map(x, y, rows, wide, tall, largest, "{:.1f}")
    return y + len(rows) * tall


def _tokens(sheet: _Sheet, y: float, use: ExpertUse, names: Sequence[str], layers: Sequence[int]) -> None:
    """Draw tokens from top to bottom, experts from left to right, in one heatmap for each layer."""
    sheet.heading(y, "How often the most frequent tokens go to each expert, in percent", [(0, "0"), (1, "100")])
    y += 66
    sheet.text(TOKENS_X - 12, y - 10, "times", 11, PALE, "rm")
    sheet.text(TOKENS_X - 56, y - 10, "token", 11, PALE, "rm")
    room = (WIDTH - MARGIN - TOKENS_X) / len(layers)
    for row, (name, (_, times)) in enumerate(zip(names, use.frequent, strict=True)):
        middle = y + (row + 0.5) * ROW
        sheet.text(TOKENS_X - 12, middle, f"{times:,}", 11, PALE, "rm")
        sheet.text(TOKENS_X - 56, middle, _cut(name.replace(" ", "\xb7"), 14), 12, INK, "rm")
    for i, layer in enumerate(layers):
        counts, x = use.by_token[layer].tolist(), TOKENS_X + i * room
        wide = min(30.0, (room - 14) / len(counts[0]))
        rows = [[100 * count / times for count in row] for row, (_, times) in zip(counts, use.frequent, strict=True)]
        sheet.text(x, y - 30, f"layer {layer}, by expert", 12, INK, "lm")
        sheet.labels_above(x, y, wide, [str(e) for e in range(len(counts[0]))])
        sheet.map(x, y, rows, wide, ROW, 100.0, "{:.0f}")


class _Sheet:
    """A white image; lengths are in units of `SCALE` pixels."""

    def __init__(self, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: float, color: str = INK, anchor: str = "la") -> None:
        from PIL import ImageFont

        self._draw.text((x * SCALE, y * SCALE), text, color, ImageFont.load_default(size * SCALE), anchor)

    def box(self, x: float, y: float, wide: float, tall: float, color: str) -> None:
        left, top, right, bottom = (round(z * SCALE) for z in (x, y, x + wide, y + tall))
        self._draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), color)

    def heading(self, y: float, text: str, marks: Sequence[tuple[float, str]]) -> None:
        """Write the title of a heatmap, with its color scale at the right."""
        self.text(MARGIN, y, text, 14)
        wide, x = 220.0, WIDTH - MARGIN - 220.0
        for i in range(int(wide)):
            self.box(x + i, y + 2, 1, 10, _color(i / wide))
        for (part, label), anchor in zip(marks, ["lt", *["mt"] * (len(marks) - 2), "rt"], strict=True):
            self.text(x + part * wide, y + 17, label, 11, PALE, anchor)

    def map(self, x: float, y: float, rows: Numbers, wide: float, tall: float, largest: float, form: str) -> None:
        """Draw cells in the color of their number; cells that are large enough also show the number."""
        self.box(x - 1, y - 1, len(rows[0]) * wide + 2, len(rows) * tall + 2, LINE)
        for i, row in enumerate(rows):
            for j, number in enumerate(row):
                part, left, top = number / largest, x + j * wide, y + i * tall
                self.box(left, top, wide, tall, _color(part))
                if wide >= 20 and tall >= 14 and number:
                    text = form.format(number)
                    self.text(left + wide / 2, top + tall / 2, text, 10, "white" if part > 0.5 else INK, "mm")

    def labels_above(self, x: float, y: float, wide: float, labels: Sequence[str]) -> None:
        """Label the columns, or every 2nd, 4th, 8th … if they are narrow."""
        for i in range(0, len(labels), _every(wide / 16)):
            self.text(x + (i + 0.5) * wide, y - 10, labels[i], 11, PALE, "mm")

    def labels_left(self, x: float, y: float, tall: float, labels: Sequence[str]) -> None:
        """Label the rows, or every 2nd, 4th, 8th … if they are low."""
        for i in range(0, len(labels), _every(tall / 14)):
            self.text(x - 8, y + (i + 0.5) * tall, labels[i], 11, PALE, "rm")


def _every(room: float) -> int:
    """The step between labels (1, 2, 4, 8, …) if each has room for that part of its length."""
    step = 1
    while step * room < 1:
        step *= 2
    return step


def _color(part: float) -> str:
    """The color of a number from 0 to 1."""
    at = min(max(part, 0.0), 1.0) * (len(BLUES) - 1)
    low, weight = min(int(at), len(BLUES) - 2), at - min(int(at), len(BLUES) - 2)
    ends = [[int(BLUES[i][at : at + 2], 16) for at in (1, 3, 5)] for i in (low, low + 1)]
    return "#" + "".join(f"{round(a + (b - a) * weight):02x}" for a, b in zip(*ends, strict=True))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
