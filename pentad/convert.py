"""Convert a checkpoint to another format, one tensor at a time.

One key table of the family converts the source's tensors to the network's parameters; another one, in reverse, converts
the parameters to the new files' tensors. The network itself is on the meta device and has only shapes.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pentad import adapters, text, weights
from pentad.build import default_dtype, dtype_named, meta_decoder, pairings, quantized_type
from pentad.errors import BadInput
from pentad.memory import available_memory
from pentad.models import family_of
from pentad.models.family import TASKS
from pentad.models.language import mixtral
from pentad.models.language.config import frequency_factors, write_family_config
from pentad.models.language.decoder_only import DecoderConfig
from pentad.nn.attention import Attention
from pentad.nn.decoder import Decoder
from pentad.nn.lora import merged_parameters
from pentad.nn.rope import Rope
from pentad.text import export
from pentad.upcycle import Upcycling, mixture_network, mixture_values
from pentad.vision import darknet_files
from pentad.vision import export as vision_export
from pentad.vision.onnx import export_onnx
from pentad.weights import registry
from pentad.weights.atomic import new_folder
from pentad.weights.cache import Progress
from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.gguf_writer import write_gguf
from pentad.weights.keytable import KeyTable, LastResult, Value, apply, on_meta
from pentad.weights.quantizer import QUANTIZED
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import SHARD_BYTES, PendingTensor

FORMATS = {"hf": "hf", "mistral": "consolidated", "gguf": "gguf"}
"""Target of `convert` -> `Checkpoint.format`."""

WORKING_BYTES = 1 << 26  # buffers of a few MiB, in which tensors are quantized and written
_PART = re.compile(r".*-\d{5}-of-\d{5}\.gguf")  # names of the parts of a split GGUF
FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
GGUF_TYPES = (*QUANTIZED, *FLOATS)
"""The types that a GGUF's matrices can be converted to."""

FILE_TYPES: dict[torch.dtype | str, int] = {
    torch.float32: 0,
    torch.float16: 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q4_k": 14,
    torch.bfloat16: 32,
}
"""Type of most matrices -> GGUF's ``general.file_type``."""

OPTIONAL_FIELDS = {
    "hidden_act",  # has several names
    *("initializer_range", "initializer_factor"),  # only for training from scratch
    "tie_word_embeddings",  # the head is written as a copy
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
    *("seq_length", "use_dynamic_ntk", "use_logn_attn"),
}
"""Fields that may be lost in a conversion. If the loss changes results, `Conversion.notes` says so."""

