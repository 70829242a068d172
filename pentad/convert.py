"""A checkpoint into another format, tensor by tensor: no more than one of them is in memory at a time.

A family's key table reads the one file and, run the other way, writes the other; what lies between them is the
network on the meta device, which has shapes and no numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pentad import text, weights
from pentad.build import default_dtype, dtype_named, meta_network, pairings
from pentad.errors import BadInput
from pentad.models import family_of
from pentad.models.language import mixtral
from pentad.models.language.config import frequency_factors, write_family_config
from pentad.models.language.decoder_only import DecoderConfig
from pentad.nn.attention import Attention
from pentad.nn.rope import Rope
from pentad.text import export
from pentad.upcycle import Upcycling, mixture_network, mixture_values
from pentad.weights import registry
from pentad.weights.atomic import new_folder
from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.gguf_writer import write_gguf
from pentad.weights.keytable import KeyTable, Value
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import QUANTIZED, PendingTensor

if TYPE_CHECKING:
    from pentad.nn.decoder import Decoder
    from pentad.weights.cache import Progress

FORMATS = {"hf": "hf", "mistral": "consolidated", "gguf": "gguf"}
"""What `convert` writes, and what a `Checkpoint` of it is called."""

SHARD_BYTES = 5_000_000_000
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")  # what parts of a split GGUF are called
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
    *("initializer_range", "initializer_factor"),  # only for training from the start
    "tie_word_embeddings",  # the head is written a second time
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("seq_length", "use_dynamic_ntk", "use_logn_attn"),
}
"""Fields that may be lost on the way; a note says what that means, where it means anything."""

HF_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
"""What a folder's config.json says that the network doesn't read, and another layout of it says too."""


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
    upcycle: Upcycling | None = None,
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
        upcycle: make a mixture of experts of a dense model (`pentad.upcycle`), a Mixtral in "hf".
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
    if upcycle is not None and to != "hf":
        raise BadInput(f"an upcycled model is written as hf; convert that to {to} afterwards")
    destination = Path(destination)
    if to != "gguf" and destination.suffix == ".gguf":
        raise BadInput(f"{destination}: {to} is a folder: give it a name that doesn't end in .gguf")
    if shard_bytes < 1:
        raise BadInput(f"shards of {shard_bytes} bytes can't hold a tensor")
    checkpoint = weights.open(registry.locate(source, progress=progress))
    work = _Work(checkpoint, FORMATS[to], upcycle)
    if destination.resolve() == checkpoint.path.resolve():
        raise BadInput(f"{destination} is the model that is to be converted: choose another name")
    if to == "gguf":
        return _to_gguf(work, destination, quantize, shard_bytes, progress)
    return _to_folder(work, destination, None if dtype is None else dtype_named(dtype), shard_bytes, progress)


class _Work:
    """A checkpoint's tensors by the network's names, and how a file of another format has them."""

    def __init__(self, checkpoint: Checkpoint, format: str, upcycle: Upcycling | None) -> None:
        if not checkpoint.tensors:
            raise BadInput(f"{checkpoint.path}: there are no weights beside the config")
        self.checkpoint, self.format = checkpoint, format
        self.family = family_of(checkpoint)
        self.network = meta_network(checkpoint)
        self.entries: dict[str, tuple[TensorEntry, ...]] = {}
        self.sources: dict[str, Callable[[], Value]] = {}
        latest = _Latest()
        for ours, entries, operation in pairings(checkpoint, self.network):
            for i, name in enumerate(ours):
                self.entries[name] = entries
                self.sources[name] = partial(latest, partial(_loaded, entries, operation.load), entries, i)
        if upcycle is not None:
            self._become_a_mixture(upcycle)
        self.config: Any = self.network.config
        tables = self.family.layouts(self.config, format)
        if not tables:
            name = self.family.names.family
            raise BadInput(f"{checkpoint.path}: {format} files of such a {name} model don't exist")
        self.table: KeyTable = tables[0]
        tied = "head.weight" not in self.sources
        # Consolidated files have no word for a tied head, and in GGUF one that has a bias is never tied.
        if tied and (format == "consolidated" or (format == "gguf" and "head.bias" in self.sources)):
            self.entries["head.weight"] = self.entries["embed.weight"]
            self.sources["head.weight"] = self.sources["embed.weight"]

    def _become_a_mixture(self, upcycle: Upcycling) -> None:
        dense: DecoderConfig = self.network.config  # type: ignore[assignment]
        self.network = mixture_network(self.checkpoint, self.family, dense, upcycle)
        self.family = mixtral.FAMILY
        values = mixture_values(self.network, self.sources, upcycle)
        self.entries = {name: self.entries[dense] for name, (dense, _) in values.items()}
        self.sources = {name: source for name, (_, source) in values.items()}

    def written_config(self, tensors: list[PendingTensor]) -> dict[str, Any]:
        """The config as the new files have it: the source's own where it is of that format and layout."""
        source = self.checkpoint.config if self.checkpoint.format == self.format else {}
        if source and all(t.name in self.checkpoint.tensors for t in tensors):
            return dict(source)
        kept = {key: source[key] for key in HF_KEPT if key in source} if self.format == "hf" else {}
        return {**write_family_config(self.family, self.config, self.format), **kept}

    def pending_tensors(self, kind: Callable[[str, tuple[int, ...]], torch.dtype | str]) -> Iterator[PendingTensor]:
        """The file's tensors; `kind` says, by one of our names and its shape, what a tensor is to be stored in."""
        latest = _Latest()
        for ours, theirs, operation in self.table.groups(self.sources):
            shapes = [tuple(self.network.get_parameter(name).shape) for name in ours]
            make = partial(_stored, [self.sources[name] for name in ours], operation.store)
            for i, (name, shape) in enumerate(zip(theirs, operation.shapes(shapes), strict=True)):
                yield PendingTensor(name, tuple(shape), kind(ours[0], tuple(shape)), partial(latest, make, ours, i))


