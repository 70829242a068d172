"""A checkpoint into another format, tensor by tensor: no more than one of them is in memory at a time.

A family's key table reads the one file and, run the other way, writes the other; what lies between them is the
network on the meta device, which has shapes and no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pentad import text, weights
from pentad.errors import BadInput
from pentad.loading import default_dtype, dtype_named, meta_network, pairings
from pentad.models import family_of
from pentad.models.published import DecoderConfig, rope_divisors
from pentad.nn.attention import Attention
from pentad.nn.rope import Rope
from pentad.text import export
from pentad.weights import registry
from pentad.weights.atomic import new_folder
from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.gguf_writer import write_gguf
from pentad.weights.keytable import KeyTable, Value
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import QUANTIZED, Outgoing

if TYPE_CHECKING:
    from pentad.nn.decoder import Decoder
    from pentad.weights.cache import Progress

FORMATS = {"hf": "hf", "mistral": "consolidated", "gguf": "gguf"}
"""What `convert` writes, and what a `Checkpoint` of it is called."""

SHARD_BYTES = 5_000_000_000
FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
KINDS = (*QUANTIZED, *FLOATS)
"""What a GGUF's matrices can be quantized to."""

FILE_TYPES: dict[torch.dtype | str, int] = {
    torch.float32: 0,
    torch.float16: 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    torch.bfloat16: 32,
}
"""GGUF's numbers for what most of a file's matrices are (``general.file_type``)."""

HARMLESS = {
    "hidden_act",  # has several names
    "tie_word_embeddings",  # the head is written a second time
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("seq_length", "use_dynamic_ntk", "use_logn_attn"),
}
"""Fields that may be lost on the way; a note says what that means, where it means anything."""


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        path: the folder or, of GGUF, the (first) file.
        family: the model's, as the new files have it.
        files: all that was written.
        notes: what the format has no place for, a line each.
    """

    path: Path
    family: str
    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    quantize: str | None = None,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint in another format, with its config, tokenizer and chat template.

    Args:
        source: as `pentad.load` takes it.
        destination: a folder that isn't there yet, or is empty; of GGUF a file that isn't there yet.
        to: "hf" (as transformers reads), "mistral" (params.json and consolidated.safetensors) or "gguf".
        quantize: of GGUF, what matrices become (one of `KINDS`); the embedding and the head stay 8 bits wide where the
            others get fewer. By default all stay as they are.
        dtype: of the other two, what numbers are stored in; by default as in the source, bfloat16 where that is
            quantized.
        shard_bytes: the most that one file of weights takes.
        progress: is told of the bytes written.

    Raises:
        BadInput: the source is broken, the format doesn't know the family or has no place for what it computes, the
            destination exists, or an option is out of range.
        PentadError: the disk is full, or can't be written. Nothing is left behind then.
    """
    if to not in FORMATS:
        raise BadInput(f"--to is {to!r}; it takes {', '.join(FORMATS)}")
    if quantize is not None and to != "gguf":
        raise BadInput(f"only GGUF is quantized: {to} takes --dtype, not --quantize {quantize}")
    if quantize is not None and quantize not in KINDS:
        raise BadInput(f"quantize is {quantize!r}; it takes {', '.join(KINDS)}")
    if dtype is not None and to == "gguf":
        raise BadInput("a GGUF's numbers are chosen by --quantize f32, f16, bf16, …, not by --dtype")
    if shard_bytes < 1:
        raise BadInput(f"shards of {shard_bytes} bytes can't hold a tensor")
    checkpoint = weights.open(registry.locate(source, progress=progress))
    work = _Work(checkpoint, FORMATS[to])
    destination = Path(destination)
    _refuse_inside(checkpoint, destination)
    if to == "gguf":
        return _to_gguf(work, destination, quantize, shard_bytes, progress)
    return _to_folder(work, destination, None if dtype is None else dtype_named(dtype), shard_bytes, progress)


