"""Drafts by prompt lookup: text often repeats what it quotes, edits or summarizes.

Source: A. Saxena, Prompt Lookup Decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Sequence

NGRAM = 3  # so many tokens must have occurred before
MEMORY = 32  # drafted tokens that an acceptance rate remembers
PAUSE = 64  # new tokens without drafts, once drafts haven't paid


class PromptLookup:
    """Drafts the tokens that followed the last tokens where these occurred before.

    It begins with one token, and pauses when too few are accepted.

    Args:
        prompt: the request's prompt.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt)
        self._prompt_length = len(prompt)
        self._next: dict[tuple[int, ...], int] = {}  # the last tokens -> the position after their last occurrence
        self._indexed = NGRAM
        self._drafted = self._accepted = 0.0
        self._paused_until = 0

    def draft(self, generated: Sequence[int], most: int, break_even: float) -> list[int]:
        """At most `most` tokens that may follow the prompt and the generated tokens.

        Args:
            generated: the request's tokens so far.
            most: maximum number of tokens.
            break_even: the share of drafted tokens that must be accepted for drafts to pay.
        """
        tokens = self._tokens
        tokens += generated[len(tokens) - self._prompt_length :]
        if most < 1 or len(tokens) < max(NGRAM, self._paused_until):
            return []
        if (self._accepted + 2) / (self._drafted + 2) < break_even:
            self._drafted = self._accepted = 0.0
            self._paused_until = len(tokens) + PAUSE
            return []
        for end in range(self._indexed, len(tokens)):
            self._next[tuple(tokens[end - NGRAM : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        at = self._next.get(tuple(tokens[-NGRAM:]))
        if at is None:
            return []
        period = len(tokens) - at  # what follows may be repeated, too
        return [tokens[at + i % period] for i in range(min(most, 1 + int(self._accepted)))]

    def learn(self, drafted: int, accepted: int) -> None:
        """Add to the acceptance rate."""
        self._drafted += drafted
        self._accepted += accepted
        if self._drafted > MEMORY:
            self._drafted, self._accepted = self._drafted / 2, self._accepted / 2
