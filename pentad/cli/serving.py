"""``pentad serve``: models through OpenAI's HTTP API."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.paths import model_names
from pentad.errors import BadInput

if TYPE_CHECKING:
    from pentad.serve.loaded import LoadedModel
    from pentad.serve.models import Model

MEMORY_SHARE = 0.5  # of the memory that is available at the start


def serve(
    model: Annotated[
        list[str] | None,
        Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A name, a file, a folder, or org/name[@revision][:Q4_K_M]; OTHER=NAME serves it by another name."
            " Repeatable: the first is loaded at once, the others when they are used. Default: smollm2.",
            autocompletion=model_names,
        ),
    ] = None,
    host: Annotated[str, Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, metavar="N", help="The port; 0 takes a free one.")] = 8000,
    memory: Annotated[
        str | None,
        Option(metavar="SIZE", help="Memory for all models: 4GiB, 500MB. Default: half of what is available."),
    ] = None,
    api_key_file: Annotated[
        Path | None, Option(metavar="FILE", help="Accept only requests with a key of this file, one a line.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        Option(metavar="ORIGIN", help="Let web pages of this origin use the API (CORS). Repeatable. Default: none."),
    ] = None,
    max_queue: Annotated[
        int, Option(min=1, metavar="N", help="Sequences of a model that run or wait; beyond them, status 429.")
    ] = 256,
    context: o.Context = None,
    threads: Annotated[int | None, Option(min=1, max=1024, metavar="N", help="CPU threads of each model.")] = None,
    dtype: o.Dtype = None,
    quantize: o.Quantize = None,
    fast: Annotated[bool, Option("--fast", help="The CPU kernels round activations to 8 bits instead of 16.")] = False,
    as_json: o.Json = False,
) -> None:
    """Serve models through OpenAI's HTTP API, until Ctrl-C or SIGTERM.

    The first signal stops accepting requests and waits for those that run; a second one stops at once.

    Vision models answer /v1/segment, /v1/detect and /v1/classify.

    JSON: one object when the first model is loaded: url, model, task, weights_bytes, memory_bytes
    (weights, KV cache and the process that runs them); of a language model also context_length and
    cache_tokens.
    """
    try:
        from pentad.serve.app import make_app
        from pentad.serve.guard import local_hosts
        from pentad.serve.metrics import Metrics
        from pentad.serve.models import Model, Models
        from pentad.serve.server import listen
        from pentad.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise BadInput(f"pentad serve needs {error.name}; install it: pip install 'pentad[serve]'") from error
    from pentad.weights import registry

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # each text is encoded by one thread
    names = [named(name) for name in model or [o.DEFAULT_MODEL]]
    (common, count), *_ = Counter(name for name, _ in names).most_common()
    if count > 1:
        raise BadInput(f"{count} models have the name {common!r}; use --model OTHER=NAME")
    budget = available() if memory is None else _size(memory)
    keys = [] if api_key_file is None else _keys(api_key_file)
    paths = [registry.locate(source, progress=output.progress()) for _, source in names]
    metrics = Metrics()
    options = {"context": context, "threads": threads, "dtype": dtype, "quantize": quantize, "fast": fast}
    models = [
        Model(name, path, options, max_queue=max_queue, metrics=metrics)
        for (name, _), path in zip(names, paths, strict=True)
    ]

    def measured() -> None:
        for one in models if not as_json else ():
            assert one.share is not None
            tokens = one.share.cache_tokens
            cache = f"KV cache {output.size(one.share.cache)} = {tokens:,} tokens, " if tokens else ""
            parts = f"weights {output.size(one.share.weights)}, {cache}the rest for the process"
            output.note(f"pentad: {one.name} takes up to {output.size(one.share.total)}: {parts}")

    together = Models(models, budget, measured)
    if local_hosts(host) is None and not keys:
        output.note(f"pentad: everyone who reaches {host} can use the models; --api-key-file asks for a key")
    app = make_app(together, metrics, host=host, keys=keys, origins=allow_origin or [])
    listening = listen(host, port)
    number = listening.getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{number}/v1"

    def ready(first: Model, loaded: LoadedModel) -> None:
        if as_json:
            assert first.share is not None
            names = ("task", "context_length", "weights_bytes", "cache_tokens")
            facts = {name: getattr(loaded, name) for name in names if hasattr(loaded, name)}
            output.write_json({"url": url, "model": first.name, **facts, "memory_bytes": first.share.total})
        else:
            output.note(f"pentad: {first.name} runs {loaded.backend}, and is ready at {url}")

    with listening:
        run(together, app, listening, ready)


def named(model: str) -> tuple[str, str]:
    """The name of a model in the API, and what was given to load it."""
    if not Path(model).exists():
        match = re.fullmatch(r"([\w.-]+)=(.+)", model)
        return (match[1], match[2]) if match else (model, model)
    path = Path(model).resolve()
    return path.name if path.is_dir() else path.stem, model


def available() -> int:
    """Bytes for models by default."""
    from pentad.memory import available_memory

    available = available_memory()
    if available is None:
        raise BadInput("this system doesn't say how much memory is available; use --memory")
    return int(available * MEMORY_SHARE)


def _size(text: str) -> int:
    """Bytes, from a size such as 4GiB."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    units |= {name + "i": 1024**power for power, name in enumerate("kmgt", 1)}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in units:
        raise BadInput(f"--memory is {text!r}; expected a size such as 4GiB or 500MB")
    return int(float(match[1]) * units[match[2]])


def _keys(file: Path) -> list[bytes]:
    """The API keys of a file."""
    keys = [line.strip().encode() for line in o.read_text(str(file)).splitlines() if line.strip()]
    if not keys:
        raise BadInput(f"{file} has no key; expected one a line")
    return keys
