"""A failed write leaves no incomplete file."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pentad.errors import BadInput, PentadError
from pentad.weights import atomic
from pentad.weights.atomic import NewFile, new_folder, write_files
from pentad.weights.gguf_writer import write_gguf
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import PendingTensor


class FullDisk:
    """A file whose second write, flush, fsync or close fails, as `when` says."""

    def __init__(self, path: Path, when: str, number: int) -> None:
        self.file, self.when, self.number, self.writes = path.open("xb"), when, number, 0

    def fail(self, when: str) -> None:
        if when == self.when:
            raise OSError(self.number, os.strerror(self.number))

    def write(self, piece: bytes) -> None:
        self.writes += 1
        if self.writes == 2:
            self.fail("write")
        self.file.write(piece)

    def flush(self) -> None:
        self.fail("flush")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        self.fail("close")

    def fileno(self) -> int:
        self.fail("fsync")
        return self.file.fileno()


def shards() -> list[PendingTensor]:
    return [PendingTensor(name, (64,), torch.float32, lambda: torch.ones(64)) for name in "abc"]


WRITERS: dict[str, Callable[[Path], list[Path]]] = {
    "safetensors": lambda folder: write_safetensors(folder, "model", shards(), shard_bytes=256),
    "gguf": lambda folder: write_gguf(folder / "m.gguf", {}, shards()),
    "gguf in parts": lambda folder: write_gguf(folder / "m.gguf", {}, shards(), shard_bytes=256),
}


def message_of(raised: pytest.ExceptionInfo[PentadError]) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("when", ["write", "flush", "fsync", "close"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"no space left: [\d,]{3,5} bytes"),
        (errno.EDQUOT, "no space left: "),
        (errno.EFBIG, "smaller shards"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_failing_disk_leaves_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writer: Callable[[Path], list[Path]],
    when: str,
    number: int,
    message: str,
) -> None:
    created: list[Path] = []

    def create(path: Path) -> Any:
        created.append(path)
        last = len(created) == (1 if writer is WRITERS["gguf"] else 3)
        return FullDisk(path, when if last else "never", number)

    monkeypatch.setattr(atomic, "open_new", create)
    with pytest.raises(PentadError, match=message) as raised:
        writer(tmp_path)
    assert str(tmp_path) in message_of(raised)
    assert ".part" not in message_of(raised)
    assert not isinstance(raised.value, BadInput)
    assert created
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for write in WRITERS.values():
        with pytest.raises(BadInput, match=f"{tmp_path}/file is a file") as raised:
            write(tmp_path / "file" / "folder")
        message_of(raised)


def test_a_failing_rename_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, done = os.replace, []

    def fail_at_the_second(source: Path, target: Path) -> None:
        done.append(target)
        if len(done) == 2:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(PentadError, match="Input/output error"):
        write_safetensors(tmp_path, "model", shards(), shard_bytes=256)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interruption_leaves_no_file(tmp_path: Path, error: BaseException) -> None:
    def interrupted() -> torch.Tensor:
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    tensors = [*shards()[:1], PendingTensor("z", (64,), torch.float32, interrupted)]
    with pytest.raises(type(error)):
        write_safetensors(tmp_path, "model", tensors, shard_bytes=256)
    assert not list(tmp_path.iterdir())


def test_free_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Path) -> Any:
        assert path == tmp_path
        return SimpleNamespace(free=1023)

    def never() -> Iterator[bytes]:
        raise AssertionError("content was generated for a full disk")
        yield b""

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(PentadError, match=r"1,024 bytes .*1,023") as raised:
        write_files([NewFile(tmp_path / "x", 1024, never())])
    message_of(raised)
    assert not list(tmp_path.iterdir())
    write_files([NewFile(tmp_path / "x", 1023, [bytes(1023)])])


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_the_systems_file_size_limit(tmp_path: Path) -> None:
    code = (
        "import resource, sys, torch, pathlib;"
        "from pentad.errors import PentadError;"
        "from pentad.weights.safetensors_writer import write_safetensors as write;"
        "from pentad.weights.writing import PendingTensor;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "write(pathlib.Path(sys.argv[1]), 'm', [PendingTensor('x', (1 << 20,), torch.float32, lambda:"
        " torch.ones(1 << 20))],"
        " shard_bytes=1 << 30)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"/m\.safetensors: .*smaller shards$", done.stderr.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_existing_files_are_not_replaced(tmp_path: Path) -> None:
    for name in ("model-00002-of-00003.safetensors", "m.gguf", "m-00001-of-00003.gguf"):
        (tmp_path / name).write_text("precious")
    for write in WRITERS.values():
        with pytest.raises(BadInput, match="exists already"):
            write(tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}
    assert len(list(tmp_path.iterdir())) == 3


def test_files_get_the_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    with new_folder(tmp_path / "new") as folder:
        write_files([NewFile(folder / "x", 2, [b"ab"])])
    assert (tmp_path / "new" / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_folder_appears_when_it_is_complete(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "above" / "new"
    if exists:
        target.mkdir(parents=True)
    with new_folder(target) as folder:
        (folder / "x").write_text("x")
        assert not (target / "x").exists()
    assert [path.name for path in target.iterdir()] == ["x"]
    assert [path.name for path in target.parent.iterdir()] == ["new"]


def test_a_new_folder_at_a_link_fills_the_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with new_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_text() == "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOENT, "none")])
def test_a_failing_block_leaves_no_folder(tmp_path: Path, error: BaseException) -> None:
    def fill() -> None:
        with new_folder(tmp_path / "new") as folder:
            (folder / "x").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fill()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_becomes_full_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new"
    with pytest.raises(PentadError, match=f"{target}: no space left") as raised, new_folder(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    message_of(raised)
    monkeypatch.setattr(atomic, "open_new", lambda path: FullDisk(path, "write", errno.ENOSPC))
    where = f"{target}/model-00001-of-00003.safetensors"
    with pytest.raises(PentadError, match=f"{where}: no space left: .*bytes"), new_folder(target) as folder:
        WRITERS["safetensors"](folder)
    with pytest.raises(BadInput, match=f"^{target}/x is wrong$"), new_folder(target) as folder:
        raise BadInput(f"{folder}/x is wrong")
    assert not list(tmp_path.iterdir())


def test_created_parent_folders_are_removed_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    deep = tmp_path / "there" / "a" / "b"
    with pytest.raises(KeyboardInterrupt), new_folder(deep / "new"):
        raise KeyboardInterrupt
    file = NewFile(deep / "x", 10**18, [b""])
    with pytest.raises(PentadError, match=f"{deep}: no space left"):
        write_files([file])
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("length", [250, 300])  # 250 is too long only for the hidden temporary name
def test_a_name_that_is_too_long_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("x" * length)
    with pytest.raises(PentadError, match="File name too long"):
        write_files([NewFile(path, 1, [b"x"])])
    with pytest.raises(PentadError, match="File name too long"), new_folder(path):
        raise AssertionError("not entered")
    assert not list(tmp_path.iterdir())


def test_folders_in_use_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    cases = {
        tmp_path / "full": "full .*not empty",
        tmp_path / "full" / "x": "x exists .*file",
        tmp_path / "empty": "empty is the current folder",
        Path("."): "^. is the current folder",
    }
    for path, message in cases.items():
        with pytest.raises(BadInput, match=message), new_folder(path):
            raise AssertionError("not entered")
    with pytest.raises(BadInput, match="/x is a file"), new_folder(tmp_path / "full/x/y"):
        raise AssertionError("not entered")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_parts_of_a_killed_process_are_removed(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "new[1]"
    (tmp_path / ".new[1].0123.part").touch()
    (tmp_path / ".new[1].4567.part").mkdir()
    (tmp_path / ".other.0123.part").touch()
    if kind == "file":
        write_files([NewFile(target, 1, [b"a"])])
    else:
        with new_folder(target):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"new[1]", ".other.0123.part"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_a_second_writer_is_refused_at_once(tmp_path: Path) -> None:
    target = tmp_path / "new"

    def pieces() -> Iterator[bytes]:
        with pytest.raises(BadInput, match="another process"):
            write_files([NewFile(target, 1, [b"b"])])
        yield b"a"

    write_files([NewFile(target, 1, pieces())])
    assert target.read_bytes() == b"a"
    again = new_folder(tmp_path / "folder")
    with new_folder(tmp_path / "folder"), pytest.raises(BadInput, match="another process"), again:
        pass
