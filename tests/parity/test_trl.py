"""Training as TRL's: losses and gradient norms of whole runs, and each loss on the same log-probabilities.

TRL gets the rows in the order in which pentad draws them. The models are tiny and random, in float32.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.convert import export_network
from pentad.train.loop import StepRecord
from pentad.train.objectives.dpo import sigmoid_loss
from pentad.train.objectives.orpo import odds_ratio_loss
from pentad.train.objectives.simpo import simpo_loss
from pentad.train.run import TrainingRun, open_run
from tests.helpers.objectives import LABELLED, PAIRS, recipe_of, write_inputs

pytest.importorskip("trl", reason="make parity installs it")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own

REPLIES = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
OWN_PAIRS = [{name: value for name, value in row.items() if name != "margin"} for row in PAIRS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))


def ours(
    folder: Path, tmp_path: Path, case: str, rows: list[dict[str, Any]], *overrides: str, steps: int, batch: int = 4
) -> tuple[TrainingRun, list[StepRecord]]:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.train={tmp_path}/rows.jsonl", f"run.out={tmp_path}/run", f"run.steps={steps}", "run.seed=1"]
    constant = ["optimizer.schedule=constant", "optimizer.warmup=0", f"run.batch_size={batch}"]
    run, records = open_run(recipe_of(folder, case, *settings, *constant, *overrides)), []
    run.train(note=print, report=records.append)
    return run, records


def theirs(
    trainer: str, run: TrainingRun, rows: list[dict[str, Any]], tmp_path: Path, model: Path, **settings: Any
) -> list[dict[str, float]]:
    """The log of a run of TRL's trainer with the rows of `run`."""
    import trl
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer

    disable_progress_bar()
    given = run.recipe
    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=given.run.batch_size,
        max_steps=given.run.steps,
        learning_rate=given.optimizer.lr,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_length=given.run.sequence_length,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token_id = 0  # a byte that no row has
    arguments = {"args": config, "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    peer = getattr(trl, f"{trainer}Trainer")(str(model), **arguments)
    peer.train()
    return [line for line in peer.state.log_history if "loss" in line]


def drawn(run: TrainingRun, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all steps, in order."""
    return [rows[number] for step in range(run.recipe.run.steps) for _, number in run.data.examples(step)]


def assert_same(records: list[StepRecord], log: list[dict[str, float]]) -> None:
    losses = [line["loss"] for line in log]
    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-5, abs=1e-6)  # robust DPO's crosses 0
    assert [record.grad_norm for record in records] == pytest.approx([line["grad_norm"] for line in log], rel=1e-4)
    assert records[0].loss != pytest.approx(records[-1].loss, rel=1e-2)


def test_20_steps_of_sft(folder: Path, tmp_path: Path) -> None:
    run, records = ours(folder, tmp_path, "sft", REPLIES, steps=20)
    assert_same(records, theirs("SFT", run, drawn(run, REPLIES), tmp_path, folder / "dense"))


def test_20_steps_of_dpo(folder: Path, tmp_path: Path) -> None:
    run, records = ours(folder, tmp_path, "dpo", OWN_PAIRS, steps=20)
    log = theirs("DPO", run, drawn(run, OWN_PAIRS), tmp_path, folder / "dense")
    assert_same(records, log)
    assert [r.metrics["accuracy"] for r in records[1:]] == [line["rewards/accuracies"] for line in log[1:]]
    assert [r.metrics["reward_chosen"] for r in records] == pytest.approx(
        [line["rewards/chosen"] for line in log], rel=1e-3, abs=1e-5
    )


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        ("ipo", {"loss_type": ["ipo"]}),
        ("hinge", {"loss_type": ["hinge"], "beta": 0.3}),
        ("robust", {"loss_type": ["robust"], "label_smoothing": 0.2}),
        ("{dpo = 1.0, sft = 0.2}", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}),
    ],
)
def test_losses_of_pairs(folder: Path, tmp_path: Path, objective: str, settings: dict[str, Any]) -> None:
    options = [f"preference.{name}={value}" for name, value in settings.items() if not name.startswith("loss")]
    run, records = ours(folder, tmp_path, "dpo", OWN_PAIRS, f"objective={objective}", *options, steps=6)
    assert_same(records, theirs("DPO", run, drawn(run, OWN_PAIRS), tmp_path, folder / "dense", **settings))


def test_kto(folder: Path, tmp_path: Path) -> None:
    """In a batch of all rows, from last to first, TRL gives a row the reply of the next one, as pentad does."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3}
    options = [f"preference.{name}={value}" for name, value in weights.items()]
    run, records = ours(folder, tmp_path, "kto", LABELLED, *options, "optimizer.lr=1e-2", steps=6, batch=10)
    log = theirs("KTO", run, LABELLED[::-1] * 6, tmp_path, folder / "dense", **weights)
    assert_same(records, log)
    assert [record.metrics["kl"] for record in records] == pytest.approx([x["kl"] for x in log], rel=1e-4, abs=1e-5)
    assert records[-1].metrics["kl"] > 0


def test_reward(folder: Path, tmp_path: Path) -> None:
    center = {"center_rewards_coefficient": 0.1}
    run, records = ours(folder, tmp_path, "reward", PAIRS, "preference.center_rewards_coefficient=0.1", steps=6)
    torch.manual_seed(run.recipe.run.seed)
    export_network(run._network(), run.source, tmp_path / "start", tokenizer=run.tokenizer_source)
    assert_same(records, theirs("Reward", run, drawn(run, PAIRS), tmp_path, tmp_path / "start", **center))


def log_probs() -> Tensor:
    """Of chosen and rejected replies, means over their tokens."""
    return -torch.rand((64, 2), generator=torch.Generator().manual_seed(0)) * 6 - 1e-3


def test_orpo() -> None:
    from trl.experimental.orpo import ORPOTrainer

    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    kept, *_ = ORPOTrainer.odds_ratio_loss(trainer, *log_probs().unbind(1))
    torch.testing.assert_close(odds_ratio_loss(log_probs(), 0.3), -kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_and_conservative_dpo(smoothing: float) -> None:
    from trl.experimental.cpo import CPOTrainer

    values = {"beta": 0.7, "alpha": 0.0, "simpo_gamma": 0.4, "label_smoothing": smoothing}
    trainer = SimpleNamespace(**values, accelerator=SimpleNamespace(device="cpu"), loss_type="simpo")
    chosen, rejected = log_probs().unbind(1)
    expected, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    torch.testing.assert_close(simpo_loss(log_probs(), 0.7, 0.4, smoothing), expected, rtol=1e-5, atol=1e-6)
    trainer.loss_type = "sigmoid"
    expected, *_ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    torch.testing.assert_close(sigmoid_loss(chosen - rejected, 0.7, smoothing), expected, rtol=1e-5, atol=1e-6)
