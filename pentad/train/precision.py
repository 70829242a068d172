"""Which dtype this machine multiplies matrices in faster."""

import time

import torch

SIZE = 512
PROBE_SECONDS = 0.05
MIN_GAIN = 1.2  # bfloat16 must be faster by this factor, since the rest of a step gains nothing


def faster_dtype() -> str:
    """Return "bfloat16" if its matmuls take clearly less time than float32's, else "float32"; measured for 50 ms."""
    return "bfloat16" if matmul_seconds(torch.bfloat16) * MIN_GAIN < matmul_seconds(torch.float32) else "float32"


def matmul_seconds(dtype: torch.dtype) -> float:
    """The shortest time of a product of two square matrices."""
    a = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
    times: list[float] = []
    a @ a  # the first call prepares the kernels
    end = time.perf_counter() + PROBE_SECONDS / 2
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return min(times)
