"""Verdicts and their uncertainty."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from pentad.reproduce.report import MAX_SEEDS, Curves, Interval, Report, Row


@pytest.mark.parametrize("count", range(2, MAX_SEEDS + 1))
def test_intervals_are_students(count: int) -> None:
    values = [math.sin(7 * i) * 3 for i in range(count)]
    ours = Interval.of(values)
    low, high = stats.t.interval(0.95, count - 1, loc=ours.mean, scale=stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-3 * (high - low))


def report(*gains: float) -> Report:
    rows = [Row("ours", "%", [50 + gain for gain in gains]), Row("theirs", "ms", [50.0] * len(gains))]
    texts = {name: name for name in ("name", "claim", "source", "setting", "unit")}
    return Report(**texts, rows=rows, difference=Interval.of(gains), expected=5.0, seconds=1.0)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((8.0, 8.5, 9.0), "reproduced"),
        ((1.0, 1.5, 2.0), "not reproduced at this size"),
        ((1.0, 12.0, 6.0), "undecided: the interval includes both"),
        ((30.0,), "undecided: the interval includes both"),
    ],
)
def test_verdicts(tmp_path: Path, gains: tuple[float, ...], verdict: str) -> None:
    made = report(*gains)
    assert made.verdict == verdict
    assert f"verdict: {verdict}" in made.lines()
    made.write(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["verdict"] == verdict
    assert (written["difference"]["low"] is None) == (len(gains) == 1)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_drawn_instead_of_rows(tmp_path: Path) -> None:
    points = {"one": [(1.0, 2.0), (1.0, 2.2), (10.0, 1.0)], "other": [(1.0, 3.0), (10.0, 0.5)]}
    made = replace(report(1.0, 2.0), curves=(Curves("compute", "loss", points),))
    made.write(tmp_path)
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "report.json").read_text())["curves"][0]["points"]["one"][2] == [10.0, 1.0]
