"""Runs of a tiny model: losses, exact resume, accumulation, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pentad.errors import BadInput, PentadError
from pentad.text import Tokenizer
from pentad.train import checkpoint
from pentad.train.loop import StepRecord
from pentad.train.recipe import Recipe, read_recipe
from pentad.train.run import open_run
from tests.helpers.tiny import byte_pipeline

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": "add " + "1" * n}, {"role": "assistant", "content": "x" * (2 + n % 3)}]}
    for n in range(1, 12)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with one token a byte."""
    folder = tmp_path_factory.mktemp("base")
    byte_pipeline("<|im_start|>", "<|im_end|>").save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))


def recipe(tmp_path: Path, base: Path, *overrides: str) -> Recipe:
    """A recipe of six steps, with overrides of `--set`."""
    data = tmp_path / "train.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'objective = "sft"\n[model]\nbase = "{base}"\n[data]\ntrain = "{data}"\n'
        f'[run]\nout = "{tmp_path}/run"\nsteps = 6\nbatch_size = 4\nsequence_length = 64\ncheckpoint_every = 2\n'
        "[optimizer]\nlr = 1e-2\n"
    )
    return read_recipe(file, overrides)


class Killed(BaseException):
    pass


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train(recipe: Recipe, *, resume: bool = False, kill_after: int | None = None) -> tuple[Path, list[StepRecord]]:
    records: list[StepRecord] = []

    def report(record: StepRecord) -> None:
        records.append(record)
        if record.step == kill_after:
            raise Killed

    try:
        final = open_run(recipe).train(resume=resume, note=lambda _: None, report=report)
    except Killed:
        final = Path()
    return final, records


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


PAIRS = [
    {"prompt": [{"role": "user", "content": "add " + "1" * n}],
     "chosen": [{"role": "assistant", "content": "x" * (1 + n % 3)}],
     "rejected": [{"role": "assistant", "content": "y" * (1 + n % 4)}]}
    for n in range(1, 9)
]  # fmt: skip


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
