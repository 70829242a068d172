"""The real images that scenes are composed from: handwritten digits, clothes, and photographs."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pentad.errors import BadInput

__all__ = ["Sprites", "digits", "fashion", "photographs"]

_SIDE = 32
_ZOOMS = 10
_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class Sprites:
    """Shapes to compose scenes from.

    Attributes:
        images: Pillow's gray pictures; 255 covers the background.
        labels: the class of each.
        names: of the classes.
        coverage: the share of each picture that its shape covers.
    """

    images: Sequence[Any]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    coverage: NDArray[np.float64]


@cache
def digits(*, held_out: bool) -> Sprites:
    """scikit-learn's 1,797 handwritten digits; a fifth of them, of other writers, is held out."""
    images, labels = _datasets().load_digits(return_X_y=True)
    chosen = slice(1437, None) if held_out else slice(1437)
    shares = images[chosen].reshape(-1, 8, 8) / 16
    padded = np.pad(shares, ((0, 0), (1, 1), (1, 1)), mode="edge")
    around = (padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]) / 4
    sharp = np.clip((1.5 * shares - 0.5 * around) / 1.3, 0, 1)  # opens the small holes of 4, 6, 8 and 9
    return _sprites(sharp, labels[chosen], tuple("0123456789"), 0.4)


def fashion(folder: Path, *, held_out: bool) -> Sprites:
    """Fashion-MNIST's pictures of clothes, from its IDX files; held out are those of its test set."""
    part = "t10k" if held_out else "train"
    images, labels = _idx(folder, f"{part}-images-idx3-ubyte", 3), _idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or not len(images):
        raise BadInput(f"{folder} has {len(labels)} labels for images of shape {images.shape}; expected N x 28 x 28")
    if labels.max() >= len(_FASHION):
        raise BadInput(f"{folder} has a label {labels.max()}; expected 0 to {len(_FASHION) - 1}")
    return _sprites(images[:6000] / 255, labels[:6000].astype(np.int64), _FASHION, 0.12)


@cache
def photographs(size: int, *, held_out: bool) -> Sequence[Any]:
    """scikit-learn's two photographs, a temple and a flower, so that crops of a size show more or less of them.

    Their right third is held out.
    """
    from PIL import Image

    pictures = []
    closest = min(3.5, max(1.0, 1500 / (1.1 * size)))  # large ones would take hundreds of megabytes
    for name in ("china.jpg", "flower.jpg"):
        pixels = _datasets().load_sample_image(name)
        border = pixels.shape[1] * 2 // 3
        picture = Image.fromarray(np.ascontiguousarray(pixels[:, border:] if held_out else pixels[:, :border]))
        for step in range(_ZOOMS):
            zoom = size / min(picture.size) * 1.1 * closest ** (step / (_ZOOMS - 1))
            sides = [round(side * zoom) for side in picture.size]
            pictures.append(picture.resize((sides[0], sides[1]), Image.Resampling.BICUBIC))
    return pictures


def _datasets() -> Any:
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise BadInput("scenes need scikit-learn; install it: pip install 'pentad[vision]'") from error
    return datasets


def _sprites(
    shares: NDArray[np.float64], labels: NDArray[np.int64], names: tuple[str, ...], threshold: float
) -> Sprites:
    """Upscaled shapes with sharp borders where the shares pass a threshold."""
    from PIL import Image

    images = []
    for share in shares:
        gray = Image.fromarray((share * 255).astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        covered = np.clip((np.asarray(gray, np.float32) / 255 - threshold) * 4 + 0.5, 0, 1)
        covered[[0, -1]] = covered[:, [0, -1]] = 0  # so that borders are smooth
        images.append(Image.fromarray((covered * 255).astype(np.uint8)))
    coverage = np.array([np.mean(np.asarray(image) > 127) for image in images])
    return Sprites(images, labels, names, coverage)


def _idx(folder: Path, name: str, dimensions: int) -> NDArray[np.uint8]:
    """An array of MNIST's file format, compressed or not."""
    file = next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)
    if file is None:
        raise BadInput(f"{folder / name} is not there; expected Fashion-MNIST's IDX files")
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            data = opened.read(1 << 28)
    except (OSError, EOFError) as error:
        raise BadInput(f"{file} is damaged: {error}") from error
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions], ">u4").astype(np.int64)
    start = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) - start != int(np.prod(shape)):
        raise BadInput(f"{file} is damaged: its header doesn't fit its {len(data)} bytes")
    return np.frombuffer(data[start:], np.uint8).reshape(shape)
