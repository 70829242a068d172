"""The shared library and its structures, field by field as plan.h has them."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

_FLOATS, _BLOCKS = ("f32", "bf16", "f16"), ("q4_0", "q4_1", "q8_0", "q4_k", "q6_k", "q5_0", "q5_1", "q5_k")
TYPES = {name: number for number, name in enumerate((*_FLOATS, *_BLOCKS, "i8"))}
"""How a weight's numbers, or a cache's, are stored: floats, ggml's blocks, and the cache's bytes with their scales."""

BUFFERS, BLOCKS_BUFFER, PARTS_BUFFER, ROUTES_BUFFER = 11, 8, 9, 10
BLOCK_BYTES = 84  # of 32 activations in int8, the larger of the two forms
SPLIT = 128  # keys whose softmax is one part
FEW_QUERIES = 4  # of a sequence, up to which its keys are shared out among threads
MAX_DIMS = 256  # a head
MAX_ROWS = 1 << 17  # of one step: an operation is cut into less than 2^20 chunks

_LIBRARY = Path(__file__).with_name("_kernels.so")


class CMatrix(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("stride", c_int64),
        *((name, c_int32) for name in ("type", "rows", "columns")),
    )


class COp(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "flags", "in_", "out", "in_width", "out_width", "count", "activation")),
        *((name, c_int32) for name in ("layer", "heads", "kv_heads", "head_dim", "window", "rotary_dim", "ahead")),
        *((name, c_int32) for name in ("log_scale_after", "experts", "capacity")),
        *((name, c_float) for name in ("eps", "scale")),
        *((name, c_void_p) for name in ("weight", "bias", "weight2", "bias2")),
        ("w", CMatrix * 3),
    )


class CStep(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("rows", "wanted", "sequences", "threads", "fast", "isa", "page_size")),
        *((name, c_int32) for name in ("cache_type", "padded_dim", "table_width")),
        *((name, c_void_p) for name in ("ids", "positions", "wanted_rows", "starts", "lengths", "dropped", "tables")),
        *((name, c_void_p) for name in ("limits", "rotations", "keys", "values")),
        ("buffers", c_void_p * BUFFERS),
    )


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.environ.get("PENTAD_KERNELS", "").lower() in ("off", "0"):
        return "PENTAD_KERNELS is off"
    if not _LIBRARY.exists():
        return "they were not built (there was no C++ compiler when pentad was installed)"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return f"the library can't be loaded: {error}"
    try:
        sizes = library.pentad_size_of_op(), library.pentad_size_of_step()
    except AttributeError:
        sizes = 0, 0
    if sizes != (ctypes.sizeof(COp), ctypes.sizeof(CStep)):
        return "the library is of another version of pentad: install it again"
    library.pentad_isa.argtypes, library.pentad_isa.restype = [c_int32], c_char_p
    library.pentad_packed_bytes.argtypes, library.pentad_packed_bytes.restype = [c_int32] * 3, c_int64
    library.pentad_pack.argtypes = [c_int32, c_void_p, c_int32, c_int32, c_void_p, c_int32]
    library.pentad_pack.restype = None
    library.pentad_run.argtypes, library.pentad_run.restype = [POINTER(COp), c_int32, POINTER(CStep)], None
    return library


def library() -> ctypes.CDLL:
    """The library. Raises RuntimeError where there is none."""
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(f"there are no kernels: {loaded}")
    return loaded


@cache
def isas() -> dict[str, int]:
    """The instruction sets that this CPU and this build have, fastest first, and their numbers in the library.

    ``PENTAD_KERNELS`` in the environment may name the only one to use.
    """
    loaded, found = _load(), dict[str, int]()
    if isinstance(loaded, str):
        return found
    index = 0
    while (name := loaded.pentad_isa(index)) != b"":
        if name is not None:
            found[name.decode()] = index
        index += 1
    wanted = os.environ.get("PENTAD_KERNELS")
    return {name: index for name, index in found.items() if wanted in (None, "", name)}


def reason() -> str | None:
    """Why there are no kernels; None where there are some."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    return None if isas() else f"this CPU or build has no {os.environ['PENTAD_KERNELS']!r} (PENTAD_KERNELS)"
