"""Build a network with its weights: a checkpoint's, or initial weights from a config and a seed.

The network is built on the meta device, which allocates no memory; then each tensor is put in place. Tensors that need
no change stay in the file's mapped memory.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pentad.errors import BadInput
from pentad.models import check_task, families, family_of
from pentad.models.family import Family, ModelConfig
from pentad.models.language.config import corrected_by_tensors, read_family_config
from pentad.nn.decoder import Decoder
from pentad.nn.linear import HeadLinear, QuantizedEmbedding, QuantizedHead, QuantizedLinear
from pentad.nn.moe.experts import GroupedLinear, QuantizedGroupedLinear
from pentad.weights.cache import Progress, task
from pentad.weights.checkpoint import Checkpoint, TensorEntry
from pentad.weights.keytable import Operation, Pairing, best_table
from pentad.weights.mapped import drop_pages
from pentad.weights.quantized import BLOCKS, QuantizedTensor
from pentad.weights.quantizer import QUANTIZED
from pentad.weights.scratch import quantized_copy

N = TypeVar("N", bound=nn.Module)

_logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEEPS_BLOCKS = {nn.Linear, HeadLinear, nn.Embedding, GroupedLinear}
"""Parts with a quantized counterpart (see `_quantized_part`)."""


def build(
    source: Checkpoint | ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trainable: bool = False,
    quantized: str = "operators",
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """Build a checkpoint's network with its weights, or a config's network with initial weights.

    Args:
        source: a checkpoint, or a config. Initial weights follow the published initialization of the config's family.
        device: device of the weights.
        dtype: dtype of the weights that are not quantized.
        trainable: put the network in training mode. Parameters get gradients and are copied from the file's mapped
            memory; quantized weights are dequantized.
        quantized: the quantized matrices that stay quantized: "operators" (those for which torch has a fast operator),
            "all" (for the kernels) or "none". One of `QUANTIZED` quantizes the matrices of a float checkpoint.
        seed: seed of the initial weights; equal seeds give equal weights.
        progress: reports the bytes read.

    Raises:
        BadInput: the family is unknown, or tensors are missing, not used or of the wrong shape.
    """
    if isinstance(source, Checkpoint):
        if trainable:
            quantized = "none"
        network = fill(meta_network(source), source, device=device, dtype=dtype, quantized=quantized, progress=progress)
        if trainable:
            _copy_parameters(network)
    else:
        family = _family_of_config(source)
        source = source.resolve(Checkpoint(Path(type(source).__name__), "hf", {}, {}, {}))
        network = _network(family, source, device).to(dtype)
        _initialize(network, family, source, seed)
    return network.train(trainable).requires_grad_(trainable)


def meta_network(source: Checkpoint | ModelConfig) -> nn.Module:
    """Build the network of a checkpoint or a config on the meta device.

    Raises:
        BadInput: the family is unknown, or the config is incomplete or contradictory.
    """
    if isinstance(source, ModelConfig):
        return _network(_family_of_config(source), source, "meta")
    family = family_of(source)
    return _network(family, corrected_by_tensors(read_family_config(family, source), source), "meta")


def meta_decoder(source: Checkpoint | ModelConfig) -> Decoder:
    """`meta_network` of a language model.

    Raises:
        BadInput: see `meta_network`; or the network is of another kind.
    """
    if isinstance(source, Checkpoint):
        check_task(source, "language")
    network = meta_network(source)
    assert isinstance(network, Decoder)
    return network


def _family_of_config(config: ModelConfig) -> Family:
    return next(family for family in families() if family.config is type(config))


def _network(family: Family, config: ModelConfig, device: torch.device | str) -> nn.Module:
    with torch.device(device), _NoInitialization():
        return family.network(config)


class _NoInitialization(TorchFunctionMode):
    """Skips `torch.nn.init`, which on the meta device would do nothing but import the compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _initialize(network: nn.Module, family: Family, config: Any, seed: int) -> None:
    """Initialize as the family does, or: biases 0, norms 1, matrices drawn in float32 on the CPU with the family's
    standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    if family.initialize is not None:
        family.initialize(network, config, generator)
        return
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        std = config.initializer_range if family.init_std is None else family.init_std(config, name)
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def _copy_parameters(network: nn.Module) -> None:
    """Copy parameters out of mapped files, since training writes to them."""
    tensors = named_tensors(network)
    for names in parameter_names(network).values():
        _set_tensor(network, names, tensors[names[0]].detach().clone())


def fill(
    network: N,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantized: str = "operators",
    progress: Progress | None = None,
) -> N:
    """Put a checkpoint's tensors into its network, which is on the meta device. For the arguments see `build`.

    Raises:
        BadInput: tensors are missing, not used or of the wrong shape.
    """
    if not checkpoint.tensors:
        raise BadInput(f"{checkpoint.path}: there are no weights next to the config")
    device = torch.device(device)
    placements = _placements(checkpoint, network, dtype, device, quantized)
    progress = progress or Progress()
    with task(progress, "Loading", sum(placement.nbytes for placement in placements)):
        for placement in placements:
            _place(network, placement, dtype, device)
            progress.advance(placement.nbytes)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and not buffer.is_floating_point():  # num_batches_tracked
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))
    return network.eval()


def held_bytes(checkpoint: Checkpoint, network: nn.Module, dtype: torch.dtype, *, quantized: str = "operators") -> int:
    """Bytes that a checkpoint's weights take on a CPU; the checkpoint can be a config without weights.

    Args:
        checkpoint: the checkpoint; only its headers are read.
        network: its network, on the meta device.
        dtype, quantized: see `build`.

    Raises:
        BadInput: see `fill`.
    """
    cpu = torch.device("cpu")
    if checkpoint.tensors:
        placements = _placements(checkpoint, network, dtype, cpu, quantized)
        kept = {p[0]: type for one in placements for p, type in zip(one.parameter_names, one.types, strict=True)}
    else:
        names = parameter_names(network)
        kept = {name: _kept_type(network, names[name], None, quantized, dtype, cpu) for name in names}
    total, tensors = 0.0, named_tensors(network)
    for name, type in kept.items():
        size, nbytes = (1, dtype.itemsize) if type is None else BLOCKS[type]
        bytes_per_weight = QuantizedLinear.bytes_per_weight if type and quantized == "operators" else nbytes / size
        total += tensors[name].numel() * bytes_per_weight
    return int(total)


class _Placement(NamedTuple):
    """The tensors that one rule converts, and the parameters made of them.

    Attributes:
        entries: the file's tensors.
        operation: converts them.
        parameter_names: the names of each result in the network; tied parameters have several.
        types: the type of the blocks in which each result is kept; None for a float parameter.
    """

    entries: tuple[TensorEntry, ...]
    operation: Operation
    parameter_names: list[list[str]]
    types: list[str | None]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def _placements(
    checkpoint: Checkpoint, network: nn.Module, dtype: torch.dtype, device: torch.device, quantized: str
) -> list[_Placement]:
    placements = []
    all_names = parameter_names(network)
    for ours, entries, operation in pairings(checkpoint, network):
        found = {entry.quantization for entry in entries}
        if quantized in QUANTIZED and found != {None}:
            raise BadInput(f"{checkpoint.path} is quantized already; --quantize {quantized} is for float weights")
        stored = found.pop() if len(found) == 1 else None
        names = [all_names[name] for name in ours]
        types = [_kept_type(network, tied, stored, quantized, dtype, device) for tied in names]
        placements.append(_Placement(entries, operation, names, types))
    return placements


def _kept_type(
    network: nn.Module, names: list[str], stored: str | None, quantized: str, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The type of the blocks in which a parameter is kept; None for a float parameter.

    Args:
        network: the network.
        names: the parameter's names.
        stored: the type in the file.
        quantized, dtype, device: see `build`.
    """
    owners = [name.rpartition(".") for name in names]
    parts = [type(network.get_submodule(owner)) if leaf == "weight" else None for owner, _, leaf in owners]
    if quantized == "operators":
        shape = network.get_parameter(names[0]).shape if parts == [nn.Linear] else ()
        return stored if QuantizedLinear.has_operator(stored, shape, dtype, device) else None
    if quantized == "none" or not set(parts) <= KEEPS_BLOCKS:
        return None
    shape = network.get_parameter(names[0]).shape
    return quantized_type(names[0], shape, quantized) if quantized in QUANTIZED else stored


