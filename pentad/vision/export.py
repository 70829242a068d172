"""Writing vision models: as a folder that transformers reads, or as one file with the names of the published code."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pentad import weights
from pentad.build import default_dtype, meta_network, named_tensors, pairings
from pentad.errors import BadInput
from pentad.models import family_of
from pentad.models.family import Family
from pentad.models.language.config import write_family_config
from pentad.models.vision.config import Preprocessing
from pentad.text.export import hf_files
from pentad.vision.classifier import PROCESSORS, read_preprocessing
from pentad.vision.segmenter import CLIP_FOLDER
from pentad.weights.atomic import NewFile, new_folder, write_files
from pentad.weights.cache import Progress
from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.keytable import KeyTable, LastResult, Value, apply
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import SHARD_BYTES, PendingTensor

PICKLED = (".pth", ".pt")
STATE_DICTS = (*PICKLED, ".safetensors")
"""Suffixes of state dicts."""

IMAGE_PROCESSORS = {"clip": "CLIPImageProcessor", "sam": "SamImageProcessor"}
"""Family -> the class in its preprocessor_config.json; ViTImageProcessor for the others."""

TRAINING_FIELDS = {"initializer_range", "logit_scale_init_value", "drop_path_rate", "bos_token_id", "eos_token_id"}
NOTED_FIELDS = {"id2label", "layer_norm_eps", "decoder_layer_norm_eps", "mask_ratio", "norm_pix_loss"}
"""Fields that are lost with a note. Sizes that a state dict's tensors show needn't be stored."""


class Source(NamedTuple):
    """One tensor of a network that is being written.

    Attributes:
        shape: its shape.
        dtype: its dtype in the new file.
        read: returns it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Value]


class Rewritten(NamedTuple):
    """The written files, the folder or the file itself first, and what they can't store."""

    files: list[Path]
    family: str
    notes: list[str]


def export(network: nn.Module, family: Family, folder: Path, preprocessing: Preprocessing | None = None) -> None:
    """Write a network in float32, in the layout of its family's published folders.

    Args:
        network: the network, with its config.
        family: its family.
        folder: is made.
        preprocessing: how the network expects its images; None for a family with its own way.

    Raises:
        BadInput, PentadError: see `new_folder`.
    """
    config: Any = network.config
    sources = {
        name: Source(tuple(tensor.shape), torch.float32, tensor.detach().float().cpu)
        for name, tensor in named_tensors(network).items()
    }
    settings = {"config.json": write_family_config(family, config, "hf") | {"dtype": "float32"}}
    if preprocessing is not None:
        settings["preprocessor_config.json"] = _processor(preprocessing, family)
    files = {name: _json(content) for name, content in settings.items()}
    _write_folder(folder, files, _pending(family.layouts(config, "hf")[0], sources))


