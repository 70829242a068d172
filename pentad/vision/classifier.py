"""The runner of image classifiers.

Legend: B images [3, H, W], V classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.vision.config import ClassifierConfig, Preprocessing
from pentad.vision.preprocess import center_crop, resize_pillow
from pentad.vision.runner import VisionModel, pixels_of
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.files import read_json

if TYPE_CHECKING:
    from pentad.vision.runner import Image

T = TypeVar("T")

BICUBIC = 3  # Pillow's number
PROCESSORS = "preprocessor_config.json", "processor_config.json"
WARPED = 384  # from this size on ConvNeXT's processor doesn't crop


@dataclass(frozen=True)
class Label:
    """A class of an image.

    Attributes:
        index: the number of the class.
        label: its name; the number if the checkpoint has no names.
        score: its probability.
    """

    index: int
    label: str
    score: float


class Classifier(VisionModel):
    """A network that names what an image shows; `pentad.load` makes one.

    Attributes:
        labels: the names of the classes.
        preprocessing: how images are resized and normalized.
    """

    task: ClassVar[str] = "classify"

    def __init__(self, name: str, network: nn.Module, checkpoint: Checkpoint, *, load_seconds: float = 0.0) -> None:
        super().__init__(name, network, checkpoint, load_seconds=load_seconds)
        config = network.config
        assert isinstance(config, ClassifierConfig)
        if not config.num_labels:
            raise BadInput(f"{name} has no head, so it names no classes: pentad train fine-tunes it")
        self.labels = [config.id2label.get(str(i), str(i)) for i in range(config.num_labels)]
        self.preprocessing = read_preprocessing(checkpoint, config.preprocessing)

    def preprocess(self, image: Image) -> Tensor:
        """An image as the network sees it, float32 [3, H, W].

        Raises:
            BadInput: it is no image, or damaged.
        """
        return preprocess_image(image, self.preprocessing)

    @torch.inference_mode()
    def logits(self, images: Sequence[Image]) -> Tensor:
        """The logits of each image, float32 [B, V]."""
        batch_B3HW = torch.stack([self.preprocess(image) for image in images]).to(self.device, self.dtype)
        logits_BV: Tensor = self.network(batch_B3HW)
        return logits_BV.float().cpu()

    def classify(self, image: Image, *, top_k: int = 5) -> list[Label]:
        """The most probable classes of an image, the first one first.

        Raises:
            BadInput: it is no image, or damaged; or `top_k` is below 1.
        """
        return next(self.classify_many([image], top_k=top_k))

    def classify_many(self, images: Iterable[Image], *, top_k: int = 5, batch_size: int = 8) -> Iterator[list[Label]]:
        """`classify` for each image, `batch_size` of them at a time."""
        for batch in batched(images, batch_size):
            yield from most_probable(self.logits(batch), self.labels, top_k)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last one may be shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def most_probable(logits_BV: Tensor, labels: Sequence[str], top_k: int) -> Iterator[list[Label]]:
    """The most probable classes of each image, the first one first; BadInput if `top_k` is below 1."""
    if top_k < 1:
        raise BadInput(f"top_k is {top_k}; expected at least 1")
    scores, indices = logits_BV.softmax(1).topk(min(top_k, len(labels)))
    for row, numbers in zip(scores.tolist(), indices.tolist(), strict=True):
        yield [Label(i, labels[i], score) for i, score in zip(numbers, row, strict=True)]


def preprocess_image(image: Image, how: Preprocessing) -> Tensor:
    """`preprocess` of an image that may have to be read; BadInput if it is none, or damaged."""
    return preprocess(pixels_of(image), how)


def preprocess(image_3HW: Tensor, how: Preprocessing) -> Tensor:
    """Resize, crop and normalize uint8 [3, H, W]; equal to the image processors of transformers."""
    image_3HW = resize_pillow(image_3HW, how.size, bicubic=how.resample == "bicubic")
    if how.crop is not None:
        image_3HW = center_crop(image_3HW, how.crop, how.crop)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (how.mean, how.std))
    return (image_3HW.float() / 255 - mean) / std


def read_preprocessing(checkpoint: Checkpoint, default: Preprocessing) -> Preprocessing:
    """The preprocessing of a checkpoint: from its preprocessor_config.json or processor_config.json, or timm's
    config.json, else the family's.

    Raises:
        BadInput: a value has the wrong type, or isn't supported.
    """
    timm = checkpoint.config.get("pretrained_cfg")
    if checkpoint.format == "hf" and (processor := _processor(checkpoint.path)) is not None:
        read, (values, source) = _from_hf, processor
    elif isinstance(timm, Mapping):
        read, values, source = _from_timm, dict(timm), checkpoint.path / "config.json"
    else:
        return default
    try:
        found = read(values, default)
        sides = [*([found.size] if isinstance(found.size, int) else found.size), found.crop or 1]
        if min(sides) < 1 or max(sides) > 10_000 or len(found.mean) != 3 or len(found.std) != 3 or min(found.std) <= 0:
            raise ValueError("sizes, mean or std are out of range")
        return found
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadInput(f"{source}: the preprocessing can't be read: {error!s:.200}") from error


def _processor(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """The settings of the image processor in a folder, and their file; None if there are none."""
    path = folder / PROCESSORS[0]
    if path.is_file():
        return read_json(path), path
    path = folder / PROCESSORS[1]  # of images and texts
    values = read_json(path).get("image_processor") if path.is_file() else None
    return (values, path) if isinstance(values, dict) else None


def _from_hf(values: dict[str, Any], default: Preprocessing) -> Preprocessing:
    size = values.get("size", default.size)
    if isinstance(size, Mapping) and "shortest_edge" in size:
        size = int(size["shortest_edge"])
    elif isinstance(size, Mapping):
        size = int(size["height"]), int(size["width"])
    elif isinstance(size, int) and "crop_pct" not in values and not isinstance(default.size, int):
        size = (size, size)  # configs of 2021
    crop: Any = values.get("crop_size") if values.get("do_center_crop") else None
    if isinstance(crop, Mapping):
        crop = crop["height"]
    if isinstance(size, int) and "crop_pct" in values:
        size, crop = ((size, size), None) if size >= WARPED else (int(size / (values["crop_pct"] or 0.875)), size)
    scale = 255 * float(values.get("rescale_factor", 1 / 255)) if values.get("do_rescale", True) else 255.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if values.get("do_normalize", True):
        mean, std = tuple(values.get("image_mean", default.mean)), tuple(values.get("image_std", default.std))
    return Preprocessing(
        size=size,
        crop=crop,
        resample="bicubic" if values.get("resample") == BICUBIC else "bilinear",
        mean=tuple(value / scale for value in mean),
        std=tuple(value / scale for value in std),
    )


def _from_timm(values: dict[str, Any], default: Preprocessing) -> Preprocessing:
    side = int((values.get("test_input_size") or values["input_size"])[-1])
    resized = int(side / (values.get("test_crop_pct") or values.get("crop_pct") or 0.875))
    return replace(
        default,
        size=(resized, resized) if values.get("crop_mode") == "squash" else resized,
        crop=side,
        resample=values.get("interpolation", "bilinear"),
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
    )
