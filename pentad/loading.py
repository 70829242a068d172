"""From a name or a path to the runner that fits: locate, open, build, fill, run."""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pentad import kernels, text, weights
from pentad.errors import BadInput
from pentad.generate import EncoderDecoderModel, LanguageModel
from pentad.generate.encoder_decoder_step import EncoderDecoderStep
from pentad.generate.guards import UnsupportedByKernels
from pentad.generate.plan import check_parts
from pentad.generate.plan_step import PlanStep
from pentad.generate.step import PlainStep, Step
from pentad.models import family_of
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.nn.linear import QuantizedEmbedding, QuantizedLinear, RowwiseInt8Linear
from pentad.nn.moe.experts import GroupedLinear, QuantizedGroupedLinear
from pentad.weights.cache import Silent, task
from pentad.weights.keytable import best_table
from pentad.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from pathlib import Path

    from pentad.nn.decoder import Decoder
    from pentad.weights.cache import Progress
    from pentad.weights.checkpoint import Checkpoint, TensorEntry
    from pentad.weights.keytable import Operation, Pairing

_logger = logging.getLogger(__name__)
IN_BLOCKS = {nn.Linear, nn.Embedding, GroupedLinear}
"""Parts that have a counterpart whose weight stays in its file's blocks; `_in_blocks` makes it."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: what a load makes stays, and it would look through all of torch to find that."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_uncollected()
def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    cache_dtype: str | torch.dtype | None = None,
    fast: bool = False,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model, as it was published, and give the runner that fits it.

    Args:
        name_or_path: a known name (``smollm2``), a file or folder, or a repository ``org/name[@revision][:Q4_K_M]``.
        device: ``cpu``, ``cuda``, ``mps``; by default CUDA where there is one, else the CPU.
        dtype: what torch computes in: float32, bfloat16 or float16. By default pentad's kernels compute on the CPU,
            with the file's weights as they are, and are near float32. Where they can't: the dtype of the file's
            weights, bfloat16 if they are quantized.
        quantize: None keeps the file's own quantization where this device computes with it; else the weights are
            dequantized (and, without the kernels, a quantized head is rounded to int8 rows where one or two tokens are
            decoded); "none" dequantizes.
        threads: CPU threads, for the whole process.
        context: the longest sequence, in tokens; the model's own limit by default.
        cache_dtype: what keys and values are kept in: a dtype, or int8 by the kernels. By default `dtype`; by the
            kernels float32 where all weights are, else float16.
        fast: let the kernels round activations to 8 bits instead of 16.
        progress: is told of downloads and of loading.

    Raises:
        BadInput: no such model, or its files are broken, or an option is out of range.
        PentadError: a download failed.
    """
    started = time.perf_counter()
    from pentad.weights import registry

    if threads is not None:
        if threads < 1:
            raise BadInput(f"threads is {threads}; it takes at least 1")
        torch.set_num_threads(threads)
    target = _device(device)
    checkpoint = weights.open(registry.locate(name_or_path, progress=progress))
    kind = default_dtype(checkpoint) if dtype is None else dtype_named(dtype)
    if quantize not in (None, "none"):
        raise BadInput(f"quantize is {quantize!r}; it takes 'none' so far, or nothing for the file's own")
    cache_kind = None if cache_dtype is None else _cache_dtype(cache_dtype)
    step: Step
    try:
        network = meta_network(checkpoint)
        check_plan(checkpoint, network, device=target, dtype=dtype, quantize=quantize)
        floats = torch.float32 if _is_quantized(checkpoint) else kind
        _fill(network, checkpoint, floats, target, keep_quantized=True, blocks=True, progress=progress)
        step = PlanStep(network, cache_dtype=cache_kind, fast=fast)
    except UnsupportedByKernels as why:
        if cache_kind == torch.int8:
            raise BadInput(f"a cache in int8 is the kernels', but plain torch runs {name_or_path}: {why}") from None
        network = load_network(
            checkpoint, device=target, dtype=kind, keep_quantized=quantize is None, progress=progress
        )
        if isinstance(network, EncoderDecoder):
            step = EncoderDecoderStep(network, cache_dtype=cache_kind)
        else:
            step = PlainStep(network, cache_dtype=cache_kind, why=str(why))
    _logger.info("%s runs %s", name_or_path, step.backend)
    runner: type[LanguageModel] = EncoderDecoderModel if isinstance(step, EncoderDecoderStep) else LanguageModel
    return runner(
        str(name_or_path),
        step,
        _tokenizer(checkpoint, step.network.config.vocab_size),
        context=context,
        generation=checkpoint.generation,
        load_seconds=time.perf_counter() - started,
    )