def rewrite(
    checkpoint: Checkpoint,
    destination: Path,
    format: str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Rewritten:
    """Write a checkpoint of a vision model in another layout.

    Args:
        checkpoint: the source.
        destination: a folder, or for a state dict a file; it must not exist yet.
        format: "hf", or "state_dict" for one file with the names of the published code.
        dtype: of the new tensors; by default as they are.
        shard_bytes: maximum size of a file in a folder.
        progress: reports the bytes written.

    Raises:
        BadInput: the source is broken, the format can't store the network, or the destination exists.
        PentadError: writing failed, as when the disk is full. No partial files remain.
    """
    if format == "state_dict" and destination.suffix not in STATE_DICTS:
        endings = ", ".join(STATE_DICTS)
        raise BadInput(f"{destination}: --to state_dict writes a file; expected a name that ends in {endings}")
    if not checkpoint.tensors:
        raise BadInput(f"{checkpoint.path}: there are no weights next to the config")
    family, network = family_of(checkpoint), meta_network(checkpoint)
    config: Any = network.config
    if not (tables := family.layouts(config, format)):
        raise BadInput(f"{checkpoint.path}: {format} files can't store this {family.names.family} model")
    tensors = _pending(tables[0], _sources(checkpoint, network, dtype))
    written = _written_config(checkpoint, family, config, tensors) if format == "hf" else {}
    notes = _read_back(checkpoint, config, format, written, tensors)
    if format == "state_dict":
        if any(hf_files(checkpoint)):
            notes.append("state_dict files can't store the tokenizer: it is left out")
        if _words(checkpoint) is not None:
            notes.append("state_dict files can't store the CLIP for words: it is left out")
        return Rewritten(_write_file(destination, tensors, progress), family.names.family, notes)
    files = {"config.json": _json(written), **_image_processor(checkpoint, family, config), **hf_files(checkpoint)}
    paths = _write_folder(destination, files, tensors, shard_bytes, progress)
    if (words := _words(checkpoint)) is not None:
        paths += rewrite(words, destination / words.path.name, format, dtype=dtype, progress=progress).files[1:]
    return Rewritten([destination, *paths], family.names.family, notes)


def _words(checkpoint: Checkpoint) -> Checkpoint | None:
    """The CLIP of a Segment Anything that takes words."""
    folder = checkpoint.path / CLIP_FOLDER
    return weights.open(folder) if folder.is_dir() and family_of(checkpoint).task == "segment" else None


def _sources(checkpoint: Checkpoint, network: nn.Module, dtype: torch.dtype | None) -> dict[str, Source]:
    tensors, last, sources = named_tensors(network), LastResult(), dict[str, Source]()
    for names, entries, operation in pairings(checkpoint, network):
        load = partial(apply, operation.load, [entry.read for entry in entries])
        stored = dtype or entries[0].dtype or torch.float32
        for i, name in enumerate(names):
            sources[name] = Source(tuple(tensors[name].shape), stored, partial(last.get, load, i))
    return sources


def _pending(table: KeyTable, sources: Mapping[str, Source]) -> list[PendingTensor]:
    """The tensors of new files, from the network's."""
    last, pending = LastResult(), list[PendingTensor]()
    for ours, theirs, operation in table.groups(sources):
        group = [sources[name] for name in ours]
        store = partial(apply, operation.store, [source.read for source in group])
        shapes = operation.shapes([source.shape for source in group])
        for i, (name, shape) in enumerate(zip(theirs, shapes, strict=True)):
            pending.append(PendingTensor(name, tuple(shape), group[0].dtype, partial(last.get, store, i)))
    return pending


def _written_config(
    checkpoint: Checkpoint, family: Family, config: Any, tensors: Sequence[PendingTensor]
) -> dict[str, Any]:
    """The config.json: the source's if its layout is the same."""
    same = checkpoint.format == "hf" and all(tensor.name in checkpoint.tensors for tensor in tensors)
    values = dict(checkpoint.config) if same else write_family_config(family, config, "hf")
    stored = tensors[0].type if all(tensor.type == tensors[0].type for tensor in tensors) else default_dtype(checkpoint)
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(stored).removeprefix("torch.")
    return values


def _read_back(
    checkpoint: Checkpoint, before: Any, format: str, config: dict[str, Any], tensors: Sequence[PendingTensor]
) -> list[str]:
    """Read the new files before they are written; return notes on what the format can't store.

    Raises:
        BadInput: the network would be different.
    """
    entries = {t.name: TensorEntry(t.name, t.shape, t.type, None, t.nbytes, t.make) for t in tensors}  # type: ignore[arg-type]
    new = Checkpoint(checkpoint.path, format, config, {}, entries)
    network = meta_network(new)
    pairings(new, network)
    after: Any = network.config
    lost = _changed(before, after) - TRAINING_FIELDS
    if wrong := sorted(lost - NOTED_FIELDS):
        raise BadInput(f"{checkpoint.path}: {format} files can't store {', '.join(wrong)} of this model")
    notes = [f"{format} files can't store {name}: it is left out" for name in sorted(lost)]
    if format == "state_dict" and hasattr(before, "preprocessing"):
        given = read_preprocessing(checkpoint, before.preprocessing)
        if given != after.preprocessing:
            notes.append(f"{format} files can't store how images are resized and normalized: it is left out")
    return notes


def _changed(before: Any, after: Any) -> set[str]:
    """The fields that differ, those of nested configs included; how many labels there are the head's shape says."""
    names = set[str]()
    for field in fields(before):
        one, other = getattr(before, field.name), getattr(after, field.name, None)
        if is_dataclass(one) and is_dataclass(other):
            names |= _changed(one, other) - {"projection_dim"}  # of both encoders together
        elif one != other and one != {} and field.name != "num_labels":
            names.add(field.name)
    return names


def _image_processor(checkpoint: Checkpoint, family: Family, config: Any) -> dict[str, bytes]:
    """The settings of the image processor: the source's own file, else as the family was published."""
    if checkpoint.format == "hf":
        found = [checkpoint.path / name for name in PROCESSORS]
        if copied := {path.name: path.read_bytes() for path in found if path.is_file()}:
            return copied
    if hasattr(config, "preprocessing"):
        return {PROCESSORS[0]: _json(_processor(read_preprocessing(checkpoint, config.preprocessing), family))}
    named = IMAGE_PROCESSORS.get(family.names.family)
    return {} if named is None else {PROCESSORS[0]: _json({"image_processor_type": named})}


def _processor(how: Preprocessing, family: Family) -> dict[str, Any]:
    """The settings of an image processor of transformers."""
    size: dict[str, int] = {"shortest_edge": how.size} if isinstance(how.size, int) else {}
    if not isinstance(how.size, int):
        size = {"height": how.size[0], "width": how.size[1]}
    crop = {"do_center_crop": True, "crop_size": {"height": how.crop, "width": how.crop}} if how.crop else {}
    return {
        "image_processor_type": IMAGE_PROCESSORS.get(family.names.family, "ViTImageProcessor"),
        "do_resize": True,
        "size": size,
        **crop,
        "resample": 3 if how.resample == "bicubic" else 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_folder(
    folder: Path,
    files: Mapping[str, bytes],
    tensors: Sequence[PendingTensor],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    with new_folder(folder) as partial_folder:
        for name, content in files.items():
            (partial_folder / name).write_bytes(content)
        written = write_safetensors(partial_folder, "model", tensors, shard_bytes=shard_bytes, progress=progress)
    return [folder / name for name in (*files, *(path.name for path in written))]


def _write_file(path: Path, tensors: Sequence[PendingTensor], progress: Progress | None) -> list[Path]:
    if path.suffix not in PICKLED:
        whole = sum(tensor.nbytes for tensor in tensors) + 1
        return write_safetensors(path.parent, path.stem, tensors, shard_bytes=whole, progress=progress)
    state, buffer = dict[str, Tensor](), io.BytesIO()
    for tensor in tensors:
        value = tensor.make()
        assert isinstance(value, Tensor)
        assert isinstance(tensor.type, torch.dtype)
        # A copy, since torch.save would write all that a view looks at.
        state[tensor.name] = value.detach().to(tensor.type).clone(memory_format=torch.contiguous_format)
    torch.save(state, buffer)
    return write_files([NewFile(path, buffer.getbuffer().nbytes, [buffer.getbuffer()])], progress)
