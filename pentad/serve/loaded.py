"""What the front process knows about a model that its worker has loaded: its task, its tokenizer, and limits."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pentad import text
from pentad.errors import BadInput
from pentad.serve.tools import OPEN, described, with_calls
from pentad.text import Tokenizer
from pentad.weights.gguf_header import read_metadata

MAX_CHARACTERS = 32  # per token of the context, of all texts of a prompt: bounds the time that encoding takes


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready.

    Attributes:
        task: a key of `pentad.models.family.TASKS`.
        backend: what runs its steps: "by the kernels (avx2, 2 threads)".
        weights_bytes: of its weights.
        words: whether a segmenter takes texts.
    """

    task: str
    backend: str
    weights_bytes: int
    words: bool = False


@dataclass(frozen=True, kw_only=True)
class Loaded(LoadedModel):
    """A language model that is ready.

    Attributes:
        tokenizer: the same as the worker's.
        context_length: maximum sequence length in tokens.
        vocab_size: token ids are smaller.
        cache_tokens: the number of tokens that the KV cache has room for.
    """

    tokenizer: Tokenizer
    context_length: int
    vocab_size: int
    cache_tokens: int

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """The prompt of a conversation; templates know "developer" by its older name, "system".

        Args:
            messages: the conversation.
            tools: functions that may be called, as in the request.

        Raises:
            BadInput: the template refuses the messages, or they are much too long for the context.
        """
        if len(messages) > self.context_length:
            raise BadInput(f"{len(messages)} messages are too many for the context of {self.context_length} tokens")
        contents = (message.get("content") or () for message in messages)
        parts = (part for content in contents for part in ([content] if isinstance(content, str) else content))
        texts = [part if isinstance(part, str) else part["text"] for part in parts]
        self._check_size([*texts, json.dumps([*tools, *(message.get("tool_calls") for message in messages)])])
        older = with_calls([{**m, "role": "system"} if m["role"] == "developer" else {**m} for m in messages])
        called = bool(tools) or any(m["role"] == "tool" or m.get("tool_calls") for m in older)
        templates = self.tokenizer.templates
        if called and OPEN.strip() not in templates.get("tool_use", templates.get("default", "")):
            return self.tokenizer.chat(described(older, tools))
        return self.tokenizer.chat(older, tools=list(tools) or None)

    def encode_prompts(self, prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        """The token ids of one or several prompts, each a text or token ids.

        Raises:
            BadInput: a text is much too long for the context, or an id is outside the vocabulary.
        """
        one = isinstance(prompts, str) or isinstance(prompts[0], int)
        return [self._encode_prompt(prompt) for prompt in ([prompts] if one else prompts)]

    def _encode_prompt(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.encode_text(prompt)
        self.check_ids(prompt)
        return list(prompt)

    def encode_text(self, prompt: str) -> list[int]:
        """The prompt that a text is, between the tokens that the tokenizer's files put around a text.

        Raises:
            BadInput: the text is much too long for the context.
        """
        self._check_size([prompt])
        tokenizer = self.tokenizer
        return [*tokenizer.encode(prompt, bos=tokenizer.adds_bos), *tokenizer.closing]

    def _check_size(self, texts: Iterable[str]) -> None:
        size, limit = sum(map(len, texts)), MAX_CHARACTERS * self.context_length
        if size > limit:
            message = f"expected at most {limit:,} for the context of {self.context_length} tokens"
            raise BadInput(f"the text has {size:,} characters; {message}")

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise BadInput if a token id is outside the vocabulary."""
        for wrong in (min(ids), max(ids)):
            if not 0 <= wrong < self.vocab_size:
                raise BadInput(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")


def describe(ready: Mapping[str, Any]) -> LoadedModel:
    """What is known about a model whose worker has sent `ready`; the tokenizer is read."""
    if ready["task"] != "language":
        return LoadedModel(**ready)
    path = Path(ready["path"])
    config = read_metadata(path) if ready["format"] == "gguf" else ready["config"]
    tokenizer = text.load(_Source(path, ready["format"], config), vocab_size=ready["vocab_size"])
    assert tokenizer is not None  # the worker has one
    names = ("task", "context_length", "vocab_size", "backend", "weights_bytes", "cache_tokens")
    return Loaded(tokenizer=tokenizer, **{name: ready[name] for name in names})


@dataclass(frozen=True)
class _Source:
    path: Path
    format: str
    config: Mapping[str, Any]
