"""Experiment trackers that receive each step's numbers besides log.jsonl."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pentad.errors import BadInput
from pentad.train.loop import StepRecord


def open_trackers(
    names: Sequence[str], folder: Path, settings: dict[str, Any], first: int, stack: contextlib.ExitStack
) -> list[Callable[[StepRecord], None]]:
    """Open trackers, and close them with `stack`.

    Args:
        names: "tensorboard", "trackio".
        folder: the run's folder; its name is the run's, and its parent's name the project's.
        settings: the recipe.
        first: the number of steps that are done; later ones, if known from a killed process, are replaced.

    Raises:
        BadInput: a tracker isn't installed.
    """
    makers = {"tensorboard": _tensorboard, "trackio": _trackio}
    return [makers[name](folder, settings, first, stack) for name in names]


def _tensorboard(
    folder: Path, settings: dict[str, Any], first: int, stack: contextlib.ExitStack
) -> Callable[[StepRecord], None]:
    module = _imported("torch.utils.tensorboard", "tensorboard")
    writer = stack.enter_context(module.SummaryWriter(folder / "tensorboard", purge_step=first + 1))

    def write(record: StepRecord) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record.step)

    return write


def _trackio(
    folder: Path, settings: dict[str, Any], first: int, stack: contextlib.ExitStack
) -> Callable[[StepRecord], None]:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    module = _imported("trackio", "trackio")
    run = folder.resolve()
    module.init(project=run.parent.name, name=run.name, config=settings, resume="allow" if first else "never")
    stack.callback(module.finish)
    return lambda record: module.log(_numbers(record), step=record.step)


def _numbers(record: StepRecord) -> dict[str, float]:
    return {name: value for name, value in record.as_json().items() if name != "step"}


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise BadInput(f"run.trackers has {package}, which isn't installed: pip install 'pentad[{package}]'") from error
