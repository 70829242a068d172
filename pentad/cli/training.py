"""``pentad train``: train a model by a recipe."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from datetime import timedelta
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from pentad.cli import options as o
from pentad.cli import output
from pentad.errors import BadInput

if TYPE_CHECKING:
    from rich.progress import Progress

    from pentad.train.loop import StepRecord
    from pentad.train.run import TextRun


def train(
    recipe: Annotated[Path, Argument(metavar="RECIPE", help="The recipe, a TOML file; see docs/training.md.")],
    set_: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Change a setting: run.steps=100. Repeatable.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
    plan: Annotated[bool, Option("--plan", help="Show rows, tokens, steps, memory and time, and stop.")] = False,
    show_mask: Annotated[
        int, Option(min=0, metavar="N", help="Show N examples, with the tokens that are learned marked, and stop.")
    ] = 0,
    truncate: Annotated[bool, Option("--truncate", help="Cut rows longer than run.sequence_length.")] = False,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave out malformed rows, and list them.")] = False,
    threads: Annotated[int | None, Option(min=1, metavar="N", help="CPU threads.")] = None,
    as_json: o.Json = False,
) -> None:
    """Train a model by a recipe, and write it as a folder that every command reads.

    JSON: one line a step: step, loss, tokens, learning_rate, grad_norm, seconds; last line final, the model's folder.
    """
    try:
        from pentad.train.processes import rank
        from pentad.train.recipe import read_recipe
        from pentad.train.run import TextRun, open_run
    except ModuleNotFoundError as error:
        raise BadInput(f"pentad train needs {error.name}; install it: pip install 'pentad[train]'") from error
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    flags = [f"data.{name}=true" for name, given in (("truncate", truncate), ("skip_bad", skip_bad)) if given]
    run = open_run(read_recipe(recipe, [*(set_ or []), *flags]))
    skipped = run.skipped
    for line in skipped:
        output.note(f"pentad: skipped: {line}")
    if show_mask:
        if not isinstance(run, TextRun):
            raise BadInput("--show-mask is for texts; this recipe trains on images")
        _show_mask(run, show_mask)
        return
    if plan:
        facts = run.plan()
        if as_json:
            output.write_json(facts)
            return
        memory, seconds = facts.pop("memory_bytes"), facts.pop("seconds")
        shown = {**facts, "skipped": len(facts["skipped"]), "estimated_bytes": output.size(facts["estimated_bytes"])}
        shown["memory"] = "more than there is" if memory is None else output.size(memory)
        shown["time"] = "not measured" if seconds is None else str(timedelta(seconds=round(seconds)))
        output.write_table((name.replace("_", " "), _number(value)) for name, value in shown.items())
        return
    steps = run.recipe.run.steps
    bar = None if as_json or not sys.stderr.isatty() else _bar()

    def report(record: StepRecord) -> None:
        if as_json:
            output.write_json(record.as_json())
            return
        if bar is not None:
            details = f"loss {record.loss:.4f}  {record.tokens / record.seconds:,.0f} tokens/s"
            details += f"  {output.size(record.peak_bytes)}"
            bar.update(bar.task_ids[0], completed=record.step, total=steps, details=details)
            return
        output.write(
            f"step {record.step}/{steps}  loss {record.loss:.4f}  gradient {record.grad_norm:.3f}"
            f"  lr {record.learning_rate:.2e}  {record.tokens / record.seconds:,.0f} tokens/s\n"
        )

    with bar or nullcontext():
        final = run.train(resume=resume, note=lambda line: output.note(f"pentad: {line}"), report=report)
    if rank() > 0:
        return
    if as_json:
        output.write_json({"final": str(final)})
    else:
        output.write(f"{final}\n")


def _bar() -> Progress:
    """A bar on standard error that shows the last step's numbers and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = MofNCompleteColumn(), BarColumn(20), TextColumn("{task.fields[details]}"), TimeElapsedColumn()
    bar = Progress(*columns, TextColumn("left"), Remaining(), console=Console(stderr=True))
    bar.add_task("", total=None, details="loading")
    return bar


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if isinstance(value, float) else str(value)


def _show_mask(run: TextRun, count: int) -> None:
    """Print examples; learned tokens are green on a terminal, and stand in [brackets] elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for source, number in [pair for step in range(count) for pair in run.data.examples(step)][:count]:
        store = run.stores[source]
        output.write(f"{store.location(number)}\n")
        for ids, targets in store[number]:
            start = 0
            for learned, tokens in groupby(zip(ids.tolist(), targets.tolist(), strict=True), itemgetter(1)):
                run_ids = [token for token, _ in tokens]
                piece = run.tokenizer.decode(run_ids, special=True, continues=start > 0)
                start += len(run_ids)
                if learned and sys.stdout.isatty():
                    console.print(Text(piece, "black on green"), end="")
                else:
                    output.write(f"[{piece}]" if learned else piece)
            output.write("\n")
