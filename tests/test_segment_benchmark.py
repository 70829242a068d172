"""Each part of benchmarks/segment.py runs on a small network: the answers equal those of Meta's code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_all_parts(tmp_path: Path) -> None:
    parts = ["encoder", "memory", "bf16", "decoder", "everything"]
    command = [sys.executable, ROOT / "benchmarks" / "segment.py", *parts, "--size", "small", "--rounds", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--points", "2"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"[\d.]+ x as fast", done.stdout)) == 6
    assert re.search(r"[\d.]+ of its memory", done.stdout)
    assert "100.0% matched" in done.stdout
