"""Experiment trackers: what trackio is called with, and what is said when one isn't installed."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pentad.errors import BadInput
from pentad.train.loop import StepRecord
from pentad.train.trackers import open_trackers


def test_trackio_gets_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    module = SimpleNamespace(
        init=lambda **settings: calls.append(("init", settings)),
        log=lambda numbers, step: calls.append(("log", (step, numbers["loss"], numbers["accuracy"]))),
        finish=lambda: calls.append(("finish", None)),
    )
    monkeypatch.setitem(sys.modules, "trackio", module)
    folder = tmp_path / "runs" / "first"
    with contextlib.ExitStack() as stack:
        (write,) = open_trackers(["trackio"], folder, {"lr": 1}, 2, stack)
        write(StepRecord(3, 2.5, 100, 1e-3, 1.0, 0.5, 10**6, {"accuracy": 0.5}))
    init = {"project": "runs", "name": "first", "config": {"lr": 1}, "resume": "allow"}
    assert calls == [("init", init), ("log", (3, 2.5, 0.5)), ("finish", None)]


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("trackio", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with contextlib.ExitStack() as stack, pytest.raises(BadInput, match=rf"pip install 'pentad\[{name}\]'"):
        open_trackers([name], tmp_path, {}, 0, stack)
