"""Constrained output: which tokens may come next, so that a text stays within a grammar (llguidance)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.text.files import refusing
from pentad.text.grammar import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from pentad.text import Tokenizer

STACK_BYTES = 256 << 20  # llguidance compiles nested grammars by recursion
# A grammar within these limits compiles in about a second, and delays a step by some milliseconds.
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "max_grammar_size": 100_000,
    "max_lexer_states": 10_000,
    "step_max_items": 20_000,
    "verbose_errors": False,
}
# Forced text would be computed and tokenized as a whole in each step, however long it is.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


class Matcher:
    """The state of one text within a constraint.

    Args:
        matcher: llguidance's.
        vocab_size: the number of the network's logits.
        openers: token -> the id, in llguidance's vocabulary, of its bytes at the beginning of a text, if they differ.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, openers: Mapping[int, int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._openers = openers
        self._begun = False

    @property
    def complete(self) -> bool:
        """True if no token can follow."""
        return self._matcher.is_stopped()

    def mask(self) -> Tensor:
        """The tokens that may come next; end tokens are among them if the text may end here.

        Returns:
            bool [V].

        Raises:
            BadInput: there are none, or they can't be found within the limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)
        mask = allowed[: self._vocab_size]
        if not self._begun and self._openers:
            mask[list(self._openers)] = allowed[list(self._openers.values())]
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """Append a token to the text.

        Raises:
            BadInput: the token can't come next, or the state exceeds the limits.
        """
        self._matcher.consume_token(token if self._begun else self._openers.get(token, token))
        self._check()
        self._begun = True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BadInput(f"the grammar can't be followed: {_reason(self._matcher)}")


class Compiler:
    """Compiles constraints for one tokenizer. Several threads may call it.

    Args:
        tokenizer: the model's.
        vocab_size: the number of the network's logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabularies: dict[bool, tuple[LLTokenizer, Mapping[int, int]]] = {}

    def matcher(self, constraint: Constraint, *, opens: bool) -> Matcher:
        """Compile a constraint.

        Args:
            constraint: what the text must be.
            opens: the text's first token opens a text, so that it loses the space in front, as in a chat.

        Raises:
            BadInput: llguidance isn't installed, or refuses the grammar, or the vocabulary can't spell any text of it.
        """
        if not isinstance(constraint, Constraint):
            raise BadInput(f"constraint is a {type(constraint).__name__}; expected a pentad.Constraint")
        return _with_deep_stack(lambda: self._compile(constraint, opens))

    def _compile(self, constraint: Constraint, opens: bool) -> Matcher:
        llguidance = _llguidance()
        vocabulary, openers = self._vocabulary(opens)
        grammar = json.dumps({"grammars": [{"lark_grammar": constraint.grammar + _OPTIONS}]})
        with refusing("the grammar can't be used"):
            limits = llguidance.LLParserLimits(**LIMITS)
            compiled = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if compiled.is_error():
            raise BadInput(f"the grammar can't be used: {_reason(compiled)}")
        if warnings := compiled.get_grammar_warnings():
            raise BadInput(f"the grammar would not be enforced: {warnings[0][:300]}")
        matcher = Matcher(compiled, self._vocab_size, openers)
        matcher.mask()  # raises an error if the first step is too complex
        return matcher

    def _vocabulary(self, opens: bool) -> tuple[LLTokenizer, Mapping[int, int]]:
        """llguidance's vocabulary, and its additional tokens for the beginning of a text."""
        with self._lock:
            if opens not in self._vocabularies:
                words = [self._tokenizer.token_bytes(token) for token in range(self._vocab_size)]
                first = [self._tokenizer.first_bytes(token) if opens else word for token, word in enumerate(words)]
                different = [token for token, word in enumerate(words) if first[token] != word]
                openers = {token: self._vocab_size + number for number, token in enumerate(different)}
                words += [first[token] for token in different]
                self._vocabularies[opens] = (self._build(words), openers)
            return self._vocabularies[opens]

    def _build(self, words: list[bytes]) -> LLTokenizer:
        llguidance = _llguidance()
        ends = [token for token in self._tokenizer.eos_ids if token < self._vocab_size]
        words = words if ends else [*words, b""]  # no token of the network ends a text
        ends = ends or [len(words) - 1]
        control = [token for token in self._tokenizer.control.values() if token < self._vocab_size]
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(words, ends[0], control))
        made: LLTokenizer = llguidance.LLTokenizer(wrapped, eos_token=ends)
        return made


class _Vocabulary:
    """A vocabulary as llguidance reads it; it doesn't tokenize without forced texts."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], end: int, control: list[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = end
        self.special_token_ids = control

    def __call__(self, text: bytes) -> list[int]:
        return []


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise BadInput("constraints need llguidance: pip install 'pentad[serve]'") from None
    return llguidance


def _reason(matcher: LLMatcher) -> str:
    """llguidance's error without the excerpt of the grammar."""
    first = matcher.get_error().replace("<non-verbose/>", "").split("\n   1 |")[0]
    return " ".join(first.split())[:300]


def _with_deep_stack(work: Callable[[], Matcher]) -> Matcher:
    """Run `work` in a thread with a large stack, which the system provides as it is used."""
    results: list[Matcher] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run, name="pentad-grammar")
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
