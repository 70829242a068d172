"""The options that commands share, and what they are used for: loading a model, reading a text."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pentad.cli import output
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.generate import EncoderDecoderModel, LanguageModel

DEFAULT_MODEL = "smollm2"


class Dtype(StrEnum):
    """What numbers are computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, Option("--json", help="Write JSON to standard output.")]

# Loading
Model = Annotated[
    str,
    Option(metavar="NAME", help="A name, a file, a folder, or org/name[@revision][:Q4_K_M]."),
]
Precision = Annotated[
    Dtype | None,
    Option(
        "--dtype",
        metavar="TYPE",
        help="Let torch compute in float32, bfloat16 or float16; by default weights are taken as they are stored.",
    ),
]
Quantize = Annotated[
    str | None,
    Option(metavar="NAME", help="none: dequantize; by default weights stay as in the file."),
]
Device = Annotated[
    str | None,
    Option(metavar="NAME", help="cpu, cuda or mps; by default CUDA where there is one."),
]
Threads = Annotated[int | None, Option(min=1, max=1024, metavar="N", help="CPU threads.")]
Fast = Annotated[
    bool,
    Option("--fast", help="Let the CPU's kernels round to 8 bits instead of 16 where weights are quantized."),
]
Context = Annotated[
    int | None,
    Option(min=1, metavar="N", help="Longest sequence in tokens; by default the model's."),
]

# Generating; what is left out is as the checkpoint recommends
Temperature = Annotated[
    float | None,
    Option(
        min=0, max=100, metavar="X", help="0 takes the likeliest token. Default: the model's recommendation, else 0.7."
    ),
]
TopK = Annotated[int | None, Option(min=0, metavar="N", help="Choose among the N likeliest tokens; 0: all.")]
TopP = Annotated[
    float | None,
    Option(
        min=0,
        max=1,
        metavar="X",
        help="Choose among the likeliest that together reach X. Default: as recommended, else 0.95.",
    ),
]
MinP = Annotated[
    float | None,
    Option(min=0, max=1, metavar="X", help="Drop tokens below X times the likeliest one."),
]
RepetitionPenalty = Annotated[
    float | None,
    Option(min=0.01, max=100, metavar="X", help="Divide logits of tokens that occurred; 1: off."),
]
PresencePenalty = Annotated[
    float | None,
    Option(min=-100, max=100, metavar="X", help="Subtract from logits of generated tokens."),
]
FrequencyPenalty = Annotated[
    float | None,
    Option(min=-100, max=100, metavar="X", help="The same, once for each time they occurred."),
]
MaxTokens = Annotated[
    int | None,
    Option(min=1, metavar="N", help="Generate N at most; by default what the context has room for."),
]
Seed = Annotated[
    int | None,
    Option(min=0, max=2**32 - 1, metavar="N", help="The same seed gives the same text."),
]
Stop = Annotated[list[str] | None, Option(metavar="TEXT", help="Stop before TEXT; may be given several times.")]
Logprobs = Annotated[
    int | None,
    Option(min=0, metavar="N", help="Report each token's log-probability, and the N likeliest."),
]

Prompt = Annotated[str | None, Argument(metavar="PROMPT", help="The text; - or nothing reads standard input.")]


def load(
    model: str,
    *,
    dtype: Dtype | None,
    quantize: str | None,
    device: str | None,
    threads: int | None,
    context: int | None,
    fast: bool,
) -> LanguageModel | EncoderDecoderModel:
    """`pentad.load`, with progress on the terminal."""
    from pentad.loading import load

    return load(
        model,
        dtype=dtype,
        quantize=quantize,
        device=device,
        threads=threads,
        context=context,
        fast=fast,
        progress=output.progress(),
    )


def decoder_only(model: LanguageModel | EncoderDecoderModel, verb: str) -> LanguageModel:
    """The model; BadInput if it is an encoder-decoder, for which `verb` is not defined."""
    from pentad.generate import LanguageModel

    if not isinstance(model, LanguageModel):
        raise BadInput(f"{model.name} is an encoder-decoder, which can't {verb}: use pentad complete")
    return model


def read_text(source: str | None) -> str:
    """A file's text as it is, or standard input's where `source` is "-" or None.

    Raises:
        BadInput: the file can't be read, or isn't UTF-8.
    """
    name = "standard input" if source in (None, "-") else source
    try:
        data = sys.stdin.buffer.read() if source in (None, "-") else Path(str(source)).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not valid UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{name}: {(error.strerror or str(error)).lower()}") from None
