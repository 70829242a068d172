"""Read rows of training data from JSONL, Parquet and folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pentad.errors import BadInput

KINDS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),  # and, unless both are whole conversations, "prompt"
    "unpaired": ("prompt", "completion", "label"),  # label is true or false
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
"""Kind of row -> the fields by which it is recognized."""

ROLES = ("system", "developer", "user", "assistant", "tool")
SUFFIXES = (".jsonl", ".parquet", ".arrow")


class Row(NamedTuple):
    """One row.

    Attributes:
        kind: a key of `KINDS`.
        fields: its fields.
        where: "file:line" in JSONL, "file:row" elsewhere; both count from 1.
    """

    kind: str
    fields: Mapping[str, Any]
    where: str


def files_of(path: Path) -> list[Path]:
    """The data files of a path: the file itself, or those in a folder, by name.

    Raises:
        BadInput: it doesn't exist, has an unknown suffix, or is a folder without data files.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and not file.name.startswith("."))
        if not files:
            raise BadInput(f"{path}: there are no {', '.join(SUFFIXES)} files in this folder")
        return files
    if not path.exists():
        raise BadInput(f"{path} doesn't exist; expected a file or folder of training data")
    if path.suffix not in SUFFIXES:
        raise BadInput(f"{path}: the suffix is {path.suffix!r}; expected {', '.join(SUFFIXES)} or a folder")
    return [path]


def read_rows(file: Path, skipped: list[str] | None = None) -> Iterator[Row]:
    """Read a file's rows, one at a time.

    Args:
        file: one of `files_of`.
        skipped: receives one line for each malformed row, which is then skipped. By default it is an error.

    Raises:
        BadInput: a malformed row, with file and line; or the file has no rows.
    """
    count = 0
    for number, record in enumerate(_records(file), 1):
        where = f"{file}:{number}"
        if record is None:
            continue  # a blank line
        count += 1
        try:
            yield check_row(record, where)
        except BadInput as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not count:
        raise BadInput(f"{file} has no rows")


def read_objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSONL file, one at a time, with their line numbers from 1; blank lines are skipped.

    Raises:
        BadInput: a line isn't an object, with file and line; or the file has none, or isn't JSONL.
    """
    if file.suffix != ".jsonl" or not file.is_file():
        what = "the name doesn't end in .jsonl" if file.is_file() else "there is no such file"
        raise BadInput(f"{file}: {what}; expected a JSONL file")
    count = 0
    for number, record in enumerate(_records(file), 1):
        if record is not None:
            count += 1
            yield number, _object(record, f"{file}:{number}")
    if not count:
        raise BadInput(f"{file} has no rows")


def _records(file: Path) -> Iterator[Any]:
    try:
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    yield _parsed(line, f"{file}:{number}") if line.strip() else None
            return
        yield from _arrow_records(file)
    except OSError as error:
        raise BadInput(f"{file} can't be read: {error.strerror or error}") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadInput(f"{where}: not a line of JSON: {error}")


def _arrow_records(file: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    batches: Iterable[Any]
    try:
        if file.suffix == ".parquet":
            batches = pq.ParquetFile(file).iter_batches(1000)
        else:  # `datasets` saves streams; other programs write files
            source = pa.memory_map(str(file))
            try:
                batches = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                batches = (
                    reader.get_batch(i)
                    for reader in [pa.ipc.open_file(source)]
                    for i in range(reader.num_record_batches)
                )
        for batch in batches:
            yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise BadInput(f"{file} can't be read as {file.suffix}: {str(error).splitlines()[0]}") from error


def check_row(record: Any, where: str) -> Row:
    """Check one record. Raises `BadInput` with `where` if it has no known shape."""
    record = {key: value for key, value in _object(record, where).items() if value is not None}
    kind = next((kind for kind, names in KINDS.items() if record.keys() >= set(names)), None)
    if kind == "unpaired" and not isinstance(record["label"], bool):
        kind = "completion"
    if kind is None:
        shapes = "; ".join(", ".join(names) for names in KINDS.values())
        found = ", ".join(map(str, record)) or "none"
        raise BadInput(f"{where}: the fields are {found}; expected one of these sets: {shapes}")
    texts = {name: record[name] for name in (*KINDS[kind], "prompt") if name in record and name != "label"}
    for name, value in texts.items():
        if isinstance(value, list) and kind != "text":
            check_messages(value, f"{where}: {name}")
        elif not isinstance(value, str) or kind == "messages":
            raise BadInput(f"{where}: {name} is a {type(value).__name__}; expected {_expected(kind)}")
        elif not value and name != "prompt":
            raise BadInput(f"{where}: {name} is empty")
    if len({type(value) for value in texts.values()}) > 1:
        raise BadInput(f"{where}: some of {', '.join(texts)} are strings and some are messages; expected one of both")
    if kind == "preference" and "prompt" not in record and isinstance(record["chosen"], str):
        raise BadInput(f"{where}: there is no prompt; expected one beside chosen and rejected")
    if kind == "preference" and type(record.get("margin", 0)) not in (int, float):
        raise BadInput(f"{where}: margin is {record['margin']!r}; expected a number")
    if kind == "messages" and not any(message["role"] == "assistant" for message in record["messages"]):
        raise BadInput(f"{where}: no message has the role assistant, so there is nothing to learn")
    return Row(kind, record, where)


def _object(record: Any, where: str) -> dict[str, Any]:
    if isinstance(record, BadInput):
        raise record
    if not isinstance(record, dict):
        raise BadInput(f"{where}: the row is a {type(record).__name__}; expected an object")
    return record


def _expected(kind: str) -> str:
    return {"text": "a string", "messages": "a list of messages"}.get(kind, "a string or a list of messages")


def check_messages(messages: list[Any], where: str) -> None:
    """Check a conversation. Raises `BadInput` with `where` if it is none."""
    if not messages:
        raise BadInput(f"{where} is empty")
    for number, message in enumerate(messages):
        at = f"{where}[{number}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadInput(f"{at}: expected an object with role and content")
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise BadInput(f"{at}: role is {role!r}; expected one of {', '.join(ROLES)}")
        text = content.strip() if isinstance(content, str) else content
        if role == "assistant" and not text and not message.get("tool_calls"):
            raise BadInput(f"{at}: the reply is empty")
