"""Files mapped into memory, and their pages given back once they were read."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor

from pentad.errors import PentadError

__all__ = ["drop_pages", "map_file"]


def map_file(path: Path) -> Tensor:
    """A file's bytes, uint8 [size]: what is written to them stays in this process.

    Raises PentadError where the system can't map it.
    """
    with contextlib.suppress(RuntimeError):
        return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    # Such a mapping counts as memory, and the file is larger than there is of that. One that can't be written doesn't.
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)
    except OSError as error:
        raise PentadError(f"{path}: cannot be mapped into memory: {error.strerror}") from error


def drop_pages(view: Tensor) -> None:
    """Give back the memory that a view of a mapped file takes; whoever looks again reads the file again.

    Only whole pages go, which are nobody else's. Where torch wrote to the mapping, nothing is given back: it would be
    lost.
    """
    if not hasattr(mmap, "MADV_DONTNEED") or view.is_inference() or view._version:
        return
    start = -(-view.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = view.data_ptr() + view.nbytes - start
    if length >= mmap.PAGESIZE:
        whole = length // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), mmap.MADV_DONTNEED)
