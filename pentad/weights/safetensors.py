"""Read one safetensors file as named, mapped tensors; the library checks the header.

The format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pentad.errors import PentadError
from pentad.weights.checkpoint import TensorEntry
from pentad.weights.files import MAX_JSON_BYTES, describe, read_start, refuse
from pentad.weights.mapped import own_storage

# fmt: off
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}
# fmt: on
"""The format's dtypes, except those that torch lacks."""


def is_safetensors(start: bytes) -> bool:
    """Return True if `start` (at least 9 bytes) looks like the start of a safetensors file."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_JSON_BYTES


def read_safetensors(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, without reading their data.

    Raises:
        BadInput: the file is invalid; the message names the file and the tensor.
        PentadError: the system cannot map the file.
    """
    read_start(path)
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        refuse(path, _diagnose(path) or str(error))
    except RuntimeError as error:  # torch's, if the file is larger than memory
        raise PentadError(f"{path}: cannot be mapped into memory: {str(error).splitlines()[0]}") from error
    entries = {}
    for name in file.keys():  # noqa: SIM118 - not a dict
        header = file.get_slice(name)
        dtype, shape = DTYPES.get(header.get_dtype()), tuple(header.get_shape())
        if dtype is None:
            refuse(path, _unknown_dtype(name, header.get_dtype()))
        nbytes = math.prod(shape) * dtype.itemsize
        read = partial(_read, file, name)
        entries[name] = TensorEntry(name, shape, dtype, None, nbytes, read, mapped=True)
    return entries


def _read(file: Any, name: str) -> torch.Tensor:
    return own_storage(file.get_tensor(name))


def _unknown_dtype(name: str, dtype: object) -> str:
    return f"tensor {name!r}: dtype {dtype!r} is not one of {', '.join(DTYPES)}"


def _diagnose(path: Path) -> str | None:
    """Describe why the library refused a file, in more detail than its message; None if unclear."""
    size = path.stat().st_size
    start = read_start(path)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        return f"not a safetensors file but {describe(path)}"
    if length > MAX_JSON_BYTES:
        return f"the header claims {length} bytes, the format allows {MAX_JSON_BYTES}"
    if 8 + length > size:
        return f"truncated: the header alone takes {8 + length} bytes, the file has {size}"
    try:
        header = json.loads(read_start(path, 8 + length)[8:])
        infos = {name: header[name] for name in header if name != "__metadata__"}
        for name, info in infos.items():
            if info["dtype"] not in DTYPES:
                return _unknown_dtype(name, info["dtype"])
        end = 8 + length + max(info["data_offsets"][1] for info in infos.values())
        if end > size:
            return f"truncated: {end - size} of {end} bytes are missing; download it again"
        for name, info in infos.items():
            first, last = info["data_offsets"]
            nbytes = math.prod(info["shape"]) * DTYPES[info["dtype"]].itemsize
            if last - first != nbytes:
                tensor = f"tensor {name!r} of {info['shape']} {info['dtype']}"
                return f"{tensor} takes {nbytes} bytes, its offsets leave {last - first}"
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        return None  # the header is no table of tensors at all: the library's message says so
    return None
