"""``run.dtype = "auto"``: what a probe of the machine finds, and a resumed run keeps."""

import json
from pathlib import Path

import pytest
import torch

from pentad.errors import BadInput
from pentad.train import precision
from pentad.train.run import open_run
from tests.helpers.training import recipe, train


def pretend(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """bfloat16 is faster than float32 by this factor."""
    monkeypatch.setattr(precision, "matmul_seconds", lambda dtype, device: 1.0 if dtype == torch.float32 else 1 / gain)


def test_bfloat16_must_be_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert precision.faster_dtype(cpu) in ("float32", "bfloat16")
    for gain, expected in ((0.5, "float32"), (1.1, "float32"), (1.5, "bfloat16")):
        pretend(monkeypatch, gain)
        assert precision.faster_dtype(cpu) == expected


def test_a_resumed_run_keeps_its_dtype(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 2.0)
    given = recipe(tmp_path, base, "run.dtype=auto", "run.steps=2")
    assert open_run(given).recipe.run.dtype == "bfloat16"
    train(given)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["run"]["dtype"] == "bfloat16"
    pretend(monkeypatch, 0.5)
    assert open_run(given).recipe.run.dtype == "bfloat16"


def test_processes_could_choose_differently(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="name float32 or bfloat16"):
        open_run(recipe(tmp_path, base, "run.dtype=auto"))
