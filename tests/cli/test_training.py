"""Data that can't be trained on: one line each, and exit code 2."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training import write_base

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))


def said(role: str, content: Any) -> dict[str, Any]:
    return {"messages": [GOOD["messages"][0], {"role": role, "content": content}]}


def run(pentad: Any, tmp_path: Path, base: Path, rows: str, *options: str) -> tuple[int, str]:
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "recipe.toml").write_text(
        f'objective = "sft"\n[model]\nbase = "{base}"\n[data]\ntrain = "{tmp_path}/train.jsonl"\n'
        f'[run]\nout = "{tmp_path}/run"\nsteps = 1\nsequence_length = 40\nbatch_size = 1\n[optimizer]\nlr = 1e-3\n'
    )
    done = pentad("train", str(tmp_path / "recipe.toml"), *options)
    return done.code, done.err


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{", "train.jsonl:2: not a line of JSON"),
        ("[]", "train.jsonl:2"),
        (json.dumps({"message": []}), "train.jsonl:2"),
        (json.dumps(said("asistant", "b")), "asistant"),
        (json.dumps(said("assistant", "")), "train.jsonl:2"),
        (json.dumps(said("assistant", 3)), "train.jsonl:2"),
        (json.dumps(said("user", "b")), "train.jsonl:2"),
        (json.dumps(said("assistant", "b" * 50)), "--truncate"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(pentad, tmp_path: Path, base: Path, row: str, expected: str) -> None:
    rows = f"{json.dumps(GOOD)}\n{row}\n"
    code, error = run(pentad, tmp_path, base, rows)
    assert code == 2
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    code, error = run(pentad, tmp_path, base, rows, "--skip-bad")
    assert code == 0
    assert "train.jsonl:2" in error


@pytest.mark.parametrize("rows", ["", "\n\n"])
def test_an_empty_file_is_refused(pentad, tmp_path: Path, base: Path, rows: str) -> None:
    code, error = run(pentad, tmp_path, base, rows)
    assert code == 2
    assert "no rows" in error


def test_a_model_without_a_chat_template_is_refused(pentad, tmp_path: Path, base: Path) -> None:
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(base, plain)
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    code, error = run(pentad, tmp_path, plain, json.dumps(GOOD) + "\n")
    assert code == 2
    assert "template" in error
    assert len(error.splitlines()) == 1


def test_a_dtype_that_is_not_computed_in_is_refused(pentad, tmp_path: Path, base: Path) -> None:
    code, error = run(pentad, tmp_path, base, json.dumps(GOOD) + "\n", "--set", "run.dtype=float16")
    assert code == 2
    assert "run.dtype is 'float16'" in error
