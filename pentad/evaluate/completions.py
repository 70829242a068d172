"""Complete the rows of a JSONL file, many at once, into another one; a run that was killed continues in its output.

Each line of the output is an input row with the fields of its completion. Its bytes are a function of the row, its line
number, the model and the options. So they don't depend on what ran beside it, or on how often the run was interrupted.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from pentad.datasets.rows import check_messages, read_objects
from pentad.errors import BadInput, PentadError
from pentad.weights.atomic import disk_errors, lock

if TYPE_CHECKING:
    from pentad.generate import Completion, EncoderDecoderModel, LanguageModel, Options, Stream

    Runner = LanguageModel | EncoderDecoderModel

OPEN_ROWS = 64  # begun at once; more than the engine runs, so that a row takes the place of one that ends
WRITTEN = (
    "model",
    "generated_with",
    "text",
    "token_ids",
    "prompt_token_ids",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "logprobs",
)
"""The fields that are added to a row."""


class PromptRow(NamedTuple):
    """A row to complete.

    Attributes:
        line: its line in the file, from 1.
        fields: all its fields, which the output repeats.
        where: "file:line".
    """

    line: int
    fields: Mapping[str, Any]
    where: str


def read_prompts(file: Path) -> Iterator[PromptRow]:
    """The rows ``{"prompt": text or messages}`` or ``{"messages": …}`` of a JSONL file, one at a time.

    Raises:
        BadInput: a row is malformed, has both fields or one that the output adds; or the file has no rows.
    """
    for line, fields in read_objects(file):
        where = f"{file}:{line}"
        names = [name for name in ("prompt", "messages") if name in fields]
        if len(names) != 1:
            has = "both prompt and messages" if names else "no prompt"
            raise BadInput(f"{where}: the row has {has}; expected one of prompt and messages")
        if taken := [name for name in WRITTEN if name in fields]:
            raise BadInput(f"{where}: the output adds a field {taken[0]} of its own; rename the row's")
        prompt = fields[names[0]]
        if isinstance(prompt, list):
            check_messages(prompt, f"{where}: {names[0]}")
        elif names == ["messages"] or not isinstance(prompt, str):
            texts = "" if names == ["messages"] else "a string or "
            raise BadInput(f"{where}: {names[0]} is a {type(prompt).__name__}; expected {texts}a list of messages")
        try:
            _json(fields)
        except ValueError as error:
            raise BadInput(f"{where}: the row can't be written as JSON in UTF-8: {error}") from None
        yield PromptRow(line, fields, where)


class Output:
    """The open output of a run; no other process writes it meanwhile.

    Attributes:
        rows: the number of rows of the source.
        done: how many of them the file has.
    """

    def __init__(self, target: Path, source: Path, settings: Mapping[str, Any], locks: contextlib.ExitStack) -> None:
        self._path, self._settings = target, settings
        created = not target.exists()
        if not created and (not target.is_file() or target.resolve() == source.resolve()):
            raise BadInput(f"{target} is {'the input' if target.is_file() else 'not a file'}; choose another --out")
        with disk_errors(target):
            self._file = locks.enter_context(target.open("ab", buffering=0))
        self._end = 0
        if created:
            locks.callback(self._remove_if_empty)
        try:
            lock(target, locks)
        except BlockingIOError:
            raise BadInput(f"{target}: another process is writing it; choose another --out") from None
        self.rows, self.done, self._end = self._compare(source)
        with disk_errors(target):
            self._file.truncate(self._end)  # without a torn line

    def _remove_if_empty(self) -> None:
        if not self._end:
            self._path.unlink(missing_ok=True)

    def _compare(self, source: Path) -> tuple[int, int, int]:
        """Check the rows of the source, and that an earlier output belongs to the first of them.

        Returns:
            The number of rows, of whole lines of output, and of these lines' bytes.
        """
        rows = done = end = 0
        with self._path.open("rb") as lines:
            for rows, row in enumerate(read_prompts(source), 1):
                if not (line := lines.readline()):
                    continue
                start, whole = self._start(row), line.endswith(b"}\n")
                if not line.startswith(start) and (whole or not start.startswith(line)):
                    raise BadInput(f"{self._path}:{rows} {self._difference(line, row)}; choose another --out")
                if whole:
                    done, end = rows, end + len(line)
            if lines.readline():
                raise BadInput(f"{self._path} has more than the {rows} rows of {source}; choose another --out")
        return rows, done, end

    def _start(self, row: PromptRow) -> bytes:
        """The beginning of a row's line: all that is known before the model runs."""
        return _json({**row.fields, **self._settings})[:-1]

    def _difference(self, line: bytes, row: PromptRow) -> str:
        try:
            written = json.loads(line)
        except ValueError:
            written = None
        if isinstance(written, dict) and self._settings.keys() <= written.keys():
            for name, value in {**row.fields, **self._settings}.items():
                if name not in written or written[name] != value:
                    return f"has another {name} than {row.where} and the options"
        return f"isn't the output of {row.where}"

    def write(self, row: PromptRow, completion: Completion) -> None:
        """Add a row's line, whole.

        Raises:
            PentadError: the disk is full or can't be written; no part of the line remains.
        """
        added = asdict(completion)
        del added["model"], added["seconds"]  # the model is among the settings; times differ in each run
        if completion.logprobs is None:
            del added["logprobs"]
        line = _json({**row.fields, **self._settings, **added}) + b"\n"
        written = 0
        try:
            with disk_errors(self._path):
                while written < len(line):
                    written += self._file.write(line[written:])
        except PentadError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(line)