EXTRA_HF_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
"""Fields that pentad's configs don't have, copied between layouts of config.json."""


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        path: the folder or the GGUF file (the first one, if split).
        family: the family of the new files.
        files: all written files.
        notes: one line for each property that the format can't store.
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
    adapter: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint in another format, with its config, tokenizer and chat template.

    Args:
        source: a name or path, as for `pentad.load`.
        destination: a folder that doesn't exist or is empty; for GGUF a file that doesn't exist.
        to: "hf" (for transformers), "mistral" (params.json and consolidated.safetensors) or "gguf"; for vision models
            "hf", or "state_dict" for one file (.pth, .pt or .safetensors) with the names of the published code;
            "onnx" writes a folder with the encoder and the decoder of a Segment Anything;
            "darknet" writes the .cfg, .weights and .names files of a Darknet network again, in the newest version.
        quantize: for GGUF the type of the matrices (one of `GGUF_TYPES`). The embedding and the head get at least 8
            bits. By default types stay unchanged.
        dtype: for the other formats the dtype of the weights. By default it stays unchanged; quantized weights become
            bfloat16.
        upcycle: convert a dense model to a mixture of experts (`pentad.upcycle`), a Mixtral in "hf".
        adapter: the folder of an adapter to merge into the weights, as for `pentad.load`.
        shard_bytes: maximum size of a file of weights.
        progress: reports the bytes written.

    Raises:
        BadInput: the source is broken, the format can't store the network, the destination exists, or an option is out
            of range.
        PentadError: writing failed, as when the disk is full. No partial files remain.
    """
    if to == "darknet":
        if any(option is not None for option in (quantize, dtype, upcycle, adapter)):
            raise BadInput("--to darknet writes float32 weights; expected no --quantize, --dtype, --upcycle or adapter")
        files = darknet_files.rewrite(
            weights.open(registry.locate(source, progress=progress)), Path(destination), progress
        )
        return Conversion(files[0], "darknet", files)
    if to not in (*FORMATS, "state_dict", "onnx"):
        raise BadInput(f"--to is {to!r}; expected one of {', '.join([*FORMATS, 'state_dict', 'onnx', 'darknet'])}")
    if quantize is not None and to != "gguf":
        raise BadInput(f"--quantize {quantize} is only for gguf; for {to} use --dtype")
    if quantize is not None and quantize not in GGUF_TYPES:
        raise BadInput(f"quantize is {quantize!r}; expected one of {', '.join(GGUF_TYPES)}")
    if dtype is not None and to == "gguf":
        raise BadInput("--dtype is not for gguf; use --quantize f32, f16, bf16, …")
    if upcycle is not None and to != "hf":
        raise BadInput(f"--upcycle writes hf; convert the result to {to} afterwards")
    destination = Path(destination)
    if to != "gguf" and destination.suffix == ".gguf":
        raise BadInput(f"{destination}: --to {to} writes a folder; expected a name that doesn't end in .gguf")
    if shard_bytes < 1:
        raise BadInput(f"shard_bytes is {shard_bytes}; expected at least 1")
    checkpoint = weights.open(registry.locate(source, progress=progress))
    if to == "onnx":
        if any(option is not None for option in (dtype, upcycle, adapter)):
            raise BadInput("--to onnx writes float32 weights; expected no --dtype, --upcycle or adapter")
        return Conversion(destination, family_of(checkpoint).names.family, export_onnx(checkpoint, destination))
    if (task := family_of(checkpoint).task) != "language":
        if upcycle is not None or adapter is not None:
            raise BadInput(f"--upcycle and adapters are for language models; {source} is {TASKS[task]}")
        chosen = None if dtype is None else dtype_named(dtype)
        options: Any = {"dtype": chosen, "shard_bytes": shard_bytes, "progress": progress}
        written = vision_export.rewrite(checkpoint, destination, FORMATS.get(to, to), **options)
        return Conversion(destination, written.family, written.files, written.notes)
    if to not in FORMATS:
        raise BadInput(f"--to {to} is for vision models; {source} is {TASKS[task]}")
    if adapter is not None:
        if dtype is None and any(entry.quantization for entry in checkpoint.tensors.values()):
            dtype = torch.float32
        checkpoint = adapters.merged(checkpoint, Path(adapter))
    converter = _Converter(checkpoint, FORMATS[to], upcycle)
    if destination.resolve() == checkpoint.path.resolve():
        raise BadInput(f"{destination} is the source itself; choose another name")
    _check_memory(checkpoint, FORMATS[to], upcycle)
    if to == "gguf":
        return _to_gguf(converter, destination, quantize, shard_bytes, progress)
    return _to_folder(converter, destination, None if dtype is None else dtype_named(dtype), shard_bytes, progress)


def export_network(
    network: Decoder,
    source: Checkpoint,
    destination: Path,
    *,
    tokenizer: Checkpoint,
    also: Callable[[Path], None] = lambda _: None,
    progress: Progress | None = None,
) -> Conversion:
    """Write a trained network as a Hugging Face folder, in float32; low-rank layers are merged.

    Args:
        network: a network with the config of `source`.
        source: the checkpoint, or the config, from which the network was built. If the network's head has one output
            (a reward model), a sequence classifier is written.
        destination: see `convert`.
        tokenizer: the checkpoint whose tokenizer and chat template are written.
        also: writes more into the folder, before it gets its name.
        progress: reports the bytes written.

    Raises:
        BadInput, PentadError: see `convert`.
    """
    converter = _Converter(source, "hf", None, network)
    return _to_folder(converter, destination, torch.float32, SHARD_BYTES, progress, tokenizer, also)


class _Converter:
    """A checkpoint's tensors by parameter name, and the key table that writes them in the target format.

    Attributes:
        checkpoint: the source.
        format: the target's `Checkpoint.format`.
        family, network, config: the family, network and config of the new files.
        entries: parameter name -> the source's tensors that are converted to the parameter.
        values: parameter name -> a function that reads the parameter's value.
        table: the key table of the new files.
        score: reads the head of a reward model; else None.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        format: str,
        upcycle: Upcycling | None,
        trained: Decoder | None = None,
        read: Callable[[TensorEntry], Value] = lambda entry: entry.read(),
    ) -> None:
        if trained is None and not checkpoint.tensors:
            raise BadInput(f"{checkpoint.path}: there are no weights next to the config")
        self.checkpoint, self.format = checkpoint, format
        self.family = family_of(checkpoint)
        self.network = meta_decoder(checkpoint)
        self.entries: dict[str, tuple[TensorEntry, ...]] = {}
        self.values: dict[str, Callable[[], Value]] = {}
        if trained is None:
            self._read_checkpoint(read)
        else:
            self.values = dict(merged_parameters(trained))
        is_reward = trained is not None and trained.head.out_features == 1
        self.score = self.values.pop("head.weight") if is_reward else None
        if upcycle is not None:
            self._upcycle(upcycle)
        self.config: Any = self.network.config
        tables = self.family.layouts(self.config, format)
        if not tables:
            name = self.family.names.family
            raise BadInput(f"{checkpoint.path}: {format} files can't store this {name} model")
        self.table: KeyTable = tables[0]
        # Consolidated files always have a head. In GGUF a head with a bias is never tied.
        has_head = format == "consolidated" or (format == "gguf" and "head.bias" in self.values)
        if has_head and "head.weight" not in self.values:
            self.entries["head.weight"] = self.entries["embed.weight"]
            self.values["head.weight"] = self.values["embed.weight"]

    def _read_checkpoint(self, read: Callable[[TensorEntry], Value]) -> None:
        last = LastResult()
        for names, entries, operation in pairings(self.checkpoint, self.network):
            load = partial(apply, operation.load, [partial(read, entry) for entry in entries])
            for i, name in enumerate(names):
                self.entries[name] = entries
                self.values[name] = partial(last.get, load, i)

    def _upcycle(self, upcycle: Upcycling) -> None:
        dense: DecoderConfig = self.network.config  # type: ignore[assignment]
        self.network = mixture_network(self.checkpoint, self.family, dense, upcycle)
        self.family = mixtral.FAMILY
        values = mixture_values(self.network, self.values, upcycle)
        self.entries = {name: self.entries[dense_name] for name, (dense_name, _) in values.items()}
        self.values = {name: value for name, (_, value) in values.items()}

    def written_config(self, tensors: list[PendingTensor]) -> dict[str, Any]:
        """The config of the new files: the source's config if format and layout are the same."""
        source = self.checkpoint.config if self.checkpoint.format == self.format else {}
        if source and all(t.name in self.checkpoint.tensors for t in tensors):
            return dict(source)
        extra = {key: source[key] for key in EXTRA_HF_FIELDS if key in source} if self.format == "hf" else {}
        return {**write_family_config(self.family, self.config, self.format), **extra}

    def pending_tensors(self, stored_type: Callable[[str, tuple[int, ...]], torch.dtype | str]) -> list[PendingTensor]:
        """The tensors of the new files; `stored_type` chooses a type by parameter name and shape."""
        last, pending = LastResult(), []
        for ours, theirs, operation in self.table.groups(self.values):
            shapes = operation.shapes([tuple(self.network.get_parameter(name).shape) for name in ours])
            store = partial(apply, operation.store, [self.values[name] for name in ours])
            for i, (name, shape) in enumerate(zip(theirs, map(tuple, shapes), strict=True)):
                pending.append(PendingTensor(name, shape, stored_type(ours[0], shape), partial(last.get, store, i)))
        return pending


