"""Checkpoints: the last good one survives whatever happens to others."""

import json
from pathlib import Path

import pytest
import torch

from pentad.errors import PentadError
from pentad.train import checkpoint

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


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, STATE, {"seed": 1})
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.info == {"seed": 1}
    assert all(torch.equal(saved.tensors[name], value) for name, value in STATE.items())
    assert saved.tensors["step"].shape == ()


def test_a_failed_write_keeps_a_good_checkpoint_of_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: File too large")

    checkpoint.save(tmp_path, 1, STATE, {})
    monkeypatch.setattr("safetensors.torch.save_file", full)
    checkpoint.save(tmp_path, 1, STATE, {})  # it is there
    with pytest.raises(PentadError, match="File too large"):
        checkpoint.save(tmp_path, 2, STATE, {})
    assert latest_step(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


def test_pruning_keeps_checkpoints_that_verify(tmp_path: Path) -> None:
    for step in (20, 60, 80):
        checkpoint.save(tmp_path, step, STATE, {}, keep=3)
    breaks(tmp_path / "step-60")
    breaks(tmp_path / "step-80")
    checkpoint.save(tmp_path, 50, STATE, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-20", "step-50"]
    breaks(tmp_path / "step-50")
    checkpoint.save(tmp_path, 50, STATE, {})
    assert latest_step(tmp_path) == 50


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, json.dumps({"step": 2, "files": {}})])
def test_a_broken_manifest_is_skipped(tmp_path: Path, content: str) -> None:
    checkpoint.save(tmp_path, 1, STATE, {})
    checkpoint.save(tmp_path, 2, STATE, {})
    (tmp_path / "step-2" / "manifest.json").write_text(content)
    saved = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert len(saved.skipped) == 1
