"""Completion of paths and of models' names."""

import os
from pathlib import Path


def model_names(prefix: str) -> list[str]:
    """The known and the cached models that begin with a text. If there are none, the shell completes paths."""
    from pentad.weights.registry import KNOWN

    # As in huggingface_hub.constants, whose import would be felt at each Tab.
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    folders = cache.glob("models--*--*") if cache.is_dir() else []
    cached = [folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders]
    return [name for name in sorted([*KNOWN, *cached]) if name.startswith(prefix)]


def files(prefix: str) -> list[str]:
    """The paths that begin with a text; folders end with a slash."""
    folder, slash, start = prefix.rpartition(os.sep)
    try:
        entries = sorted(Path(folder + slash or ".").expanduser().iterdir())
    except OSError:
        return []
    return [
        folder + slash + entry.name + (os.sep if entry.is_dir() else "")
        for entry in entries
        if entry.name.startswith(start) and entry.name.isprintable() and (start or not entry.name.startswith("."))
    ]