def conversion_bytes(checkpoint: Checkpoint, format: str, upcycle: Upcycling | None) -> int:
    """The memory that converting a checkpoint takes: that of the largest tensors that one rule makes together."""
    tensors = {name: on_meta(entry) for name, entry in checkpoint.tensors.items()}
    converter = _Converter(checkpoint, format, upcycle, read=lambda entry: tensors[entry.name])
    joined = checkpoint.format == "consolidated"  # slices of several files are joined in new memory
    return converter.table.largest_bytes(converter.values, [] if joined else tensors.values())


def _check_memory(checkpoint: Checkpoint, format: str, upcycle: Upcycling | None) -> None:
    needed = conversion_bytes(checkpoint, format, upcycle) + WORKING_BYTES
    available = available_memory(torch.device("cpu"))
    if available is not None and needed > available:
        sizes = f"{needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are available"
        raise BadInput(f"{checkpoint.path}: converting the largest tensors needs {sizes}; close other programs")


def _to_folder(
    converter: _Converter,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: Progress | None,
    tokenizer_source: Checkpoint | None = None,
    also: Callable[[Path], None] = lambda _: None,
) -> Conversion:
    checkpoint, default = converter.checkpoint, default_dtype(converter.checkpoint)
    if dtype is None and checkpoint.format == "gguf":  # GGUF norms are always float32
        dtype = default
    tensors = converter.pending_tensors(lambda name, _: dtype or converter.entries[name][0].dtype or default)
    config = converter.written_config(tensors)
    named = tokenizer_source or checkpoint
    tokenizer = text.load(named, converter.config.vocab_size)  # also checks that it fits the vocabulary
    if converter.score is not None:
        weight: Any = converter.score()
        tensors.append(PendingTensor("score.weight", tuple(weight.shape), torch.float32, converter.score))
        architecture = converter.family.names.architecture.replace("ForCausalLM", "ForSequenceClassification")
        config |= {"architectures": [architecture], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        if tokenizer is not None and config.get("pad_token_id") in tokenizer.eos_ids:
            del config["pad_token_id"]  # transformers would take the last token for padding
    files: dict[str, bytes]
    if converter.format == "hf":
        if dtype is not None or checkpoint.format != "hf":
            config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype or default).removeprefix("torch.")
        files = {"config.json": _json(config), **export.hf_files(named)}
    else:
        files = {"params.json": _json(config), **export.consolidated_files(checkpoint)}
    generation = checkpoint.generation
    if not generation and tokenizer is not None and tokenizer.eos_ids and named.format != "hf":
        generation = {"eos_token_id": list(tokenizer.eos_ids)}  # other formats store them with the vocabulary
    if generation:
        files["generation_config.json"] = _json(generation)
    family, notes = _read_back(converter, config, tensors)
    with new_folder(folder) as partial_folder:
        for name, content in files.items():
            path = partial_folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        stem = "model" if converter.format == "hf" else "consolidated"
        written = write_safetensors(partial_folder, stem, tensors, shard_bytes=shard_bytes, progress=progress)
        also(partial_folder)
    return Conversion(folder, family, [folder / name for name in (*files, *(path.name for path in written))], notes)


