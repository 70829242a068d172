"""``pentad complete`` and ``score`` on the rows of JSONL files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pentad.cli import output
from pentad.cli.options import Generating, Loading
from pentad.errors import BadInput
from pentad.weights.cache import Progress

if TYPE_CHECKING:
    from pentad.generate import Completion, LanguageModel, Options, Score

SCORED_TOGETHER = 64  # rows


def complete_rows(
    prompts: str | None, out: Path, loading: Loading, generating: Generating, *, special: bool, as_json: bool
) -> None:
    """``pentad complete PROMPTS.jsonl --out OUT.jsonl``."""
    from pentad.evaluate.completions import complete_file

    if prompts in (None, "-"):
        raise BadInput("--out completes the rows of a file; expected PROMPTS.jsonl before it")
    options: Options = generating.options(as_json=True)
    seed = options.pop("seed", None) or 0
    constraint = options.get("constraint")
    settings = {**options, **({} if constraint is None else {"constraint": constraint.grammar})}
    given = {name: value for name in ("dtype", "quantize", "fast", "context") if (value := getattr(loading, name))}
    given |= {"special": True} if special else {}
    bars, started, tokens = output.progress("rows") or Progress(), time.perf_counter(), 0

    def begin(rows: int, done: int) -> None:
        bars.start("Completing", rows)
        bars.advance(done)

    def report(completion: Completion) -> None:
        nonlocal tokens
        tokens += completion.completion_tokens
        bars.advance(1)

    try:
        rows, resumed = complete_file(
            loading.load,
            Path(str(prompts)),
            out,
            settings={"model": loading.model, "generated_with": {**given, **settings, "seed": seed}},
            seed=seed,
            special=special,
            options=options,
            begin=begin,
            report=report,
        )
    finally:
        bars.finish()
    seconds = time.perf_counter() - started
    if as_json:
        output.write_json({"out": str(out), "rows": rows, "resumed": resumed, "tokens": tokens, "seconds": seconds})
    else:
        earlier = f", {resumed:,} of them from an earlier run" if resumed else ""
        output.write(f"{out}: {rows:,} rows{earlier}; {tokens:,} tokens in {seconds:.0f} s\n")


class _ScoredRow(NamedTuple):
    line: int
    text: str
    given: str | None


def score_rows(file: Path, loading: Loading, *, stride: int | None, as_json: bool) -> None:
    """``pentad score FILE.jsonl``."""
    for row in _scored_rows(file):  # malformed rows are refused before the model is loaded
        if stride is not None and row.given is not None:
            raise BadInput(f"{file}:{row.line}: --stride is for texts without a prompt; leave it out")
    model, rows = loading.load_decoder_only("score a text"), _scored_rows(file)
    while batch := list(islice(rows, SCORED_TOGETHER)):
        for row, score in _scores(model, file, batch, stride):
            show_score(score, row=row.line, as_json=as_json)


def show_score(score: Score, *, row: int | None = None, as_json: bool) -> None:
    """Write a score, of a text or of a row."""
    if as_json:
        output.write_json({**({} if row is None else {"row": row}), **asdict(score)})
    else:
        output.write(
            f"{'' if row is None else f'{row}: '}{score.tokens} tokens, log-likelihood {score.log_likelihood:.4f},"
            f" perplexity {score.perplexity:.4f}\n"
        )


def _scores(
    model: LanguageModel, file: Path, rows: list[_ScoredRow], stride: int | None
) -> Iterator[tuple[_ScoredRow, Score]]:
    try:
        scores = model.score([row.text for row in rows], given=[row.given for row in rows], stride=stride)
        yield from zip(rows, scores, strict=True)
    except BadInput as error:
        if len(rows) == 1:
            raise BadInput(f"{file}:{rows[0].line}: {error}") from None
        for row in rows:
            yield from _scores(model, file, [row], stride)


def _scored_rows(file: Path) -> Iterator[_ScoredRow]:
    from pentad.datasets.rows import check_row, read_objects

    for line, record in read_objects(file):
        where = f"{file}:{line}"
        row = check_row(record, where)
        values: list[Any] = [row.fields.get(name) for name in ("prompt", "completion", "text")]
        if row.kind not in ("text", "completion") or isinstance(values[1], list):
            raise BadInput(f"{where}: expected a row with the field text, or with the strings prompt and completion")
        yield _ScoredRow(line, values[2], None) if row.kind == "text" else _ScoredRow(line, values[1], values[0])
