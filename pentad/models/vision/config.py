"""What the configs of vision models share: labels, image sizes, and reading sizes off tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from pentad.errors import BadInput
from pentad.models.family import ModelConfig
from pentad.weights.checkpoint import Checkpoint

DEFAULT_LABELS = 2  # transformers' default, which its config.json leaves out


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a published network expects its images.

    Attributes:
        size: height and width that the image is resized to; one number for the shorter side.
        crop: side of the square cut out of the center after resizing; None for all.
        resample: "bilinear" or "bicubic".
        mean, std: subtracted from, and divided by, for values from 0 to 1.
    """

    size: tuple[int, int] | int
    crop: int | None = None
    resample: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(ModelConfig):
    """The fields of every classifier's config.

    Attributes:
        id2label: the classes' names by index; empty if they have none.
        num_labels: the number of classes; 0 for a network without a head.
    """

    id2label: Mapping[str, str] = field(default_factory=dict)
    num_labels: int = field(default=0, metadata={"least": 0})

    HEAD = "classifier"
    """The start of the names of the head's tensors in a Hugging Face folder."""

    @property
    def preprocessing(self) -> Preprocessing:
        """How the published networks expect their images."""
        raise NotImplementedError

    def resolve(self, checkpoint: Checkpoint) -> Self:
        labels = len(self.id2label) or self.num_labels
        if checkpoint.format == "hf" and "model_type" in checkpoint.config:
            labels = labels or DEFAULT_LABELS
            if checkpoint.tensors and not any(name.startswith(self.HEAD) for name in checkpoint.tensors):
                return replace(self, num_labels=0, id2label={})
        if self.id2label and {*self.id2label} != {str(i) for i in range(labels)}:
            raise BadInput(f"{checkpoint.path}: id2label has keys {[*self.id2label][:4]}; expected 0 to {labels - 1}")
        return replace(self, num_labels=labels)

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        values["id2label"] = {str(i): self.id2label.get(str(i), f"LABEL_{i}") for i in range(self.num_labels)}
        return {**values, "label2id": {label: int(i) for i, label in values["id2label"].items()}}


def sizes(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The shape of a tensor that a config is read off.

    Raises:
        BadInput: it is missing.
    """
    if name not in checkpoint.tensors:
        raise BadInput(f"{checkpoint.path}: the tensor {name} is missing")
    return checkpoint.tensors[name].shape


def count_layers(checkpoint: Checkpoint, prefix: str) -> int:
    """The number of layers: one more than the largest number after `prefix` in the tensors' names."""
    numbers = (name.removeprefix(prefix).partition(".")[0] for name in checkpoint.tensors if name.startswith(prefix))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def timm_labels(checkpoint: Checkpoint, head: str) -> dict[str, Any]:
    """The labels of timm's files: their number from the head's weight, their names from the config.json, if any."""
    names = checkpoint.config.get("label_names")
    count = sizes(checkpoint, head)[0] if head in checkpoint.tensors else 0
    if not isinstance(names, list) or len(names) != count:
        names = []
    return {"num_labels": count, "id2label": {str(i): str(name) for i, name in enumerate(names)}}
