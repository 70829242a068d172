"""The machine's memory, and an estimate of the memory that a network takes to run."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from pentad.nn.decoder import Decoder
    from pentad.weights.checkpoint import Checkpoint

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt


class MemoryEstimate(NamedTuple):
    """Bytes that running a network takes.

    Attributes:
        weights: the network's weights.
        kv_cache: keys and values of one sequence.
        process: Python, torch and pentad, without a network.
    """

    weights: int
    kv_cache: int
    process: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


def estimate(
    checkpoint: Checkpoint, network: Decoder, *, tokens: int, dtype: torch.dtype, quantized: str
) -> MemoryEstimate:
    """Estimate the memory that a checkpoint takes to run on a CPU.

    Args:
        checkpoint: the checkpoint; only its headers are read.
        network: the checkpoint's network, on the meta device.
        tokens: number of tokens in the KV cache.
        dtype: dtype of the KV cache, and of weights that aren't quantized.
        quantized: see `pentad.build.build`.

    Raises:
        BadInput: see `pentad.build.fill`.
    """
    from pentad.build import held_bytes

    weights = held_bytes(checkpoint, network, dtype, quantized=quantized)
    return MemoryEstimate(weights, kv_cache_bytes(network, tokens, dtype), process_bytes())


def kv_cache_bytes(network: Decoder, tokens: int, dtype: torch.dtype, *, lanes: int = 1) -> int:
    """Bytes of one sequence's keys and values; for an encoder-decoder, also those of a source of the same length.

    Args:
        network: the network; it may be on the meta device.
        tokens: the length of the sequence.
        dtype: dtype of keys and values.
        lanes: dimensions of a head are rounded up to a multiple of this.
    """
    from pentad.nn.attention import Attention

    return sum(
        2 * part.kv_heads * -(-part.head_dim // lanes) * lanes * min(tokens, part.window or tokens) * dtype.itemsize
        for part in network.modules()
        if isinstance(part, Attention) and part.causal
    )


def process_bytes(device: torch.device | None = None) -> int:
    """The peak memory of this process so far, on the CPU or in tensors on a CUDA device; 0 on Windows."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device | None = None) -> int | None:
    """Bytes that a device, by default the CPU, has free or can free; None if the system doesn't say."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return physical_memory()


def physical_memory() -> int | None:
    """The machine's memory in bytes; None if the system doesn't report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: otherwise each large tensor of a step lies in new pages, which the system
    fills with zeros first. Other C libraries do as they do.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
