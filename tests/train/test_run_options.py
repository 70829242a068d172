"""Options of a run: stages, groups, averages, limits, the plan, and held-out data."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pentad.errors import BadInput, PentadError
from pentad.train import checkpoint
from pentad.train.loop import StepRecord
from pentad.train.recipe import read_recipe
from pentad.train.run import open_run
from tests.helpers.training import PAIRS, ROWS, Killed, log_of, recipe, train


def test_stages_follow_each_other(tmp_path: Path, base: Path) -> None:
    for name, reply in (("easy", "x"), ("hard", "y")):
        rows = [{**row, "messages": [row["messages"][0], {"role": "assistant", "content": reply}]} for row in ROWS]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    easy, hard = (json.dumps(f"{tmp_path}/{name}.jsonl") for name in ("easy", "hard"))
    mixture = f"[{{path={easy}, weight=1}}, {{path={hard}, weight=3}}]"
    file = tmp_path / "stages.toml"
    file.write_text(
        f'objective="sft"\n[model]\nbase="{base}"\n'
        f"[data]\nstages=[{{steps=2, train={easy}}}, {{steps=4, train={mixture}}}]\n"
        f'[run]\nout="{tmp_path}/run"\nbatch_size=4\nsequence_length=64\n[optimizer]\nlr=1e-3\n'
    )
    run = open_run(read_recipe(file))
    drawn = [[source for source, _ in run.data.examples(step)] for step in range(6)]
    assert drawn[:2] == [[0] * 4] * 2
    assert {source for step in drawn[2:] for source in step} == {1, 2}
    _, records = train(read_recipe(file))
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]


def test_groups_of_parameters(tmp_path: Path, base: Path) -> None:
    groups = "optimizer.groups=[{parameters='embed.*', lr_scale=0}, {parameters='layers.0.*', lr_scale=1e-6}]"
    final, _ = train(recipe(tmp_path, base, groups, "run.steps=2"))
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, final))
    change = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert change["model.embed_tokens.weight"] == 0
    assert 0 < change["model.layers.0.mlp.up_proj.weight"] < 1e-6
    assert change["model.layers.1.mlp.up_proj.weight"] > 1e-4
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(BadInput, match="matches no parameter"):
        train(recipe(tmp_path, base, "optimizer.groups=[{parameters='embedding'}]"))


def test_the_average_of_the_parameters_is_the_result(tmp_path: Path, base: Path) -> None:
    final, _ = train(recipe(tmp_path, base, "run.ema=0.25", "run.steps=3", "run.checkpoint_every=1"))
    steps = {saved.step: saved.tensors for saved in [checkpoint.latest(tmp_path / "run/checkpoints")] if saved}
    average, parameter = (steps[2][f"{part}/norm.weight"] for part in ("average", "parameters"))
    first = 0.75 * checkpoint_tensor(tmp_path, 1) + 0.25 * torch.ones(32)
    torch.testing.assert_close(average, 0.75 * parameter + 0.25 * first)
    result = AutoModelForCausalLM.from_pretrained(final).state_dict()["model.norm.weight"]
    assert not torch.equal(result, parameter)


def checkpoint_tensor(tmp_path: Path, step: int) -> torch.Tensor:
    from safetensors.torch import load_file

    file = tmp_path / f"run/checkpoints/step-{step}/state.safetensors"
    return load_file(file)["parameters/norm.weight"]


def test_a_spike_stops_before_the_step_and_its_batch_is_saved(tmp_path: Path, base: Path) -> None:
    rows = [{"prompt": "a" * n, "completion": "b" * (3 + n % 4)} for n in range(1, 50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = recipe(
        tmp_path, base, f"data.train={tmp_path}/rows.jsonl", "run.steps=40", "run.max_spike=0.2",
        "optimizer.lr=0.5", "optimizer.warmup=0.5", "run.batch_size=2", "run.checkpoint_every=0",
    )  # fmt: skip
    with pytest.raises(PentadError, match=r"step \d+: the loss is .*a spike over.*rows\.jsonl:\d") as caught:
        train(given)
    (saved,) = (tmp_path / "run").glob("bad-step-*.json")
    report = json.loads(saved.read_text())
    assert str(saved) in str(caught.value)
    assert len(report["batches"][0]["rows"]) == 2
    assert len(log_of(tmp_path / "run")) == int(saved.stem.rpartition("-")[2]) - 1


def test_one_process_trains_in_a_folder(tmp_path: Path, base: Path) -> None:
    given = recipe(tmp_path, base)

    def second(_: StepRecord) -> None:
        with pytest.raises(BadInput, match="another process"):
            train(given, resume=True)
        raise Killed

    with pytest.raises(Killed):
        open_run(given).train(note=lambda _: None, report=second)


def test_the_plan_is_what_happens(tmp_path: Path, base: Path) -> None:
    given = recipe(tmp_path, base, "run.micro_batch_tokens=80")
    plan = open_run(given).plan()
    assert not (tmp_path / "run").exists()
    _, records = train(given)
    assert plan["steps"] == len(records)
    assert plan["trained_tokens"] == sum(record.tokens for record in records)
    assert plan["rows"] == len(ROWS)
    assert plan["memory_bytes"] == pytest.approx(records[-1].peak_bytes, rel=0.15)
    assert plan["seconds"] > 0


def test_a_run_that_memory_cannot_hold_is_refused(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pentad.train import plan, run

    for module in (plan, run):
        monkeypatch.setattr(module, "available_memory", lambda _: 100_000)
    with pytest.raises(BadInput, match="GB of memory"):
        train(recipe(tmp_path, base))
    assert open_run(recipe(tmp_path, base)).plan()["memory_bytes"] is None


def test_held_out_data_are_measured(tmp_path: Path, base: Path) -> None:
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    overrides = (f"data.validation={tmp_path}/held.jsonl", "run.validate_every=2", "run.micro_batch_tokens=30")
    train(recipe(tmp_path, base, *overrides), kill_after=5)
    train(recipe(tmp_path, base, *overrides), resume=True)
    measured = [json.loads(line) for line in (tmp_path / "run/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in measured] == [0, 2, 4, 6]
    assert measured[-1]["loss"] < measured[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    store, loss, count = open_run(recipe(tmp_path, base, *overrides)).held_out, 0.0, 0
    assert store is not None
    for ids, targets in (store[number][0] for number in range(3)):
        labels = torch.where(torch.from_numpy(targets.copy()).bool(), torch.from_numpy(ids.copy()).long(), -100)
        logits = model(torch.from_numpy(ids.copy()).long()[None]).logits[0]
        loss += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").detach())
        count += int((labels[1:] >= 0).sum())
    assert measured[-1]["loss"] == pytest.approx(loss / count, rel=1e-4)


def test_held_out_pairs_are_compared_with_their_own_references(tmp_path: Path, base: Path) -> None:
    for name, rows in (("pairs", PAIRS), ("held", PAIRS[::-2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (f"data.train={tmp_path}/pairs.jsonl", f"data.validation={tmp_path}/held.jsonl")
    train(recipe(tmp_path, base, "objective=dpo", *files))
    first, last = (json.loads(line) for line in (tmp_path / "run/validation.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(0.693147, rel=1e-5)
    assert last["loss"] < first["loss"]
    assert last["accuracy"] == 1.0


def test_an_unknown_device_is_one_line(tmp_path: Path, base: Path) -> None:
    with pytest.raises(BadInput, match="device is tpu; expected one of cpu, cuda, mps"):
        open_run(recipe(tmp_path, base, "run.device=tpu"))