def check_plan(
    checkpoint: Checkpoint,
    network: Decoder,
    *,
    device: torch.device,
    dtype: object = None,
    quantize: str | None = None,
) -> None:
    """Raise UnsupportedByKernels, which says why, if `load` with these options runs a checkpoint by plain torch.

    Args:
        checkpoint: its headers are looked at.
        network: of the checkpoint; its weights may be on the meta device.
        device: where it is to run.
        dtype, quantize: as `load` takes them.
    """
    if device.type != "cpu":
        raise UnsupportedByKernels(f"it is on {device}")
    if dtype is not None or quantize is not None:
        raise UnsupportedByKernels(f"{'a dtype' if quantize is None else 'dequantizing'} was asked for")
    if not kernels.isas():
        raise UnsupportedByKernels(f"there are no kernels: {kernels.reason()}")
    types = {(entry.quantization, entry.shape[-1]) for entry in checkpoint.tensors.values() if entry.quantization}
    for kind, columns in sorted(types):
        if not kernels.packs(kind, columns):
            raise UnsupportedByKernels(f"the kernels don't take {kind} in rows of {columns}")
    check_parts(network)


def _is_quantized(checkpoint: Checkpoint) -> bool:
    return any(entry.quantization for entry in checkpoint.tensors.values())


def _tokenizer(checkpoint: Checkpoint, vocab_size: int) -> text.Tokenizer | BadInput | None:
    """The tokenizer, or why there is none: a network runs without."""
    try:
        return text.load(checkpoint, vocab_size=vocab_size)
    except BadInput as error:
        return error


def load_network(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    keep_quantized: bool = True,
    blocks: bool = False,
    progress: Progress | None = None,
) -> Decoder:
    """Build a checkpoint's network on the meta device and put its tensors in place.

    Tensors that already have `dtype` and `device` are the file's own mapped memory. Quantized linear weights stay in
    blocks where torch has an operator for them; all others are dequantized. With `blocks`, all quantized matrices stay
    in blocks, as the kernels take them.

    Raises:
        BadInput: an unknown family, or tensors that are missing, not used or of the wrong shape.
    """
    return _fill(meta_network(checkpoint), checkpoint, dtype, torch.device(device), keep_quantized, blocks, progress)


def _fill(
    network: Decoder,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    keep_quantized: bool,
    blocks: bool,
    progress: Progress | None,
) -> Decoder:
    """Put a checkpoint's tensors in place, in a network on the meta device."""
    if not checkpoint.tensors:
        raise BadInput(f"{checkpoint.path}: there are no weights beside the config")
    placements = _placements(checkpoint, network, dtype, device, keep_quantized, blocks)
    progress = progress or Silent()
    with task(progress, "Loading", sum(placement.nbytes for placement in placements)):
        for placement in placements:
            _place(network, placement, dtype, device)
            progress.advance(placement.nbytes)
    return network.eval()


def held_bytes(checkpoint: Checkpoint, dtype: torch.dtype, *, keep_quantized: bool = True) -> int:
    """What a checkpoint's weights take in memory on a CPU; of one without weights, what they would take.

    Raises:
        BadInput: as `load_network`.
    """
    network = meta_network(checkpoint)
    if not checkpoint.tensors:
        return sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
    total = 0.0
    for placement in _placements(checkpoint, network, dtype, torch.device("cpu"), keep_quantized):
        for homes, linear in zip(placement.homes, placement.linears, strict=True):
            numbers = network.get_parameter(homes[0]).numel()
            total += numbers * (dtype.itemsize if linear is None else linear.bytes_per_weight)
    return int(total)


class _Placement(NamedTuple):
    """Tensors of a file that a rule ties together, and where what is made of them goes."""

    entries: tuple[TensorEntry, ...]
    operation: Operation
    homes: list[list[str]]
    """For each tensor that is made, its names in the network; a tied one has several."""
    linears: list[type[QuantizedLinear | RowwiseInt8Linear] | None]
    """For each, what takes the place of a linear layer whose weight is quantized in the file."""

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def _placements(
    checkpoint: Checkpoint,
    network: Decoder,
    dtype: torch.dtype,
    device: torch.device,
    keep_quantized: bool,
    blocks: bool = False,
) -> list[_Placement]:
    placements = []
    homes = tensor_names(network)
    shapes = {name: tuple(network.get_parameter(name).shape) for name in homes}
    for ours, entries, operation in pairings(checkpoint, network):
        types = {entry.quantization for entry in entries}
        quantization = types.pop() if len(types) == 1 and keep_quantized else None
        linears: list[type[QuantizedLinear | RowwiseInt8Linear] | None] = []
        for name in ours:
            owners = [home.rpartition(".") for home in homes[name]]
            kinds = {type(network.get_submodule(owner)) if leaf == "weight" else None for owner, _, leaf in owners}
            alone = len(owners) == 1 and kinds == {nn.Linear}
            taken = alone and QuantizedLinear.takes(quantization, shapes[name], dtype, device)
            if taken or (blocks and quantization and kinds <= IN_BLOCKS):
                linears.append(QuantizedLinear)
            elif quantization and "head.weight" in homes[name] and RowwiseInt8Linear.takes(dtype, device):
                linears.append(RowwiseInt8Linear)
            else:
                linears.append(None)
        placements.append(_Placement(entries, operation, [homes[name] for name in ours], linears))
    return placements


