"""The one tokenizer class; what reads a vocabulary is behind `backends.Backend`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pentad.errors import BadInput, PentadError
from pentad.text.control import END_OF_TURN, ControlStrings
from pentad.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from pentad.text.backends import Backend
    from pentad.text.chat_template import ChatTemplate

__all__ = ["Source", "Tokenizer"]


class Source(Protocol):
    """The parts of a checkpoint that its tokenizer is read from."""

    @property
    def path(self) -> Path:
        """The GGUF file, or the folder, or a file in it."""

    @property
    def format(self) -> str:
        """ "gguf", "hf" or "consolidated"."""

    @property
    def config(self) -> Mapping[str, Any]:
        """GGUF: the file's metadata; consolidated: params.json."""


class Tokenizer:
    """Text <-> ids for one vocabulary.

    Attributes: `vocab_size`; `control`: control string -> id; `bos_id`: the id that begins a
    sequence, or None; `adds_bos`: whether the files say that a plain prompt begins with it;
    `eos_ids`: the ids that end a reply: what the tokenizer's files and the generation settings
    name, then every control token of `END_OF_TURN`. For those who write it out again: `backend`,
    what encodes; `special_tokens`: role (`eos_token`) -> string; `templates`: name -> jinja source.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        adds_bos: bool,
        special_tokens: Mapping[str, str],
        templates: Mapping[str, str],
    ) -> None:
        """`special_tokens`: what a chat template may name, as `bos_token`; `templates`: name ->
        jinja source.
        """
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

    @property
    def chat_template(self) -> str | None:
        """The source of the template for a chat without tools; None where the model has none."""
        return self.templates.get("default")

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """The ids of `text`. Control strings in it stay text unless `special`; `bos` puts `bos_id`
        in front.

        Raises `BadInput` for a string that isn't Unicode text, and for `bos` where there is no such
        token.
        """
        check_text(text)
        if bos and self.bos_id is None:
            raise BadInput("this vocabulary has no token that begins a sequence: encode with bos=False")
        with refusing("the tokenizer can't encode this text"):
            ids = self.backend.encode(text, special=special)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int], *, special: bool = False, continues: bool = False) -> str:
        """The text of `ids`, control tokens left out unless `special`; bytes that aren't UTF-8
        become U+FFFD.

        `continues`: text comes before the first id, so a SentencePiece vocabulary's leading space
        is kept.
        """
        stream = self.stream(special=special, continues=continues)
        return "".join([*(stream.add(token) for token in ids), stream.finish()])

    def stream(self, *, special: bool = False, continues: bool = False) -> Detokenizer:
        """A fresh incremental `decode`."""
        return Detokenizer(self, special=special, continues=continues)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for; none for an id past the vocabulary (embeddings are
        padded).
        """
        return self.backend.token_bytes(token) if self._known(token) else b""

    def first_bytes(self, token: int) -> bytes:
        """The same where the id opens a text: without the space that encoding put in front."""
        return self.backend.first_bytes(token) if self._known(token) else b""

    def _known(self, token: int) -> bool:
        if token < 0:
            raise BadInput(f"{token} is not a token id: ids are 0 or more")
        return token < self.vocab_size

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """The ids of a conversation, by the model's own template, which also owns BOS.

        Control tokens come from the template's own text alone: one that is spelled out in a
        message, tool or variable is encoded as the characters it is made of. Raises `BadInput`
        where there is no template, where the messages aren't dicts with role and content, and for
        whatever the template itself complains of.
        """
        from pentad.text.chat_template import render_guarded

        rendered, sentinel = render_guarded(
            self._template("tool_use" if tools is not None else "default"),
            self.backend.control,
            {"messages": messages, "tools": tools, "documents": None, **variables},
            {**self.special_tokens, "add_generation_prompt": add_generation_prompt},
        )
        control: ControlStrings = self.backend.control
        plain = rendered.replace(sentinel, "")
        check_text(plain)
        parts = control.split(rendered, sentinel)
        if parts == control.split(plain):  # nothing was forged
            return self.backend.encode(plain, special=True)
        return self.backend.encode_parts(parts)

    def _template(self, name: str) -> ChatTemplate:
        from pentad.text.chat_template import ChatTemplate

        if name not in self.templates:
            name = "default"
        if name not in self.templates:
            raise BadInput("this model has no chat template: complete plain text instead")
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.templates[name])
        return self._compiled[name]


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Makes `BadInput` of whatever libraries raise over a stranger's files, a panic of Rust code included."""
    try:
        yield
    except PentadError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def check_text(text: str) -> None:
    """Raises `BadInput` where `text` isn't a string, or can't be written as UTF-8."""
    if not isinstance(text, str):
        raise BadInput(f"a text is a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start} is a lone surrogate"
        raise BadInput(f"the text is not valid UTF-8 ({where}): save it as UTF-8") from None
