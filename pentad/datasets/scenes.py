"""Scenes: small pictures and videos with exact labels, composed from real images.

Handwritten digits (scikit-learn's), or clothes where a folder of Fashion-MNIST is given, lie on crops of photographs or
on textures, in colors, sizes and angles of their own; they hide parts of each other. A scene is a function of the seed
and its number.
"""

from __future__ import annotations

import colorsys
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pentad.datasets.objects import LabeledImage, Object, Sample
from pentad.datasets.sprites import Sprites, digits, fashion, photographs
from pentad.errors import BadInput
from pentad.vision import masks

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = ["Scene", "Scenes"]

Random = np.random.RandomState
"""Its streams never change, unlike those of numpy's newer generators."""

_VISIBLE = 0.6  # the least share of an object that is seen
_TRIES = 8


@dataclass(frozen=True)
class Placed:
    """An object of a scene, and how it moves.

    Attributes:
        sprite: its number among the sprites.
        label: its class.
        color: red, green, blue.
        size: of its square, in pixels.
        angle: in degrees, to the left.
        x, y: of its center.
        speed: pixels a frame to the right and down, and degrees a frame.
    """

    sprite: int
    label: int
    color: tuple[int, int, int]
    size: float
    angle: float
    x: float
    y: float
    speed: tuple[float, float, float]


class Cut(NamedTuple):
    """The part of an object inside of the picture.

    Attributes:
        box: left, top, right and bottom in the picture.
        alpha: how much each pixel there is covered, as a gray picture.
        solid: which pixels show the object.
    """

    box: tuple[int, int, int, int]
    alpha: Picture
    solid: NDArray[np.bool_]

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the picture."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)


@dataclass(frozen=True)
class Scene:
    """A picture, or a frame of a video.

    Attributes:
        sample: pixels, boxes of what is seen, labels and masks.
        caption: one sentence.
        tracks: the number of each object of the sample in its video.
    """

    sample: Sample
    caption: str
    tracks: tuple[int, ...]


