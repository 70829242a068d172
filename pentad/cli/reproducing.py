"""``pentad reproduce``: rerun a paper's claim, small."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.errors import BadInput


def reproduce(
    name: Annotated[str | None, Argument(metavar="NAME", help="One of --list.")] = None,
    list_: Annotated[bool, Option("--list", help="List the claims.")] = False,
    out: Annotated[
        Path | None, Option("--out", "-o", metavar="DIR", help="A new folder for the report, data and runs.")
    ] = None,
    seeds: Annotated[int, Option(metavar="N", help="Repeat with N seeds.", min=1, max=10)] = 3,
    threads: o.Threads = None,
    as_json: o.Json = False,
) -> None:
    """Rerun what a paper claims, at a size that fits a laptop.

    Prints the claim with its source, what was measured with the interval over seeds, and the verdict;
    "not reproduced at this size" is one. Writes report.json and report.png.

    JSON: name, claim, source, setting, unit, rows {name: [a value for each seed]}, difference {mean, low,
    high}, expected, seconds, verdict.
    """
    from pentad.reproduce import NAMES

    if list_:
        for known, claim in NAMES.items():
            if as_json:
                output.write_json({"name": known, "claim": claim})
            else:
                output.write(f"{known}: {claim}\n")
        return
    if name not in NAMES:
        raise BadInput(f"NAME is {name!r}; expected one of {', '.join(NAMES)}")
    folder = out or Path(f"reproduced-{name}")
    if folder.exists():
        raise BadInput(f"{folder} exists already; choose another --out")
    try:
        from pentad.reproduce.report import check_plot

        check_plot()
        module = import_module(f"pentad.reproduce.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        packages = "pip install 'pentad[train,vision,plot]'"
        raise BadInput(f"pentad reproduce needs {error.name}; install it: {packages}") from error
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    folder.mkdir(parents=True)
    report = module.run(folder, seeds, lambda line: output.note(f"pentad: {line}"))
    report.write(folder)
    if as_json:
        output.write_json(report.to_json())
    else:
        output.write("\n".join([*report.lines(), f"{folder / 'report.png'}"]) + "\n")
