"""Files mapped into memory, and releasing memory after use."""

import contextlib
import ctypes
import mmap
import warnings
from pathlib import Path

import torch
from torch import Tensor

from pentad.errors import PentadError


def map_file(path: Path) -> Tensor:
    """A file's bytes, uint8 [size]; writes to them do not reach the file.

    Raises:
        PentadError: the system cannot map the file.
    """
    with contextlib.suppress(RuntimeError):
        return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    # The system counts a writable mapping as memory, and the file is too large for it. Read-only mappings don't count.
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)
    except OSError as error:
        raise PentadError(f"{path}: cannot be mapped into memory: {error.strerror}") from error


def own_storage(view: Tensor) -> Tensor:
    """Give a view of a mapped file its own storage, without copying the memory.

    Pickling, saving or deep-copying a tensor includes its whole storage, which for a plain view is the whole file.
    """
    if not view.numel():
        return view.clone()
    return torch.from_numpy(view.reshape(-1).view(torch.uint8).numpy()).view(view.dtype).view(view.shape)


def return_free_memory() -> None:
    """Let glibc return the memory that this process has freed to the system; other systems do that by themselves."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def drop_pages(view: Tensor) -> None:
    """Free the memory of a view of a mapped file; the next access reads the file again.

    Only whole pages are freed, because neighboring tensors may share the others. If torch has written to the mapping,
    nothing is freed, because the changes would be lost.
    """
    if not hasattr(mmap, "MADV_DONTNEED") or view.is_inference() or view._version:
        return
    start = -(-view.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = view.data_ptr() + view.nbytes - start
    if length >= mmap.PAGESIZE:
        whole = length // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), mmap.MADV_DONTNEED)
