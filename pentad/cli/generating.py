"""``pentad chat``, ``complete`` and ``score``: what language models do with text."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.answer import answer, options
from pentad.cli.conversation import Conversation
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.generate import EncoderDecoderModel, LanguageModel, Stream

System = Annotated[str | None, Option(metavar="TEXT", help="The system message.")]
Truncate = Annotated[bool, Option("--truncate", help="Drop the oldest turns when the context is full.")]
Special = Annotated[bool, Option("--special", help="Let control strings become control tokens.")]
Stride = Annotated[
    int | None,
    Option(min=1, metavar="N", help="Slide a window by N tokens over a text that is too long."),
]
File = Annotated[str, Argument(metavar="FILE", help="A text in UTF-8, taken as it is; - reads standard input.")]


def chat(
    prompt: o.Prompt = None,
    model: o.Model = o.DEFAULT_MODEL,
    system: System = None,
    truncate: Truncate = False,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    presence_penalty: o.PresencePenalty = None,
    frequency_penalty: o.FrequencyPenalty = None,
    max_tokens: o.MaxTokens = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    logprobs: o.Logprobs = None,
    dtype: o.Precision = None,
    quantize: o.Quantize = None,
    device: o.Device = None,
    threads: o.Threads = None,
    fast: o.Fast = False,
    context: o.Context = None,
    as_json: o.Json = False,
) -> None:
    """Talk to a model.

    With PROMPT, or with standard input that is no terminal, one question and one answer; else a
    conversation, where /help lists what can be done.

    JSON: model, text, token_ids, prompt_token_ids, finish_reason (stop, length or interrupted),
    prompt_tokens, completion_tokens, seconds {load, prefill, decode}, logprobs if asked for.
    """
    chosen = options(
        logprobs,
        as_json,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop,
    )
    load = partial(
        o.load,
        model,
        dtype=dtype,
        quantize=quantize,
        device=device,
        threads=threads,
        context=context,
        fast=fast,
    )
    if prompt is None and sys.stdin.isatty():
        if as_json:
            raise BadInput("--json answers one prompt: give PROMPT, or standard input")
        from pentad.cli.interactive import Loop

        Loop(Conversation(o.decoder_only(load(), "chat"), chosen, system=system, truncate=truncate)).run()
        return
    text = o.read_text(None).removesuffix("\n") if prompt in (None, "-") else str(prompt)
    if not text.strip():
        raise BadInput("the prompt is empty: say something, or run pentad chat at a terminal")

    def begin(loaded: LanguageModel | EncoderDecoderModel) -> Stream:
        conversation = Conversation(o.decoder_only(loaded, "chat"), chosen, system=system, truncate=truncate)
        conversation.add("user", text)
        conversation.fit()
        return conversation.stream()

    answer(model, load, begin, as_json=as_json)


def complete(
    prompt: o.Prompt = None,
    model: o.Model = o.DEFAULT_MODEL,
    special: Special = False,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    min_p: o.MinP = None,
    repetition_penalty: o.RepetitionPenalty = None,
    presence_penalty: o.PresencePenalty = None,
    frequency_penalty: o.FrequencyPenalty = None,
    max_tokens: o.MaxTokens = None,
    seed: o.Seed = None,
    stop: o.Stop = None,
    logprobs: o.Logprobs = None,
    dtype: o.Precision = None,
    quantize: o.Quantize = None,
    device: o.Device = None,
    threads: o.Threads = None,
    fast: o.Fast = False,
    context: o.Context = None,
    as_json: o.Json = False,
) -> None:
    """Continue a text, without a chat template.

    Standard input is taken as it is, the end of its last line included.

    JSON: as chat.
    """
    text = o.read_text(None) if prompt in (None, "-") else str(prompt)
    chosen = options(
        logprobs,
        as_json,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        max_tokens=max_tokens,
        seed=seed,
        stop=stop,
    )
    load = partial(
        o.load,
        model,
        dtype=dtype,
        quantize=quantize,
        device=device,
        threads=threads,
        context=context,
        fast=fast,
    )
    answer(model, load, lambda loaded: loaded.stream(text, special=special, **chosen), as_json=as_json)


def score(
    file: File,
    model: o.Model = o.DEFAULT_MODEL,
    stride: Stride = None,
    dtype: o.Precision = None,
    quantize: o.Quantize = None,
    device: o.Device = None,
    threads: o.Threads = None,
    fast: o.Fast = False,
    context: o.Context = None,
    as_json: o.Json = False,
) -> None:
    """Say how likely a model finds a text.

    JSON: model, tokens, log_likelihood (natural, summed over all tokens but the first), perplexity.
    """
    text = o.read_text(file)
    loaded = o.load(model, dtype=dtype, quantize=quantize, device=device, threads=threads, context=context, fast=fast)
    result = o.decoder_only(loaded, "score a text").score(text, stride=stride)
    if as_json:
        output.write_json(asdict(result))
    else:
        output.write(
            f"{result.tokens} tokens, log-likelihood {result.log_likelihood:.4f}, perplexity {result.perplexity:.4f}\n"
        )
