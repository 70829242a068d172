"""The options that several commands share, each declared once, and what they are for: loading, generating, reading."""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from typer import Argument, Option

from pentad.cli import output
from pentad.cli.making import train_if_missing
from pentad.cli.paths import model_names
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.generate import EncoderDecoderModel, LanguageModel, Options

DEFAULT_MODEL = "smollm2"


class DtypeName(StrEnum):
    """The dtypes that weights and activations can have."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, Option("--json", help="Write JSON to standard output.")]
Prompt = Annotated[
    str | None, Argument(metavar="PROMPT", help="The prompt. If omitted or -, it is read from standard input.")
]
Context = Annotated[int | None, Option(min=1, metavar="N", help="Longest sequence in tokens. Default: the model's.")]
Dtype = Annotated[
    DtypeName | None,
    Option(
        metavar="TYPE",
        help="Compute in float32, bfloat16 or float16 with plain PyTorch; turns the CPU kernels off."
        " Default: as the weights are stored.",
    ),
]
Quantize = Annotated[
    str | None,
    Option(
        metavar="TYPE",
        help="Quantize float weights while loading: q8_0, q5_1, q5_0, q4_1, q4_0 or q4_k (a CPU only)."
        " none dequantizes instead, and turns the CPU kernels off. Default: as in the file.",
    ),
]
Device = Annotated[
    str | None, Option(metavar="NAME", help="cpu, cuda or mps. Default: CUDA if there is a GPU, else the CPU.")
]
Threads = Annotated[int | None, Option(min=1, max=1024, metavar="N", help="CPU threads.")]


@dataclass(frozen=True)
class Loading:
    """Options of every command that loads a model."""

    model: Annotated[
        str,
        Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A name, a file, a folder, or org/name[@revision][:Q4_K_M].",
            autocompletion=model_names,
        ),
    ] = DEFAULT_MODEL
    dtype: Dtype = None
    quantize: Quantize = None
    adapter: Annotated[
        Path | None,
        Option(metavar="DIR", help="A LoRA adapter in PEFT's format, merged into the weights while they are loaded."),
    ] = None
    device: Device = None
    threads: Threads = None
    fast: Annotated[
        bool,
        Option("--fast", help="The CPU kernels round activations to 8 bits instead of 16 where weights are quantized."),
    ] = False
    context: Context = None

    def load(self) -> LanguageModel | EncoderDecoderModel:
        """`pentad.load`, with progress on the terminal, and a note if an option turns the kernels off."""
        with output.status(f"loading {self.model} …"):
            from pentad.weights import registry

            registry.check(self.model)  # an unknown name is refused before torch's import
            from pentad import kernels
            from pentad.generate import LanguageModel
            from pentad.loading import load
            from pentad.models.family import TASKS
            from pentad.vision.runner import VisionModel

            values = {field.name: getattr(self, field.name) for field in fields(self)}
            loaded = load(values.pop("model"), **values, progress=output.progress())
        if isinstance(loaded, VisionModel):
            raise BadInput(f"{self.model} is {TASKS[loaded.task]}")
        if self.adapter is not None:
            output.note(f"pentad: {self.model} runs with {self.adapter} merged into its weights, {loaded.step.backend}")
        elif isinstance(loaded, LanguageModel) and loaded.network.device.type == "cpu":
            why = loaded.step.backend.removeprefix("as plain torch: ")
            if kernels.isas() and (self.dtype or self.quantize == "none"):
                why = f"{'--dtype' if self.dtype else '--quantize'} turns the CPU kernels off"
            if why != loaded.step.backend:
                output.note(f"pentad: plain PyTorch runs the model, more slowly than the CPU kernels: {why}")
        return loaded

    def load_decoder_only(self, verb: str) -> LanguageModel:
        """`load`; raises BadInput if the model is an encoder-decoder, for which `verb` is not defined."""
        return decoder_only(self.load(), verb)


@dataclass(frozen=True)
class VisionLoading:
    """Options of every command that loads a vision model."""

    dtype: Annotated[
        DtypeName | None,
        Option(
            metavar="TYPE", help="Compute in float32, bfloat16 or float16. Default: float32 on a CPU, or as stored."
        ),
    ] = None
    device: Device = None
    threads: Threads = None

    def load(self, model: str, *tasks: str) -> Any:
        """`pentad.load`, with progress on the terminal; BadInput if the model has none of the tasks.

        A model that is trained on this machine is trained if it isn't yet.
        """
        from pentad.weights import registry

        registry.check(model)
        train_if_missing(model)
        with output.status(f"loading {model} …"):
            from pentad.loading import load
            from pentad.models.family import TASKS

            options = {field.name: getattr(self, field.name) for field in fields(self)}
            loaded = load(model, **options, progress=output.progress())
        found = getattr(loaded, "task", "language")
        if found not in tasks:
            raise BadInput(f"{model} is {TASKS[found]}")
        return loaded


def decoder_only(model: LanguageModel | EncoderDecoderModel, verb: str) -> LanguageModel:
    """The model; BadInput if it is an encoder-decoder, for which `verb` is not defined."""
    from pentad.generate import LanguageModel

    if not isinstance(model, LanguageModel):
        raise BadInput(f"{model.name} is an encoder-decoder, which can't {verb}: use pentad complete")
    return model


@dataclass(frozen=True)
class Generating:
    """Options of every command that generates text; None takes the checkpoint's recommendation."""

    temperature: Annotated[
        float | None,
        Option(min=0, max=100, metavar="X", help="0 takes the likeliest token. Default: as recommended, else 0.7."),
    ] = None
    top_k: Annotated[int | None, Option(min=0, metavar="N", help="Choose among the N likeliest tokens; 0: all.")] = None
    top_p: Annotated[
        float | None,
        Option(
            min=0,
            max=1,
            metavar="X",
            help="Choose among the likeliest tokens whose probabilities sum to X. Default: as recommended, else 0.95.",
        ),
    ] = None
    min_p: Annotated[
        float | None, Option(min=0, max=1, metavar="X", help="Drop tokens less likely than X times the likeliest one.")
    ] = None
    repetition_penalty: Annotated[
        float | None,
        Option(min=0.01, max=100, metavar="X", help="Divide the logits of tokens that occurred by X; 1: off."),
    ] = None
    presence_penalty: Annotated[
        float | None, Option(min=-100, max=100, metavar="X", help="Subtract X from the logits of generated tokens.")
    ] = None
    frequency_penalty: Annotated[
        float | None, Option(min=-100, max=100, metavar="X", help="The same, times how often the token was generated.")
    ] = None
    max_tokens: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Generate at most N tokens. Default: what the context has room for."),
    ] = None
    seed: Annotated[
        int | None, Option(min=0, max=2**32 - 1, metavar="N", help="The same seed gives the same text.")
    ] = None
    stop: Annotated[list[str] | None, Option(metavar="TEXT", help="Stop before TEXT; may be repeated.")] = None
    logprobs: Annotated[
        int | None,
        Option(min=0, metavar="N", help="With --json: each token's log-probability, and the N likeliest tokens."),
    ] = None

    schema: Annotated[
        Path | None, Option(metavar="FILE", help="A JSON schema: the text is JSON that it describes.")
    ] = None

    def options(self, *, as_json: bool) -> Options:
        """The options that were given, as `LanguageModel.stream` takes them."""
        if self.logprobs is not None and not as_json:
            raise BadInput("--logprobs reports in JSON: add --json")
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if (schema := given.pop("schema")) is not None:
            from pentad.text.grammar import Constraint

            given["constraint"] = Constraint.json_schema(_read_schema(schema), str(schema))
        return {name: value for name, value in given.items() if value is not None}  # type: ignore[return-value]


