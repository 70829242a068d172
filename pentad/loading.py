"""Load a model: resolve the name, open the checkpoint, build the network, return its runner."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pentad import build, kernels, text, weights
from pentad.errors import BadInput
from pentad.generate import EncoderDecoderModel, LanguageModel
from pentad.generate.encoder_decoder_step import EncoderDecoderStep
from pentad.generate.guards import UnsupportedByKernels
from pentad.generate.plan import check_network
from pentad.generate.plan_step import step_for
from pentad.generate.step import PlainStep, Step
from pentad.nn.encoder_decoder import EncoderDecoder

if TYPE_CHECKING:
    from pathlib import Path

    from pentad.nn.decoder import Decoder
    from pentad.weights.cache import Progress
    from pentad.weights.checkpoint import Checkpoint

_logger = logging.getLogger(__name__)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Everything that a load makes stays, and a collection would look through all of torch to find that out."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_no_garbage_collection()
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
) -> LanguageModel | EncoderDecoderModel:
    """Load a model as it was published.

    Args:
        name_or_path: a known name (``smollm2``), a file or folder, or a repository ``org/name[@revision][:Q4_K_M]``.
        device: ``cpu``, ``cuda`` or ``mps``; by default CUDA if there is one, else the CPU.
        dtype: float32, bfloat16 or float16: plain torch computes in it, and the CPU kernels are off. By default the
            kernels run on a CPU, with the file's weights as they are and near float32. Where the kernels don't take
            the network, torch computes in the dtype of the file's weights, bfloat16 if they are quantized.
        quantize: by default quantized weights stay quantized as in the file. (Without the kernels some are
            dequantized, and a quantized head is rounded to int8 rows for steps of one or two tokens.) "none"
            dequantizes all weights, and turns the CPU kernels off.
        threads: CPU threads, for the whole process.
        context: the longest sequence, in tokens; the model's own limit by default.
        cache_dtype: dtype of the KV cache, or "int8" (kernels only). By default `dtype`; with the kernels float32 if
            all weights are float32, else float16.
        fast: the kernels round activations to 8 bits instead of 16.
        progress: is told of downloads and of loading.

    Returns:
        The runner: a `LanguageModel`, or an `EncoderDecoderModel`.

    Raises:
        BadInput: no such model, broken files, or an option that is out of range.
        PentadError: a download failed.
    """
    started = time.perf_counter()
    from pentad.weights import registry

    if threads is not None:
        if threads < 1:
            raise BadInput(f"threads is {threads}; expected at least 1")
        torch.set_num_threads(threads)
    target = _device(device)
    checkpoint = weights.open(registry.locate(name_or_path, progress=progress))
    torch_dtype = build.default_dtype(checkpoint) if dtype is None else build.dtype_named(dtype)
    if quantize not in (None, "none"):
        raise BadInput(f"quantize is {quantize!r}; expected 'none', or nothing to keep the file's quantization")
    kv_dtype = None if cache_dtype is None else _cache_dtype(cache_dtype)
    network = build.meta_network(checkpoint)
    why_torch = kernels_decline(checkpoint, network, device=target, dtype=dtype, quantize=quantize)
    if why_torch is not None and kv_dtype == torch.int8:
        raise BadInput(f"cache_dtype is int8, which needs the kernels; plain torch runs {name_or_path}: {why_torch}")
    quantized = "none" if quantize == "none" else "operators"
    if why_torch is None:
        quantized = "all"
        if any(entry.quantization for entry in checkpoint.tensors.values()):
            torch_dtype = torch.float32  # of the norms and biases beside the blocks
    build.fill(network, checkpoint, device=target, dtype=torch_dtype, quantized=quantized, progress=progress)
    tokenizer = _tokenizer(checkpoint, network.config.vocab_size)
    about: Any = {"context": context, "generation": checkpoint.generation}
    step: Step
    if isinstance(network, EncoderDecoder):
        step = EncoderDecoderStep(network, cache_dtype=kv_dtype)
    elif why_torch is None:
        step = step_for(network, cache_dtype=kv_dtype, fast=fast)
    else:
        step = PlainStep(network, cache_dtype=kv_dtype, why=why_torch)
    _logger.info("%s runs %s", name_or_path, step.backend)
    about["load_seconds"] = time.perf_counter() - started
    if isinstance(step, EncoderDecoderStep):
        return EncoderDecoderModel(str(name_or_path), step, tokenizer, **about)
    return LanguageModel(str(name_or_path), step, tokenizer, **about)


def kernels_decline(
    checkpoint: Checkpoint,
    network: Decoder,
    *,
    device: torch.device,
    dtype: object = None,
    quantize: str | None = None,
) -> str | None:
    """Why `load` with these options runs a checkpoint by plain torch; None if the kernels run it.

    Args:
        checkpoint: its headers are read.
        network: the checkpoint's; its weights may be on the meta device.
        device: where it is to run.
        dtype, quantize: as `load` takes them.
    """
    if device.type != "cpu":
        return f"it is on {device}"
    if dtype is not None or quantize is not None:
        return f"{'a dtype' if quantize is None else 'dequantizing'} was asked for"
    if not kernels.isas():
        return f"there are no kernels: {kernels.reason()}"
    types = {(entry.quantization, entry.shape[-1]) for entry in checkpoint.tensors.values() if entry.quantization}
    for name, columns in sorted(types):
        if not kernels.packs(name, columns):
            return f"the kernels don't take {name} in rows of {columns}"
    try:
        check_network(network)
    except UnsupportedByKernels as reason:
        return str(reason)
    return None


def _tokenizer(checkpoint: Checkpoint, vocab_size: int) -> text.Tokenizer | BadInput | None:
    """The tokenizer, or the error that reading it raised: `logits` works without one."""
    try:
        return text.load(checkpoint, vocab_size=vocab_size)
    except BadInput as error:
        return error


def _cache_dtype(name: str | torch.dtype) -> torch.dtype:
    return torch.int8 if str(name).removeprefix("torch.") == "int8" else build.dtype_named(name)


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!s} can't be used here: {str(error).splitlines()[0]}") from error
    return device
