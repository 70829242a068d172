"""Networks, one file per family, named after its published ``model_type``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

from pentad.errors import BadInput
from pentad.models.family import TASKS

if TYPE_CHECKING:
    from pentad.models.family import Family
    from pentad.weights.checkpoint import Checkpoint

_LANGUAGE = "openmoe", "llama", "mistral", "qwen2", "qwen3", "phi", "mixtral", "qwen", "switch_transformers"
_VISION = "vit", "mae", "resnet", "nfnet", "darknet", "yolox", "mask_rcnn", "sam.sam", "clip"
MODULES = [*(f"pentad.models.language.{name}" for name in _LANGUAGE), *(f"pentad.models.vision.{n}" for n in _VISION)]
"""Modules with a FAMILY. They are imported one after the other until a family matches a checkpoint.

OpenMoE comes before Llama because its ``config.json`` has Llama's ``model_type``.
"""

NAME_KEYS = {"hf": "model_type", "gguf": "general.architecture"}
"""The config key with the architecture's name; params.json has none."""

_registered: list[Family] = []


def register(family: Family) -> None:
    """Add a family from outside pentad. It takes precedence over pentad's families."""
    _registered.insert(0, family)


def families() -> Iterator[Family]:
    """All families; their modules are imported lazily."""
    yield from _registered
    for name in MODULES:
        yield import_module(name).FAMILY


def check_task(checkpoint: Checkpoint, *tasks: str) -> None:
    """Raise BadInput if a checkpoint's networks have none of these tasks, keys of `TASKS`."""
    family = family_of(checkpoint)
    if family.task not in tasks:
        raise BadInput(f"{checkpoint.path}: {family.names.family} is {TASKS[family.task]}")


def family_of(checkpoint: Checkpoint) -> Family:
    """Find a checkpoint's family by its config.

    Raises:
        BadInput: the config names no family, or one that pentad does not support.
    """
    for family in families():
        if family.matches(checkpoint):
            if checkpoint.format not in family.key_tables:
                raise BadInput(f"{checkpoint.path}: {checkpoint.format} files of {family.names.family} are unsupported")
            return family
    key = NAME_KEYS.get(checkpoint.format)
    if checkpoint.format == "consolidated":
        raise BadInput(
            f"{checkpoint.path}: params.json has neither hidden_dim (Mistral's) nor multiple_of (Meta's),"
            " so its architecture is unknown"
        )
    if key is None:
        tensors = f"its {len(checkpoint.tensors)} tensors ({', '.join([*checkpoint.tensors][:3])}, …)"
        raise BadInput(f"{checkpoint.path}: no config.json beside it, and {tensors} are of no known architecture")
    name = checkpoint.config.get(key)
    if not isinstance(name, str):
        raise BadInput(f"{checkpoint.path}: the config has no {key!r}, so its architecture is unknown")
    known_here = (family.names for family in families() if checkpoint.format in family.key_tables)
    names = [names.gguf if checkpoint.format == "gguf" else names.family for names in known_here]
    known = ", ".join(sorted({name for name in names if name is not None}))
    raise BadInput(f"{checkpoint.path}: architecture {name!r} is not supported; supported: {known}")
