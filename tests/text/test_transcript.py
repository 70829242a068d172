"""The text of a growing transcript, and stop strings."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pentad.text import Detokenizer
from pentad.text.transcript import Transcript


class Alphabet:
    """Ids are indices of pieces; "<end>" is a control string."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.control = {"<end>": len(pieces)}

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]

    first_bytes = token_bytes


def write(pieces: list[bytes], stop: list[str]) -> tuple[list[str], Transcript]:
    """Add pieces to a transcript; returns its text after each piece and after the end, and the transcript."""
    transcript = Transcript(Detokenizer(Alphabet(*pieces)), stop)
    seen = []
    for token in range(len(pieces)):
        transcript.add(token)
        seen.append(transcript.text)
        if transcript.stopped:
            break
    transcript.finish()
    return [*seen, transcript.text], transcript


def test_without_a_stop_string_no_text_is_withheld() -> None:
    seen, transcript = write([b"Hel", b"lo", b" you"], [])
    assert seen == ["Hel", "Hello", "Hello you", "Hello you"]
    assert not transcript.stopped


@pytest.mark.parametrize(
    ("pieces", "stop", "seen", "stopped"),
    [
        ([b"one. two"], ["."], ["one", "one"], True),
        ([b"a", b"##", b"# b"], ["###"], ["a", "a", "a", "a"], True),
        ([b"a", b"##", b" b"], ["###"], ["a", "a", "a## b", "a## b"], False),
        ([b"a##"], ["###"], ["a", "a##"], False),  # "##" is withheld until the end
        ([b"ab", b"ac"], ["abac"], ["", "", ""], True),
        ([b"ab", b"ab", b"ac"], ["abac"], ["", "ab", "ab", "ab"], True),
        ([b"xab", b"y"], ["abc", "by"], ["x", "xa", "xa"], True),
        ([b"stop at the first"], ["the", "at"], ["stop ", "stop "], True),
        ([b"\n", b"\nUser", b":"], ["\n\nUser:", "\n\nA"], ["", "", "", ""], True),
        ([b"text"], [""], ["text", "text"], False),
        ([b"caf", b"\xc3", b"\xa9!"], ["\xe9"], ["caf", "caf", "caf", "caf"], True),
        ([b"caf", b"\xc3"], ["\ufffd"], ["caf", "caf", "caf"], True),
    ],
)
def test_stop_strings(pieces: list[bytes], stop: list[str], seen: list[str], stopped: bool) -> None:
    got, transcript = write(pieces, stop)
    assert (got, transcript.stopped) == (seen, stopped)


def test_control_tokens_have_no_text() -> None:
    transcript = Transcript(Detokenizer(Alphabet(b"a", b"<end>")), ["<end>"])
    for token in (0, 2, 0):
        transcript.add(token)
    assert transcript.text == "aa"
    transcript.add(1)  # the same string as text is a stop string
    assert transcript.stopped


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_the_text_ends_at_the_first_stop_string(pieces: list[str], stop: list[str]) -> None:
    """The first stop string is the earliest one in the text of the first pieces that contain any."""
    seen, transcript = write([piece.encode() for piece in pieces], stop)
    whole, read = "".join(pieces), ""
    expected = whole
    for piece in pieces:
        read += piece
        starts = [at for string in stop if (at := read.find(string)) >= 0]
        if starts:
            expected = read[: min(starts)]
            break
    assert seen[-1] == expected
    assert transcript.stopped == (expected != whole or any(s in whole for s in stop))
    for earlier, later in pairwise(seen):
        assert later.startswith(earlier)
