"""Checkpoints of a training run: whole and verified, or ignored.

A checkpoint is a folder step-N with state.safetensors and manifest.json, which has the size and SHA-256 of the former
and of itself. It is written under a hidden name, synced and renamed, so that a process killed at any moment leaves the
last one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pentad.weights.atomic import new_folder
from pentad.weights.cache import check_space
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import PendingTensor

_STATE, _MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        step: the number of steps done.
        tensors: by name.
        info: what `Saver.save` was given.
        skipped: one line for each newer checkpoint that is broken.
    """

    step: int
    tensors: dict[str, Tensor]
    info: Mapping[str, Any]
    skipped: list[str]


class Saver:
    """Writes checkpoints in a thread, one at a time. A context manager; its end waits for the last one.

    Args:
        folder: the folder of all checkpoints. No other process writes into it.
        keep: the number of checkpoints to keep, at least 1: the newest that verify.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep
        self._verified: set[Path] = set()
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        for partial in folder.glob(".step-*.part"):  # of a killed process
            shutil.rmtree(partial, ignore_errors=True)

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the memory of the copies, in the background: a step would wait longer for new pages than for copying."""
        self.check(wait=True)
        self._last = self._thread.submit(self._take, {name: (t.shape, t.dtype) for name, t in tensors.items()})

    def _take(self, needed: Mapping[str, tuple[torch.Size, torch.dtype]]) -> None:
        self._copies = {name: torch.empty(shape, dtype=dtype).fill_(0) for name, (shape, dtype) in needed.items()}

    def save(self, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Copy the tensors; the rest goes on in the background, after the last checkpoint is complete.

        Args:
            step: the number of steps done; a checkpoint of this step that verifies is kept, a broken one replaced.
            tensors: by name; each storage once.
            info: JSON that `latest` returns.

        Raises:
            PentadError: see `check`.
        """
        self.check(wait=True)
        if self._copies.keys() != tensors.keys():
            self._take({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor.detach())
        self._last = self._thread.submit(self._write, step, self._copies, dict(info))

    def check(self, *, wait: bool = False) -> None:
        """Raise the error of the last checkpoint, if it has failed.

        Raises:
            PentadError: the disk is full or can't be written; the checkpoints before are unchanged.
        """
        if self._last is not None and (wait or self._last.done()):
            last, self._last = self._last, None
            last.result()

    def _write(self, step: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        target = self._folder / f"step-{step}"
        if not self._verifies(target):  # if it does, it is the same: a step's state is a function of the run
            shutil.rmtree(target, ignore_errors=True)
            pending = [_pending(name, tensor) for name, tensor in tensors.items()]
            nbytes = sum(tensor.nbytes for tensor in pending)
            check_space(self._folder, nbytes, "free some, or keep fewer checkpoints")
            with new_folder(target) as partial:
                write_safetensors(partial, "state", pending, shard_bytes=nbytes + 1)
                manifest = {"step": step, "files": {_STATE: _facts(partial / _STATE)}, "info": info}
                (partial / _MANIFEST).write_text(json.dumps({**manifest, "sha256": _hash(manifest)}, indent=2) + "\n")
                for path in (partial / _MANIFEST, partial):
                    _sync(path)
            _sync(self._folder)
            self._verified.add(target)
        kept = 0
        for path in _newest_first(self._folder):
            if kept < self._keep and (path == target or self._verifies(path)):
                kept += 1
            elif path != target:
                shutil.rmtree(path, ignore_errors=True)

    def _verifies(self, path: Path) -> bool:
        if path not in self._verified:
            try:
                _read_manifest(path)
            except ValueError:
                return False
            self._verified.add(path)
        return path.exists()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown()
        if error is None:
            self.check()


def latest(folder: Path) -> Saved | None:
    """Read the newest checkpoint whose manifest verifies; None if there is none."""
    from safetensors.torch import load_file

    skipped: list[str] = []
    for path in _newest_first(folder):
        try:
            manifest = _read_manifest(path)
        except ValueError as error:
            skipped.append(f"{path} is skipped: {' '.join(str(error).split())}")
            continue
        return Saved(manifest["step"], load_file(path / _STATE), manifest["info"], skipped)
    return None


def _pending(name: str, tensor: Tensor) -> PendingTensor:
    return PendingTensor(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name)]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError with the defect if the checkpoint doesn't verify."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if not isinstance(manifest, dict) or manifest.pop("sha256") != _hash(manifest):
            raise ValueError(f"{_MANIFEST} differs from its own SHA-256")
        if manifest["step"] != int(path.name[5:]):
            raise ValueError(f"{_MANIFEST} is of another step")
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


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"nbytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
