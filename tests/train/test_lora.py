"""Runs that train adapters: what is saved, exact resume, and equality with PEFT."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pentad.errors import BadInput
from pentad.train.objectives import references
from pentad.train.recipe import Recipe, read_recipe
from pentad.train.run import open_run
from tests.helpers.peft_adapters import load_in_peft
from tests.helpers.tiny import assert_equal_logits, peer_logits, random_ids, talking_checkpoint
from tests.helpers.training import PAIRS, ROWS, train

IDS = random_ids(12)
LORA = "[lora]\nrank = 4\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("base")).folder


def recipe(tmp_path: Path, base: Path, *overrides: str, lora: str = LORA, rows: list[Any] = ROWS) -> Recipe:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(
        f'objective = "sft"\n[model]\nbase = "{base}"\n[data]\ntrain = "{tmp_path}/train.jsonl"\n'
        f'[run]\nout = "{tmp_path}/run"\nsteps = 4\nbatch_size = 4\nsequence_length = 64\ncheckpoint_every = 2\n'
        f"[optimizer]\nlr = 1e-2\n{lora}"
    )
    return read_recipe(tmp_path / "recipe.toml", overrides)


def saved_names(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "state.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    ("killed", "options"),
    [
        (1, []),
        (3, ["lora.dropout=0.3", "run.micro_batch_tokens=40"]),
        (3, ["lora.dropout=0.3", "run.checkpointing=blocks", "optimizer.name=muon"]),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, base: Path, killed: int, options: list[str]) -> None:
    given = recipe(tmp_path, base, *options)
    whole, _ = train(given)
    files = ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    expected = [(whole / name).read_bytes() for name in files]
    shutil.rmtree(tmp_path / "run")
    train(given, kill_after=killed)
    final, _ = train(given, resume=True)
    assert [(final / name).read_bytes() for name in files] == expected


def test_checkpoints_have_adapters_only_and_the_base_stays(tmp_path: Path, base: Path) -> None:
    final, records = train(recipe(tmp_path, base, "lora.targets=['q_proj', 'down_proj']"))
    assert records[-1].loss < records[0].loss
    names = saved_names(tmp_path / "run/checkpoints/step-2")
    assert all(".lora_" in name for name in names)
    assert len([name for name in names if name.startswith("parameters/")]) == 2 * 2 * 2
    before, after = load_file(base / "model.safetensors"), load_file(final / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{i}.{part}.weight" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_adapter_in_peft_and_the_merged_model_in_transformers_agree(tmp_path: Path, family: str) -> None:
    config = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    folder = talking_checkpoint(tmp_path / "base", family=family, **config).folder
    final, _ = train(recipe(tmp_path, folder))
    merged = AutoModelForCausalLM.from_pretrained(final, attn_implementation="eager")
    expected = peer_logits(merged, IDS)
    assert_equal_logits(peer_logits(load_in_peft(folder, final / "adapter"), IDS), expected, 1e-5)
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert not torch.allclose(peer_logits(base, IDS), expected, atol=1e-2)


def test_losses_and_the_adapter_equal_those_of_peft(tmp_path: Path, base: Path) -> None:
    given = recipe(tmp_path, base, "run.checkpoint_every=0", "lora.alpha=16", "lora.use_rslora=true")
    untrained, _ = train(recipe(tmp_path, base, "optimizer.lr=1e-30", "run.steps=1", "lora.alpha=16",
                                "lora.use_rslora=true"))  # fmt: skip
    shutil.move(untrained / "adapter", tmp_path / "initial")
    shutil.rmtree(tmp_path / "run")
    model = load_in_peft(base, tmp_path / "initial").train()
    trained = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    for parameter in trained.values():
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    run = open_run(given)
    final, records = train(given)
    for record in records:
        loss, count = torch.zeros(()), 0
        for _, number in run.data.examples(record.step - 1):
            ids, targets = (torch.from_numpy(part.copy()).long() for part in run.stores[0][number][0])
            logits = model(ids[None]).logits[0, :-1]
            loss = loss + torch.nn.functional.cross_entropy(
                logits[targets[1:] == 1], ids[1:][targets[1:] == 1], reduction="sum"
            )
            count += int(targets[1:].sum())
        optimizer.zero_grad()
        (loss / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0).detach()
        optimizer.param_groups[0]["lr"] = record.learning_rate
        optimizer.step()
        assert record.loss == pytest.approx(float(loss.detach() / count), rel=1e-5)
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, tensor in load_file(final / "adapter/adapter_model.safetensors").items():
        expected = trained[name.removesuffix(".weight") + ".default.weight"]
        assert torch.allclose(tensor, expected, atol=1e-4), name


def test_the_reference_of_dpo_is_the_base_model(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(tmp_path, base, "objective=dpo", lora="", rows=PAIRS))
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(references, "collate", None)  # those of the run before, of the same base, are used
    _, records = train(recipe(tmp_path, base, "objective=dpo", rows=PAIRS))
    assert records[0].loss == pytest.approx(0.693147, abs=1e-6)
    assert records[-1].loss < records[0].loss


def test_the_plan_counts_what_is_trained(tmp_path: Path, base: Path) -> None:
    plan = open_run(recipe(tmp_path, base, "lora.targets=['q_proj']")).plan()
    whole = open_run(recipe(tmp_path, base, lora="")).plan()
    assert plan["trained_parameters"] == 2 * (32 + 32) * 4
    assert plan["parameters"] == whole["parameters"] + plan["trained_parameters"]
    assert whole["trained_parameters"] == whole["parameters"]
    assert plan["estimated_bytes"] < whole["estimated_bytes"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.rank=0", "lora.rank is 0"),
        ("lora.dropout=1", "lora.dropout is 1"),
        ("lora.rnk=3", "nearest known one is 'rank'"),
        ("lora.targets=['q_proj', 'c_attn']", r"lora\.targets is 'c_attn'; expected 'all-linear', or of q_proj"),
        ("lora.targets=[]", "lora.targets"),
        ("objective=reward", "can't train a reward model"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path: Path, base: Path, override: str, expected: str) -> None:
    with pytest.raises(BadInput, match=expected) as caught:
        open_run(recipe(tmp_path, base, override))
    assert "\n" not in str(caught.value)


def test_random_weights_and_another_rank_at_resume_are_refused(tmp_path: Path, base: Path) -> None:
    train(recipe(tmp_path, base), kill_after=3)
    with pytest.raises(BadInput, match=r"lora\.rank was 4 and is 8"):
        train(recipe(tmp_path, base, "lora.rank=8"), resume=True)
    file = tmp_path / "recipe.toml"
    file.write_text(file.read_text().replace("base = ", "config = ").replace("[data]", f'tokenizer = "{base}"\n[data]'))
    with pytest.raises(BadInput, match=r"needs model\.base"):
        read_recipe(file)
