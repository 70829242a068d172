"""Load the shared library with ctypes, and declare the enumerations and structures of plan.h.

The library exports its own declarations; pentad refuses to load a library whose declarations differ.
"""

import ctypes
import os
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import Any

Type = IntEnum("Type", "F32 BF16 F16 Q4_0 Q4_1 Q8_0 Q4_K Q6_K Q5_0 Q5_1 Q5_K I8", start=0)
OpKind = IntEnum("OpKind", "EMBED NORM QUANTIZE MATMUL GATED ROTATE ATTEND MERGE ROUTE GATHER COMBINE", start=0)
Flag = IntFlag("Flag", "QUANTIZED CENTERED ADD WANTED PAIRS NORMALIZED")
Activation = IntEnum("Activation", "LINEAR GELU", start=0)
Buffer = IntEnum(
    "Buffer", "RESIDUAL NORMED PROJECTED ATTENDED GATES LOGITS SCORES PAIRED BLOCKS PARTIALS ROUTES", start=0
)

ConvKind = IntEnum("ConvKind", "CONVOLVE DEPTHWISE MAXPOOL REPEAT", start=0)
ConvActivation = IntEnum("ConvActivation", "NONE LEAKY RELU MISH SWISH LOGISTIC", start=0)

LIMITS = (
    "LANES",
    "BLOCK",
    "MAX_HEAD_DIM",
    "MAX_STEP_ROWS",
    "MAX_SIZE",
    "MAX_CONV_SIZE",
    "MAX_GRID_SIDE",
    "MAX_GRID_DIM",
)  # the constants that only plan.h defines
_LIBRARY = Path(__file__).with_name("_kernels.so")


def _fields(names: str, c_type: Any) -> list[tuple[str, Any]]:
    return [(name, c_type) for name in names.split()]


class CMatrix(ctypes.Structure):
    _fields_ = [*_fields("data bias", c_void_p), ("stride", c_int64), *_fields("type rows columns", c_int32)]


class COp(ctypes.Structure):
    _fields_ = [
        *_fields(
            "kind flags in_ out in_width out_width count activation layer heads kv_heads head_dim window", c_int32
        ),
        *_fields("rotary_dim log_scale_after experts capacity", c_int32),
        *_fields("eps scale", c_float),
        *_fields("weight bias weight2 bias2", c_void_p),
        ("w", CMatrix * 3),
    ]


class CStep(ctypes.Structure):
    _fields_ = [
        *_fields("rows wanted sequences threads fast isa page_size cache_type padded_dim block_table_width", c_int32),
        *_fields("ids positions wanted_rows cu_seqlens lengths dropped block_tables limits", c_void_p),
        *_fields("rotations keys values", c_void_p),
        ("buffers", c_void_p * len(Buffer)),
    ]


class CDraw(ctypes.Structure):
    _fields_ = [
        ("logits", c_void_p),
        ("temperature", c_float),
        ("top_k", c_int32),
        *_fields("top_p min_p", c_float),
        ("uniform", c_double),
        ("largest", c_float),
        ("token", c_int32),
    ]


class CConvOp(ctypes.Structure):
    _fields_ = [
        *_fields("kind activation add_activation batch in_height in_width in_channels", c_int32),
        *_fields("out_height out_width out_channels size stride pad_top pad_left", c_int32),
        *_fields("in_stride out_stride add_stride", c_int32),
        *_fields("in_ add out weight bias zeros", c_void_p),
    ]


class CGridOp(ctypes.Structure):
    _fields_ = [
        *_fields("images side window heads dim offsets", c_int32),
        ("scale", c_float),
        *_fields("q k v out k_padding v_padding positions packed", c_void_p),
    ]


def _declared() -> Iterator[tuple[str, int]]:
    """The values that the library must match: "Enum.NAME", "Struct.field" (its offset) and "Struct" (its size)."""
    for enum in (Type, OpKind, Flag, Activation, Buffer, ConvKind, ConvActivation):
        yield from ((f"{enum.__name__}.{member.name}", member.value) for member in enum)
    structs: dict[str, type[ctypes.Structure]]
    structs = {"Matrix": CMatrix, "Op": COp, "Step": CStep, "Draw": CDraw, "ConvOp": CConvOp, "GridOp": CGridOp}
    for name, struct in structs.items():
        yield name, ctypes.sizeof(struct)
        yield from (
            (f"{name}.{field[0]}".removesuffix("_"), getattr(struct, field[0]).offset) for field in struct._fields_
        )