def quantized_type(name: str, shape: Sequence[int], wanted: str) -> str | None:
    """The type of a parameter in a model that is quantized to `wanted`, one of `QUANTIZED`; None for a float.

    As in llama.cpp, vectors, routers, relative biases and rows that aren't whole blocks stay floats, and q4_k becomes
    q5_0 in rows that aren't whole blocks of 256. The embedding and the head get 8 bits.
    """
    if len(shape) == 1 or shape[-1] % 32 or name.endswith((".router.weight", ".position_bias.weight")):
        return None
    if name.startswith(("embed.", "head.")):
        return "q8_0"
    return "q5_0" if wanted == "q4_k" and shape[-1] % 256 else wanted


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that checkpoints store, by name: parameters and floating-point buffers, such as the statistics of a
    batch norm."""
    state = network.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def parameter_names(network: nn.Module) -> dict[str, list[str]]:
    """Map the first name of each of `named_tensors` to all its names; tied parameters have several."""
    names: dict[str, list[str]] = {}
    first_names: dict[Tensor, str] = {}
    for name, tensor in named_tensors(network).items():
        names.setdefault(first_names.setdefault(tensor, name), []).append(name)
    return names


def pairings(checkpoint: Checkpoint, network: nn.Module) -> list[Pairing]:
    """Pair a network's parameters with the tensors of its checkpoint.

    Raises:
        BadInput: tensors are missing, not used, of the wrong shape or not floating-point numbers.
    """
    tensors = named_tensors(network)
    shapes = {name: tuple(tensors[name].shape) for name in parameter_names(network)}
    family = family_of(checkpoint)
    tables = family.layouts(network.config, checkpoint.format)
    if not tables:
        raise BadInput(f"{checkpoint.path}: {checkpoint.format} files of this {family.names.family} are unsupported")
    pairs = best_table(tables, checkpoint.tensors, shapes).pair(checkpoint.tensors, shapes, checkpoint.path)
    for entry in (entry for pair in pairs for entry in pair.entries):
        if entry.dtype is not None and not entry.dtype.is_floating_point:
            raise BadInput(f"{checkpoint.path}: {entry.name} is {entry.dtype}; expected floating-point numbers")
    return pairs


def _place(network: nn.Module, placement: _Placement, dtype: torch.dtype, device: torch.device) -> None:
    """Read and convert the tensors of one rule, and put the results into the network."""
    tensors = [entry.read() for entry in placement.entries]
    values = placement.operation.load(tensors)
    for value, names, type in zip(values, placement.parameter_names, placement.types, strict=True):
        if type is not None and isinstance(value, torch.Tensor) and placement.entries[0].quantization is None:
            value = quantized_copy(names[0], value, type)
        if isinstance(value, QuantizedTensor):
            if type is not None:
                for owner in (name.rpartition(".")[0] for name in names):
                    network.set_submodule(owner, _quantized_part(network.get_submodule(owner), value))
                continue
            value = value.dequantize(dtype)
        _set_tensor(network, names, value.to(device, dtype))
    for entry, tensor in zip(placement.entries, tensors, strict=True):
        if isinstance(tensor, QuantizedTensor):
            tensor.release()
        elif entry.mapped and (any(placement.types) or tensor.dtype != dtype):  # all of it was copied
            drop_pages(tensor)


def _set_tensor(network: nn.Module, names: list[str], value: Tensor) -> None:
    """Set a buffer, or a frozen parameter that all `names` share."""
    parameter = nn.Parameter(value, requires_grad=False)
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(path)
        setattr(owner, leaf, value if leaf in owner._buffers else parameter)


def _quantized_part(part: nn.Module, weight: QuantizedTensor) -> nn.Module:
    """The counterpart of `part` with a quantized weight."""
    if isinstance(part, nn.Linear):
        return (QuantizedHead if isinstance(part, HeadLinear) else QuantizedLinear)(weight, part.bias)
    return QuantizedGroupedLinear(weight) if isinstance(part, GroupedLinear) else QuantizedEmbedding(weight)


def default_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of a checkpoint's bytes (bfloat16 for quantized ones); without weights its config's dtype."""
    sizes = Counter[torch.dtype]()
    for entry in checkpoint.tensors.values():
        sizes[entry.dtype or torch.bfloat16] += entry.nbytes
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if not sizes:
        default = torch.bfloat16 if checkpoint.format == "consolidated" else torch.float32
        return DTYPES.get(str(named), default)
    if checkpoint.format == "hf" and named is not None and str(named) not in DTYPES:
        _logger.warning("%s: torch_dtype %r is unknown and is ignored", checkpoint.path, str(named)[:40])
    dtype = sizes.most_common(1)[0][0]
    return dtype if dtype in DTYPES.values() else torch.float32


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    """A dtype from its name; raise BadInput unless it is in `DTYPES`."""
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise BadInput(f"dtype is {name}; expected one of {', '.join(DTYPES)}")
    return dtype
