"""`pentad complete` and `score` on JSONL files."""

import json
from pathlib import Path
from typing import Any

import pytest

import pentad as package
from tests.helpers.tiny import talking_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("talking")).folder


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join("\n" if row is None else json.dumps(row) + "\n" for row in rows))
    return path


def lines(out: str) -> list[Any]:
    return [json.loads(line) for line in out.splitlines()]


def test_complete_writes_a_row_for_each_row(pentad, folder: Path, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", {"id": 7, "prompt": "a<|im_end|>"}), tmp_path / "out.jsonl"
    command = ["complete", source, "--out", out, "--model", folder, "--max-tokens", 3, "--stop", "x", "--special"]
    done = pentad(*command, "--logprobs", 1, "--context", 64, "--json")
    assert done.code == 0
    assert (done.json["rows"], done.json["resumed"]) == (1, 0)
    (row,) = lines(out.read_text())
    assert list(row)[:4] == ["id", "prompt", "model", "generated_with"]
    assert row["generated_with"] == {
        "context": 64,
        "special": True,
        "max_tokens": 3,
        "stop": ["x"],
        "logprobs": 1,
        "seed": 0,
    }
    assert row["prompt_tokens"] == 2
    assert len(row["logprobs"]) == row["completion_tokens"] == done.json["tokens"]
    again = pentad(*command, "--logprobs", 1, "--context", 64)
    assert "1 rows, 1 of them from an earlier run" in again.out
    assert "generated_with" in (refused := pentad(*command)).error
    assert refused.code == 2


def test_score_writes_a_line_for_each_row(pentad, folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "a b c"}, None, {"prompt": "a", "completion": "bcd", "id": 3}, *[{"text": "xyz"}] * 99]
    done = pentad("score", write(tmp_path / "x.jsonl", *rows), "--model", folder, "--json")
    assert done.code == 0
    model = package.load(folder)
    scores = lines(done.out)
    assert [score.pop("row") for score in scores] == [1, *range(3, 103)]
    for score, expected in zip(scores, [model.score("a b c"), model.score("bcd", given="a")], strict=False):
        assert score == {**vars(expected), "log_likelihood": score["log_likelihood"], "perplexity": score["perplexity"]}
        assert score["log_likelihood"] == pytest.approx(expected.log_likelihood, rel=1e-6)
    text = pentad("score", tmp_path / "x.jsonl", "--model", folder).out
    assert text.splitlines()[1].startswith("3: 3 tokens, log-likelihood ")


def test_score_slides_over_each_row(pentad, folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "x.jsonl", {"text": "a" * 99}, {"text": "abc"})
    command = ["score", rows, "--model", folder, "--context", 16, "--json"]
    done = pentad(*command)
    assert (done.code, done.out) == (2, "")
    assert "x.jsonl:1: the text has 99 tokens" in done.err
    expected = package.load(folder, context=16).score("a" * 99, stride=4)
    assert lines(pentad(*command, "--stride", 4).out)[0]["log_likelihood"] == pytest.approx(expected.log_likelihood)


def test_rows_before_one_that_can_not_be_scored_are_written(pentad, folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "x.jsonl", {"text": "abc"}, {"text": "a"}, {"text": "abc"})
    done = pentad("score", rows, "--model", folder, "--json")
    assert done.code == 2
    assert "x.jsonl:2: the text has 1 tokens" in done.err
    assert [score["row"] for score in lines(done.out)] == [1]


@pytest.mark.parametrize(
    ("command", "row", "message"),
    [
        (["score", "x.jsonl"], {"prompt": "a"}, "x.jsonl:2"),
        (["score", "x.jsonl"], {"messages": [{"role": "assistant", "content": "a"}]}, "x.jsonl:2"),
        (["score", "x.jsonl"], {"prompt": "a", "chosen": "b", "rejected": "c"}, "x.jsonl:2"),
        (["score", "x.jsonl", "--stride", "2"], {"prompt": "a", "completion": "b"}, "x.jsonl:2"),
        (["score", "x.jsonl", "--given", "a"], {"text": "b"}, "--given"),
        (["score", "no.jsonl"], {}, "no such file"),
        (["complete", "x.jsonl"], {"prompt": "a"}, "--out"),
        (["complete", "x.jsonl", "--out", "y.jsonl"], {"completion": "a"}, "x.jsonl:2"),
        (["complete", "x.txt", "--out", "y.jsonl"], {}, "x.txt"),
        (["complete", "--out", "y.jsonl"], {}, "PROMPTS.jsonl"),
        (["complete", "x.jsonl", "--out", "x.jsonl"], {"prompt": "a"}, "the input"),
    ],
    ids=str,
)
def test_bad_rows_are_refused_before_the_model_is_loaded(
    pentad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], row: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("x.jsonl"), {"text": "abc"} if command[0] == "score" else {"prompt": "a"}, row)
    done = pentad(*command, "--model", "no-such-model")
    assert done.code == 2
    assert message in done.error
    assert not Path("y.jsonl").exists()