class _Work:
    """A checkpoint's tensors by the network's names, and how a file of another format has them."""

    def __init__(self, checkpoint: Checkpoint, format: str) -> None:
        if not checkpoint.tensors:
            raise BadInput(f"{checkpoint.path}: there are no weights beside the config")
        self.checkpoint, self.format = checkpoint, format
        self.family_name, self.family = family_of(checkpoint)
        self.network = meta_network(checkpoint)
        self.config: DecoderConfig = self.network.config  # type: ignore[assignment]
        self.entries: dict[str, tuple[TensorEntry, ...]] = {}
        self.sources: dict[str, Callable[[], Value]] = {}
        for ours, entries, operation in pairings(checkpoint, self.network):
            for i, name in enumerate(ours):
                self.entries[name] = entries
                self.sources[name] = partial(_loaded, entries, operation.load, i)
        tables = self.family.key_tables(self.config, format)
        if not tables:
            raise BadInput(f"{checkpoint.path}: {format} files of the family {self.family_name} don't exist")
        self.table: KeyTable = tables[0]
        self.tied = "head.weight" not in self.sources
        if self.tied and format == "consolidated":  # which has no word for a tied head
            self.entries["head.weight"] = self.entries["embed.weight"]
            self.sources["head.weight"] = self.sources["embed.weight"]

    def written_config(self, tensors: list[Outgoing]) -> dict[str, Any]:
        """The config as the new files have it: the source's own where it is of that format and layout."""
        same = self.checkpoint.format == self.format and all(t.name in self.checkpoint.tensors for t in tensors)
        return dict(self.checkpoint.config) if same else self.family.write_config(self.config, self.format)

    def outgoing(self, kind: Callable[[str, tuple[int, ...]], torch.dtype | str]) -> Iterator[Outgoing]:
        """The file's tensors; `kind` says, by one of our names and its shape, what a tensor is to be stored in."""
        for ours, theirs, operation in self.table.groups(self.sources):
            shapes = [tuple(self.network.get_parameter(name).shape) for name in ours]
            for i, (name, shape) in enumerate(zip(theirs, operation.shapes(shapes), strict=True)):
                made = partial(_stored, [self.sources[name] for name in ours], operation.store, i)
                yield Outgoing(name, tuple(shape), kind(ours[0], tuple(shape)), made)


def _loaded(entries: tuple[TensorEntry, ...], load: Callable[[list[Value]], Any], index: int) -> Value:
    value: Value = load([entry.read() for entry in entries])[index]
    return value


def _stored(sources: list[Callable[[], Value]], store: Callable[[list[Value]], Any], index: int) -> Value:
    value: Value = store([source() for source in sources])[index]
    return value


def _refuse_inside(checkpoint: Checkpoint, destination: Path) -> None:
    """A conversion onto its own source would be refused as existing; say what was meant."""
    source = checkpoint.path.resolve()
    if destination.resolve() == source:
        raise BadInput(f"{destination} is the model that is to be converted: choose another name")


def _to_folder(
    work: _Work, folder: Path, dtype: torch.dtype | None, shard_bytes: int, progress: Progress | None
) -> Conversion:
    checkpoint = work.checkpoint
    if dtype is None and checkpoint.format == "gguf":  # whose norms are float32 whatever the rest is
        dtype = default_dtype(checkpoint)
    tensors = list(work.outgoing(lambda name, _: dtype or work.entries[name][0].dtype or default_dtype(checkpoint)))
    config = work.written_config(tensors)
    files: dict[str, bytes]
    if work.format == "hf":
        if dtype is not None or checkpoint.format != "hf":
            stored = str(dtype or default_dtype(checkpoint)).removeprefix("torch.")
            config["dtype" if "dtype" in config else "torch_dtype"] = stored
        files = {"config.json": _json(config), **export.hf_files(checkpoint)}
    else:
        files = {"params.json": _json(config), **export.consolidated_files(checkpoint)}
    if generation := checkpoint.generation or _ends(checkpoint):
        files["generation_config.json"] = _json(generation)
    family, notes = _read_back(work, config, tensors)
    with new_folder(folder) as partial_folder:
        for name, content in files.items():
            path = partial_folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        stem = "model" if work.format == "hf" else "consolidated"
        written = write_safetensors(partial_folder, stem, tensors, shard_bytes=shard_bytes, progress=progress)
        names = [*files, *(path.name for path in written)]
    return Conversion(folder, family, [folder / name for name in names], notes)


