"""Checkpoints of a training run: whole and verified, or ignored.

A checkpoint is a folder step-N with state.safetensors and manifest.json, which has the size and SHA-256 of the former.
It is written under a hidden name, synced and renamed, so that a process killed at any moment leaves the last one.
"""

from __future__ import annotations

import contextlib
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
    if _verifies(target):
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
    kept = 0
    for path in _newest_first(folder):
        if kept < keep and (path == target or _verifies(path)):
            kept += 1
        elif path != target:
            shutil.rmtree(path, ignore_errors=True)
    return target


def latest(folder: Path) -> Saved | None:
    """Read the newest checkpoint whose manifest verifies; None if there is none."""
    from safetensors.torch import load_file

    skipped: list[str] = []
    for path in _newest_first(folder):
        try:
            manifest = _verified(path)
        except ValueError as error:
            skipped.append(f"{path} is skipped: {' '.join(str(error).split())}")
            continue
        return Saved(manifest["step"], load_file(path / _STATE), manifest["info"], skipped)
    return None


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name)]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def _verifies(path: Path) -> bool:
    with contextlib.suppress(ValueError):
        _verified(path)
        return True
    return False


def _verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError with the defect if the checkpoint doesn't verify."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if not isinstance(manifest, dict) or manifest["step"] != int(path.name[5:]):
            raise ValueError(f"{_MANIFEST} is of another step")
        if not isinstance(manifest["info"], dict):
            raise ValueError(f"{_MANIFEST} has no info")
        expected, nbytes = manifest["files"][_STATE], (path / _STATE).stat().st_size
        if nbytes != expected["nbytes"]:
            raise ValueError(f"{_STATE} has {nbytes} bytes; expected {expected['nbytes']}")
        if _facts(path / _STATE) != expected:
            raise ValueError(f"{_STATE} differs from its SHA-256 in {_MANIFEST}")
    except KeyError as error:
        raise ValueError(f"{_MANIFEST} lacks {error}") from error
    except (OSError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
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
