"""Find control strings (`<|im_end|>`, `</s>`) in a text, and keep users from forging them."""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property

__all__ = ["END_OF_TURN", "ControlStrings", "is_control"]

# A reply ends at each of these. Many chat models end a turn with one token and a document with another, but their
# files name only one of them as the end of a sequence.
END_OF_TURN = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_turn|>", "<|endoftext|>"),
    *("<|end_of_text|>", "</s>", "<EOT>"),
)


def is_control(string: str) -> bool:
    """Recognize a control string that its file lists as an ordinary added token.

    Fine-tuners add `<|im_start|>` and its like as ordinary tokens. Left ordinary, they could be forged by any user.
    """
    return string in END_OF_TURN or re.fullmatch(r"<[|\uff5c][^|\uff5c\s]+[|\uff5c]>", string) is not None


class ControlStrings:
    """The control strings of a vocabulary.

    Attributes:
        ids: string -> id.
    """

    def __init__(self, ids: Mapping[str, int], strips: Mapping[str, tuple[bool, bool]] | None = None) -> None:
        """Make a set from `ids` and `strips`: string -> (strips white space on its left, strips it on its right)."""
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
        # Ignore case: a template may convert a message to upper case.
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
        """Split `text` at its control strings, the longest match first.

        Args:
            text: any text.
            sentinel: the character that `guard` inserts; a control string that contains it is plain text.

        Returns:
            Runs of plain text without the sentinel, and ids of control strings.
        """
        parts: list[str | int] = []
        start, strip_left = 0, False
        for match in self.matches(text, sentinel):
            lstrip, rstrip = self._strips.get(match[0], (False, False))
            run = _run(text[start : match.start()], sentinel, strip_left, lstrip)
            parts += [run, self.ids[match[0]]] if run else [self.ids[match[0]]]
            start, strip_left = match.end(), rstrip
        run = _run(text[start:], sentinel, strip_left, False)
        return [*parts, run] if run else parts

    def matches(self, text: str, sentinel: str = "") -> Iterator[re.Match[str]]:
        """The control strings in `text`; for the arguments see `split`."""
        singles = f"[{self._singles}]" + (f"(?!{sentinel})" if sentinel else "") if self._singles else ""
        return self._pattern(singles).finditer(text)

    def guard(self, text: str, sentinel: str) -> str:
        """Insert `sentinel` into each control string of `text`, and at edges where a neighbor could complete one.

        Two texts form a control string if one ends in `<|im_` and the next opens with `end|>`. The template may trim
        white space before it joins texts.
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
