"""Whole networks, one file a family, named by its published ``model_type``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.nn.decoder import Decoder
    from pentad.weights.checkpoint import Checkpoint
    from pentad.weights.keytable import KeyTable

FAMILIES = {
    name: f"pentad.models.language.{name}"
    for name in ("llama", "mistral", "mixtral", "openmoe", "phi", "qwen", "qwen2", "qwen3", "switch_transformers")
}
ALIASES = {"phi2": "phi", "phi-msft": "phi", "mixformer-sequential": "phi"}
"""Other names that files give to a family."""
ARCHITECTURES = {"OpenMoeForCausalLM": "openmoe"}
"""Classes of families whose ``config.json`` has another's model_type: OpenMoE's says "llama"."""
RELATIVES = ("llama", "t5", "mistral", "mixtral", "qwen", "gemma", "phi", "smollm", "olmo", "granite", "stablelm")


class Family(Protocol):
    """What a family's module offers."""

    def config_from(self, checkpoint: Checkpoint) -> Any:
        """The typed config of a checkpoint; BadInput where it lacks or contradicts something."""

    def key_tables(self, config: Any, format: str) -> list[KeyTable]:
        """The file's tensor names against the network's, for each layout that files of a format have had; the first
        is the one to write. Empty where the format doesn't know the family."""

    def write_config(self, config: Any, format: str) -> dict[str, Any]:
        """The config as files of a format spell it; what that has no place for is left out."""

    def build(self, config: Any) -> Decoder:
        """The network, with weights still to be filled in."""


def family_of(checkpoint: Checkpoint) -> tuple[str, Family]:
    """The family that a checkpoint says it belongs to, and its module.

    Raises:
        BadInput: it says nothing, or names a family that isn't here.
    """
    if checkpoint.format == "consolidated":
        name: Any = _family_of_params(checkpoint)
    else:
        key = "general.architecture" if checkpoint.format == "gguf" else "model_type"
        name = _family_of_class(checkpoint.config.get("architectures")) or checkpoint.config.get(key)
        if not isinstance(name, str):
            raise BadInput(f"{checkpoint.path}: the config has no {key!r}, so its architecture is unknown")
        name = ALIASES.get(name, name)
        if name == "llama" and checkpoint.config.get("llama.expert_count"):
            name = "mixtral"  # llama.cpp's name for all that has Llama's attention
    if name not in FAMILIES:
        raise BadInput(
            f"{checkpoint.path}: architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}"
            + (f" ({name!r} is a relative, but its networks differ)" if name.startswith(RELATIVES) else "")
        )
    return name, import_module(FAMILIES[name])


def _family_of_class(architectures: object) -> str | None:
    published = architectures if isinstance(architectures, list) else []
    return next((name for architecture, name in ARCHITECTURES.items() if architecture in published), None)


def _family_of_params(checkpoint: Checkpoint) -> str:
    """Neither Meta nor Mistral say in a params.json whose it is, but only Mistral's has the feed-forward's width."""
    params = checkpoint.config
    if params.get("moe") or "num_experts" in params:
        return "mixtral"
    if "hidden_dim" in params:
        return "mistral"
    if "multiple_of" in params:
        return "llama"
    raise BadInput(
        f"{checkpoint.path}: params.json has neither hidden_dim (Mistral's) nor multiple_of (Meta's),"
        " so its architecture is unknown"
    )
