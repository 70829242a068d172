"""The segmenter that is trained on this machine."""

from pathlib import Path

import pytest

import pentad as package
from pentad.datasets.scenes import Scenes
from pentad.errors import BadInput
from pentad.recipes import scenes_sam
from pentad.vision.segmenter import Segmenter
from pentad.weights import registry
from pentad.weights.cache import Progress

TINY = scenes_sam.Size(scenes=6, clip=2, pairs=4, steps=2, batch=2, objects=1, clicks=1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/models"


class Interrupted(Progress):
    """Ctrl-C after the first step of a task."""

    def __init__(self, at: str) -> None:
        self.at, self.seen, self.advanced = at, list[str](), set[str]()

    def start(self, description: str, total: int | None) -> None:
        self.seen.append(description)

    def advance(self, n: int) -> None:
        if self.seen[-1] == self.at:
            raise KeyboardInterrupt
        self.advanced.add(self.seen[-1])


def test_an_interrupted_training_continues(cache: Path) -> None:
    path = cache / "sam-scenes"
    with pytest.raises(KeyboardInterrupt):
        scenes_sam.make(path, note=print, progress=Interrupted("Training segment"), size=TINY)
    assert not path.exists()
    with pytest.raises(BadInput, match="pentad pull sam-scenes"):
        registry.locate("sam-scenes")
    seen = Interrupted("nothing")
    scenes_sam.make(path, note=print, progress=seen, size=TINY)
    assert seen.advanced == {"Training segment"}
    assert [one.name for one in cache.iterdir() if one.is_dir()] == ["sam-scenes"]
    assert sum(file.stat().st_size for file in path.rglob("*")) < 12e6
    assert registry.locate("sam-scenes") == path
    sam = package.load("sam-scenes")
    assert isinstance(sam, Segmenter)
    image = sam.image(Scenes(1, size=64)[0].image)
    assert image.masks(points=[30, 20])
    assert image.masks(text=["five"])
    assert registry.remove("sam-scenes") > 1e6
    assert not path.exists()
