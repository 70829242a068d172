"""The record of a family: its config, network, key tables and names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pentad.weights.checkpoint import Checkpoint
    from pentad.weights.keytable import KeyTable


TASKS = {
    "language": "a language model: use pentad chat, complete, score or serve",
    "classify": "a classifier of images: use pentad classify",
    "detect": "a detector: use pentad detect",
    "segment": "a promptable segmenter: use pentad segment",
    "embed": "an encoder of images and texts: use pentad classify with --labels",
    "pretrain": "a pretrained encoder: pentad train fine-tunes it",
}
"""What a family's networks do -> what they are, and the commands for them."""


class ArchitectureNames(NamedTuple):
    """The names of a family.

    Attributes:
        family: pentad's name, also the name of the family's module.
        architecture: the class in ``config.json``.
        model_type: the ``model_type`` that pentad writes; `family` if None.
        gguf: ``general.architecture`` in GGUF files; None if llama.cpp does not support the family.
        aliases: other values of ``model_type`` in published files.
    """

    family: str
    architecture: str
    model_type: str | None = None
    gguf: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base class of configs. Fields have the names and defaults of a published ``config.json``."""

    HF_NAMES: ClassVar[Mapping[str, str]] = {}
    """Published names that differ from the field's name: published name -> field.
    In ``a.b``, b is a key of the object a."""
    OLD_HF_NAMES: ClassVar[Mapping[str, str]] = {}
    """Published names in older files, which are read but not written: published name -> field."""

    def resolve(self, checkpoint: Checkpoint) -> Self:
        """The config with derived fields filled in.

        Args:
            checkpoint: the source of the config. Its path begins error messages.

        Raises:
            BadInput: fields contradict each other, or the family does not support their values.
        """
        return self

    def to_hf(self) -> dict[str, Any]:
        """The fields with the values of a ``config.json``, by field name."""
        return asdict(self)


@dataclass(frozen=True)
class Family:
    """A family of networks, and how its checkpoints are published.

    Attributes:
        config: the config's class.
        network: builds the network of a config, without initializing weights.
        key_tables: checkpoint format -> function from a config to the key tables of such files. The first table is used
            for writing. If a format is absent or has no table, it can't store the network.
        names: the family's names.
        recognizes: whether a checkpoint belongs to the family, by its format, config, and names and shapes of tensors.
            If None, `names` decides.
        init_std: standard deviation of an initial weight matrix, from the config and the tensor's name; the config's
            ``initializer_range`` if None.
        task: what the networks do, a key of `TASKS`; it decides the runner.
        read_config: the config of a checkpoint without a ``model_type``, such as a state dict's or a Darknet
            cfg's; not resolved.
        initialize: draws all initial weights of a network; replaces `init_std`.
    """

    config: type[ModelConfig]
    network: Callable[[Any], nn.Module]
    key_tables: Mapping[str, Callable[[Any], list[KeyTable]]]
    names: ArchitectureNames
    recognizes: Callable[[Checkpoint], bool] | None = None
    init_std: Callable[[Any, str], float] | None = None
    task: str = "language"
    read_config: Callable[[Checkpoint], ModelConfig] | None = None
    initialize: Callable[[Any, Any, torch.Generator], None] | None = None

    def matches(self, checkpoint: Checkpoint) -> bool:
        """True if a checkpoint belongs to this family, by its config."""
        if self.recognizes is not None:
            return self.recognizes(checkpoint)
        if checkpoint.format == "gguf":
            return self.names.gguf is not None and checkpoint.config.get("general.architecture") == self.names.gguf
        return checkpoint.config.get("model_type") in (self.names.family, *self.names.aliases)

    def layouts(self, config: Any, format: str) -> list[KeyTable]:
        """The key tables for a config and a format; empty if the format can't store the network."""
        return self.key_tables[format](config) if format in self.key_tables else []
