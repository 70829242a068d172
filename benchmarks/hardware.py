"""The machine's description, memory bandwidth and multiply-add throughput, measured with torch's operators.

Short loops in C and assembly confirm both: `stream_seconds` reaches 93 to 100 % of a loop that only loads and
prefetches, and `products` in int8 reaches 100 % of a loop that only multiplies registers.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

PASSES = 20  # passes over the memory in one measurement
CALM = 0.2  # seconds after which OpenMP's threads stop spinning
FLAGS = ("avx2", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def machine(*packages: str) -> str:
    """The machine's CPU, and the versions of Python and of `packages`."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in lines.items()}
        features = named.get("flags", named.get("Features", "")).split()
        cpu = f"{named.get('model name', cpu)} ({', '.join(flag for flag in FLAGS if flag in features)})"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return f"{cpu}, {os.cpu_count()} CPUs; Python {platform.python_version()}, {', '.join(versions)}"


def memory() -> dict[str, int]:
    """This process's resident memory now and at its peak, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return {"now": values["VmRSS"], "peak": values["VmHWM"]}


def streaming(nbytes: int) -> Callable[[], float]:
    """Make a function that reads `nbytes` bytes with all of torch's threads and returns the median seconds."""
    import torch

    words = torch.zeros(nbytes // 4, dtype=torch.int32)

    def stream_seconds() -> float:
        times = [time.perf_counter()]
        for _ in range(PASSES):
            words.amax()
            times.append(time.perf_counter())
        time.sleep(CALM)
        return median(end - start for start, end in pairwise(times))

    return stream_seconds


def products(threads: int, dtype: str, instructions: str | None = None) -> float:
    """oneDNN's best multiply-adds a second, int8 into int32 or float32, in a new process.

    Args:
        threads: the number of threads.
        dtype: int8 or float32.
        instructions: the newest instruction set that oneDNN may use; None means all.
    """
    multiply = "torch._int_mm" if dtype == "int8" else "torch.mm"
    code = (
        "import time, torch\n"
        f"torch.set_num_threads({threads})\n"
        f"x, w = (torch.ones(n, 1024, dtype=torch.{dtype}) for n in (512, 1024))\n"
        "best = 1.0\n"
        "for _ in range(200):\n"
        f"    started = time.perf_counter(); {multiply}(x, w.t()); best = min(best, time.perf_counter() - started)\n"
        "print(512 * 1024 * 1024 / best)"
    )
    environment = {**os.environ, **({"ONEDNN_MAX_CPU_ISA": instructions} if instructions else {})}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)
