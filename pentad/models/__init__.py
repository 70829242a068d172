"""Whole networks, one file a family, named by its published ``model_type``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from pentad.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from pentad.weights.checkpoint import Checkpoint
    from pentad.weights.keytable import KeyTable

FAMILIES = {"llama": "pentad.models.llama"}


class Family(Protocol):
    """What a family's module offers."""

    def config_from(self, checkpoint: Checkpoint) -> Any:
        """The typed config of a checkpoint; BadInput where it lacks or contradicts something."""

    def key_table(self, config: Any, format: str) -> KeyTable:
        """The file's tensor names against the network's, for checkpoints of this format."""

    def build(self, config: Any) -> nn.Module:
        """The network, with weights still to be filled in."""


def family_of(checkpoint: Checkpoint) -> tuple[str, Family]:
    """The family that a checkpoint says it belongs to, and its module.

    Raises:
        BadInput: it says nothing, or names a family that isn't here.
    """
    key = "general.architecture" if checkpoint.format == "gguf" else "model_type"
    name = checkpoint.config.get(key)
    if not isinstance(name, str):
        raise BadInput(f"{checkpoint.path}: the config has no {key!r}, so its architecture is unknown")
    if name not in FAMILIES:
        raise BadInput(
            f"{checkpoint.path}: architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}"
            + (f" ({name!r} is a relative, but its networks differ)" if _is_relative(name) else "")
        )
    return name, import_module(FAMILIES[name])


def _is_relative(name: str) -> bool:
    return name.startswith(
        (
            "llama",
            "mistral",
            "mixtral",
            "qwen",
            "gemma",
            "phi",
            "smollm",
            "olmo",
            "granite",
            "stablelm",
        )
    )
