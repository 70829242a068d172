"""From a name or a path to the runner that fits: locate, open, build, fill, run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pentad import text, weights
from pentad.errors import BadInput
from pentad.generate import LanguageModel
from pentad.models import family_of
from pentad.nn.linear import QuantizedLinear, RowwiseInt8Linear
from pentad.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from pathlib import Path

    from pentad.weights.cache import Progress
    from pentad.weights.checkpoint import Checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    cache_dtype: str | torch.dtype | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a model, as it was published, and give the runner that fits it.

    Args:
        name_or_path: a known name (``smollm2``), a file or folder, or a repository ``org/name[@revision][:Q4_K_M]``.
        device: ``cpu``, ``cuda``, ``mps``; by default CUDA where there is one, else the CPU.
        dtype: what is computed in: float32, bfloat16 or float16. By default the dtype of the file's weights; bfloat16
            where they are quantized.
        quantize: None keeps the file's own quantization (where this device computes with it; else the weights are
            dequantized), "none" dequantizes.
        threads: CPU threads, for the whole process.
        context: the longest sequence, in tokens; the model's own limit by default.
        cache_dtype: what keys and values are kept in; `dtype` by default.
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
    kind = default_dtype(checkpoint) if dtype is None else _dtype(dtype)
    if quantize not in (None, "none"):
        raise BadInput(f"quantize is {quantize!r}; it takes 'none' so far, or nothing for the file's own")
    network = load_network(checkpoint, device=target, dtype=kind, keep_quantized=quantize is None)
    return LanguageModel(
        str(name_or_path),
        network,
        text.load(checkpoint),
        context=context,
        generation=checkpoint.generation,
        cache_dtype=None if cache_dtype is None else _dtype(cache_dtype),
        load_seconds=time.perf_counter() - started,
    )


def load_network(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    keep_quantized: bool = True,
) -> nn.Module:
    """Build a checkpoint's network on the meta device and put its tensors in place.

    Tensors that already have `dtype` and `device` are the file's own mapped memory. Quantized linear weights stay in
    blocks where torch has an operator for them; all others are dequantized.

    Raises:
        BadInput: an unknown family, or tensors that are missing, not used or of the wrong shape.
    """
    device = torch.device(device)
    _, family = family_of(checkpoint)
    network = meta_network(checkpoint)
    if not checkpoint.tensors:
        raise BadInput(f"{checkpoint.path}: there are no weights beside the config")
    homes: dict[str, list[str]] = {}  # a tied parameter has several names, and goes by the first
    firsts: dict[nn.Parameter, str] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        homes.setdefault(firsts.setdefault(parameter, name), []).append(name)
    shapes = {name: tuple(parameter.shape) for parameter, name in firsts.items()}
    table = family.key_table(network.config, checkpoint.format)
    rounded_head = False
    for name, value in table.load(checkpoint.tensors, shapes, checkpoint.path):
        if isinstance(value, QuantizedTensor):
            linear = network.get_submodule(module := name.rpartition(".")[0])
            free = keep_quantized and len(homes[name]) == 1
            if free and isinstance(linear, nn.Linear) and QuantizedLinear.takes(value, dtype, device):
                network.set_submodule(module, QuantizedLinear(value, linear.bias))
                continue
            rounded_head |= "head.weight" in homes[name]
            value = value.dequantize(dtype)
        parameter = nn.Parameter(value.to(device, dtype), requires_grad=False)
        for home in homes[name]:
            module, _, leaf = home.rpartition(".")
            setattr(network.get_submodule(module), leaf, parameter)
    if rounded_head and keep_quantized and RowwiseInt8Linear.takes(dtype, device):
        network.set_submodule("head", RowwiseInt8Linear(network.get_parameter("head.weight")))
    return network.eval()


def meta_network(checkpoint: Checkpoint) -> nn.Module:
    """A checkpoint's network with shapes and no memory: all parameters on the meta device.

    Raises:
        BadInput: an unknown family, or a config that lacks or contradicts something.
    """
    _, family = family_of(checkpoint)
    with torch.device("meta"), _NoInitialization():
        return family.build(family.config_from(checkpoint))


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
    """What most of a checkpoint's numbers are stored in; bfloat16 where they are quantized."""
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        kind = entry.dtype or torch.bfloat16
        sizes[kind] = sizes.get(kind, 0) + entry.nbytes
    most = max(sizes, key=lambda kind: sizes[kind], default=torch.float32)
    return most if most in DTYPES.values() else torch.float32


def _dtype(name: str | torch.dtype) -> torch.dtype:
    kind = DTYPES.get(str(name).removeprefix("torch."))
    if kind is None:
        raise BadInput(f"dtype is {name}; it takes one of {', '.join(DTYPES)}")
    return kind


def _device(name: str | torch.device | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!s} can't be used here: {str(error).splitlines()[0]}") from error
    return device
