"""Tokenized examples on disk, memory-mapped, so that tokenizing happens once for the same files and options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pentad.datasets.examples import PAIRS, Encoder
from pentad.datasets.rows import files_of, read_rows
from pentad.errors import BadInput
from pentad.text.targets import Encoded
from pentad.weights.atomic import cache_entry, new_folder
from pentad.weights.cache import cache_folder

FORMAT = 3  # changes when equal inputs would give other examples

Tokens = tuple[np.ndarray, np.ndarray]
"""A sequence: int32 ids, and uint8 targets."""


class Examples:
    """A memory-mapped store of examples.

    Attributes:
        path: the folder of examples.arrow and facts.json.
        sequences: sequences of an example: 1, or 2 of a pair.
        lengths: int64 [examples], tokens of each example, all its sequences together.
        scores: float32 [examples, sequences]; see `pentad.datasets.examples`.
        facts: rows, skipped (one line each), truncated, targets, ends, and the hash of each data file.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path / "examples.arrow")))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.facts: dict[str, Any] = json.loads((path / "facts.json").read_text())
        self.sequences: int = self.facts["sequences"]
        self._where = [batch.column("where") for batch in batches]
        self._ids = [batch.column("ids").values.to_numpy() for batch in batches]
        self._targets = [batch.column("targets").values.to_numpy() for batch in batches]
        self._starts = [batch.column("ids").offsets.to_numpy() for batch in batches]
        self._first = np.cumsum([0, *(len(starts) - 1 for starts in self._starts)])
        self.lengths = np.concatenate([np.diff(starts) for starts in self._starts]).reshape(-1, self.sequences).sum(1)
        self.scores = np.concatenate([b.column("score").to_numpy() for b in batches]).reshape(-1, self.sequences)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> list[Tokens]:
        """The sequences of an example, views of the mapped file."""
        return [self._sequence(number * self.sequences + i) for i in range(self.sequences)]

    def _sequence(self, number: int) -> Tokens:
        batch, row = self._find(number)
        start, stop = self._starts[batch][row : row + 2]
        return self._ids[batch][start:stop], self._targets[batch][start:stop]

    def location(self, number: int) -> str:
        """The file and line of an example."""
        batch, row = self._find(number * self.sequences)
        return str(self._where[batch][row])

    def _find(self, number: int) -> tuple[int, int]:
        """The record batch of a sequence, and its row there."""
        batch = int(np.searchsorted(self._first, number, side="right")) - 1
        return batch, int(number - self._first[batch])


def prepare(
    path: Path,
    encoder: Encoder,
    fingerprint: str,
    *,
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Examples:
    """Tokenize a file or folder, or find the store of an earlier run.

    Args:
        path: see `files_of`.
        encoder: makes the examples.
        fingerprint: hash of the tokenizer and its template.
        skip_bad: leave out malformed rows, listed in `Examples.facts`; by default they are an error.
        progress: is told of each row.

    Raises:
        BadInput: a row is malformed or too long, a file is empty, or no end of a turn is ever a target.
        PentadError: the disk is full.
    """
    files = files_of(path)
    hashes = {str(file): _sha256(file) for file in files}
    options = [FORMAT, fingerprint, encoder.learns, encoder.sequence_length, encoder.truncate, skip_bad]
    key = hashlib.sha256(json.dumps([list(hashes.values()), options]).encode()).hexdigest()
    target = cache_folder() / "examples" / key[:32]
    with cache_entry(target):
        if not target.exists():
            with new_folder(target) as folder:
                _write(folder, files, hashes, encoder, skip_bad, progress)
    return Examples(target)


def _write(
    folder: Path,
    files: Sequence[Path],
    hashes: Mapping[str, str],
    encoder: Encoder,
    skip_bad: bool,
    progress: Callable[[int], None] | None,
) -> None:
    import pyarrow as pa

    skipped: list[str] = []
    facts: dict[str, Any] = {"rows": 0, "targets": 0, "ends": 0, "truncated": 0, "files": dict(hashes)}
    facts["sequences"] = 2 if encoder.learns == PAIRS else 1
    lists = [("ids", pa.list_(pa.int32())), ("targets", pa.list_(pa.uint8()))]
    schema = pa.schema([*lists, ("score", pa.float32()), ("where", pa.string())])
    examples = _examples(files, encoder, skipped if skip_bad else None, facts, progress)
    with pa.ipc.new_file(str(folder / "examples.arrow"), schema) as writer:
        while chunk := list(islice(examples, 1000)):
            flat = [(encoded, where) for example, where in chunk for encoded in example]
            columns = [
                [encoded.ids for encoded, _ in flat],
                [list(map(int, encoded.targets)) for encoded, _ in flat],
                [encoded.score for encoded, _ in flat],
                [where for _, where in flat],
            ]
            facts["targets"] += sum(sum(encoded.targets[1:]) for encoded, _ in flat)
            facts["ends"] += sum(encoded.ends for encoded, _ in flat)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    if not facts["targets"]:
        raise BadInput(f"{files[0]}: every row was skipped; the first: {skipped[0] if skipped else 'none'}")
    if not facts["ends"]:
        raise BadInput(f"{files[0]}: no end of a turn is ever a target, so the model would never learn to stop")
    (folder / "facts.json").write_text(json.dumps({**facts, "skipped": skipped}))


def _examples(
    files: Sequence[Path],
    encoder: Encoder,
    skipped: list[str] | None,
    facts: dict[str, Any],
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[list[Encoded], str]]:
    for file in files:
        for row in read_rows(file, skipped):
            facts["rows"] += 1
            if progress is not None:
                progress(1)
            try:
                examples = list(encoder.examples(row))
            except BadInput as error:
                if skipped is None:
                    raise
                skipped.append(str(error))
                continue
            facts["truncated"] += sum(not encoded.ends for example in examples for encoded in example[-1:])
            yield from ((example, row.where) for example in examples)


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{file} can't be read: {error.strerror or error}") from error