def _ends(checkpoint: Checkpoint) -> dict[str, Any]:
    """What ends a reply, which a Hugging Face folder says here, and other formats in their vocabulary."""
    tokenizer = None if checkpoint.format == "hf" else text.load(checkpoint)
    return {} if tokenizer is None else {"eos_token_id": list(tokenizer.eos_ids)}


def _to_gguf(work: _Work, path: Path, quantize: str | None, shard_bytes: int, progress: Progress | None) -> Conversion:
    if path.suffix != ".gguf":
        raise BadInput(f"{path}: a GGUF is one file: give it a name that ends in .gguf")

    def kind(name: str, shape: tuple[int, ...]) -> torch.dtype | str:
        if len(shape) == 1:  # as llama.cpp computes with norms and biases
            return torch.float32
        if quantize in FLOATS:
            return FLOATS[quantize]
        if quantize is None or shape[-1] % 32:
            entry = work.entries[name][0]
            return entry.quantization or (entry.dtype if entry.dtype in FILE_TYPES else torch.float32)
        return "q8_0" if name.startswith(("embed.", "head.")) else quantize

    tensors = list(work.outgoing(kind))
    if (divisors := rope_divisors(work.config)) is not None:
        tensors.append(Outgoing("rope_freqs.weight", tuple(divisors.shape), torch.float32, lambda: divisors))
    metadata = work.written_config(tensors)
    if quantize is not None:
        metadata |= {"general.file_type": FILE_TYPES[FLOATS.get(quantize, quantize)], "general.quantization_version": 2}
    tokenizer = export.gguf_metadata(work.checkpoint, vocab_size=work.config.vocab_size)
    family, notes = _read_back(work, metadata, tensors)
    files = write_gguf(path, {**metadata, **tokenizer}, tensors, shard_bytes=shard_bytes, progress=progress)
    return Conversion(files[0], family, files, notes)


def _read_back(work: _Work, config: Mapping[str, Any], tensors: list[Outgoing]) -> tuple[str, list[str]]:
    """Read what is about to be written as whoever opens it would: its family, and what the format has no place for.

    Raises:
        BadInput: the network would be another.
    """
    entries = {
        t.name: TensorEntry(
            t.name, t.shape, t.kind if isinstance(t.kind, torch.dtype) else None, None, t.nbytes, t.make
        )
        for t in tensors
    }
    name, _ = family_of(again := Checkpoint(work.checkpoint.path, work.format, config, {}, entries))
    network = meta_network(again)
    new, ours, theirs = network.config, _rope(work.network), _rope(network)
    lost = {f.name for f in fields(work.config) if getattr(new, f.name, f.default) != getattr(work.config, f.name)}
    lost -= {"rope_theta", "rope_parameters", "partial_rotary_factor"}  # spelled in more than one way
    if not _rotate_alike(ours, theirs, 1):
        lost.add("rope_parameters")
    if breaking := sorted(lost - HARMLESS):
        raise BadInput(
            f"{work.checkpoint.path}: {work.format} files have no place for {', '.join(breaking)} of this model"
        )
    long = 2 * work.config.max_position_embeddings
    missing = {
        "the sliding window": work.format == "gguf" and any(getattr(p, "window", None) for p in work.network.modules()),
        "RoPE's scaling for long texts": not _rotate_alike(ours, theirs, long),
        "the scaling of attention for long texts": "use_logn_attn" in lost,
    }
    notes = [f"{work.format} files have no place for {what}: it is left out" for what, left in missing.items() if left]
    return name, notes


def _rope(network: Decoder) -> Rope:
    return next(part.rope for part in network.modules() if isinstance(part, Attention))


def _rotate_alike(one: Rope, other: Rope, length: int) -> bool:
    """Whether both rotate alike in a sequence of `length` tokens."""
    if one.dim != other.dim or abs(one.scaling.magnitude() - other.scaling.magnitude()) > 1e-6:
        return False
    ours, theirs = (rope.scaling.frequencies(rope.theta, rope.dim, length) for rope in (one, other))
    return torch.allclose(ours, theirs, rtol=1e-5, atol=0)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
