"""``pentad chat``, ``complete`` and ``score``: what language models do with text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pentad import terminal
from pentad.cli import options as o
from pentad.cli.answer import answer
from pentad.cli.conversation import Conversation
from pentad.cli.rows import complete_rows, score_rows, show_score
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.generate import EncoderDecoderModel, LanguageModel, Stream

System = Annotated[str | None, Option(metavar="TEXT", help="The system message.")]
Truncate = Annotated[bool, Option("--truncate", help="Drop the oldest turns when the context is full.")]
Special = Annotated[bool, Option("--special", help="Read control tokens such as <|im_start|> in the prompt.")]
Given = Annotated[str | None, Option(metavar="PROMPT", help="Score the text as the continuation of this prompt.")]
Stride = Annotated[
    int | None,
    Option(min=1, metavar="N", help="Score a text longer than the context in windows, each N tokens further on."),
]
File = Annotated[
    str,
    Argument(
        metavar="FILE",
        help='A text in UTF-8, scored unchanged; - reads standard input. The rows {"text"} or {"prompt", "completion"}'
        " of a FILE.jsonl are scored one by one.",
    ),
]
Out = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help='PROMPT is a file of rows {"prompt"} or {"messages"}: complete each, and write FILE.jsonl.'
        " If FILE is there, continue it.",
    ),
]


def chat(
    prompt: o.Prompt = None,
    *,
    loading: o.Loading,
    system: System = None,
    truncate: Truncate = False,
    generating: o.Generating,
    as_json: o.Json = False,
) -> None:
    """Talk to a model.

    With PROMPT or piped input, answers once; piped input is appended to PROMPT. Otherwise starts a
    conversation; type /help for commands.

    JSON: model, text, token_ids, prompt_token_ids, finish_reason (stop, length or interrupted),
    prompt_tokens, completion_tokens, seconds {load, prefill, decode}, logprobs with --logprobs.
    """
    chosen = generating.options(as_json=as_json)
    for typed, source in ((prompt, "PROMPT"), (system, "--system")):
        o.check_typed(typed, source)
    if prompt is None and sys.stdin.isatty():
        if as_json:
            raise BadInput("--json answers one prompt: give PROMPT, or standard input")
        from pentad.cli.interactive import Loop, complete_line

        with terminal.quiet():
            model = loading.load_decoder_only("chat")
            from pentad.cli.prompting import Prompt

            Loop(Conversation(model, chosen, system=system, truncate=truncate), Prompt(complete_line)).run()
        return
    terminal.restore()
    text = _prompt(prompt).removesuffix("\n")
    if not text.strip():
        raise BadInput("the prompt is empty: say something, or run pentad chat at a terminal")

    def begin(loaded: LanguageModel | EncoderDecoderModel) -> Stream:
        conversation = Conversation(o.decoder_only(loaded, "chat"), chosen, system=system, truncate=truncate)
        conversation.add("user", text)
        conversation.fit()
        return conversation.stream()

    answer(loading, begin, as_json=as_json)


def _prompt(prompt: str | None) -> str:
    """PROMPT, then the text that is piped in; "-" stands for the text alone."""
    if prompt in (None, "-"):
        return o.read_text(None)
    piped = "" if sys.stdin.isatty() else o.read_text(None)
    return f"{prompt}\n\n{piped}" if piped.strip() else str(prompt)


def complete(
    prompt: o.Prompt = None,
    *,
    loading: o.Loading,
    special: Special = False,
    out: Out = None,
    generating: o.Generating,
    as_json: o.Json = False,
) -> None:
    """Continue a text, without a chat template; or the rows of a JSONL file, many at once, with --out.

    Standard input is taken unchanged, including the newline at its end.

    With --out each row's line has its fields, model, generated_with (the options), and those of the
    completion. Its seed is a function of --seed (default: 0) and its line number. A run that was
    interrupted continues if it is started again.

    JSON: as for chat; with --out rows, resumed, tokens, seconds.
    """
    if out is not None:
        complete_rows(prompt, out, loading, generating, special=special, as_json=as_json)
        return
    if prompt is not None and prompt.endswith(".jsonl") and Path(prompt).is_file():
        raise BadInput(f"{prompt} is a file; to complete its rows, add --out FILE.jsonl")
    text = o.read_text(None) if prompt in (None, "-") else str(prompt)
    o.check_typed(text, "PROMPT")
    chosen = generating.options(as_json=as_json)
    answer(loading, lambda loaded: loaded.stream(text, special=special, **chosen), as_json=as_json)


def score(file: File, loading: o.Loading, given: Given = None, stride: Stride = None, as_json: o.Json = False) -> None:
    """Measure how likely a model finds a text, a continuation of a prompt, or each row of a JSONL file.

    JSON: model, tokens, log_likelihood (natural; summed over all tokens but the first, or over the
    continuation), perplexity, greedy (whether each of these tokens is the most likely one). For
    FILE.jsonl one line a row, which begins with row, its line in the file.
    """
    if file.endswith(".jsonl"):
        if given is not None:
            raise BadInput("--given is for one text; expected rows with a prompt and a completion")
        score_rows(Path(file), loading, stride=stride, as_json=as_json)
        return
    text = o.read_text(file)
    show_score(loading.load_decoder_only("score a text").score(text, given=given, stride=stride), as_json=as_json)
