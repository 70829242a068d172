"""Training the models that have a name of pentad's own but no published weights."""

from __future__ import annotations

from pentad.cli import output
from pentad.errors import BadInput


def train_if_missing(name: str) -> None:
    """Train a model of pentad's own that is trained on this machine, unless it is there or `name` is another model.

    Raises:
        BadInput: the training extra isn't installed.
    """
    from pentad.weights.registry import KNOWN, TrainedModel

    model = KNOWN.get(name)
    if not isinstance(model, TrainedModel) or model.path.is_dir():
        return
    try:
        from pentad.recipes.scenes_sam import make
    except ModuleNotFoundError as error:
        raise BadInput(f"{name} is trained here, which needs {error.name}: pip install 'pentad[train]'") from error

    output.note(
        f"pentad: {name} is trained on this machine, once: it takes an hour or two on two cores, and continues if it is"
        f" interrupted; --model names another"
    )
    make(model.path, note=output.note, progress=output.progress("steps"))
