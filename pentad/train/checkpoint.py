"""Checkpoints of a training run: whole and verified, or ignored.

A checkpoint is a folder step-N with state.safetensors and manifest.json, which has the size and SHA-256 of the former.
It is written under a hidden name, synced and renamed, so that a process killed at any moment leaves the last one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pentad.errors import PentadError
from pentad.weights.atomic import new_folder
from pentad.weights.cache import check_space

_STATE, _MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        step: the number of steps done.
        tensors: by name.
        info: what `save` was given.
        skipped: one line for each newer checkpoint that is broken.
    """

    step: int
    tensors: dict[str, Tensor]
    info: Mapping[str, Any]
    skipped: list[str]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint, then remove all others but the `keep` newest that verify.

    Args:
        folder: the folder of all checkpoints.
        step: the number of steps done; a checkpoint of this step that verifies is kept, a broken one replaced.
        tensors: by name; each storage once.
        info: JSON that `latest` returns.
        keep: the number of checkpoints to keep, at least 1.

    Raises:
        PentadError: the disk is full or can't be written; the checkpoints before are unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = folder / f"step-{step}"
    if _problem(target) is None:
        return target  # a step's state is a function of the run: it is this one
    needed = sum(tensor.nbytes for tensor in tensors.values())
    check_space(folder, needed, "free some, or keep fewer checkpoints")
    shutil.rmtree(target, ignore_errors=True)  # it is broken
    with new_folder(target) as partial:
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / _STATE)
        except SafetensorError as error:  # the disk is full, or files may not be as large
            raise PentadError(f"{target} can't be written: {' '.join(str(error).split())}") from error
        manifest = {"step": step, "files": {_STATE: _facts(partial / _STATE)}, "info": dict(info)}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in (partial / _STATE, partial / _MANIFEST, partial):
            _sync(path)
    _sync(folder)
    verified = [path for path in _newest_first(folder) if path == target or _problem(path) is None]
    for old in _newest_first(folder):
        if old != target and old not in verified[:keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def latest(folder: Path) -> Saved | None:
    """Read the newest checkpoint whose manifest verifies; None if there is none."""
    skipped: list[str] = []
    for path in _newest_first(folder):
        if (problem := _problem(path)) is not None:
            skipped.append(f"{path} is skipped: {problem}")
            continue
        manifest = _verified(path)
        from safetensors.torch import load_file

        return Saved(manifest["step"], load_file(path / _STATE), manifest["info"], skipped)
    return None


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name)]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it verifies."""
    try:
        _verified(path)
    except KeyError as error:
        return f"{_MANIFEST} lacks {error}"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return " ".join(str(error).split())
    return None


def _verified(path: Path) -> dict[str, Any]:
    manifest = json.loads((path / _MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest["step"] != int(path.name[5:]):
        raise ValueError(f"{_MANIFEST} is of another step")
    if not isinstance(manifest["info"], dict):
        raise ValueError(f"{_MANIFEST} has no info")
    expected, found = manifest["files"][_STATE], {"nbytes": (path / _STATE).stat().st_size}
    if found["nbytes"] != expected["nbytes"]:
        raise ValueError(f"{_STATE} has {found['nbytes']} bytes; expected {expected['nbytes']}")
    if _facts(path / _STATE) != expected:
        raise ValueError(f"{_STATE} differs from its SHA-256 in {_MANIFEST}")
    return manifest


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"nbytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
