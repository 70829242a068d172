"""Real weights and photos that developers' machines have in a folder ``shared/data`` above the repository."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def shared_data(name: str) -> Path:
    """A file or folder of the real data; skips the test if this machine doesn't have it."""
    for folder in ROOT.parents:
        if (path := folder / "shared" / "data" / name).exists():
            return path
    pytest.skip(f"shared/data/{name} isn't on this machine")
