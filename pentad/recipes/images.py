"""Training on a folder of images by settings that stand in code, instead of a recipe file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pentad.train.loop import StepRecord
from pentad.train.recipe import Recipe
from pentad.train.run import open_run


def train_on_images(
    out: Path,
    objective: str,
    model: dict[str, str],
    source: Path,
    steps: int,
    batch: int,
    *,
    note: Callable[[str], None],
    report: Callable[[StepRecord], None] = lambda _: None,
    resume: bool = False,
    **tables: Any,
) -> Path:
    """Train a model, and return its folder.

    Args:
        out: of the run.
        objective, model: of the recipe.
        source: the folder of images.
        steps, batch: steps, and images a step.
        note, report, resume: of `pentad.train.base.TrainingRun.train`.
        tables: other tables of the recipe, or more of these.
    """
    run = {"out": str(out), "steps": steps, "batch_size": batch, "micro_batch_images": batch}
    recipe = {
        "objective": objective,
        "model": model,
        **tables,
        "data": {"train": str(source), **tables.get("data", {})},
        "run": {**run, **tables.get("run", {})},
    }
    return open_run(Recipe.model_validate(recipe)).train(resume=resume, note=note, report=report)
