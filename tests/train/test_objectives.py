"""Every objective: gradients don't depend on micro-batches and processes; what each needs of its data."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pentad.datasets.batches import collate
from pentad.errors import BadInput
from pentad.nn.linear_loss import linear_log_probs
from pentad.train.loop import StepRecord
from pentad.train.objectives.causal import CausalLM
from pentad.train.objectives.kto import mismatched
from pentad.train.objectives.orpo import odds_ratio_loss
from pentad.train.objectives.preference import LOSSES, REFERENCE_FREE
from pentad.train.run import TrainingRun, open_run
from tests.helpers.objectives import (
    CASES,
    PAIRS,
    first_step,
    free_port,
    in_two_processes,
    recipe_of,
    write_inputs,
    write_rows,
)
from tests.helpers.tiny import add_tokenizer, edit_json, network_of, talking_checkpoint
from tests.helpers.tiny_qwen import qwen_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows."""
    folder = tmp_path_factory.mktemp("objectives")
    write_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(folder / "cache"))


@pytest.fixture(scope="module")
def by_two(folder: Path) -> Path:
    """The gradients of all cases, computed by two processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENTAD_CACHE", str(folder / "cache"))
        torch.multiprocessing.spawn(in_two_processes, (folder, free_port()), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_micro_batches_and_processes(folder: Path, by_two: Path, case: str) -> None:
    whole = first_step(recipe_of(folder, case))
    assert len(whole.run.data.step(0)) == 1
    single = first_step(recipe_of(folder, case, "run.micro_batch_tokens=1"))
    assert len(single.run.data.step(0)) == 8
    largest = max(float(gradient.abs().max()) for gradient in whole.gradients.values())
    assert largest > 1e-2
    for other in (single.gradients, load_file(by_two / f"{case}.safetensors")):
        for name, gradient in whole.gradients.items():
            assert float((gradient - other[name]).abs().max()) <= 1e-6 * max(1.0, largest), name
    facts = {"loss": whole.record.loss, **whole.record.metrics}
    assert {"loss": single.record.loss, **single.record.metrics} == pytest.approx(facts, rel=1e-5, abs=1e-6)
    assert json.loads((by_two / f"{case}.json").read_text()) == pytest.approx(facts, rel=1e-5, abs=1e-6)


def test_torchrun_gives_the_losses_of_one_process(folder: Path, tmp_path: Path) -> None:
    losses = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]):
        out = tmp_path / f"run{len(losses)}"
        recipe_of(folder, "dpo")
        command = [sys.executable, *launcher, "-m", "pentad", "train", str(folder / f"dpo-{os.getpid()}.toml")]
        given = [*command, "--set", f"run.out={out}", "--set", "run.checkpoint_every=1", "--json"]
        done = subprocess.run(given, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"final"') == 1
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
        assert AutoModelForCausalLM.from_pretrained(out / "final").config.vocab_size == 264
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_the_first_dpo_loss_is_ln_2(folder: Path, dtype: str, tokens: int) -> None:
    given = recipe_of(folder, "dpo", f"run.dtype={dtype}", f"run.micro_batch_tokens={tokens}")
    step = first_step(given, noise=0)
    assert step.record.loss == pytest.approx(math.log(2), abs=1e-6)


def test_packed_gradients_equal_separate_ones_and_documents_do_not_see_each_other(folder: Path) -> None:
    network = network_of(folder / "dense", trainable=True)
    random = np.random.default_rng(0)
    documents = [(random.integers(0, 256, n).astype(np.int32), np.ones(n, np.uint8)) for n in (9, 30, 17)]
    gradients = []
    for batches in ([documents], [[document] for document in documents]):
        network.zero_grad()
        for batch in map(collate, batches):
            CausalLM()(network, batch, [53.0]).share.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    for name, packed in gradients[0].items():
        assert float((packed - gradients[1][name]).abs().max()) <= 1e-6, name

    losses = []
    other = ((documents[0][0] + 1) % 256, documents[0][1])
    for first in (documents[0], other):
        batch = collate([first, *documents[1:]])
        with torch.no_grad():
            hidden = network(batch.ids_N, batch.batch)[batch.rows_M]
            losses.append(linear_log_probs(hidden, network.head.weight, None, batch.targets_M))
    assert not torch.equal(losses[0][:8], losses[1][:8])
    assert torch.equal(losses[0][8:], losses[1][8:])


def test_the_load_balancing_loss_equals_transformers(folder: Path) -> None:
    step = first_step(recipe_of(folder, "router", "objective=pretrain", f"data.train={folder}/documents.jsonl",
                                "run.batch_size=1"), noise=0)  # fmt: skip
    [(source, number)] = step.run.data.examples(0)
    [(ids, _)] = step.run.stores[source][number]
    peer = AutoModelForCausalLM.from_pretrained(folder / "router", router_aux_loss_coef=0.5)
    tokens = torch.from_numpy(ids.copy()).long()[None]
    loss = peer(tokens, labels=tokens, output_router_logits=True).loss
    assert step.record.loss == pytest.approx(float(loss.detach()), rel=1e-5)


def trained(folder: Path, case: str, *overrides: str) -> tuple[TrainingRun, list[StepRecord]]:
    settings = ("run.steps=12", "optimizer.schedule=constant", "optimizer.warmup=0", "optimizer.lr=1e-2")
    run, records = open_run(recipe_of(folder, case, *settings, *overrides)), []
    run.train(note=print, report=records.append)
    return run, records


def test_a_reward_model_is_read_by_transformers(folder: Path) -> None:
    run, records = trained(folder, "reward")
    assert records[-1].metrics["accuracy"] == 1.0
    assert records[-1].loss < 0.5 * records[0].loss
    peer = AutoModelForSequenceClassification.from_pretrained(run.folder / "final")
    assert peer.config.num_labels == 1
    peer.requires_grad_(False)
    for number in range(len(PAIRS)):
        chosen, rejected = (peer(torch.tensor(ids[None], dtype=torch.int64)).logits for ids, _ in run.stores[0][number])
        assert float(chosen - rejected) > PAIRS[number]["margin"]


def test_the_reward_model_of_a_tied_network_does_not_take_its_last_token_for_padding(
    folder: Path, tmp_path: Path
) -> None:
    talking_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    edit_json(tmp_path / "tied/config.json", pad_token_id=256)
    run, _ = trained(folder, "reward", f"model.base={tmp_path}/tied", f"run.out={tmp_path}/run", "run.steps=1")
    peer = AutoModelForSequenceClassification.from_pretrained(run.folder / "final")
    assert peer.config.pad_token_id is None
    assert peer.score.weight.shape == (1, 32)


def test_a_reward_model_of_a_family_without_classifiers_is_refused(folder: Path, tmp_path: Path) -> None:
    qwen_checkpoint(tmp_path / "qwen", vocab_size=264)
    add_tokenizer(tmp_path / "qwen")
    with pytest.raises(BadInput, match="no sequence classifier"):
        open_run(recipe_of(folder, "reward", f"model.base={tmp_path}/qwen"))


@pytest.mark.parametrize("case", ["kto", "reward", "mixture"])
def test_a_resumed_run_gives_the_same_bytes(folder: Path, tmp_path: Path, case: str) -> None:
    weights = []
    for kill_after in (None, 2):
        given = recipe_of(folder, case, "run.steps=3", "run.checkpoint_every=1", f"run.out={tmp_path}/{kill_after}")

        def report(record: StepRecord, kill_after: int | None = kill_after) -> None:
            if record.step == kill_after:
                raise KeyboardInterrupt

        if kill_after is not None:
            with pytest.raises(KeyboardInterrupt):
                open_run(given).train(note=print, report=report)
        final = open_run(given).train(resume=kill_after is not None, note=print, report=lambda record: None)
        weights.append((final / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_pairs_are_packed_into_bins_of_two_sequences(folder: Path) -> None:
    run = open_run(recipe_of(folder, "dpo", "data.pack=true", "run.sequence_length=40"))
    lengths = run.stores[0].lengths
    bins = [sum(int(lengths[n]) for n in unit) for unit in run.data._units[0]]
    assert 40 < max(bins) <= 80
    assert sum(bins) == lengths.sum()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_pairs_prefers_the_chosen_reply(folder: Path, name: str) -> None:
    out, cache = folder / f"only-{name}", folder / f"cache-{name}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENTAD_CACHE", str(cache))
        _, records = trained(folder, "dpo", f"objective={{{name} = 1}}", f"run.out={out}")
    assert records[-1].metrics["accuracy"] == 1.0
    assert records[-1].loss < records[0].loss
    assert (cache / "references").exists() == (name not in REFERENCE_FREE)


def test_orpo_has_gradients_where_replies_are_certain() -> None:
    log_probs = torch.tensor([[0.0, 0.0], [-1e-8, -3.0]], requires_grad=True)
    odds_ratio_loss(log_probs, 0.1).sum().backward()
    assert log_probs.grad is not None
    assert torch.isfinite(log_probs.grad).all()


def test_kto_learns_labels_and_takes_pairs_apart(folder: Path) -> None:
    _, records = trained(folder, "kto")
    assert records[0].loss == pytest.approx(0.5)
    assert records[0].metrics["kl"] == pytest.approx(0, abs=1e-5)
    assert records[-1].loss < 0.45
    assert records[-1].metrics["reward_chosen"] > records[-1].metrics["reward_rejected"]
    apart = open_run(recipe_of(folder, "kto", f"data.train={folder}/pairs.jsonl")).stores[0]
    assert len(apart) == 2 * len(PAIRS)
    assert apart.scores[:, 0].tolist() == [1.0, 0.0] * len(PAIRS)
    text = bytes(min(int(token), 255) for token in mismatched(apart, 18, 64)[0]).decode(errors="replace")
    assert "add 1111111111\ufffd" in text  # the last prompt, with the first row's chosen reply
    assert text.endswith("xx\ufffd")
    assert len(mismatched(apart, 18, 20)[0]) == 20


@pytest.mark.parametrize(
    ("case", "override", "row", "expected"),
    [
        ("kto", "", {"prompt": "a", "completion": "b"}, "label"),
        ("kto", "", {"prompt": "a", "completion": "b", "label": 1}, r"label \(true or false\)"),
        ("sft", "", {"prompt": "a", "completion": "b", "label": False}, "messages, or prompt and completion"),
        ("dpo", "", {**PAIRS[0], "margin": "high"}, "margin is 'high'"),
        ("dpo", "objective={dpo = 1, kto = 1}", PAIRS[0], "objective is 'kto'"),
        ("dpo", "objective={}", PAIRS[0], "objective"),
        ("dpo", "preference.beta=0", PAIRS[0], "beta is 0"),
    ],
)
def test_bad_rows_and_options_are_refused_in_one_line(
    folder: Path, tmp_path: Path, case: str, override: str, row: dict[str, object], expected: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match=expected) as caught:
        open_run(recipe_of(folder, case, f"data.train={tmp_path}/rows.jsonl", *([override] if override else [])))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "override", "expected"),
    [
        ("sft", "model.router_aux_loss_coef=0.1", "no router"),
        ("dpo", "model.router_aux_loss_coef=0.1", "pretrain and sft"),
        ("kto", "data.train=same.jsonl", "two prompts"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, override: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    Path("same.jsonl").write_text('{"prompt": "a", "completion": "b", "label": true}\n' * 3)
    with pytest.raises(BadInput, match=expected):
        first_step(recipe_of(folder, case, override))


def test_a_step_has_a_sequence_for_each_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(BadInput, match="batch_size is 8"):
        open_run(recipe_of(folder, "sft"))
