"""A family of networks, and which checkpoints belong to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

if TYPE_CHECKING:
    from pentad.nn.decoder import Decoder
    from pentad.weights.checkpoint import Checkpoint
    from pentad.weights.keytable import KeyTable


class ArchitectureNames(NamedTuple):
    """What a family is called.

    Attributes:
        family: pentad's name, that of the family's module.
        architecture: the class in a ``config.json``.
        model_type: in a ``config.json`` that pentad writes; `family` if None.
        gguf: ``general.architecture``; None if llama.cpp does not run the family.
        aliases: other values of ``model_type`` in published files.
    """

    family: str
    architecture: str
    model_type: str | None = None
    gguf: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family's config has: fields with the names and defaults of a published ``config.json``."""

    HF_NAMES: ClassVar[Mapping[str, str]] = {}
    """Names in the family's ``config.json`` that differ from the field's: published name -> field."""
    OLD_HF_NAMES: ClassVar[Mapping[str, str]] = {}
    """The same for names in older files, which are read and never written."""

    def resolve(self, checkpoint: Checkpoint) -> Self:
        """The config with derived fields filled in.

        Args:
            checkpoint: the source; its headers may be consulted, and its path starts error messages.

        Raises:
            BadInput: fields contradict each other, or no network of the family has such values.
        """
        return self

    def published(self) -> dict[str, Any]:
        """The fields as a ``config.json`` has them, under the names of their fields."""
        return asdict(self)


@dataclass(frozen=True)
class Family:
    """One kind of network: how its config, its tensors and its names are published.

    Attributes:
        config: the config's class.
        network: makes the network of a config, with weights still to be filled in.
        key_tables: by checkpoint format, the layouts that such files have had; the first one is written. A format that
            is absent, or has no layout for a config, does not know the network.
        names: what the family is called.
        recognizes: whether a checkpoint's format and config are this family's; by `names` if None.
        init_std: standard deviation of a weight matrix before training, from the config and the tensor's name; the
            config's ``initializer_range`` if None.
    """

    config: type[ModelConfig]
    network: Callable[[Any], Decoder]
    key_tables: Mapping[str, Callable[[Any], list[KeyTable]]]
    names: ArchitectureNames
    recognizes: Callable[[str, Mapping[str, Any]], bool] | None = None
    init_std: Callable[[Any, str], float] | None = None

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint's config says that it belongs to this family."""
        if self.recognizes is not None:
            return self.recognizes(checkpoint.format, checkpoint.config)
        if checkpoint.format == "gguf":
            return self.names.gguf is not None and checkpoint.config.get("general.architecture") == self.names.gguf
        return checkpoint.config.get("model_type") in (self.names.family, *self.names.aliases)

    def layouts(self, config: Any, format: str) -> list[KeyTable]:
        """The key tables for a config in files of a format; none if the format does not know such a network."""
        return self.key_tables[format](config) if format in self.key_tables else []