class _Latest:
    """What a rule made of its tensors, until another's are asked for: a stack of experts is made once, not for each."""

    def __init__(self) -> None:
        self._key: object = None
        self._values: Sequence[Value] = ()

    def __call__(self, make: Callable[[], Sequence[Value]], key: object, index: int) -> Value:
        if key is not self._key:
            self._key, self._values = None, ()  # before there are others
            self._key, self._values = key, make()
        return self._values[index]


def _loaded(entries: tuple[TensorEntry, ...], load: Callable[[list[Value]], Sequence[Value]]) -> Sequence[Value]:
    return load([entry.read() for entry in entries])


def _stored(sources: list[Callable[[], Value]], store: Callable[[list[Value]], Sequence[Value]]) -> Sequence[Value]:
    return store([source() for source in sources])


def _to_folder(
    work: _Work, folder: Path, dtype: torch.dtype | None, shard_bytes: int, progress: Progress | None
) -> Conversion:
    checkpoint = work.checkpoint
    if dtype is None and checkpoint.format == "gguf":  # whose norms are float32 whatever the rest is
        dtype = default_dtype(checkpoint)
    tensors = list(
        work.pending_tensors(lambda name, _: dtype or work.entries[name][0].dtype or default_dtype(checkpoint))
    )
    config = work.written_config(tensors)
    tokenizer = text.load(checkpoint, work.config.vocab_size)  # even where its files are copied: they may not fit
    files: dict[str, bytes]
    if work.format == "hf":
        if dtype is not None or checkpoint.format != "hf":
            stored = str(dtype or default_dtype(checkpoint)).removeprefix("torch.")
            config["dtype" if "dtype" in config else "torch_dtype"] = stored
        files = {"config.json": _json(config), **export.hf_files(checkpoint)}
    else:
        files = {"params.json": _json(config), **export.consolidated_files(checkpoint)}
    generation = checkpoint.generation
    if not generation and tokenizer is not None and tokenizer.eos_ids and checkpoint.format != "hf":
        generation = {"eos_token_id": list(tokenizer.eos_ids)}  # which other formats say in their vocabulary
    if generation:
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


def _to_gguf(work: _Work, path: Path, quantize: str | None, shard_bytes: int, progress: Progress | None) -> Conversion:
    if path.suffix != ".gguf":
        raise BadInput(f"{path}: a GGUF is one file: give it a name that ends in .gguf")
    if _PART.fullmatch(path.name):
        raise BadInput(f"{path}: so the parts of a split GGUF are called: leave the numbers out, and name --shard-size")

    def kind(name: str, shape: tuple[int, ...]) -> torch.dtype | str:
        if len(shape) == 1:  # as llama.cpp computes with norms and biases
            return torch.float32
        entry = work.entries[name][0]
        if name.endswith(".router.weight") and (quantize or not entry.quantization):  # as llama.cpp keeps them
            return torch.float32
        if quantize in FLOATS:
            return FLOATS[quantize]
        if quantize is None or shape[-1] % 32:
            return entry.quantization or (entry.dtype if entry.dtype in FILE_TYPES else torch.float32)
        return "q8_0" if name.startswith(("embed.", "head.")) else quantize

    tensors = list(work.pending_tensors(kind))
    if isinstance(work.config, DecoderConfig) and (factors := frequency_factors(work.config)) is not None:
        tensors.append(PendingTensor("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors))
    metadata = work.written_config(tensors)
    if quantize is not None:
        metadata |= {"general.file_type": FILE_TYPES[FLOATS.get(quantize, quantize)], "general.quantization_version": 2}
    tokenizer = export.gguf_metadata(work.checkpoint, vocab_size=work.config.vocab_size)
    family, notes = _read_back(work, metadata, tensors)
    if not export.keeps_spacing(work.checkpoint, tokenizer):
        notes.append("gguf files have no place for text without a space after a control token: it gets one")
    files = write_gguf(path, {**metadata, **tokenizer}, tensors, shard_bytes=shard_bytes, progress=progress)
    return Conversion(files[0], family, files, notes)


def _read_back(work: _Work, config: Mapping[str, Any], tensors: list[PendingTensor]) -> tuple[str, list[str]]:
    """Read what is about to be written as whoever opens it would: its family, and what the format has no place for.

    Raises:
        BadInput: the network would be another.
    """
    entries = {
        t.name: TensorEntry(
            t.name, t.shape, t.type if isinstance(t.type, torch.dtype) else None, None, t.nbytes, t.make
        )
        for t in tensors
    }
    name = family_of(again := Checkpoint(work.checkpoint.path, work.format, config, {}, entries)).names.family
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


def _rope(network: Decoder) -> Rope | None:
    return next((part.rope for part in network.modules() if isinstance(part, Attention)), None)


def _rotate_alike(one: Rope | None, other: Rope | None, length: int) -> bool:
    """Whether both rotate alike, or neither does, in a sequence of `length` tokens."""
    if one is None or other is None:
        return one is other
    if one.dim != other.dim or abs(one.scaling.attention_scaling() - other.scaling.attention_scaling()) > 1e-6:
        return False
    ours, theirs = (rope.scaling.frequencies(rope.theta, rope.dim, length) for rope in (one, other))
    return torch.allclose(ours, theirs, rtol=1e-5, atol=0)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
