"""Load a model: resolve the name, open the checkpoint, build the network, return its runner."""

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from pentad import adapters, build, kernels, text, weights
from pentad.errors import BadInput
from pentad.generate import EncoderDecoderModel, LanguageModel
from pentad.generate.encoder_decoder_step import EncoderDecoderStep
from pentad.generate.guards import UnsupportedByKernels
from pentad.generate.plan import check_network
from pentad.generate.plan_step import cached_weights, step_for
from pentad.generate.sampling import Sampling
from pentad.generate.step import PlainStep, Step
from pentad.models import family_of
from pentad.models.family import TASKS
from pentad.nn.decoder import Decoder
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.text.folder_settings import read_generation
from pentad.vision.runner import VisionModel
from pentad.weights.cache import Progress
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.quantizer import QUANTIZED

DEVICES = ("cpu", "cuda", "mps")
VISION_RUNNERS = {
    "classify": "pentad.vision.classifier:Classifier",
    "detect": "pentad.vision.detector:Detector",
    "segment": "pentad.vision.segmenter:Segmenter",
    "embed": "pentad.vision.clip:Clip",
}
"""A family's task -> the class that runs its networks."""
_logger = logging.getLogger(__name__)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector: loading leaves no garbage, and a collection would scan all objects of torch."""
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
    adapter: str | Path | None = None,
    threads: int | None = None,
    context: int | None = None,
    cache_dtype: str | torch.dtype | None = None,
    fast: bool = False,
    progress: Progress | None = None,
) -> LanguageModel | EncoderDecoderModel | VisionModel:
    """Load a published model.

    Args:
        name_or_path: a known name (``smollm2``), a file or folder, or a repository ``org/name[@revision][:Q4_K_M]``.
        device: ``cpu``, ``cuda`` or ``mps``; by default CUDA if available, else the CPU.
        dtype: float32, bfloat16 or float16: compute in this dtype in plain torch, without the CPU kernels. By default
            the kernels run on a CPU, close to float32, with the file's weights unchanged. If the kernels don't support
            the network, torch computes in the dtype of the file's weights (bfloat16 if they are quantized). Vision
            models compute in float32 on a CPU, which is faster than 16 bits without instructions for these.
        quantize: by default quantized weights stay as in the file (without the kernels some are dequantized). A type
            ("q8_0", "q4_0", "q4_k", …: one of `QUANTIZED`) quantizes float weights while loading, as `pentad.convert`
            does: the embedding and the head get 8 bits. "none" dequantizes all weights and turns the CPU kernels off.
        adapter: the folder of a LoRA adapter in PEFT's format, which is merged into the weights while they are loaded;
            the quantized ones among them become float32.
        threads: CPU threads of the whole process.
        context: maximum sequence length in tokens; the model's limit by default. This option and `quantize`, `adapter`,
            `cache_dtype` and `fast` are for language models only.
        cache_dtype: dtype of the KV cache, or "int8" (kernels only). By default `dtype`; with the kernels float32 if
            all weights are float32, else float16.
        fast: the kernels quantize activations to 8 bits instead of 16.
        progress: reports downloads and loading.

    Returns:
        The runner: a `LanguageModel`, an `EncoderDecoderModel`, or the runner of a vision model.

    Raises:
        BadInput: the model doesn't exist, its files are broken, or an option is out of range.
        PentadError: a download failed.
    """
    started = time.perf_counter()
    from pentad.weights import registry

    if threads is not None:
        if threads < 1:
            raise BadInput(f"threads is {threads}; expected at least 1")
        torch.set_num_threads(threads)
    target = device_named(device)
    check_quantize(quantize, target)
    checkpoint = weights.open(registry.locate(name_or_path, progress=progress))
    if (task := family_of(checkpoint).task) != "language":
        given = {"quantize": quantize, "adapter": adapter, "context": context, "cache_dtype": cache_dtype, "fast": fast}
        if wrong := next((option for option, value in given.items() if value), None):
            raise BadInput(f"{wrong} is for language models; {name_or_path} is {TASKS[task]}")
        stored = build.default_dtype(checkpoint) if target.type != "cpu" else torch.float32
        chosen = stored if dtype is None else build.dtype_named(dtype)
        vision_runner, vision = _vision_runner(str(name_or_path), task), build.meta_network(checkpoint)
        build.fill(vision, checkpoint, device=target, dtype=chosen, quantized="none", progress=progress)
        return vision_runner(str(name_or_path), vision, checkpoint, load_seconds=time.perf_counter() - started)
    if adapter is not None:
        checkpoint = adapters.merged(checkpoint, Path(adapter))
    kv_dtype = None if cache_dtype is None else _cache_dtype(cache_dtype)
    network, why_torch, quantized, torch_dtype, _ = plan(checkpoint, device=target, dtype=dtype, quantize=quantize)
    if why_torch is not None and kv_dtype == torch.int8:
        raise BadInput(f"cache_dtype is int8, which needs the kernels; plain torch runs {name_or_path}: {why_torch}")
    build.fill(network, checkpoint, device=target, dtype=torch_dtype, quantized=quantized, progress=progress)
    if why_torch is not None:
        why_torch += cached_weights(network)
    sampling = Sampling() if checkpoint.format == "gguf" else Sampling.recommended(*read_generation(checkpoint))
    tokenizer: text.Tokenizer | BadInput | None
    try:
        tokenizer = text.load(checkpoint, vocab_size=network.config.vocab_size)
    except BadInput as error:
        tokenizer = error  # raised when the tokenizer is needed: `logits` works without one
    step: Step
    if isinstance(network, EncoderDecoder):
        step = EncoderDecoderStep(network, cache_dtype=kv_dtype)
    elif why_torch is None:
        step = step_for(network, cache_dtype=kv_dtype, fast=fast)
    else:
        step = PlainStep(network, cache_dtype=kv_dtype, why=why_torch)
    _logger.info("%s runs %s", name_or_path, step.backend)
    runner: type[EncoderDecoderModel | LanguageModel]
    runner = EncoderDecoderModel if isinstance(network, EncoderDecoder) else LanguageModel
    seconds = time.perf_counter() - started
    return runner(str(name_or_path), step, tokenizer, context=context, sampling=sampling, load_seconds=seconds)


def _vision_runner(name: str, task: str) -> type[VisionModel]:
    if task not in VISION_RUNNERS:
        raise BadInput(f"{name} is {TASKS[task]}")
    module, _, runner = VISION_RUNNERS[task].partition(":")
    found: type[VisionModel] = getattr(import_module(module), runner)
    return found


class Plan(NamedTuple):
    """How `load` runs a checkpoint.

    Attributes:
        network: the network, on the meta device.
        why_torch: why plain torch runs it; None if the kernels do.
        quantized: see `pentad.build.build`.
        dtype: dtype of the weights that are not quantized.
        cache_dtype: dtype of keys and values, unless `load` is told another one.
    """

    network: Decoder
    why_torch: str | None
    quantized: str
    dtype: torch.dtype
    cache_dtype: torch.dtype


def plan(
    checkpoint: Checkpoint, *, device: torch.device, dtype: str | torch.dtype | None = None, quantize: str | None = None
) -> Plan:
    """Plan to load a checkpoint, of which only the headers are read.

    Args:
        checkpoint: the checkpoint.
        device: the device to run on.
        dtype, quantize: see `load`.

    Raises:
        BadInput: see `load`.
    """
    network = build.meta_decoder(checkpoint)
    why_torch = _kernels_decline(checkpoint, network, device, dtype, quantize)
    chosen = build.default_dtype(checkpoint) if dtype is None else build.dtype_named(dtype)
    if why_torch is not None:
        return Plan(network, why_torch, quantize or "operators", chosen, chosen)
    if quantize or any(entry.quantization for entry in checkpoint.tensors.values()):
        return Plan(network, None, quantize or "all", torch.float32, torch.float16)  # float32 norms and biases
    return Plan(network, None, "all", chosen, torch.float32 if chosen == torch.float32 else torch.float16)


def _kernels_decline(
    checkpoint: Checkpoint, network: Decoder, device: torch.device, dtype: object, quantize: str | None
) -> str | None:
    """The reason why plain torch runs a checkpoint; None if the kernels run it."""
    if device.type != "cpu":
        return f"the device is {device}"
    if dtype is not None or quantize == "none":
        return f"{'dequantizing' if quantize == 'none' else 'a dtype'} was requested"
    if not kernels.isas():
        return f"there are no kernels: {kernels.reason()}"
    types = {(entry.quantization, entry.shape[-1]) for entry in checkpoint.tensors.values() if entry.quantization}
    for name, columns in sorted(types):
        if not kernels.packs(name, columns):
            return f"the kernels don't support {name} in rows of {columns}"
    try:
        check_network(network)
    except UnsupportedByKernels as reason:
        return str(reason)
    return None


def check_quantize(quantize: str | None, device: torch.device) -> None:
    """Raise BadInput if `load` can't quantize to a type on a device."""
    if quantize not in (None, "none", *QUANTIZED):
        raise BadInput(f"quantize is {quantize!r}; expected one of {', '.join(QUANTIZED)}, or none to dequantize")
    if quantize in QUANTIZED and device.type != "cpu":
        raise BadInput(f"quantize is {quantize!r}, which is for the CPU; the device is {device}: use cpu")


def _cache_dtype(name: str | torch.dtype) -> torch.dtype:
    return torch.int8 if str(name).removeprefix("torch.") == "int8" else build.dtype_named(name)


def device_named(name: str | torch.device | None) -> torch.device:
    """A device from its name, by default CUDA if available; raise BadInput if it can't be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if str(name).partition(":")[0] not in DEVICES:
        raise BadInput(f"device is {name}; expected one of {', '.join(DEVICES)}")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!s} can't be used here: {str(error).splitlines()[0]}") from error
    return device
