"""The ratios to peers that benchmarks measure, collected in a file for benchmarks/table.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "PENTAD_BENCHMARK_RESULTS"


def report(what: str, peer: str, ratio: float) -> None:
    """Note that pentad is `ratio` times as fast as a peer, if benchmarks/table.py has started this benchmark."""
    if path := os.environ.get(VARIABLE):
        with Path(path).open("a") as file:
            file.write(json.dumps({"what": what, "peer": peer, "ratio": ratio}) + "\n")
