"""``pentad convert``: a checkpoint in another format."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.paths import model_names
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.upcycle import Upcycling

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def convert(
    source: Annotated[str, Argument(metavar="SRC", help="The model, as for --model.", autocompletion=model_names)],
    destination: Annotated[
        Path,
        Argument(
            metavar="DST",
            help="The output folder (for GGUF, state dicts and Darknet, the output file). It must not exist yet.",
        ),
    ],
    to: Annotated[
        str | None,
        Option(
            metavar="FORMAT",
            help="hf (for transformers), mistral (params.json and consolidated) or gguf (the default for DST.gguf);"
            " vision models: hf, state_dict (the published code's names; the default for DST.pth, .pt, .safetensors)"
            " onnx (Segment Anything: a folder), or darknet (the default for DST.cfg).",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        Option(
            metavar="TYPE", help="For gguf: q4_0, q4_1, q4_k, q5_0, q5_1, q8_0, f16, bf16 or f32. Default: as in SRC."
        ),
    ] = None,
    dtype: Annotated[
        o.DtypeName | None,
        Option(metavar="TYPE", help="For hf and mistral: float32, bfloat16 or float16. Default: as in SRC."),
    ] = None,
    upcycle: Annotated[
        str | None,
        Option(
            metavar="NUMBERS",
            help="Make a dense model a mixture of experts, as hf: experts=8,top_k=2; seed=N varies the routers.",
        ),
    ] = None,
    shard_size: Annotated[
        str, Option(metavar="SIZE", help="The largest size of a file of weights, such as 500MB or 5GB.")
    ] = "5GB",
    as_json: o.Json = False,
) -> None:
    """Write a model in another format, with its config, tokenizer and chat template.

    JSON: path, format, family, files, nbytes, notes (settings that the format can't hold), seconds.
    """
    if to is None and destination.suffix == ".gguf":
        to = "gguf"
    if to is None and destination.suffix == ".cfg":
        to = "darknet"
    if to is None and destination.suffix in (".pth", ".pt", ".safetensors"):
        to = "state_dict"
    if to is None and upcycle is None:
        raise BadInput("Missing option '--to'; expected hf, mistral, gguf, state_dict, onnx or darknet")
    to = to or "hf"
    _convert(
        source,
        destination,
        to=to,
        as_json=as_json,
        quantize=quantize,
        dtype=dtype,
        upcycle=None if upcycle is None else _upcycling(upcycle),
        shard_bytes=_bytes(shard_size),
    )


def merge(
    base: Annotated[str, Argument(metavar="BASE", help="The base model, as for --model.", autocompletion=model_names)],
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="The folder of a LoRA adapter in PEFT's format.")],
    destination: Annotated[Path, Argument(metavar="OUT", help="The output folder. It must not exist yet.")],
    as_json: o.Json = False,
) -> None:
    """Merge an adapter into its base model, and write the result as a Hugging Face folder.

    The weights keep the base's dtype; quantized weights become float32.

    JSON: as for convert.
    """
    _convert(base, destination, to="hf", as_json=as_json, adapter=adapter)


def _convert(source: str, destination: Path, *, to: str, as_json: bool, **options: Any) -> None:
    from pentad.convert import convert as run

    started = time.perf_counter()
    result = run(source, destination, to=to, **options, progress=output.progress())
    nbytes = sum(path.stat().st_size for path in result.files)
    if as_json:
        facts = {**asdict(result), "path": str(result.path), "files": [str(path) for path in result.files]}
        output.write_json({**facts, "format": to, "nbytes": nbytes, "seconds": time.perf_counter() - started})
        return
    for note in result.notes:
        output.note(f"pentad: {note}")
    files = f", {len(result.files)} files" if len(result.files) > 1 else ""
    output.write(f"{result.path}: {result.family}{files}, {output.size(nbytes)}\n")


def _upcycling(text: str) -> Upcycling:
    from pentad.upcycle import Upcycling

    pairs = [pair.strip().partition("=") for pair in text.split(",")]
    names, known = [name for name, _, _ in pairs], [field.name for field in fields(Upcycling)]
    if (
        not set(names) <= set(known)
        or len(set(names)) < len(names)
        or not all(re.fullmatch(r"\d{1,18}", number, re.ASCII) for _, _, number in pairs)
    ):
        raise BadInput(f"--upcycle is {text!r}; expected whole numbers for {', '.join(known)}: experts=8,top_k=2")
    return Upcycling(**{name: int(number) for name, _, number in pairs})


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?)B?", size.strip().upper())
    if match is None or not (count := int(float(match[1]) * _UNITS[match[2]])):
        raise BadInput(f"--shard-size is {size[:40]!r}; expected a size such as 500MB or 5GB")
    return count
