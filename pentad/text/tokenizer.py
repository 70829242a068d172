"""The tokenizer: one class for all vocabularies, on top of a `backends.Backend`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pentad.errors import BadInput
from pentad.text.control import END_OF_TURN
from pentad.text.detokenizer import Detokenizer
from pentad.text.files import refusing

if TYPE_CHECKING:
    from pentad.text.backends import Backend
    from pentad.text.chat_template import ChatTemplate

__all__ = ["Source", "Tokenizer"]

MIN_CHECKED_SIZE = 1 << 16  # characters; shorter texts are tokenized at once
SHRINKAGE = 8  # a normalizer makes a text at most so many times shorter


class Source(Protocol):
    """The parts of a checkpoint from which its tokenizer is read."""

    @property
    def path(self) -> Path:
        """The GGUF file, or the folder, or a file in the folder."""

    @property
    def format(self) -> str:
        """ "gguf", "hf" or "consolidated"."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The metadata of a GGUF file; params.json of a consolidated checkpoint."""


class Tokenizer:
    """A vocabulary that converts between text and token ids.

    Attributes:
        vocab_size: the number of ids.
        control: control string (such as `<|im_end|>`) -> id.
        bos_id: the id that begins a sequence, or None.
        eos_ids: the ids that end a reply: those that the checkpoint's files name, then every control token of
            `END_OF_TURN`.
        adds_bos: True if the files ask for `bos_id` at the beginning of a plain prompt.
        closing: ids that the files ask for at the end of a plain prompt; almost always none.
        special_tokens: role (such as `eos_token`) -> string.
        templates: name ("default", "tool_use") -> jinja source of a chat template.
        backend: encodes and decodes.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        adds_bos: bool,
        closing: Sequence[int] = (),
        special_tokens: Mapping[str, str],
        templates: Mapping[str, str],
    ) -> None:
        """Make a tokenizer; for the arguments see the attributes of the class."""
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.templates = dict(templates)
        self._compiled: dict[str, ChatTemplate] = {}
        self.vocab_size = backend.vocab_size
        self.control = backend.control.ids
        self.bos_id = bos_id
        ends = [self.control[string] for string in END_OF_TURN if string in self.control]
        self.eos_ids = tuple(dict.fromkeys([*eos_ids, *ends]))
        self.adds_bos = adds_bos and bos_id is not None
        self.closing = tuple(closing)

    def __repr__(self) -> str:
        return f"<Tokenizer: {self.vocab_size} ids, {len(self.control)} control tokens>"

    @cached_property
    def max_token_bytes(self) -> float:
        """The length of the longest token; infinite if a token can stand for any number of unknown characters."""
        tokens = [self.backend.token_bytes(token) for token in range(self.vocab_size)]
        single_bytes = {token for token in tokens if len(token) == 1}
        return max(map(len, tokens)) if len(single_bytes) > 128 else math.inf  # else there are only ASCII characters

    def check_size(self, texts: Iterable[str], context_length: int) -> None:
        """Raise `BadInput` if texts are much too long for a context together, without encoding them."""
        size = sum(map(len, texts))
        if size > MIN_CHECKED_SIZE and size > SHRINKAGE * context_length * self.max_token_bytes:
            raise BadInput(f"the text has {size:,} characters, too many for the context of {context_length} tokens")

    @property
    def chat_template(self) -> str | None:
        """The jinja source of the template for chats without tools, or None."""
        return self.templates.get("default")

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Encode text.

        Args:
            text: any text.
            bos: put `bos_id` in front.
            special: turn control strings in `text` into their ids. By default they are encoded as plain text.

        Returns:
            The ids.

        Raises:
            BadInput: `text` is not a string of valid Unicode, or `bos` is set and `bos_id` is None.
        """
        _check_text(text)
        if bos and self.bos_id is None:
            raise BadInput("bos is True, but this vocabulary has no token that begins a sequence; use bos=False")
        with refusing("the tokenizer can't encode this text"):
            ids = self.backend.encode(text, special=special)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], *, special: bool = False, continues: bool = False) -> str:
        """Decode ids.

        Args:
            ids: token ids; ids past the vocabulary give no text.
            special: keep control tokens, as their text. By default they are dropped.
            continues: text precedes the first id, so the leading space of a SentencePiece vocabulary is kept.

        Returns:
            The text, with U+FFFD in place of bytes that aren't UTF-8.

        Raises:
            BadInput: an id is negative.
        """
        stream = self.stream(special=special, continues=continues)
        return "".join([*(stream.add(token) for token in ids), stream.finish()])

    def stream(self, *, special: bool = False, continues: bool = False) -> Detokenizer:
        """Start decoding ids one at a time.

        Args:
            special: keep control tokens, as their text. By default they are dropped.
            continues: text precedes the first id, so the leading space of a SentencePiece vocabulary is kept.

        Returns:
            A decoder: call `add(id)` for each id, then `finish()`.
        """
        return Detokenizer(self, special=special, continues=continues)

    def token_bytes(self, token: int) -> bytes:
        """Get the bytes of one id.

        Args:
            token: an id; one past the vocabulary has no bytes (embeddings are padded).

        Returns:
            The bytes, which may be a part of a character.

        Raises:
            BadInput: `token` is negative.
        """
        return self.backend.token_bytes(token) if self._known(token) else b""

    def first_bytes(self, token: int) -> bytes:
        """Get the bytes of an id that opens a text: `token_bytes` without the space that encoding puts in front."""
        return self.backend.first_bytes(token) if self._known(token) else b""

    def _known(self, token: int) -> bool:
        if token < 0:
            raise BadInput(f"token id is {token}; expected 0 or more")
        return token < self.vocab_size

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Encode a conversation by the model's own template, which also writes BOS.

        Only the template's own text produces control tokens. A control string in a message, tool or variable is encoded
        as plain text.

        Args:
            messages: dicts with `role` and `content` (a string, or a list of parts), and other fields that the
                template reads.
            tools: JSON schemas of functions; they select the template "tool_use" if there is one.
            add_generation_prompt: end with the opening of an assistant's reply.
            variables: more variables for the template, made of JSON's types.

        Returns:
            The ids.

        Raises:
            BadInput: the model has no template, a message is malformed, or the template raises an error.
        """
        return self.encode_rendered(
            *self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> tuple[str, str]:
        """Render a conversation to text; for the arguments see `chat`.

        Returns:
            The text, and the sentinel: a character that stands in control strings of the inputs, and nowhere else.
        """
        from pentad.text.chat_template import render_guarded

        return render_guarded(
            self._template("tool_use" if tools is not None else "default"),
            self.backend.control,
            {"messages": messages, "tools": tools, "documents": None, **variables},
            {**self.special_tokens, "add_generation_prompt": add_generation_prompt},
        )

    def encode_rendered(self, rendered: str, sentinel: str) -> list[int]:
        """Encode the text that `render` returned."""
        plain = rendered.replace(sentinel, "")
        _check_text(plain)
        parts = self.backend.control.split(rendered, sentinel)
        if parts == self.backend.control.split(plain):  # no input holds a control string
            return self.backend.encode(plain, special=True)
        return self.backend.encode_parts(parts)

    def _template(self, name: str) -> ChatTemplate:
        from pentad.text.chat_template import ChatTemplate

        if name not in self.templates:
            name = "default"
        if name not in self.templates:
            raise BadInput("this model has no chat template; complete plain text instead")
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.templates[name])
        return self._compiled[name]


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise BadInput(f"text is a {type(text).__name__}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"text is not valid Unicode: character {error.start} is a lone surrogate") from None