def _read_schema(file: Path) -> Any:
    try:
        return json.loads(read_text(str(file)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file} is not JSON: {error}") from None


DECLARED: dict[str, Any] = {}
"""Parameter name -> its annotation, for all commands."""


def expected(name: str) -> str:
    """A description of the values that an option takes: "a number from 0 to 100"."""
    kind = get_args(DECLARED[name])[0]
    kind = next((one for one in get_args(kind) if one is not NoneType), kind)
    low, high = _range(name)
    if issubclass(kind, StrEnum):
        return "one of " + ", ".join(kind)
    words = {float: "a number", int: "a whole number"}.get(kind, "a text")
    return words + (f" from {low:g}" if low is not None else "") + (f" to {high}" if high is not None else "")


def _range(name: str) -> tuple[float | None, float | None]:
    info = get_args(DECLARED[name])[1]
    return getattr(info, "min", None), getattr(info, "max", None)


def check(name: str, value: float) -> None:
    """Raise BadInput if a value is outside an option's range, or NaN."""
    low, high = _range(name)
    if not (-math.inf if low is None else low) <= value <= (math.inf if high is None else high):
        raise BadInput(f"{name} is {value}; expected {expected(name)}")


def check_typed(text: str | None, source: str) -> None:
    """Raise BadInput if the terminal's encoding has garbled a text of the command line."""
    if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
        encoding = sys.getfilesystemencoding()
        raise BadInput(f"{source} isn't valid {encoding}, this terminal's encoding: set LC_ALL=C.UTF-8 or PYTHONUTF8=1")


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: each parameter of a dataclass type becomes the options that its fields declare."""
    hints = get_type_hints(command, include_extras=True)
    options: dict[str, inspect.Parameter] = {}
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        declared = [(parameter.name, parameter.default, hint)]
        if is_dataclass(hint):
            groups[parameter.name] = hint
            field_hints = get_type_hints(hint, include_extras=True)
            declared = [(field.name, field.default, field_hints[field.name]) for field in fields(hint)]
        for name, default, annotation in declared:
            options[name] = inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
            )

    DECLARED.update({name: option.annotation for name, option in options.items()})

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    run.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    return run


def read_text(source: str | None) -> str:
    """The text of a file, unchanged; of standard input if `source` is "-" or None.

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
