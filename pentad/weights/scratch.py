"""Quantized copies of weights in unnamed files: memory holds only the parts in use, as for the model's own files."""

import logging
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pentad.weights.cache import cache_folder
from pentad.weights.mapped import map_file, return_free_memory
from pentad.weights.quantized import QuantizedTensor
from pentad.weights.writing import PendingTensor, pieces

_logger = logging.getLogger(__name__)


def quantized_copy(name: str, value: Tensor, type: str) -> QuantizedTensor:
    """Quantize a weight a few MiB at a time, as `write_gguf` would.

    The blocks are in a file of pentad's cache folder that has no name: the system frees its disk space when the blocks
    are no longer used, and when the process is killed. If the file can't be written, they are in memory.

    Args:
        name: names the weight in errors.
        value: numbers [*, columns].
        type: one of `pentad.weights.quantizer.QUANTIZED`.

    Raises:
        BadInput: a number is NaN or too large.
    """
    pending = PendingTensor(name, tuple(value.shape), type, lambda: value)
    rows = math.prod(value.shape[:-1])
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.writelines(pieces(pending))
            file.flush()
            stored, mapped = map_file(Path(f"/dev/fd/{file.fileno()}")), True
    except OSError as error:
        _logger.info("quantized weights are kept in memory: %s", error)
        stored, mapped = torch.frombuffer(bytearray().join(pieces(pending)), dtype=torch.uint8), False
    return_free_memory()  # of the threads that quantized, which glibc would keep
    return QuantizedTensor(stored.view(rows, -1), type, pending.shape, mapped=mapped)
