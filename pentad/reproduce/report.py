"""A claim, what was measured, and the verdict with its uncertainty."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pentad.errors import BadInput

# The 97.5 % quantiles of Student's t distribution with 1, 2, … degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MAX_SEEDS = len(_T) + 1


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, and its 95 % confidence interval.

    Attributes:
        mean: the mean.
        low, high: the interval's ends; without bounds for a single seed.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Of independent values, by Student's t distribution."""
        if len(values) < 2:
            return cls(values[0], -math.inf, math.inf)
        half = _T[len(values) - 2] * stdev(values) / math.sqrt(len(values))
        return cls(mean(values), mean(values) - half, mean(values) + half)

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:.3g} (one seed: no interval)"
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Row:
    """Something measured, once with each seed."""

    name: str
    unit: str
    values: list[float]


@dataclass(frozen=True)
class Curves:
    """Values against something.

    Attributes:
        x, y: the axes' names.
        points: name of a curve -> its points (x, y), of all seeds.
        scale: of both axes, "log" or "linear".
    """

    x: str
    y: str
    points: dict[str, list[tuple[float, float]]]
    scale: str = "log"


@dataclass(frozen=True)
class Report:
    """What `pentad reproduce` prints and writes.

    Attributes:
        name: of the claim.
        claim: what the paper says, in a sentence.
        source: the paper, and where in it.
        setting: what was done here, in a sentence.
        rows: what was measured.
        difference: between the two things that the claim compares.
        unit: of the difference, a few words.
        expected: the claim holds here if all of the interval of `difference` is above this.
        seconds: how long it took.
        curves: drawn instead of the rows.
    """

    name: str
    claim: str
    source: str
    setting: str
    rows: list[Row]
    difference: Interval
    unit: str
    expected: float
    seconds: float
    curves: tuple[Curves, ...] = ()

    @property
    def verdict(self) -> str:
        """What the numbers say."""
        if self.difference.low > self.expected:
            return "reproduced"
        if self.difference.high < self.expected:
            return "not reproduced at this size"
        return "undecided: the interval includes both"

    def lines(self) -> list[str]:
        """The report as text."""
        return [
            f"claim: {self.claim}",
            f"source: {self.source}",
            f"here: {self.setting}",
            *(f"{row.name}: {Interval.of(row.values)} {row.unit}" for row in self.rows),
            f"difference: {self.difference} {self.unit}; expected: more than {self.expected:g}",
            f"verdict: {self.verdict}",
        ]

    def to_json(self) -> dict[str, Any]:
        """All fields and the verdict; an interval without bounds has None for its ends."""
        fields = asdict(self) | {"verdict": self.verdict}
        ends = {name: None if math.isinf(value) else value for name, value in fields["difference"].items()}
        return fields | {"difference": ends}

    def write(self, folder: Path) -> None:
        """Write report.json and, if Matplotlib is there, report.png into a folder."""
        (folder / "report.json").write_text(json.dumps(self.to_json(), indent=2) + "\n")
        self._draw(folder / "report.png")

    def _draw(self, file: Path) -> None:
        from matplotlib.figure import Figure

        figure: Any = Figure(layout="constrained")
        if self.curves:
            figure.set_size_inches(6.4 * len(self.curves), 4.2)
            for axes, curves in zip(figure.subplots(1, len(self.curves), squeeze=False)[0], self.curves, strict=True):
                _draw_curves(axes, curves)
        else:
            units = list(dict.fromkeys(row.unit for row in self.rows))
            groups = [[row for row in self.rows if row.unit == unit] for unit in units]
            figure.set_size_inches(6.4, 0.6 * len(self.rows) + 0.8 * len(units) + 0.6)
            heights = [len(group) for group in groups]
            for axes, group in zip(
                figure.subplots(len(groups), squeeze=False, height_ratios=heights), groups, strict=True
            ):
                _draw_bars(axes[0], group)
        figure.suptitle(f"{self.name}: {self.verdict}", x=0.01, ha="left", fontsize=11)
        figure.savefig(file, dpi=120)


def _draw_bars(axes: Any, rows: Sequence[Row]) -> None:
    """Means as bars, and the seeds as points."""
    for place, row in enumerate(reversed(rows)):
        middle = Interval.of(row.values).mean
        axes.barh(place, middle, color="#9ecae1", height=0.55)
        axes.plot(row.values, [place] * len(row.values), "o", color="#08519c", markersize=5)
        at = (max(row.values), place)
        axes.annotate(f"{middle:.3g}", at, va="center", xytext=(8, 0), textcoords="offset points")
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set_xlabel(f"{rows[0].unit} (bars: means; points: seeds)")
    axes.set_xlim(0, 1.15 * max(max(row.values) for row in rows) or 1)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curves(axes: Any, curves: Curves) -> None:
    """Points, and lines through their means."""
    for (name, points), color in zip(curves.points.items(), ("#08519c", "#d94801", "#238b45"), strict=False):
        by_x: dict[float, list[float]] = {}
        for x, y in points:
            by_x.setdefault(x, []).append(y)
        axes.plot(*zip(*points, strict=True), "o", color=color, alpha=0.5, markersize=5)
        axes.plot([*by_x], [mean(ys) for ys in by_x.values()], color=color, label=name)
    axes.set(xscale=curves.scale, yscale=curves.scale, xlabel=curves.x, ylabel=curves.y)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def check_plot() -> None:
    """Raise BadInput if the picture can't be drawn, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput("the picture needs Matplotlib: pip install 'pentad[plot]'") from None
