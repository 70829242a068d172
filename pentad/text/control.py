"""Control strings (`<|im_end|>`, `</s>`): finding them in a text, and keeping users from forging
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

__all__ = ["END_OF_TURN", "ControlStrings", "is_control"]

# Tokens at which a reply has ended, whatever the file calls its end-of-sequence token: many chat
# models end a turn by one token and a document by another, and name only one of them.
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|end_of_turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<EOT>",
)


def is_control(string: str) -> bool:
    """Whether an added token that its file doesn't mark as control is one by its looks.

    Converters mark `<|im_start|>` as an ordinary added token where a fine-tuner added it as one;
    read so, any user could write it.
    """
    return string in END_OF_TURN or re.fullmatch(r"<[|\uff5c][^|\uff5c\s]+[|\uff5c]>", string) is not None


class ControlStrings:
    """The control strings of a vocabulary."""

    def __init__(self, ids: Mapping[str, int], strips: Mapping[str, tuple[bool, bool]] | None = None) -> None:
        """`ids`: string -> id; `strips`: whether the token swallows white space to its left, to its
        right.
        """
        self.ids = dict(ids)
        self._strips = dict(strips or {})

    @cached_property
    def _longest_first(self) -> str:
        return "|".join(re.escape(s) for s in sorted(self.ids, key=lambda s: -len(s)) if len(s) > 1)

    @cached_property
    def _singles(self) -> str:
        return "".join(re.escape(s) for s in self.ids if len(s) == 1)

    @cached_property
    def _forged(self) -> re.Pattern[str]:
        # Any case: a template may write what a user said in capitals.
        return self._pattern(f"[{self._singles}]" if self._singles else "", re.IGNORECASE)

    @cached_property
    def _edges(self) -> tuple[frozenset[str], frozenset[str], int]:
        strings = [s.lower() for s in self.ids]
        starts = frozenset(s[:n] for s in strings for n in range(1, len(s)))
        ends = frozenset(s[n:] for s in strings for n in range(1, len(s)))
        return starts, ends, max(map(len, strings), default=0)

    def _pattern(self, singles: str, flags: int = 0) -> re.Pattern[str]:
        return re.compile("|".join(filter(None, (self._longest_first, singles))) or "(?!)", flags)

    def split(self, text: str, sentinel: str = "") -> list[str | int]:
        """`text` as runs of plain text and the ids of the control strings between them, longest
        match first.

        A `sentinel` (see `guard`) breaks what it stands in, and is dropped from the runs.
        """
        singles = f"[{self._singles}]" + (f"(?!{sentinel})" if sentinel else "") if self._singles else ""
        parts: list[str | int] = []
        start, strip_left = 0, False
        for match in self._pattern(singles).finditer(text):
            lstrip, rstrip = self._strips.get(match[0], (False, False))
            run = _run(text[start : match.start()], sentinel, strip_left, lstrip)
            parts += [run, self.ids[match[0]]] if run else [self.ids[match[0]]]
            start, strip_left = match.end(), rstrip
        run = _run(text[start:], sentinel, strip_left, False)
        return [*parts, run] if run else parts

    def guard(self, text: str, sentinel: str) -> str:
        """`text` with `sentinel` put wherever it holds a control string, or could help to make one
        with its neighbor.

        Neighbors: a text that ends in `<|im_` and one that opens with `end|>`, also once white
        space is trimmed.
        """
        broken = self._forged.sub(lambda match: match[0][0] + sentinel + match[0][1:], text)
        starts, ends, longest = self._edges
        core = broken.strip()
        head, tail = core[:longest].lower(), core[-longest:].lower()
        indent = len(broken) - len(broken.lstrip())
        if any(tail[-n:] in starts for n in range(1, len(tail) + 1)):
            broken = broken[: indent + len(core)] + sentinel + broken[indent + len(core) :]
        if any(head[:n] in ends for n in range(1, len(head) + 1)):
            broken = broken[:indent] + sentinel + broken[indent:]
        return broken


def _run(text: str, sentinel: str, strip_left: bool, strip_right: bool) -> str:
    text = text.replace(sentinel, "") if sentinel else text
    text = text.lstrip() if strip_left else text
    return text.rstrip() if strip_right else text