def complete_file(
    load: Callable[[], Runner],
    source: Path,
    target: Path,
    *,
    settings: Mapping[str, Any],
    seed: int,
    special: bool,
    options: Options,
    begin: Callable[[int, int], None],
    report: Callable[[Completion], None],
) -> tuple[int, int]:
    """Complete the rows of a file, in its order, after those that `target` has from an interrupted run.

    Args:
        load: loads the model, once all rows have been checked; not called if no row is left.
        source: see `read_prompts`.
        target: the output, which is made, or continued.
        settings: fields of each line of output; those of an earlier run must be equal.
        seed: of the run; each row has a seed of its own, see `row_seed`.
        special: see `LanguageModel.complete`.
        options: of all rows.
        begin: is told the number of rows, and how many of them `target` has, after loading.
        report: is told of each row when it has been written.

    Returns:
        The number of rows, and how many of them `target` had.

    Raises:
        BadInput: a row is malformed or too long for the context, or `target` isn't the output of these rows with these
            settings. The rows before it have been written.
        PentadError: the disk is full, or another process writes `target`.
    """
    with contextlib.ExitStack() as locks:
        output = Output(target, source, settings, locks)
        if output.done == output.rows:
            return output.rows, output.done
        model = load()
        begin(output.rows, output.done)
        rows = islice(read_prompts(source), output.done, None)
        for row, completion in completions(model, rows, seed=seed, special=special, options=options):
            output.write(row, completion)
            report(completion)
    return output.rows, output.done


def completions(
    model: Runner, rows: Iterator[PromptRow], *, seed: int, special: bool, options: Options
) -> Iterator[tuple[PromptRow, Completion]]:
    """Complete rows together, and yield them in order.

    Raises:
        BadInput: a row can't be completed; the message begins with its place. The rows before it have been yielded.
    """
    from pentad.memory import available_memory

    available = available_memory(model.network.device)
    model.limit_cache(None if available is None else available // 2)  # growing, the cache is in memory twice
    waiting: deque[tuple[PromptRow, Stream]] = deque()
    refused: BadInput | None = None
    try:
        for row in rows:
            try:
                waiting.append((row, _begin(model, row, seed, special, options)))
            except BadInput as error:
                refused = BadInput(f"{row.where}: {error}")
                break
            if len(waiting) == OPEN_ROWS:
                yield _finish(waiting)
        while waiting:
            yield _finish(waiting)
        if refused is not None:
            raise refused
    finally:
        for _, stream in waiting:
            stream.close()


def row_seed(seed: int, line: int) -> int:
    """The seed of the row on a line of a file, from 1."""
    return Random(f"{seed} {line}").getrandbits(63)


def _begin(model: Runner, row: PromptRow, seed: int, special: bool, options: Options) -> Stream:
    prompt = row.fields["prompt" if "prompt" in row.fields else "messages"]
    chosen: Options = {**options, "seed": row_seed(seed, row.line)}
    if isinstance(prompt, str):
        return model.stream(prompt, special=special, **chosen)
    if not hasattr(model, "chat_ids"):
        raise BadInput(f"{model.name} is an encoder-decoder, which can't chat; expected a prompt that is a string")
    return model.stream(prompt, **chosen)


def _finish(waiting: deque[tuple[PromptRow, Stream]]) -> tuple[PromptRow, Completion]:
    """Run the first row to its end; the others advance with it."""
    row, stream = waiting[0]
    for _ in stream:
        pass
    stream.close()
    waiting.popleft()
    return row, stream.completion


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
