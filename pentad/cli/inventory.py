"""``pentad models``, ``pull`` and ``rm``: the models on this machine."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from pentad.cli import output
from pentad.cli.making import train_if_missing
from pentad.cli.options import Json
from pentad.cli.paths import model_names
from pentad.errors import BadInput

Name = Annotated[
    str,
    Argument(
        metavar="NAME", help="As pentad models lists it, or org/name[@revision][:Q4_K_M].", autocompletion=model_names
    ),
]


def models(as_json: Json = False) -> None:
    """List the models that pentad knows by name, and those in the Hugging Face cache.

    JSON lines: name, path (null if it isn't pulled), nbytes, description, license.
    """
    from pentad.weights import registry

    rows = registry.known()
    if as_json:
        for row in rows:
            output.write_json({**asdict(row), "path": None if row.path is None else str(row.path)})
        return
    table = [("name", "size", "pulled", "description", "license")]
    for row in rows:
        pulled = "no" if row.path is None else "yes"
        table.append((row.name, output.size(row.nbytes), pulled, row.description, row.license or ""))
    output.write_table(table)


def pull(name: Name, as_json: Json = False) -> None:
    """Download a model into the cache, or train one that is made on this machine, and print its path.

    JSON: name, path.
    """
    from pentad.weights import registry

    train_if_missing(name)
    path = registry.locate(name, progress=output.progress())
    if path == Path(name).expanduser():
        output.note(f"pentad: {name} is a file or folder of this machine, which needs no pull")
    if as_json:
        output.write_json({"name": name, "path": str(path)})
    else:
        output.write(f"{path}\n")


def rm(
    name: Name,
    yes: Annotated[bool, Option("--yes", "-y", help="Don't ask for confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a model from the cache.

    JSON: name, nbytes (freed).
    """
    from pentad.weights import registry

    if not yes and not _confirmed(name):
        raise Exit(1)
    freed = registry.remove(name)
    if as_json:
        output.write_json({"name": name, "nbytes": freed})
    else:
        output.write(f"removed {name}, {output.size(freed)}\n")


def _confirmed(name: str) -> bool:
    """Ask on the terminal.

    Raises:
        BadInput: standard input is no terminal.
    """
    if not sys.stdin.isatty():
        raise BadInput(f"standard input is no terminal to confirm at: use --yes to remove {name}")
    print(f"Remove {name} from the cache? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
