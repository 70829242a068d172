"""The table that `make bench` makes of a CPU."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
table = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "table.py")))
results = SimpleNamespace(**runpy.run_path(str(BENCHMARKS / "results.py")))

ROWS = [
    {"what": "decode", "peer": "llama.cpp", "ratio": 2.5},
    {"what": "training", "peer": "transformers", "ratio": 0.954},
    {"what": "YOLOv3-tiny", "peer": "onnxruntime", "ratio": 0.96},
]


def test_the_table_begins_with_what_is_slower() -> None:
    lines = table.section("A CPU", "2026-11-28", ROWS, ["serve"]).splitlines()
    assert lines[0] == "## A CPU"
    assert lines[2].endswith("training (0.95 x transformers), YOLOv3-tiny (0.96 x onnxruntime).")
    assert "serve" in lines[4]
    assert [line.split(" | ")[-1] for line in lines[-3:]] == ["0.95 x |", "0.96 x |", "2.50 x |"]
    assert "nothing" in table.section("A CPU", "2026-11-28", ROWS[:1], [])


def test_a_cpu_s_table_is_replaced() -> None:
    old, new = (table.section("A (x) CPU", date, ROWS, []) for date in ("2026-11-27", "2026-11-28"))
    other = table.section("B", "2026-11-26", ROWS[:1], [])
    document = table.insert(table.insert("# Benchmarks\n", old), other)
    assert document == f"# Benchmarks\n\n{old}\n{other}"
    assert table.insert(document, new) == f"# Benchmarks\n\n{new}\n{other}"


def test_ratios_are_collected_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results.report("not collected", "a peer", 1.0)
    monkeypatch.setenv(results.VARIABLE, str(tmp_path / "results"))
    for row in ROWS:
        results.report(**row)
    assert [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()] == ROWS


def test_unknown_benchmarks_are_refused() -> None:
    command = [sys.executable, str(BENCHMARKS / "table.py"), "--only", "decode,cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown benchmark 'cpu'" in done.stderr
