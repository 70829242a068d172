"""What a generated text must be: JSON of a schema, a match of a regex, one of several texts, or of a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pentad.errors import BadInput
from pentad.text.json_schema import checked_schema

__all__ = ["Constraint"]

MAX_CHARACTERS = 1 << 16  # of a grammar; bounds the time and the stack that compiling takes
# Texts may be indented, but a model can't go on with spaces for ever.
_WHITESPACE = r"[ \t\n\r]{1,32}"


@dataclass(frozen=True)
class Constraint:
    """A language that a generated text belongs to, once it is complete.

    Attributes:
        grammar: in llguidance's variant of Lark's notation.
    """

    grammar: str

    def __post_init__(self) -> None:
        if not isinstance(self.grammar, str):
            raise BadInput(f"the grammar is a {type(self.grammar).__name__}; expected a string")
        if len(self.grammar) > MAX_CHARACTERS:
            raise BadInput(f"the grammar has {len(self.grammar):,} characters; expected at most {MAX_CHARACTERS:,}")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any], path: str = "schema") -> Constraint:
        """JSON that a schema describes, with the properties of objects in the order of the schema.

        Args:
            schema: the schema.
            path: its name in errors.

        Raises:
            BadInput: the schema is malformed, or uses a keyword that would not be enforced.
        """
        return cls(f"start: {embedded(schema, path)}")

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """A text that a regular expression matches as a whole, in the syntax of Rust's regex crate."""
        if not isinstance(pattern, str):
            raise BadInput(f"the regex is a {type(pattern).__name__}; expected a string")
        whole = pattern.removeprefix("^")  # anchors at both ends mean nothing
        inner = whole.removesuffix("$")
        if (len(inner) - len(inner.rstrip("\\"))) % 2 == 0:  # else the dollar is escaped
            whole = inner
        return cls("start: /" + re.sub(r"\\.|[/\n]", _escaped, whole, flags=re.DOTALL) + "/")

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Constraint:
        """One of several texts."""
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts or "" in texts:
            raise BadInput("choice is empty or has an empty text; expected a list of texts")
        if not all(isinstance(text, str) for text in texts):
            raise BadInput("choice has an element that is not a string; expected a list of texts")
        return cls("start: TEXT\nTEXT: " + " | ".join(map(quoted, texts)))

    @classmethod
    def lark(cls, grammar: str) -> Constraint:
        """A context-free grammar with the rule `start`, in llguidance's variant of Lark's notation."""
        return cls(grammar)


def quoted(text: str) -> str:
    """A text as a literal of a grammar."""
    return json.dumps(text, ensure_ascii=False)


def embedded(schema: Mapping[str, Any], path: str) -> str:
    """The part of a grammar that stands for JSON of a schema.

    Raises:
        BadInput: the schema is malformed, or uses a keyword that would not be enforced; the message begins with `path`.
    """
    whole = {**checked_schema(schema, path), "x-guidance": {"whitespace_pattern": _WHITESPACE}}
    return "%json " + json.dumps(whole, ensure_ascii=False)


def _escaped(found: re.Match[str]) -> str:
    """A slash would end the regex, and a line break the rule."""
    text = found[0]
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(text, text)
