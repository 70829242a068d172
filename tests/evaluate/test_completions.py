"""Completing the rows of a file: what is written, what a run that was killed continues, and what is refused."""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pentad
from pentad.errors import BadInput, PentadError
from pentad.evaluate import completions
from pentad.evaluate.completions import OPEN_ROWS, Output, PromptRow, complete_file, row_seed
from pentad.generate import LanguageModel, Options
from tests.helpers.tiny import talking_checkpoint

ROOT = Path(__file__).parents[2]
OPTIONS: Options = {"max_tokens": 6, "temperature": 1.0}
MESSAGES = [{"role": "user", "content": "Hi"}]
ROWS: list[dict[str, Any]] = [
    {"id": "é", "prompt": "The quick", "nested": {"a": [1, None]}},
    {"messages": MESSAGES},
    {"prompt": MESSAGES},
    *({"prompt": f"row {n}" + " and" * (n % 5), "id": n} for n in range(OPEN_ROWS + 8)),
]

Complete = Callable[..., tuple[int, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("talking")).folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return pentad.load(folder)


@pytest.fixture
def complete(model: LanguageModel, tmp_path: Path) -> Complete:
    """A function that completes `rows` into out.jsonl."""

    def run(rows: list[dict[str, Any]] = ROWS, *, seed: int = 3, load: object = None, out: str = "out.jsonl"):
        write(tmp_path / "in.jsonl", rows)
        return complete_file(
            load or (lambda: model),
            tmp_path / "in.jsonl",
            tmp_path / out,
            settings={"model": "tiny", "generated_with": {"seed": seed}},
            seed=seed,
            special=False,
            options=OPTIONS,
            begin=lambda rows, done: None,
            report=lambda completion: None,
        )

    return run


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_row_is_completed_as_alone(complete: Complete, model: LanguageModel, tmp_path: Path) -> None:
    assert complete() == (len(ROWS), 0)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert '"id": "é"' in lines[0]
    for number, (line, row) in enumerate(zip(lines, ROWS, strict=True), 1):
        prompt = row.get("prompt", MESSAGES)
        alone = model.chat if isinstance(prompt, list) else model.complete
        expected = alone(prompt, seed=row_seed(3, number), **OPTIONS)
        written = json.loads(line)
        assert {name: written[name] for name in row} == row
        assert (written["text"], written["token_ids"]) == (expected.text, expected.token_ids)
        assert (written["model"], written["generated_with"]) == ("tiny", {"seed": 3})
        assert (written["finish_reason"], written["prompt_tokens"]) == (expected.finish_reason, expected.prompt_tokens)
        assert "seconds" not in written
    assert len({tuple(json.loads(line)["token_ids"]) for line in lines[1:3]}) == 2  # equal prompts, different seeds


def test_a_cut_output_is_continued_to_the_same_bytes(complete: Complete, tmp_path: Path) -> None:
    complete()
    out, rows = tmp_path / "out.jsonl", len(ROWS)
    whole = out.read_bytes()
    first, last = whole.index(b"\n") + 1, whole[:-1].rindex(b"\n") + 1
    for size, done in ((0, 0), (1, 0), (first - 1, 0), (first, 1), (last + 40, rows - 1), (len(whole) - 1, rows - 1)):
        out.write_bytes(whole[:size])
        assert complete() == (rows, done)
        assert out.read_bytes() == whole

    def load() -> None:
        raise AssertionError("there is no row left")

    assert complete(load=load) == (rows, rows)


def test_rows_are_read_as_they_are_needed(model: LanguageModel) -> None:
    read: list[int] = []

    def rows() -> Iterator[PromptRow]:
        for line in range(1, 10**9):
            read.append(line)
            yield PromptRow(line, {"prompt": "a"}, "")

    done = completions.completions(model, rows(), seed=0, special=False, options={"max_tokens": 1})
    for _ in range(10):
        next(done)
    done.close()
    assert len(read) < OPEN_ROWS + 10
    assert model.open_requests == 0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda whole: whole.replace(b"row 1", b"row 9", 1), "out.jsonl:5 has another prompt than"),
        (lambda whole: whole.replace(b'"id": 2', b'"id": 3'), "has another id"),
        (lambda whole: whole.replace(b'"seed": 3', b'"seed": 4'), "has another generated_with"),
        (lambda whole: whole.replace(b'"tiny"', b'"huge"'), "has another model"),
        (lambda whole: whole + whole[:9], "more than the 75 rows"),
        (lambda whole: b"my only notes", "out.jsonl:1 isn't the output"),
        (lambda whole: b"{}\n", "out.jsonl:1 isn't the output"),
        (lambda whole: b"\n\n\n", "out.jsonl:1 isn't the output"),
    ],
)
def test_another_output_is_refused_and_kept(
    complete: Complete, tmp_path: Path, output: Callable[[bytes], bytes], message: str
) -> None:
    complete()
    out = tmp_path / "out.jsonl"
    out.write_bytes(content := output(out.read_bytes()))
    with pytest.raises(BadInput, match=message):
        complete()
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "is a list"),
        ({"id": 1}, "no prompt"),
        ({"prompt": "a", "messages": MESSAGES}, "both prompt and messages"),
        ({"prompt": 3}, "prompt is a int"),
        ({"messages": "Hi"}, "messages is a str"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, "'bot'"),
        ({"prompt": "a", "text": "b"}, "field text"),
        ({"prompt": "a", "number": float("inf")}, "JSON"),
        ({"prompt": "a\ud800"}, "UTF-8"),
    ],
)
def test_malformed_rows_are_refused_before_the_model_is_loaded(
    complete: Complete, tmp_path: Path, row: object, message: str
) -> None:
    def load() -> None:
        raise AssertionError("loaded")

    with pytest.raises(BadInput, match=message) as refused:
        complete([ROWS[0], row], load=load)
    assert "in.jsonl:2" in str(refused.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_beyond_the_context_ends_the_run_after_the_rows_before_it(complete: Complete, tmp_path: Path) -> None:
    rows = [*ROWS[:5], {"prompt": "a" * 1000}, ROWS[5]]
    with pytest.raises(BadInput, match=r"in\.jsonl:6: .*1000 tokens"):
        complete(rows)
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 5
    assert complete([*rows[:5], ROWS[5]]) == (6, 5)


def test_the_input_and_folders_are_no_output(complete: Complete, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is the input"):
        complete(out="in.jsonl")
    with pytest.raises(BadInput, match="not a file"):
        complete(out=".")
    with pytest.raises(PentadError, match="no/out"):
        complete(out="no/out")


def test_two_runs_do_not_share_an_output(complete: Complete, tmp_path: Path) -> None:
    complete()
    settings = {"model": "tiny", "generated_with": {"seed": 3}}
    with contextlib.ExitStack() as locks:
        Output(tmp_path / "out.jsonl", tmp_path / "in.jsonl", settings, locks)
        with pytest.raises(BadInput, match="another process"):
            complete()
    assert complete() == (len(ROWS), len(ROWS))


def test_a_full_disk_leaves_whole_lines(complete: Complete, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(PentadError, match=r"out\.jsonl"):
            complete()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    content = (tmp_path / "out.jsonl").read_bytes()
    assert content.endswith(b"}\n")
    assert complete() == (len(ROWS), content.count(b"\n"))


def test_a_killed_run_is_continued_to_the_bytes_of_a_whole_run(folder: Path, tmp_path: Path) -> None:
    source, rows = tmp_path / "in.jsonl", [{"prompt": f"{n} "} for n in range(120)]
    write(source, rows)

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pentad", "complete", source, "--out", out, "--model", folder]
        return subprocess.Popen([*command, "--max-tokens", "32", "--seed", "1"], cwd=ROOT, stdout=subprocess.DEVNULL)

    for name in ("whole", "killed"):
        out = tmp_path / name
        with start(out) as process:
            while name == "killed" and (not out.exists() or out.stat().st_size < 10):
                assert process.poll() is None
                time.sleep(0.002)
            if name == "killed":
                process.kill()
    assert 0 < (tmp_path / "killed").read_bytes().count(b"\n") < len(rows)
    with (tmp_path / "killed").open("ab") as file:
        os.truncate(file.fileno(), file.tell() - 7)  # the kernel may have written a part of a line only
    with start(tmp_path / "killed") as process:
        assert process.wait() == 0
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