class Scenes:
    """A data set of scenes; scene i is the same whatever was asked for before.

    Args:
        count: how many scenes there are.
        seed: another seed gives other scenes.
        size: height and width in pixels.
        objects: the smallest and the largest number of objects; fewer where they would hide each other.
        held_out: compose from other digits and other parts of the photographs, for evaluation.
        fashion_folder: a folder with Fashion-MNIST's files, for clothes instead of digits.

    Raises:
        BadInput: a number is out of range, or the folder doesn't have those files.
    """

    def __init__(
        self,
        count: int,
        seed: int = 0,
        *,
        size: int = 160,
        objects: tuple[int, int] = (1, 4),
        held_out: bool = False,
        fashion_folder: str | Path | None = None,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise BadInput(f"seed is {seed}; expected 0 to {2**32 - 1}")
        if not 32 <= size <= 1024:
            raise BadInput(f"size is {size}; expected 32 to 1024")
        if not 1 <= objects[0] <= objects[1] <= 20:
            raise BadInput(f"objects is {objects}; expected two numbers from 1 to 20")
        self.count, self.seed, self.size, self.objects, self.held_out = count, seed, size, objects, held_out
        self.fashion_folder = fashion_folder

    @cached_property
    def sprites(self) -> Sprites:
        """The images that scenes are composed from."""
        if self.fashion_folder is not None:
            return fashion(Path(self.fashion_folder), held_out=self.held_out)
        return digits(held_out=self.held_out)

    @cached_property
    def _photographs(self) -> Sequence[Any]:
        return photographs(self.size, held_out=self.held_out)

    @property
    def names(self) -> Sequence[str]:
        """The names of the classes."""
        return self.sprites.names

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        """The pixels and objects of a scene."""
        return self.scene(index).sample

    def labeled(self, index: int) -> LabeledImage:
        """The objects of a scene, with masks as run-length codes."""
        return labeled_image(self[index], Path(f"{index:06}.png"), index + 1)

    def scene(self, index: int) -> Scene:
        """A scene with its caption. Raises IndexError beyond `count`."""
        background, placed, cuts = self._plan(index)
        return self._draw(background, placed, cuts)

    def video(self, index: int, frames: int = 16) -> Iterator[Scene]:
        """The frames of a scene whose objects move, and turn back at the borders; its first frame is the scene."""
        background, placed, _ = self._plan(index)
        for _ in range(frames):
            yield self._draw(background, placed, [self._cut(one) for one in placed], moving=True)
            placed = [self._moved(one) for one in placed]

    def _plan(self, index: int) -> tuple[Picture, list[Placed], list[Cut]]:
        """The background and the objects of a scene, and what each covers."""
        if not 0 <= index < self.count:
            raise IndexError(f"there is no scene {index}; there are {self.count}")
        random = Random(np.random.PCG64([self.seed, index]))  # quicker to make than its default
        background = self._background(random)
        shown = np.full((self.size, self.size), -1, np.int16)  # which object is seen where
        placed, cuts = list[Placed](), list[Cut]()
        visible, least = list[int](), list[float]()  # pixels of each object
        for _ in range(random.randint(self.objects[0], self.objects[1] + 1)):
            one = self._object(random)
            area = float(self.sprites.coverage[one.sprite]) * one.size**2
            for _ in range(_TRIES):
                cut = self._cut(one)
                region = shown[cut.window]
                hidden = np.bincount(region[cut.solid] + 1, minlength=len(placed) + 1)
                left = [seen - gone for seen, gone in zip(visible, hidden[1:].tolist(), strict=True)]
                if hidden.sum() >= _VISIBLE * area and all(map(operator.ge, left, least)):
                    behind = background.resize((1, 1), box=cut.box).convert("L").tobytes()[0]  # the mean
                    color = self._color(random, behind)
                    region[cut.solid] = len(placed)
                    placed.append(replace(one, color=color))
                    cuts.append(cut)
                    visible, least = [*left, int(hidden.sum())], [*least, _VISIBLE * area]
                    break
                x, y = random.uniform(0.05, 0.95, 2) * self.size
                one = replace(one, x=x, y=y)
        return background, placed, cuts

    def _object(self, random: Random) -> Placed:
        """An object without a color, somewhere."""
        sprite = random.randint(len(self.sprites.labels))
        log_size, x, y, angle, right, down, spin = random.uniform(size=7).tolist()
        size = 0.16 * (0.5 / 0.16) ** log_size * self.size
        x, y = (0.1 + 0.8 * x) * self.size, (0.1 + 0.8 * y) * self.size
        speed = (right - 0.5) * 0.05 * self.size, (down - 0.5) * 0.05 * self.size, (spin - 0.5) * 8
        return Placed(sprite, int(self.sprites.labels[sprite]), (0, 0, 0), size, (angle - 0.5) * 50, x, y, speed)

    def _color(self, random: Random, behind: int) -> tuple[int, int, int]:
        """A color that stands out: light on dark, dark on light."""
        hue, saturation, share = random.uniform(size=3).tolist()
        value = 0.8 + 0.2 * share if behind < 120 else 0.05 + 0.35 * share
        red, green, blue = colorsys.hsv_to_rgb(hue, 0.2 + 0.8 * saturation, value)
        return round(255 * red), round(255 * green), round(255 * blue)

    def _moved(self, one: Placed) -> Placed:
        x, y, (right, down, spin) = one.x + one.speed[0], one.y + one.speed[1], one.speed
        right = -right if not 0.1 * self.size < x < 0.9 * self.size and (x > self.size / 2) == (right > 0) else right
        down = -down if not 0.1 * self.size < y < 0.9 * self.size and (y > self.size / 2) == (down > 0) else down
        spin = -spin if abs(one.angle + spin) > 25 and (one.angle > 0) == (spin > 0) else spin
        return replace(one, x=x, y=y, angle=one.angle + spin, speed=(right, down, spin))

    def _background(self, random: Random) -> Picture:
        """A crop of a photograph, or a texture: soft noise of two scales, sometimes with stripes."""
        from PIL import Image, ImageChops

        size = (self.size, self.size)
        haze = Image.new("RGB", size, (random.randint(40, 216),) * 3)
        clearness = random.uniform(0.6, 1.05)
        if random.uniform() < 0.6:
            photograph: Picture = self._photographs[random.randint(len(self._photographs))]
            left, top = (random.randint(length - self.size + 1) for length in photograph.size)
            picture = photograph.crop((left, top, left + self.size, top + self.size))
            if random.uniform() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return Image.blend(haze, picture, clearness)
        coarse = random.uniform(40, 215, 3) + random.uniform(-60, 60, (*random.randint(2, 6, 2), 3))
        fine = 128 + random.uniform(-25, 25, (*random.randint(12, 40, 2), 3))
        wide, narrow = (
            Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
            for noise in (coarse, fine)
        )
        picture = Image.blend(haze, ImageChops.add(wide, narrow, offset=-128), clearness)
        if random.uniform() < 0.4:
            angle, period = random.uniform(0, math.pi), random.uniform(4, 20)
            at = np.arange(self.size, dtype=np.float32) * (period / self.size * 2 * math.pi)
            wave = np.sin(at[:, None] * math.cos(angle) + at * math.sin(angle))[:, :, None]
            striped = np.asarray(picture) + wave * random.uniform(8, 30, 3)
            picture = Image.fromarray(np.clip(striped, 0, 255).astype(np.uint8))
        return picture

    def _cut(self, one: Placed) -> Cut:
        """The part of an object that is inside of the picture."""
        from PIL import Image

        cos, sin = math.cos(math.radians(one.angle)), math.sin(math.radians(one.angle))
        reach = one.size / 2 * (abs(cos) + abs(sin))
        left, top = max(0, math.floor(one.x - reach)), max(0, math.floor(one.y - reach))
        right, bottom = (min(self.size, math.ceil(at + reach)) for at in (one.x, one.y))
        if right <= left or bottom <= top:
            return Cut((0, 0, 0, 0), Image.new("L", (0, 0)), np.zeros((0, 0), np.bool_))
        sprite = self.sprites.images[one.sprite]
        zoom, dx, dy, middle = sprite.width / one.size, left - one.x, top - one.y, sprite.width / 2
        matrix = (
            *(cos * zoom, -sin * zoom, zoom * (cos * dx - sin * dy) + middle),
            *(sin * zoom, cos * zoom, zoom * (sin * dx + cos * dy) + middle),
        )
        size = right - left, bottom - top
        alpha = sprite.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        return Cut((left, top, right, bottom), alpha, np.asarray(alpha) > 127)

    def _draw(
        self, background: Picture, placed: Sequence[Placed], cuts: Sequence[Cut], *, moving: bool = False
    ) -> Scene:
        picture = background.copy()
        shown = np.full((self.size, self.size), -1, np.int16)
        for number, (one, cut) in enumerate(zip(placed, cuts, strict=True)):
            picture.paste(one.color, cut.box, cut.alpha)
            shown[cut.window][cut.solid] = number
        seen = shown == np.arange(len(placed), dtype=np.int16)[:, None, None]
        rows, columns = seen.any(2), seen.any(1)
        tracks = [number for number in range(len(placed)) if rows[number].any()]
        boxes = np.empty((len(tracks), 4), np.float32)
        for box, number in zip(boxes, tracks, strict=True):
            ys, xs = np.flatnonzero(rows[number]), np.flatnonzero(columns[number])
            box[:] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
        sample = Sample(
            torch.from_numpy(np.array(picture)).permute(2, 0, 1),
            torch.from_numpy(boxes),
            torch.tensor([placed[number].label for number in tracks], dtype=torch.int64),
            torch.zeros(len(tracks), dtype=torch.bool),
            torch.from_numpy(seen[tracks]),
        )
        return Scene(sample, self._caption(placed, moving), tuple(tracks))

    def _caption(self, placed: Sequence[Placed], moving: bool) -> str:
        """A sentence about the largest object, and where it is: to another one, or in the picture."""
        if not placed:
            return "an empty scene"
        first, *others = sorted(placed, key=lambda one: -one.size)
        text = self._phrase(first)
        if moving:
            right, down = first.speed[:2]
            sideways = abs(right) >= abs(down)
            text += " moving " + (("right" if right > 0 else "left") if sideways else ("down" if down > 0 else "up"))
        if others:
            other = max(others, key=lambda one: abs(one.x - first.x) + abs(one.y - first.y))
            dx, dy = other.x - first.x, other.y - first.y
            sideways = abs(dx) >= abs(dy)
            where = (
                ("to the left of" if dx > 0 else "to the right of") if sideways else ("above" if dy > 0 else "below")
            )
            return f"{text} {where} {self._phrase(other)}"
        third = [min(2, max(0, int(3 * at / self.size))) for at in (first.y, first.x)]
        row, column = ("top", "", "bottom")[third[0]], ("left", "", "right")[third[1]]
        return f"{text} at the {' '.join(word for word in (row, column) if word) or 'center'}"

    def _phrase(self, one: Placed) -> str:
        share = one.size / self.size
        size = "small " if share < 0.24 else "large " if share > 0.38 else ""
        name = self.names[one.label]
        article = "an" if not size and (name[0] in "aeiouAEIOU8") else "a"
        return f"{article} {size}{name}"


def labeled_image(sample: Sample, path: Path, number: int) -> LabeledImage:
    """The objects of a sample, with masks as run-length codes."""
    objects = []
    for box, label, crowd, mask_HW in zip(sample.boxes, sample.labels, sample.crowd, sample.masks, strict=True):
        x0, y0, x1, y1 = box.tolist()
        objects.append(Object((x0, y0, x1, y1), int(label), masks.encode(mask_HW), bool(crowd), float(mask_HW.sum())))
    height, width = sample.image.shape[1:]
    return LabeledImage(path, height, width, tuple(objects), number)
