"""The roofline plot of a plan's operations, drawn with Pillow.

A roofline is min(bandwidth x intensity, operations per second): Williams, Waterman and Patterson 2009, *Roofline: An
Insightful Visual Performance Model for Multicore Architectures*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from roofline import Part

SCALE = 2  # pixels per unit of length, for high-resolution screens
WIDTH, HEIGHT = 860, 560
LEFT, TOP, RIGHT, BOTTOM = 66, 66, 840, 500  # of the plot
INK, PALE, GRID = "#1b1b1b", "#636363", "#e6e6e6"
COLORS = ("#0072b2", "#d55e00", "#009e73")  # distinguishable with any color vision (Okabe and Ito)
MIN_SHARE = 0.02  # of a step's time: faster operations get no dot
LABEL_DISTANCE = 9  # dots closer than this share a label
XS, YS = (1, 1024), (16, 2048)  # the ranges of the axes
Box = tuple[float, float, float, float]


class Sheet:
    """White paper with two logarithmic axes."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        self._draw = ImageDraw.Draw(self.image)
        self.occupied: list[Box] = []  # by dots, lines and labels

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = XS, YS
        return (
            LEFT + math.log(x / x0) / math.log(x1 / x0) * (RIGHT - LEFT),
            BOTTOM - math.log(y / y0) / math.log(y1 / y0) * (BOTTOM - TOP),
        )

    def line(self, start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1) -> None:
        self._draw.line([z * SCALE for z in (*start, *end)], color, round(width * SCALE))

    def text(self, x: float, y: float, text: str, size: float, color: str = INK, anchor: str = "la") -> None:
        self._draw.text((x * SCALE, y * SCALE), text, color, ImageFont.load_default(size * SCALE), anchor)

    def width(self, text: str, size: float) -> float:
        return ImageFont.load_default(size * SCALE).getlength(text) / SCALE

    def dot(self, x: float, y: float, radius: float, color: str) -> None:
        box = (x - radius, y - radius, x + radius, y + radius)
        self._draw.ellipse([z * SCALE for z in box], color, "white", SCALE)
        self.occupied.append(box)

    def label(self, x: float, y: float, radius: float, text: str, color: str) -> None:
        """Write a label in a free place near a dot. If it is not next to the dot, a line connects them."""
        wide, tall = self.width(text, 11), 13
        candidates = []
        for away in (4, 12, 20, 30, 46, 64):
            for angle in range(0, 360, 30):
                dx, dy = ((radius + away) * turn(math.radians(angle)) for turn in (math.cos, math.sin))
                left = x + dx - (0 if dx > 1 else wide if dx < -1 else wide / 2)
                candidates.append((away, (left, y + dy - tall / 2, left + wide, y + dy + tall / 2)))
        away, box = next((candidate for candidate in candidates if self._free(candidate[1])), candidates[0])
        if away > 4:
            nearest = min(max(x, box[0] - 2), box[2] + 2), min(max(y, box[1] + 3), box[3])
            self.line((x, y), nearest, color, 0.5)
        self.text(box[0], box[1], text, 11, color)
        self.occupied.append(box)

    def _free(self, box: Box) -> bool:
        inside = box[0] > LEFT + 4 and box[2] < RIGHT - 4 and box[1] > TOP + 4 and box[3] < BOTTOM - 4
        return inside and not any(
            box[0] < other[2] + 2 and other[0] < box[2] + 2 and box[1] < other[3] and other[1] < box[3]
            for other in self.occupied
        )

    def blocked(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Keep labels off a line."""
        steps = 80
        for i in range(steps + 1):
            x, y = (a + (b - a) * i / steps for a, b in zip(start, end, strict=True))
            self.occupied.append((x - 2, y - 3, x + 2, y + 3))


def draw(
    path: Path,
    steps: Mapping[str, Sequence[Part]],
    bandwidth: float,
    roofs: Mapping[str, float],
    title: str,
    caption: str,
) -> None:
    """Write a PNG.

    Args:
        path: the file; an existing one is replaced.
        steps: the operations of each measured step, at most three steps.
        bandwidth: bytes per second.
        roofs: operations per second, by the kind of arithmetic.
        title: the first line.
        caption: a smaller line below it.
    """
    sheet = Sheet()
    _axes(sheet, title, caption)
    _roofs(sheet, bandwidth, roofs)
    dots: list[tuple[float, float, float, str, str]] = []
    for color, parts in zip(COLORS, steps.values(), strict=False):
        total = sum(part.seconds for part in parts)
        for part in sorted(parts, key=lambda part: -part.seconds):
            if not part.multiply_adds or part.seconds < MIN_SHARE * total:
                continue
            work, name = 2 * part.multiply_adds, part.name
            x, y = sheet.at(work / part.bytes, work / part.seconds / 1e9)
            radius = 3 + 16 * math.sqrt(part.seconds / total / math.pi)
            sheet.dot(x, y, radius, color)
            near = next((dot for dot in dots if dot[4] == color and math.dist(dot[:2], (x, y)) < LABEL_DISTANCE), None)
            if near:
                dots.remove(near)
                x, y, radius, name = *near[:3], f"{near[3]}; {name}"
            dots.append((x, y, radius, name, color))
    for dot in dots:
        sheet.label(*dot)
    for i, (color, step) in enumerate(zip(COLORS, steps, strict=False)):
        x = LEFT + 8 + i * 150
        sheet.dot(x, HEIGHT - 14, 5, color)
        sheet.text(x + 10, HEIGHT - 14, step, 12, INK, "lm")
    sheet.text(RIGHT, HEIGHT - 14, "dot area: share of the step's time", 11, PALE, "rm")
    sheet.image.quantize(64).save(path, optimize=True)


def _roofs(sheet: Sheet, bandwidth: float, roofs: Mapping[str, float]) -> None:
    lines = [(sheet.at(roof / bandwidth, roof / 1e9), sheet.at(XS[1], roof / 1e9)) for roof in roofs.values()]
    for (name, roof), (_, end) in zip(roofs.items(), lines, strict=True):
        text = f"{name}: {roof / 1e9:,.0f} GOP/s"
        sheet.text(end[0] - 4, end[1] + 4, text, 11, INK, "ra")
        sheet.occupied.append((end[0] - 4 - sheet.width(text, 11), end[1], end[0], end[1] + 18))
    highest = max(roofs.values())
    lines.append((sheet.at(XS[0], bandwidth * XS[0] / 1e9), sheet.at(highest / bandwidth, highest / 1e9)))
    for start, end in lines:
        sheet.line(start, end, INK, 1.5)
        sheet.blocked(start, end)
    x, y = sheet.at(4, bandwidth * 4 / 1e9)
    sheet.text(x - 8, y - 4, f"memory: {bandwidth / 1e9:.0f} GB/s", 11, INK, "rd")


def _axes(sheet: Sheet, title: str, caption: str) -> None:
    sheet.text(LEFT, 16, title, 15)
    sheet.text(LEFT, 38, caption, 11, PALE)
    for number in (2**power for power in range(12)):
        x, y = sheet.at(number, number)
        if XS[0] <= number <= XS[1]:
            sheet.line((x, TOP), (x, BOTTOM), GRID)
            sheet.text(x, BOTTOM + 6, f"{number:,}", 11, PALE, "ma")
        if YS[0] <= number <= YS[1]:
            sheet.line((LEFT, y), (RIGHT, y), GRID)
            sheet.text(LEFT - 6, y, f"{number:,}", 11, PALE, "rm")
    sheet.text((LEFT + RIGHT) / 2, BOTTOM + 20, "operations per byte read", 12, INK, "ma")
    sheet.text(8, TOP - 10, "GOP/s", 12, INK, "lb")