@cache
def _load() -> tuple[ctypes.CDLL, dict[str, int]] | str:
    """The library and the values of LIMITS, or the reason why there is no library."""
    if os.environ.get("PENTAD_KERNELS", "").lower() in ("off", "0"):
        return "PENTAD_KERNELS is off"
    if not _LIBRARY.exists():
        return "they were not built (there was no C++ compiler when pentad was installed)"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return f"the library can't be loaded: {error}"
    exported = dict[str, int]()
    if hasattr(library, "pentad_constant"):
        library.pentad_constant.restype = c_char_p
        value = c_int64()
        while (name := library.pentad_constant(len(exported), ctypes.byref(value))) is not None:
            exported[name.decode()] = value.value
    limits = {name: exported.pop(name, 0) for name in LIMITS}
    different = dict(exported.items() ^ set(_declared())).keys() | {name for name in LIMITS if not limits[name]}
    optional = {"Conv": ("MAX_CONV_SIZE",), "Grid": ("MAX_GRID_SIDE", "MAX_GRID_DIM")}  # an older library may lack them
    if all(name.startswith((*optional, "MAX_CONV", "MAX_GRID")) for name in different):
        for prefix, names in optional.items():
            if any(name.startswith((prefix, *names)) for name in different):
                limits.update(dict.fromkeys(names, 0))
    else:
        return f"{_LIBRARY.name} is from another version of pentad ({min(different)} differs): install pentad again"
    library.pentad_isa.argtypes, library.pentad_isa.restype = [c_int32], c_char_p
    library.pentad_row_bytes.argtypes, library.pentad_row_bytes.restype = [c_int32] * 2, c_int64
    library.pentad_packed_bytes.argtypes, library.pentad_packed_bytes.restype = [c_int32] * 3, c_int64
    library.pentad_pack.argtypes = [c_int32, c_void_p, c_int32, c_int32, c_void_p, c_int32]
    library.pentad_run.argtypes = [POINTER(COp), c_int32, POINTER(CStep)]
    library.pentad_buffer_sizes.argtypes = [POINTER(COp), c_int32, POINTER(CStep), POINTER(c_int64)]
    library.pentad_sample.argtypes = [c_int32, POINTER(CDraw), c_int32, c_int32, c_void_p]
    library.pentad_sample.restype = None
    if limits["MAX_CONV_SIZE"]:
        library.pentad_convolve.argtypes = [POINTER(CConvOp), c_int32, c_int32, c_int32]
        library.pentad_convolve.restype = None
    if limits["MAX_GRID_SIDE"]:
        library.pentad_attend_grid.argtypes = [POINTER(CGridOp), c_int32, c_int32]
        library.pentad_attend_grid.restype = None
    library.pentad_pack.restype = library.pentad_run.restype = library.pentad_buffer_sizes.restype = None
    return library, limits


def _loaded() -> tuple[ctypes.CDLL, dict[str, int]]:
    if isinstance(loaded := _load(), str):
        raise RuntimeError(f"there are no kernels: {loaded}")
    return loaded


def library() -> ctypes.CDLL:
    """Return the library. Raises RuntimeError if there is none."""
    return _loaded()[0]


def limit(name: str) -> int:
    """Return one of LIMITS. Raises RuntimeError if there is no library."""
    return _loaded()[1][name]


@cache
def isas() -> dict[str, int]:
    """The instruction sets that this CPU and this build have, fastest first, and their indices in the library.

    The environment variable ``PENTAD_KERNELS`` restricts them to the one that it names.
    """
    loaded, found = _load(), dict[str, int]()
    if isinstance(loaded, str):
        return found
    index = 0
    while (name := loaded[0].pentad_isa(index)) != b"":
        if name is not None:
            found[name.decode()] = index
        index += 1
    wanted = os.environ.get("PENTAD_KERNELS")
    return {name: index for name, index in found.items() if wanted in (None, "", name)}


def reason() -> str | None:
    """Why there are no kernels; None if there are."""
    loaded = _load()
    if isinstance(loaded, str):
        return loaded
    return None if isas() else f"this CPU or build has no {os.environ['PENTAD_KERNELS']!r} (PENTAD_KERNELS)"
