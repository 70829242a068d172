"""Encode text for training: token ids, and which of them a model learns to produce.

A conversation is rendered a second time with a mark before each message's content and after each reply's; the marks
say where the replies stand, for any template. A reply's targets begin where the template's generation prompt ends, and
include the control token that ends the turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pentad.errors import BadInput
from pentad.text.tokenizer import Tokenizer

__all__ = ["Encoded", "encode_completion", "encode_conversation", "encode_document"]

_PRIVATE_USE = range(0xF0000, 0xF1000)  # outside the range from which `render_guarded` takes its sentinel


class Encoded(NamedTuple):
    """Token ids for training.

    Attributes:
        ids: the token ids.
        targets: for each id, whether it is a target.
        ends: the number of targets that end a turn or a text.
        score: what a preference objective knows of the text; see `pentad.datasets.examples`.
    """

    ids: list[int]
    targets: list[bool]
    ends: int
    score: float = 0.0


class _Span(NamedTuple):
    """Characters of a text."""

    start: int
    stop: int

    def overlaps(self, start: int, stop: int) -> bool:
        return start < self.stop and stop > self.start


def encode_document(tokenizer: Tokenizer, text: str) -> Encoded:
    """Encode a document for pretraining: BOS if the tokenizer adds it, the text, and the end token; all are targets."""
    ids = [*tokenizer.encode(text, bos=tokenizer.adds_bos), *tokenizer.eos_ids[:1]]
    return Encoded(ids, [True] * len(ids), len(tokenizer.eos_ids[:1]))


def encode_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Encoded:
    """Encode a plain text and its continuation; the continuation and the end token are targets."""
    text = prompt + completion
    ids = tokenizer.encode(text)
    targets = _in_run(tokenizer, ids, text, [_Span(len(prompt), len(text))])
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    end = list(tokenizer.eos_ids[:1])
    return Encoded([*head, *ids, *end], [*[False] * len(head), *targets, *[True] * len(end)], len(end))


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    first: int = 0,
) -> Encoded:
    """Encode a conversation; the assistant's messages and their end-of-turn tokens are targets.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: see `Tokenizer.chat`.
        tools: see `Tokenizer.chat`.
        first: index of the first message that may be a target.

    Returns:
        The ids that ``tokenizer.chat(messages, add_generation_prompt=False)`` returns, with their targets.

    Raises:
        BadInput: there is no template, a message is malformed, or the template doesn't show where a reply stands.
    """
    rendered, sentinel = tokenizer.render(messages, tools=tools, add_generation_prompt=False)
    ids = tokenizer.encode_rendered(rendered, sentinel)
    plain = rendered.replace(sentinel, "")
    controls: list[tuple[int, int, int]] = []
    guards = 0
    position = 0
    for match in tokenizer.backend.control.matches(rendered, sentinel):
        guards += rendered.count(sentinel, position, match.start())
        position = match.start()
        controls.append((match.start() - guards, match.end() - guards, tokenizer.control[match[0]]))
    spans, ends = [], 0
    for start, content_stop, limit in _replies(tokenizer, messages, tools, first, plain):
        stop = next((b for a, b, i in controls if content_stop <= a < limit and i in tokenizer.eos_ids), None)
        ends += stop is not None
        spans.append(_Span(start, content_stop if stop is None else stop))
    return Encoded(ids, _targets(tokenizer, ids, plain, controls, spans), ends)


def _replies(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    first: int,
    plain: str,
) -> Iterable[tuple[int, int, int]]:
    """Each reply's first character, the end of its content, and the next message's first character."""
    opening, closing = _unused(plain, 2)
    marked = [
        _marked(message, opening, closing if number >= first and message["role"] == "assistant" else "")
        for number, message in enumerate(messages)
    ]
    rendered, sentinel = tokenizer.render(marked, tools=tools, add_generation_prompt=False)
    rendered = rendered.replace(sentinel, "")
    events: list[tuple[int, str]] = []
    for position, character in enumerate(rendered):
        if character in (opening, closing):
            events.append((position - len(events), character))
    if rendered.replace(opening, "").replace(closing, "") != plain:
        raise BadInput("the chat template changes replies, so that pentad can't tell which tokens are theirs")
    expected = sum(number >= first and message["role"] == "assistant" for number, message in enumerate(messages))
    if sum(character == closing for _, character in events) != expected:
        raise BadInput("the chat template leaves out a reply; give it as the conversation's last message")
    header = _generation_prompt(tokenizer, messages, tools)
    for number, (position, character) in enumerate(events):
        if character != closing:
            continue
        opened = number > 0 and events[number - 1][1] == opening
        content = events[number - 1][0] if opened else position
        before = number - 2 if opened else number - 1
        found = plain.rfind(header, events[before][0] if before >= 0 else 0, content) if header else -1
        if found < 0 and not opened:
            raise BadInput("the chat template doesn't show where a reply begins")
        limit = events[number + 1][0] if number + 1 < len(events) else len(plain)
        yield content if found < 0 else found + len(header), position, limit


def _unused(text: str, count: int) -> list[str]:
    return [character for character in map(chr, _PRIVATE_USE) if character not in text][:count]


def _marked(message: Mapping[str, Any], opening: str, closing: str) -> dict[str, Any]:
    """A copy of a message with marks around its content, inside the white space that a template may strip."""
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, str) and content.strip():
        return {**message, "content": _wrap(content, opening, closing)}
    if isinstance(content, list) and content:
        *others, last = content
        last = _wrap(last, "", closing) if isinstance(last, str) else {**last, "text": _wrap(last["text"], "", closing)}
        return {**message, "content": [*others, last]}
    if calls and closing:
        function = {**calls[-1]["function"], "name": calls[-1]["function"]["name"] + closing}
        return {**message, "tool_calls": [*calls[:-1], {**calls[-1], "function": function}]}
    return dict(message)


def _wrap(text: str, opening: str, closing: str) -> str:
    core = text.strip()
    start = text.find(core)
    return text[:start] + opening + core + closing + text[start + len(core) :]


def _generation_prompt(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> str:
    """The text that opens a reply; empty if the template has none."""
    asked = next((number for number, message in enumerate(messages) if message["role"] == "assistant"), 0)
    if not asked:
        return ""
    (prompt, sentinel), (text, other) = (
        tokenizer.render(messages[:asked], tools=tools, add_generation_prompt=add) for add in (True, False)
    )
    prompt, text = prompt.replace(sentinel, ""), text.replace(other, "")
    return prompt[len(text) :] if prompt.startswith(text) else ""


def _targets(
    tokenizer: Tokenizer, ids: list[int], text: str, controls: list[tuple[int, int, int]], spans: list[_Span]
) -> list[bool]:
    """For each id of `text`, whether its characters overlap a span."""
    targets: list[bool] = []
    start = 0
    for begin, stop, control in [*controls, (len(text), len(text), -1)]:
        end = len(ids) if control < 0 else ids.index(control, len(targets))
        run = [_Span(span.start - start, span.stop - start) for span in spans]
        targets += _in_run(tokenizer, ids[len(targets) : end], text[start:begin], run)
        if control >= 0:
            targets.append(any(span.overlaps(begin, stop) for span in spans))
        start = stop
    return targets


def _in_run(tokenizer: Tokenizer, ids: list[int], text: str, spans: list[_Span]) -> list[bool]:
    """For each id of a run without control tokens, whether its bytes overlap a span of characters."""
    covered = [span for span in spans if span.overlaps(0, len(text))]
    if not ids or not covered:
        return [False] * len(ids)
    if any(span.start <= 0 and span.stop >= len(text) for span in covered):
        return [True] * len(ids)
    tokens, encoded = [tokenizer.token_bytes(token) for token in ids], text.encode()
    joined = b"".join(tokens)
    at = -1 if joined == b" " + encoded else encoded.find(joined)  # a leading space, or white space that was stripped
    if at < 0 and joined != b" " + encoded:  # a normalizer changed the text: count the tokens of the text before
        bounds = [tuple(len(tokenizer.encode(text[: max(edge, 0)])) for edge in span) for span in covered]
        return [any(a <= n < b for a, b in bounds) for n in range(len(ids))]
    in_bytes = [_Span(*(len(text[: max(edge, 0)].encode()) for edge in span)) for span in covered]
    targets = []
    for token in tokens:
        targets.append(any(span.overlaps(at, at + len(token)) for span in in_bytes))
        at += len(token)
    return targets
