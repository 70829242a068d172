"""A text that is being generated, in pieces."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pentad.generate.completion import Completion
from pentad.generate.requests import Generation
from pentad.text.transcript import Transcript

if TYPE_CHECKING:
    from pentad.generate.runner import Runner


class Stream(Iterator[str]):
    """Pieces of text while they are generated; `completion` is the result so far.

    `close` ends a stream early, as does leaving a ``with`` block, or deleting the last reference to the stream.
    """

    def __init__(self, runner: Runner, request: Generation, transcript: Transcript) -> None:
        self._runner = runner
        self._request = request
        self._transcript = transcript
        self._tokens_read = 0
        self._text_read = 0
        self._stopping = False
        self._started = time.perf_counter()
        self._first_token: float | None = None
        self._last_token = self._started

    def __repr__(self) -> str:
        state = self._request.finish_reason or "running"
        return f"<Stream of {self._runner.name!r}: {len(self._request.generated)} tokens, {state}>"

    def __next__(self) -> str:
        while not self._runner._read(self):
            if self._request.error is not None:
                raise self._request.error
            if self._stopping or self._request.finish_reason is not None:
                raise StopIteration
            self._runner._advance(self._request)
        piece = self._transcript.text[self._text_read :]
        self._text_read += len(piece)
        return piece

    def stop(self) -> None:
        """End the iteration after the current step. A signal handler may call this."""
        self._stopping = True

    def close(self) -> None:
        """Stop generating and keep the text so far."""
        self._runner._close(self)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        """Add the request's new tokens to the text."""
        request = self._request
        if len(request.generated) > self._tokens_read:
            self._last_token = time.perf_counter()
            self._first_token = self._first_token or self._last_token
        for token in request.generated[self._tokens_read :]:
            self._tokens_read += 1
            self._transcript.add(token)
            if self._transcript.stopped:
                break
        if request.finish_reason is not None and not self._transcript.stopped:
            self._transcript.finish()
        if self._transcript.stopped:  # even if the request has ended by length with the same token
            self._runner._engine.cancel(request)
            request.finish_reason = "stop"
            del request.generated[self._tokens_read :], request.token_logprobs[self._tokens_read :]

    @property
    def completion(self) -> Completion:
        """The text so far, with its tokens and times."""
        request, reason = self._request, self._request.finish_reason
        prompt = request.prompt if request.source is None else request.source
        total = self._last_token - self._started
        prefill = total if self._first_token is None else self._first_token - self._started
        return Completion(
            model=self._runner.name,
            text=self._transcript.text,
            token_ids=list(request.generated),
            prompt_token_ids=list(prompt),
            finish_reason=reason if reason in ("stop", "length") else "interrupted",
            prompt_tokens=len(prompt),
            completion_tokens=len(request.generated),
            seconds={"load": self._runner.load_seconds, "prefill": prefill, "decode": total - prefill},
            logprobs=None if request.logprobs is None else list(request.token_logprobs),
        )