def _to_gguf(
    converter: _Converter, path: Path, quantize: str | None, shard_bytes: int, progress: Progress | None
) -> Conversion:
    if path.suffix != ".gguf":
        raise BadInput(f"{path}: --to gguf writes a file; expected a name that ends in .gguf")
    if _PART.fullmatch(path.name):
        raise BadInput(f"{path} is the name of a part of a split GGUF; leave out the numbers and use --shard-size")

    def stored_type(name: str, shape: tuple[int, ...]) -> torch.dtype | str:
        entry = converter.entries[name][0]
        if len(shape) == 1 or (name.endswith(".router.weight") and (quantize or not entry.quantization)):
            return torch.float32  # as in llama.cpp
        if quantize in FLOATS:
            return FLOATS[quantize]
        wanted = None if quantize is None else quantized_type(name, shape, quantize)
        return wanted or entry.quantization or (entry.dtype if entry.dtype in FILE_TYPES else torch.float32)

    tensors, config = converter.pending_tensors(stored_type), converter.config
    if isinstance(config, DecoderConfig) and (factors := frequency_factors(config)) is not None:
        tensors.append(PendingTensor("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors))
    metadata = converter.written_config(tensors)
    if quantize is not None:
        metadata |= {"general.file_type": FILE_TYPES[FLOATS.get(quantize, quantize)], "general.quantization_version": 2}
    tokenizer = export.gguf_metadata(converter.checkpoint, vocab_size=config.vocab_size)
    family, notes = _read_back(converter, metadata, tensors)
    if not export.keeps_spacing(converter.checkpoint, tokenizer):
        notes.append("gguf files can't store text without a space after a control token: a space is added")
    files = write_gguf(path, {**metadata, **tokenizer}, tensors, shard_bytes=shard_bytes, progress=progress)
    return Conversion(files[0], family, files, notes)


def _read_back(converter: _Converter, config: Mapping[str, Any], tensors: list[PendingTensor]) -> tuple[str, list[str]]:
    """Read the new files before they are written; return their family, and notes on what the format can't store.

    Raises:
        BadInput: the network would be different.
    """
    entries = {}
    for t in tensors:
        dtype = t.type if isinstance(t.type, torch.dtype) else None
        entries[t.name] = TensorEntry(t.name, t.shape, dtype, None, t.nbytes, t.make)
    path, format, before = converter.checkpoint.path, converter.format, converter.config
    written = Checkpoint(path, format, config, {}, entries)
    network = meta_decoder(written)
    old_rope, new_rope = _rope(converter.network), _rope(network)
    lost = {f.name for f in fields(before) if getattr(network.config, f.name, f.default) != getattr(before, f.name)}
    lost -= {"rope_theta", "rope_parameters", "partial_rotary_factor"}  # the rotations are compared instead
    if not _same_rotation(old_rope, new_rope, 1):
        lost.add("rope_parameters")
    optional = OPTIONAL_FIELDS
    if format == "consolidated" and _windows(network) != _windows(converter.network):
        optional = optional - {"layer_types"}  # every layer would have the window
    if changed := sorted(lost - optional):
        raise BadInput(f"{path}: {format} files can't store {', '.join(changed)} of this model")
    dropped = {
        "the sliding window": format == "gguf" and any(_windows(converter.network)),
        "RoPE's scaling for long texts": not _same_rotation(old_rope, new_rope, 2 * before.max_position_embeddings),
        "the scaling of attention for long texts": "use_logn_attn" in lost,
    }
    notes = [f"{format} files can't store {name}: it is dropped" for name, is_dropped in dropped.items() if is_dropped]
    return family_of(written).names.family, notes


def _windows(network: Decoder) -> list[int | None]:
    return [part.window for part in network.modules() if isinstance(part, Attention)]


def _rope(network: Decoder) -> Rope | None:
    return next((part.rope for part in network.modules() if isinstance(part, Attention)), None)


def _same_rotation(one: Rope | None, other: Rope | None, length: int) -> bool:
    """True if two RoPEs (or none) rotate a sequence of `length` tokens equally."""
    if one is None or other is None:
        return one is other
    if one.dim != other.dim or abs(one.scaling.attention_scaling() - other.scaling.attention_scaling()) > 1e-6:
        return False
    ours, theirs = (rope.scaling.frequencies(rope.theta, rope.dim, length) for rope in (one, other))
    return torch.allclose(ours, theirs, rtol=1e-5, atol=0)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
