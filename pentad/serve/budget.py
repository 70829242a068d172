"""How a server's memory is divided among its models."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pentad.errors import BadInput

PROCESS_BYTES = 400 << 20  # Python, torch and pentad in a worker
MIN_CACHE_BYTES = 128 << 20
_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pth")


class Share(NamedTuple):
    """The memory of one model in bytes: everything, and its KV cache alone."""

    total: int
    cache: int


def shares(paths: Sequence[Path], memory: int) -> list[Share]:
    """Divide `memory` equally; a model that needs more than its share takes more, and then they take turns.

    Raises:
        BadInput: a model doesn't fit at all.
    """
    found = []
    for path in paths:
        fixed = weights_bytes(path) + PROCESS_BYTES
        total = max(memory // len(paths), fixed + MIN_CACHE_BYTES)
        if total > memory:
            needed = f"needs {total / 1e9:.1f} GB of memory at least"
            raise BadInput(f"{path} {needed}, and {memory / 1e9:.1f} GB are for models; see --memory")
        found.append(Share(total, total - fixed))
    return found


def weights_bytes(path: Path) -> int:
    """The size of a model's weights in its files; of a folder with several formats, the largest."""
    if path.is_file() and path.suffix == ".gguf" and "-of-" not in path.name:
        return path.stat().st_size
    folder = path if path.is_dir() else path.parent
    return max(sum(file.stat().st_size for file in folder.glob("*" + suffix)) for suffix in _SUFFIXES)
