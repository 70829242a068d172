"""``pentad serve``: language models through OpenAI's HTTP API."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated

from typer import Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.cli.paths import model_names
from pentad.errors import BadInput


def serve(
    model: Annotated[
        list[str] | None,
        Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A name, a file, a folder, or org/name[@revision][:Q4_K_M]; OTHER=NAME serves it by another name.",
            autocompletion=model_names,
        ),
    ] = None,
    host: Annotated[str, Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, metavar="N", help="The port; 0 takes a free one.")] = 8000,
    context: o.Context = None,
    threads: Annotated[int | None, Option(min=1, max=1024, metavar="N", help="CPU threads.")] = None,
    max_queue: Annotated[
        int, Option(min=1, metavar="N", help="Sequences that run or wait; beyond, requests get status 429.")
    ] = 256,
    as_json: o.Json = False,
) -> None:
    """Serve models through OpenAI's HTTP API, until Ctrl-C or SIGTERM.

    The first signal stops accepting requests and waits for those that run; a second one stops at once.

    JSON: one object when the model is loaded: url, model.
    """
    try:
        from pentad.serve.models import Model, Models
        from pentad.serve.server import listen
        from pentad.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise BadInput(f"pentad serve needs {error.name}; install it: pip install 'pentad[serve]'") from error
    from pentad.weights import registry

    names = [_named(name) for name in model or [o.DEFAULT_MODEL]]
    (common, count), *_ = Counter(name for name, _ in names).most_common()
    if count > 1:
        raise BadInput(f"{count} models have the name {common!r}; use --model OTHER=NAME")
    options = {"context": context, "threads": threads, "cache_bytes": None}
    paths = {name: registry.locate(source, progress=output.progress()) for name, source in names}
    models = Models({name: Model(name, path, options, max_queue=max_queue) for name, path in paths.items()})
    listening = listen(host, port)
    number = listening.getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{number}/v1"

    def ready(loaded: Model) -> None:
        if as_json:
            output.write_json({"url": url, "model": loaded.name})
        else:
            output.note(f"pentad: {loaded.name} is ready at {url}")

    run(models, listening, ready)


def _named(model: str) -> tuple[str, str]:
    """The name of a model in the API, and what was given to load it."""
    if not Path(model).exists():
        match = re.fullmatch(r"([\w.-]+)=(.+)", model)
        return (match[1], match[2]) if match else (model, model)
    path = Path(model).resolve()
    return path.name if path.is_dir() else path.stem, model
