"""A picture of how experts are used: their load by layer, and the experts of the most frequent tokens.

Matplotlib draws it. Matplotlib is an optional dependency, so it is imported only for a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pentad.errors import BadInput, PentadError

if TYPE_CHECKING:
    from torch import Tensor

    from pentad.generate.expert_use import ExpertUse

ROW = 0.24  # inches
MAX_LABELS = 24  # of a heatmap's rows, and of its columns; heatmaps of at most so many show their numbers


def require(path: Path) -> None:
    """Check that a picture can be drawn, before any work is done.

    Raises:
        BadInput: Matplotlib is missing, the file's name isn't that of a PNG, or its folder doesn't exist.
    """
    if path.suffix.lower() != ".png":
        raise BadInput(f"--out is {str(path)!r}; expected a name that ends in .png")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"{path}: the folder {path.parent} doesn't exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput("a picture needs Matplotlib: pip install 'pentad[plot]'") from None


def draw(use: ExpertUse, names: Sequence[str], layers: Sequence[int], path: Path, *, title: str) -> None:
    """Write a PNG.

    Args:
        use: how the experts were used.
        names: of its frequent tokens, in ASCII.
        layers: those whose routing of the frequent tokens is drawn.
        path: the file, which is replaced if it exists.
        title: the first line.

    Raises:
        PentadError: the file can't be written.
    """
    import torch
    from matplotlib.figure import Figure

    load_EL = torch.stack([usage.load * len(usage.load) for usage in use.layers.values()], 1)
    heights = [min(ROW * len(load_EL), 6.0) + 0.9, ROW * len(names) + 0.9]
    figure: Any = Figure((10, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(_shortened(title, 90), parse_math=False)
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    axes = upper.subplots()
    axes.set(title="Load of each expert; 1 is an even share", xlabel="layer", ylabel="expert")
    image = _heatmap(axes, load_EL, "{:.1f}", max(2.0, load_EL.max().item()))
    step = _step(len(use.layers))
    axes.set_xticks(range(0, len(use.layers), step), list(use.layers)[::step])
    upper.colorbar(image, pad=0.01)
    times = torch.tensor([count for _, count in use.frequent])
    lower.suptitle("Experts of the most frequent tokens, in percent", fontsize=12)
    visible = [_shortened(name.replace(" ", "\xb7"), 14) for name in names]
    labels = [f"{name}  {count:,}" for name, (_, count) in zip(visible, use.frequent, strict=True)]
    row = lower.subplots(1, len(layers), squeeze=False)[0]
    for layer, axes in zip(layers, row, strict=True):
        axes.set(title=f"layer {layer}", xlabel="expert")
        image = _heatmap(axes, 100 * use.by_token[layer] / times[:, None], "{:.0f}", 100.0)
        axes.set_xticks(range(0, len(load_EL), len(layers) * _step(len(load_EL))))
        axes.set_yticks(range(len(names)), [] if axes is not row[0] else labels, parse_math=False)
    lower.colorbar(image, ax=list(row), pad=0.01)
    try:
        figure.savefig(path, dpi=172)
    except OSError as error:
        raise PentadError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def _heatmap(axes: Any, values: Tensor, form: str, largest: float) -> Any:
    """Draw rows from top to bottom, in colors from 0 to `largest`; returns the image."""
    image = axes.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(0, len(values), _step(len(values))))
    if max(values.shape) <= MAX_LABELS:
        for i, row in enumerate(values.tolist()):
            for j, value in enumerate(row):
                color = "white" if value > largest / 2 else "black"
                axes.text(j, i, form.format(value), ha="center", va="center", fontsize=7, color=color)
    return image


def _step(count: int) -> int:
    """The distance between the labels of so many rows or columns."""
    return -(-count // MAX_LABELS)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