def tensor_names(network: nn.Module) -> dict[str, list[str]]:
    """A network's tensors by their first names, with all names that each has: a tied one has several."""
    homes: dict[str, list[str]] = {}
    firsts: dict[nn.Parameter, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        homes.setdefault(firsts.setdefault(parameter, name), []).append(name)
    return homes


def pairings(checkpoint: Checkpoint, network: Decoder) -> list[Pairing]:
    """A network's tensors with those of its checkpoint that they are made of.

    Raises:
        BadInput: tensors that are missing, not used, of the wrong shape or not numbers.
    """
    shapes = {name: tuple(network.get_parameter(name).shape) for name in tensor_names(network)}
    _, family = family_of(checkpoint)
    tables = family.key_tables(network.config, checkpoint.format)
    if not tables:
        raise BadInput(f"{checkpoint.path}: no {checkpoint.format} files of this family are known")
    pairs = best_table(tables, checkpoint.tensors, shapes).pair(checkpoint.tensors, shapes, checkpoint.path)
    for entry in (entry for pair in pairs for entry in pair.entries):
        if entry.dtype is not None and not entry.dtype.is_floating_point:
            raise BadInput(f"{checkpoint.path}: {entry.name} is {entry.dtype}; weights are floating-point numbers")
    return pairs


def _place(network: nn.Module, placement: _Placement, dtype: torch.dtype, device: torch.device) -> None:
    """Read the tensors of one rule and put them where they go."""
    read = [entry.read() for entry in placement.entries]
    values = placement.operation.load(read)
    for value, homes, linear in zip(values, placement.homes, placement.linears, strict=True):
        if isinstance(value, QuantizedTensor):
            if linear is QuantizedLinear:
                for home in homes:
                    owner = home.rpartition(".")[0]
                    network.set_submodule(owner, _in_blocks(network.get_submodule(owner), value))
                continue
            value = value.dequantize(dtype)
        parameter = nn.Parameter(value.to(device, dtype), requires_grad=False)
        for home in homes:
            owner, _, leaf = home.rpartition(".")
            setattr(network.get_submodule(owner), leaf, parameter)
        if linear is RowwiseInt8Linear:
            head = network.get_submodule("head")
            assert isinstance(head, nn.Linear)
            network.set_submodule("head", RowwiseInt8Linear(parameter, head.bias))
    for value in read:
        if isinstance(value, QuantizedTensor):
            value.release()


def _in_blocks(part: nn.Module, weight: QuantizedTensor) -> nn.Module:
    """What takes a part's place where its weight stays in blocks."""
    if isinstance(part, nn.Linear):
        return QuantizedLinear(weight, part.bias)
    return QuantizedGroupedLinear(weight) if isinstance(part, GroupedLinear) else QuantizedEmbedding(weight)


def meta_network(checkpoint: Checkpoint) -> Decoder:
    """A checkpoint's network with shapes and no memory: all parameters on the meta device.

    Raises:
        BadInput: an unknown family, or a config that lacks or contradicts something.
    """
    _, family = family_of(checkpoint)
    config = family.config_from(checkpoint)
    with torch.device("meta"), _NoInitialization():
        return family.build(config)


class _NoInitialization(TorchFunctionMode):
    """Leaves out `torch.nn.init`: on the meta device it does nothing, but imports the compiler to do it."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def default_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What most of a checkpoint's numbers are stored in; bfloat16 where they are quantized.

    Of a checkpoint without weights, what its config says of them.
    """
    sizes = Counter[torch.dtype]()
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype or torch.bfloat16] += entry.nbytes
    if not sizes:
        said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
        silent = torch.bfloat16 if checkpoint.format == "consolidated" else torch.float32
        return DTYPES.get(str(said), silent)
    most = sizes.most_common(1)[0][0]
    return most if most in DTYPES.values() else torch.float32


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """A dtype by itself or by its name; BadInput for those that nothing is computed in."""
    kind = DTYPES.get(str(name).removeprefix("torch."))
    if kind is None:
        raise BadInput(f"dtype is {name}; it takes one of {', '.join(DTYPES)}")
    return kind


def _cache_dtype(name: str | torch.dtype) -> torch.dtype:
    return torch.int8 if str(name).removeprefix("torch.") == "int8" else dtype_named(name)


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!s} can't be used here: {str(error).splitlines()[0]}") from error
    return device
