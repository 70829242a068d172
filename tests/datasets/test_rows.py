"""Rows of training data: what is read, and what is refused with file and line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentad.datasets.rows import check_row, files_of, read_rows
from pentad.errors import BadInput

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
GOOD = [
    {"text": "a"},
    {"messages": [USER, REPLY]},
    {"prompt": "a", "completion": "b"},
    {"prompt": [USER], "chosen": [REPLY], "rejected": [REPLY]},
]


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_kinds_are_recognized_by_their_fields(tmp_path: Path) -> None:
    rows = list(read_rows(write(tmp_path / "x.jsonl", GOOD)))
    assert [row.kind for row in rows] == ["text", "messages", "completion", "preference"]
    assert rows[2].where.endswith("x.jsonl:3")


def test_parquet_and_arrow_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist([GOOD[1], GOOD[1]])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as file:
        file.write_table(table)
    for file in files_of(tmp_path):
        assert [row.fields for row in read_rows(file)] == [GOOD[1], GOOD[1]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([], "is a list"),
        ({"question": "a"}, "fields are question"),
        ({"text": 3}, "text is a int"),
        ({"messages": []}, "is empty"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "'bot'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "reply is empty"),
        ({"messages": [USER]}, "nothing to learn"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": "a", "chosen": [REPLY], "rejected": [REPLY]}, "strings"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
    ],
)
def test_a_malformed_row_is_named_with_its_line(tmp_path: Path, row: object, expected: str) -> None:
    file = write(tmp_path / "x.jsonl", [GOOD[0], row])
    with pytest.raises(BadInput, match=expected) as caught:
        list(read_rows(file))
    assert f"{file}:2" in str(caught.value)
    skipped: list[str] = []
    assert len(list(read_rows(file, skipped))) == 1
    assert len(skipped) == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"{", b"\xff\xfe\n"])
def test_files_without_a_good_row_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"x\.jsonl"):
        list(read_rows(file))


def test_paths_that_hold_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a")
    for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "x.csv"):
        with pytest.raises(BadInput):
            files_of(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["text", "messages", "prompt", "chosen", "role"]), x),
    )
)
def test_any_json_is_a_row_or_refused(value: object) -> None:
    try:
        where = check_row(value, "x:1").where
    except BadInput as error:
        where = str(error)
    assert where.startswith("x:1")
