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
            return f"{self.mean:.1f} (one seed: no interval)"
        return f"{self.mean:.1f} ({self.low:.1f} to {self.high:.1f})"


@dataclass(frozen=True)
class Report:
    """What `pentad reproduce` prints and writes.

    Attributes:
        name: of the claim.
        claim: what the paper says, in a sentence.
        source: the paper, and where in it.
        setting: what was done here, in a sentence.
        unit: of the rows' values.
        rows: what was measured -> the value of each seed.
        difference: of the two things that the claim compares.
        expected: the claim holds here if all of the interval of `difference` is above this.
        seconds: how long it took.
    """

    name: str
    claim: str
    source: str
    setting: str
    unit: str
    rows: dict[str, list[float]]
    difference: Interval
    expected: float
    seconds: float

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
            *(f"{name}: {Interval.of(values)} {self.unit}" for name, values in self.rows.items()),
            f"difference: {self.difference} {self.unit}",
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

        figure: Any = Figure((6.4, 0.7 * len(self.rows) + 1.6), layout="constrained")
        axes = figure.subplots()
        for place, values in enumerate(reversed(self.rows.values())):
            interval = Interval.of(values)
            axes.barh(place, interval.mean, color="#9ecae1", height=0.55)
            axes.plot(values, [place] * len(values), "o", color="#08519c", markersize=5)
            at = (max(values), place)
            axes.annotate(f"{interval.mean:.1f}", at, va="center", xytext=(8, 0), textcoords="offset points")
        axes.set_yticks(range(len(self.rows)), [*reversed(self.rows)])
        axes.set_xlabel(f"{self.unit} (bars: means; points: seeds)")
        axes.set_xlim(0, 1.15 * max(max(values) for values in self.rows.values()))
        axes.set_title(f"{self.name}: {self.verdict}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=120)


def check_plot() -> None:
    """Raise BadInput if the picture can't be drawn, before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadInput("the picture needs Matplotlib: pip install 'pentad[plot]'") from None
