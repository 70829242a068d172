"""Runs of a tiny model: losses, exact resume, accumulation, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pentad.errors import BadInput, PentadError
from pentad.text import Tokenizer
from pentad.train import checkpoint
from pentad.train.recipe import read_recipe
from pentad.train.run import open_run
from tests.helpers.training import PAIRS, log_of, recipe, train


def test_losses_equal_transformers_and_the_result_loads_there(tmp_path: Path, base: Path) -> None:
    given = recipe(tmp_path, base, "run.checkpoint_every=0")
    run = open_run(given)
    tokenizer: Tokenizer = run.tokenizer
    reference = AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    final, records = train(given)
    assert tokenizer.control["<|im_end|>"] == 257
    for record in records:
        sequences = [run.stores[0][number][0] for _, number in run.data.examples(record.step - 1)]
        loss, count = torch.zeros(()), 0
        for ids, targets in sequences:
            labels = torch.where(torch.from_numpy(targets.copy()).bool(), torch.from_numpy(ids.copy()).long(), -100)
            logits = reference(torch.from_numpy(ids.copy()).long()[None]).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            count += int((labels[1:] >= 0).sum())
        optimizer.zero_grad()
        (loss / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0).detach()
        optimizer.param_groups[0]["lr"] = record.learning_rate
        optimizer.step()
        assert record.loss == pytest.approx(float(loss.detach() / count), rel=1e-5)
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-4)
    trained = AutoModelForCausalLM.from_pretrained(final)
    for (name, ours), theirs in zip(trained.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4), name


@pytest.mark.parametrize("killed", [1, 2, 3, 5])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, base: Path, killed: int) -> None:
    overrides = ("data.pack=true", "run.micro_batch_tokens=80", "run.ema=0.5")
    whole, records = train(recipe(tmp_path, base, *overrides))
    expected = (whole / "model.safetensors").read_bytes()
    log = [record["loss"] for record in log_of(tmp_path / "run")]
    shutil.rmtree(tmp_path / "run")
    given = recipe(tmp_path, base, *overrides)
    train(given, kill_after=killed)
    final, _ = train(given, resume=True)
    assert (final / "model.safetensors").read_bytes() == expected
    assert [record["loss"] for record in log_of(tmp_path / "run")] == log
    assert len(records) == 6


def test_a_broken_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, base: Path) -> None:
    given = recipe(tmp_path, base)
    train(given, kill_after=5)
    newest = tmp_path / "run/checkpoints/step-4/state.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    saved = checkpoint.latest(tmp_path / "run/checkpoints")
    assert saved is not None
    assert saved.step == 2
    assert "step-4" in saved.skipped[0]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path, base: Path, optimizer: str) -> None:
    norms = []
    for tokens in (1, 4096):  # one sequence a micro-batch, and all of them
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        _, records = train(
            recipe(tmp_path, base, f"run.micro_batch_tokens={tokens}", "run.steps=2", f"optimizer.name={optimizer}")
        )
        norms.append([record.grad_norm for record in records])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_pretraining_from_a_config(tmp_path: Path, base: Path) -> None:
    (tmp_path / "config").mkdir()
    shutil.copy(base / "config.json", tmp_path / "config")
    (tmp_path / "text.jsonl").write_text('{"text": "abcabcabcabc"}\n' * 20)
    given = recipe(
        tmp_path, base, "objective=pretrain", f"data.train={tmp_path}/text.jsonl", "run.steps=20", "run.dtype=bfloat16"
    )
    given = given.model_copy(
        update={
            "model": given.model.model_copy(
                update={"base": None, "config": str(tmp_path / "config"), "tokenizer": str(base)}
            )
        }
    )
    final, records = train(given)
    assert records[-1].loss < 0.5 * records[0].loss
    assert AutoModelForCausalLM.from_pretrained(final).config.vocab_size == 264


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.stps=3", "nearest known one is 'steps'"),
        ("data.mix=1", "unknown key"),
        ("optimizer.lr=-1", "optimizer.lr is -1"),
        ("objective=sfd", "objective is 'sfd'"),
        ("run.sequence_length=16", "more than sequence_length"),
        ("run.sequence_length=4096", "at most 128 positions"),
        ("run", "key=value"),
        ("data.stages=[{train='a', steps=1}]", "train, or stages"),
        ("optimizer.groups=[{parameters='x', lrscale=1}]", "nearest known one is 'lr_scale'"),
        ("data.train=none.jsonl", "doesn't exist"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(tmp_path: Path, base: Path, override: str, expected: str) -> None:
    with pytest.raises(BadInput, match=expected) as caught:
        open_run(recipe(tmp_path, base, override))
    assert "\n" not in str(caught.value)


def test_a_second_run_into_a_folder_and_another_recipe_are_refused(tmp_path: Path, base: Path) -> None:
    train(recipe(tmp_path, base), kill_after=3)
    with pytest.raises(BadInput, match="--resume"):
        train(recipe(tmp_path, base))
    with pytest.raises(BadInput, match=r"optimizer\.lr was 0\.01 and is 0\.02"):
        train(recipe(tmp_path, base, "optimizer.lr=0.02"), resume=True)


def test_a_complete_run_is_not_repeated(tmp_path: Path, base: Path) -> None:
    given = recipe(tmp_path, base, "run.checkpoint_every=0")
    final, _ = train(given)
    written = (final / "model.safetensors").stat().st_mtime_ns
    assert train(given, resume=True) == (final, [])
    assert (final / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(BadInput, match=r"optimizer\.lr was"):
        train(recipe(tmp_path, base, "run.checkpoint_every=0", "optimizer.lr=0.5"), resume=True)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, base: Path) -> None:
    with pytest.raises(PentadError, match=r"step [2-6]: the loss is .*train\.jsonl:\d"):
        train(
            recipe(
                tmp_path,
                base,
                "optimizer.lr=99",
                "optimizer.max_grad_norm=1e30",
                "optimizer.warmup=0",
                "run.steps=6",
                "optimizer.eps=1e-30",
                "optimizer.weight_decay=90",
            )
        )


def test_spikes_may_have_no_limit(tmp_path: Path, base: Path) -> None:
    _, records = train(recipe(tmp_path, base, "run.max_spike=0", "run.steps=2"))
    assert len(records) == 2


def test_the_recipe_in_the_docs_is_valid(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs/training.md"
    (tmp_path / "r.toml").write_text(docs.read_text().split("```toml\n")[1].split("```")[0])
    assert read_recipe(tmp_path / "r.toml").run.out == "runs/first"


@pytest.mark.parametrize("objective", ["dpo", "ipo", "ipo_sum", "hinge", "robust"])
def test_losses_of_pairs_equal_their_formulas_on_transformers_log_probs(
    tmp_path: Path, base: Path, objective: str
) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    given = recipe(
        tmp_path, base, f"objective={objective}", f"data.train={tmp_path}/pairs.jsonl", "run.steps=8",
        "optimizer.schedule=constant", "optimizer.warmup=0", "preference.label_smoothing=0.1",
    )  # fmt: skip
    run = open_run(given)
    first = run.data.examples(0)
    _, records = train(given)
    beta, e = 0.1, 0.1
    lengths: list[int] = []
    start = {"dpo": 0.693147, "ipo": 25.0, "ipo_sum": 25.0, "hinge": 1.0, "robust": 0.693147}[objective]
    assert records[0].loss == pytest.approx(start, rel=1e-5)
    assert records[-1].metrics["accuracy"] == 1.0

    def log_probs(model: torch.nn.Module) -> torch.Tensor:
        rows = []
        for _, number in run.data.examples(1):
            for ids, targets in run.stores[0][number]:
                tokens = torch.from_numpy(ids.copy()).long()
                chosen = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
                rows.append(chosen[torch.from_numpy(targets[1:].copy()).bool()].sum())
                lengths.append(int(targets.sum()))
        return torch.stack(rows).view(-1, 2)

    shutil.rmtree(tmp_path / "run")
    after_one, _ = train(given.model_copy(update={"run": given.run.model_copy(update={"steps": 1})}))
    with torch.no_grad():
        policy = log_probs(AutoModelForCausalLM.from_pretrained(after_one))
        reference = log_probs(AutoModelForCausalLM.from_pretrained(base))
    ratios = policy - reference
    margin = ratios[:, 0] - ratios[:, 1]
    means = ratios / torch.tensor(lengths[-2 * len(ratios) :]).view(-1, 2)
    won, lost = -torch.sigmoid(beta * margin).log(), -torch.sigmoid(-beta * margin).log()
    expected = {
        "dpo": won * (1 - e) + lost * e,
        "ipo": (means[:, 0] - means[:, 1] - 5) ** 2,
        "ipo_sum": (margin - 5) ** 2,
        "hinge": (1 - beta * margin).clamp(min=0),
        "robust": (won * (1 - e) - lost * e) / (1 - 2 * e),
    }[objective].mean()
    assert records[1].loss == pytest.approx(float(expected), rel=1e-4)
    assert len(first) == 4


def test_references_are_computed_once(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pentad.train.objectives import references

    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    given = recipe(tmp_path, base, "objective=dpo", f"data.train={tmp_path}/pairs.jsonl")
    whole, _ = train(given)
    expected = (whole / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")
    train(given, kill_after=3)
    monkeypatch.setattr(references, "collate", None)  # only the references call it from there
    final, _ = train(given, resume=True)
    assert (final / "model.safetensors").read_bytes() == expected
