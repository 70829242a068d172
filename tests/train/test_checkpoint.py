"""Checkpoints: the last good one survives whatever happens to others."""

import errno
import io
import json
from pathlib import Path

import pytest
import torch

from pentad.errors import PentadError
from pentad.train import checkpoint
from pentad.weights import atomic

STATE = {"a": torch.arange(6.0), "step": torch.tensor(3.0)}


def breaks(folder: Path) -> None:
    """Flip a bit of a checkpoint's state."""
    file = folder / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def latest_step(folder: Path) -> int | None:
    saved = checkpoint.latest(folder)
    return None if saved is None else saved.step


def save(folder: Path, step: int, info: dict[str, int] | None = None, keep: int = 2) -> None:
    with checkpoint.Saver(folder, keep) as saver:
        saver.save(step, STATE, info or {})


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    save(tmp_path, 3, {"seed": 1})
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.info == {"seed": 1}
    assert all(torch.equal(saved.tensors[name], value) for name, value in STATE.items())
    assert saved.tensors["step"].shape == ()


def test_what_changes_after_a_save_is_not_in_it(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    with checkpoint.Saver(tmp_path) as saver:
        saver.save(1, state, {})
        for tensor in state.values():
            tensor.fill_(-1)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert torch.equal(saved.tensors["a"], STATE["a"])


class FullDisk(io.BytesIO):
    def write(self, _: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    opened = [open(tmp_path.parent / "unused", "wb")]  # noqa: SIM115 - its descriptor is locked

    def full(path: Path) -> FullDisk:
        disk = FullDisk()
        disk.fileno = opened[0].fileno  # type: ignore[method-assign]
        path.touch()
        return disk

    monkeypatch.setattr(atomic, "open_new", full)
    save(tmp_path, 1)  # it is there
    saver = checkpoint.Saver(tmp_path)
    saver.save(2, STATE, {})
    with pytest.raises(PentadError, match="no space left"):
        saver.check(wait=True)
    opened[0].close()
    assert latest_step(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


def test_pruning_keeps_checkpoints_that_verify(tmp_path: Path) -> None:
    for step in (20, 60, 80):
        save(tmp_path, step, keep=3)
    breaks(tmp_path / "step-60")
    breaks(tmp_path / "step-80")
    save(tmp_path, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-20", "step-50"]
    breaks(tmp_path / "step-50")
    save(tmp_path, 50)
    assert latest_step(tmp_path) == 50


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-7.0123abcd.part").mkdir()
    save(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-8"]


def test_a_changed_manifest_is_skipped(tmp_path: Path) -> None:
    save(tmp_path, 1, {"seed": 1})
    save(tmp_path, 2, {"seed": 1})
    manifest = tmp_path / "step-2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 1', '"seed": 2'))
    assert latest_step(tmp_path) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, json.dumps({"step": 2, "files": {}})])
def test_a_broken_manifest_is_skipped(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-2" / "manifest.json").write_text(content)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert len(saved.skipped) == 1
