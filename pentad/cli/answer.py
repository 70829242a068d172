"""One answer to one prompt: text as it is generated, or JSON at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from typer import Exit

from pentad.cli import output
from pentad.cli.interrupts import CtrlC

if TYPE_CHECKING:
    from pentad.cli.options import Loading
    from pentad.generate import Completion, EncoderDecoderModel, LanguageModel, Stream

INTERRUPTED = 130  # exit code: 128 and the number of SIGINT


def follow(stream: Stream, write: Callable[[str], None], ctrl_c: CtrlC) -> Completion:
    """Write a reply as it is generated, until its end or the first Ctrl-C."""
    ctrl_c.stop = stream.stop
    written = 0
    with stream:
        for piece in stream:
            write(piece)
            written += len(piece)
    completion = stream.completion
    write(completion.text[written:])  # held back, as it might have begun a stop string
    return completion


def answer(loading: Loading, begin: Callable[[Any], Stream], *, as_json: bool) -> None:
    """Load a model, run one prompt, and write the completion.

    Raises:
        typer.Exit: with 130 if it was interrupted.
    """
    stream: Stream | None = None
    with CtrlC() as ctrl_c:
        try:
            model = loading.load()
            stream = begin(model)
            with nullcontext(lambda _: None) if as_json else output.generated() as write:
                follow(stream, write, ctrl_c)
        except KeyboardInterrupt:
            pass  # the stream has the reply so far
        completion = None if stream is None else stream.completion
        if as_json:
            output.write_json(_nothing(loading.model) if completion is None else as_fields(completion))
        elif completion is not None:
            output.write("\n")
            if cut_off(completion, model):
                output.note(f"(cut off: the context of {model.context_length} tokens is full)")
    if completion is None or completion.finish_reason == "interrupted":
        if not as_json:
            output.note("interrupted")
        raise Exit(INTERRUPTED)


def cut_off(completion: Completion, model: LanguageModel | EncoderDecoderModel) -> bool:
    """True if a reply ended because the context was full."""
    return completion.finish_reason == "length" and model.is_full(completion)


def as_fields(completion: Completion) -> dict[str, Any]:
    """The fields of a completion; log-probabilities only if they were requested."""
    fields = asdict(completion)
    if completion.logprobs is None:
        del fields["logprobs"]
    return fields


def _nothing(name: str) -> dict[str, Any]:
    """The completion of a run that was interrupted while the model was loading."""
    return {
        "model": name,
        "text": "",
        "token_ids": [],
        "prompt_token_ids": [],
        "finish_reason": "interrupted",
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "seconds": {"load": 0.0, "prefill": 0.0, "decode": 0.0},
    }
