"""One answer to one prompt: printed as it comes, or as JSON when it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from typer import Exit

from pentad.cli import output
from pentad.cli.interrupts import CtrlC
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.generate import Completion, EncoderDecoderModel, LanguageModel, Options, Stream

INTERRUPTED = 130  # exit code: 128 and the number of SIGINT


def options(logprobs: int | None, as_json: bool, **rest: Any) -> Options:
    """What was given on the command line, as `LanguageModel` takes it."""
    if logprobs is not None and not as_json:
        raise BadInput("--logprobs reports in JSON: add --json")
    given = {name: value for name, value in rest.items() if value is not None}
    return {**given, "logprobs": logprobs}  # type: ignore[typeddict-item]


def follow(stream: Stream, write: Callable[[str], None], ctrl_c: CtrlC) -> Completion:
    """Write a reply as it comes, to its end or to where Ctrl-C is pressed gently."""
    ctrl_c.stop = stream.stop
    written = 0
    with stream:
        for piece in stream:
            write(piece)
            written += len(piece)
    completion = stream.completion
    write(completion.text[written:])  # what was held back, as it might have begun a stop string
    return completion


def answer(
    name: str,
    load: Callable[[], LanguageModel | EncoderDecoderModel],
    begin: Callable[[Any], Stream],
    *,
    as_json: bool,
) -> None:
    """Load a model, run one prompt to its end, and write what came of it.

    Raises:
        typer.Exit: with 130 where it was interrupted.
    """
    stream: Stream | None = None
    with CtrlC() as ctrl_c:
        try:
            model = load()
            ctrl_c.gently = True
            stream = begin(model)
            follow(stream, (lambda _: None) if as_json else output.write, ctrl_c)
        except KeyboardInterrupt:
            pass  # what was said so far is in the stream
        completion = None if stream is None else stream.completion
        if as_json:
            output.write_json(_nothing(name) if completion is None else as_fields(completion))
        elif completion is not None:
            output.write("\n")
            if cut_off(completion, model):
                output.note(f"(cut off: the context of {model.context_length} tokens is full)")
    if completion is None or completion.finish_reason == "interrupted":
        raise Exit(INTERRUPTED)


def cut_off(completion: Completion, model: LanguageModel | EncoderDecoderModel) -> bool:
    """Whether a reply ended because the context was full."""
    return completion.finish_reason == "length" and model.is_full(completion)


def as_fields(completion: Completion) -> dict[str, Any]:
    """The fields of a completion, log-probabilities only where they were asked for."""
    fields = asdict(completion)
    if completion.logprobs is None:
        del fields["logprobs"]
    return fields


def _nothing(name: str) -> dict[str, Any]:
    """What there is of a completion before the model is loaded."""
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
