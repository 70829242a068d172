"""Conversations that exceed their context, with a stand-in model that counts characters as tokens."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pentad.cli.conversation import Conversation
from pentad.errors import BadInput, PentadError


def conversation(limit: int, **options: Any) -> Conversation:
    model: Any = SimpleNamespace(
        context_length=limit, chat_ids=lambda messages: [0] * sum(len(message["content"]) for message in messages)
    )
    return Conversation(model, {}, **options)


def talk(c: Conversation, *turns: str) -> None:
    for i, text in enumerate(turns):
        c.add("assistant" if i % 2 else "user", text)


def contents(c: Conversation) -> list[str]:
    return [message["content"] for message in c.messages]


def test_a_conversation_that_fits_is_unchanged() -> None:
    c = conversation(10, system="s")
    talk(c, "aaa", "bbb", "cc")
    assert c.fit() == []
    assert contents(c) == ["s", "aaa", "bbb", "cc"]
    assert c.tokens() == 9


def test_the_error_names_tokens_and_context() -> None:
    c = conversation(10)
    talk(c, "aaaa", "bbb", "ccc")
    with pytest.raises(BadInput, match=r"10 tokens.* of 10 .*/set truncate yes"):
        c.fit()
    assert contents(c) == ["aaaa", "bbb", "ccc"]
    c.undo()
    c.reset()
    c.add("user", "x" * 11)
    with pytest.raises(BadInput, match=r"11 tokens.*shorten it"):
        c.fit()


def test_the_oldest_turns_are_dropped_and_returned() -> None:
    c = conversation(20, system="s", truncate=True)
    talk(c, "one", "1111", "two", "2222", "three")
    assert c.fit() == ["one", "two"]
    assert contents(c) == ["s", "three"]

    c = conversation(40, system="s", truncate=True)
    talk(c, "one", "1" * 20, "two", "2222", "three")
    assert c.fit() == ["one"]
    assert contents(c) == ["s", "two", "2222", "three"]


def test_turns_are_dropped_until_a_reply_fits() -> None:
    c = conversation(40, truncate=True)
    talk(c, "one", "1" * 25, "three")  # 33 of 40 tokens: less than a quarter is free
    assert c.fit() == ["one"]
    c = conversation(40, truncate=True)
    c.options["max_tokens"] = 7
    talk(c, "one", "1" * 25, "three")
    assert c.fit() == []


def test_the_last_turn_is_never_dropped() -> None:
    c = conversation(20, system="s", truncate=True)
    talk(c, "one", "1", "x" * 30)
    with pytest.raises(BadInput, match=r"31 tokens.*shorten it"):
        c.fit()
    c = conversation(20, truncate=True)
    c.add("user", "x" * 18)  # more than half of the context, but it fits
    assert c.fit() == []


def test_system_message() -> None:
    c = conversation(10)
    assert c.system is None
    talk(c, "a", "b")
    c.set_system("s")
    c.set_system("t")
    assert (c.system, contents(c)) == ("t", ["t", "a", "b"])
    c.reset()
    assert contents(c) == ["t"]
    c.set_system(None)
    assert contents(c) == []


def test_undo() -> None:
    c = conversation(10, system="s")
    assert c.undo() is None
    talk(c, "a", "b", "c", "d")
    assert c.undo() == "c"
    assert contents(c) == ["s", "a", "b"]


def test_save_and_load(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    c = conversation(10, system="s")
    talk(c, "ä\n", "b")
    c.save(file)
    talk(c, "c")
    c.save(file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(line["messages"]) for line in lines] == [3, 4]
    other = conversation(10)
    other.load(file)
    assert other.messages == c.messages


@pytest.mark.parametrize("text", ["", "no json", "[]", '{"messages": 1}', '{"messages": [{"role": "user"}]}', "\udcff"])
def test_a_file_without_a_conversation_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    c = conversation(10)
    talk(c, "a")
    with pytest.raises(BadInput, match=r"talk\.jsonl.*not a conversation"):
        c.load(file)
    assert contents(c) == ["a"]


def test_absent_files_are_named(tmp_path: Path) -> None:
    c = conversation(10)
    with pytest.raises(BadInput, match="absent"):
        c.load(tmp_path / "absent")
    with pytest.raises(PentadError, match="absent"):
        c.save(tmp_path / "absent" / "file")
