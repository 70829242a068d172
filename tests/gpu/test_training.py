"""Training on a CUDA device: `make gpu` runs these tests with the installed packages."""

import json
from pathlib import Path

import pytest
import torch

import pentad
from tests.helpers.training import PAIRS, log_of, recipe, train, write_base

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "options", [(), ("run.checkpointing=blocks", "run.ema=0.9"), ("lora.rank=4",), ("optimizer.name=muon",)]
)
def test_losses_are_the_cpus(tmp_path: Path, base: Path, options: tuple[str, ...]) -> None:
    losses = {}
    for device in ("cpu", "cuda"):
        given = recipe(tmp_path, base, f"run.device={device}", f"run.out={tmp_path / device}", *options)
        final, records = train(given)
        losses[device] = [record.loss for record in records]
        assert pentad.load(final, device="cuda").complete("add 1", max_tokens=4, temperature=0).completion_tokens
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=2e-3)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "reward"])
def test_pairs(tmp_path: Path, base: Path, objective: str) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    losses = {}
    for device in ("cpu", "cuda"):
        _, records = train(
            recipe(tmp_path, base, f"objective={objective}", f"run.device={device}", f"run.out={tmp_path / device}")
        )
        losses[device] = [record.loss for record in records]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path: Path, base: Path, dtype: str) -> None:
    options = ("run.device=cuda", f"run.dtype={dtype}")
    whole, _ = train(recipe(tmp_path, base, f"run.out={tmp_path / 'whole'}", *options))
    given = recipe(tmp_path, base, *options)
    train(given, kill_after=4)
    resumed, _ = train(given, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [r["loss"] for r in log_of(resumed.parent)] == [r["loss"] for r in log_of(whole.parent)]


def test_auto_takes_the_gpu_and_bfloat16_if_that_is_faster(tmp_path: Path, base: Path) -> None:
    train(recipe(tmp_path, base, "run.dtype=auto", "run.steps=2"))
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["run"]["dtype"] in ("float32", "bfloat16")
    assert log_of(tmp_path / "run")[-1]["peak_bytes"] == torch.cuda.max_memory_allocated()
