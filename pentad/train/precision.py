"""Which dtype this machine multiplies matrices in faster."""

import time

import torch

SIZE = 512
PROBE_SECONDS = 0.05
MIN_GAIN = 1.2  # bfloat16 must be faster by this factor, since the rest of a step gains nothing


def faster_dtype(device: torch.device) -> str:
    """ "bfloat16" if its matmuls take clearly less time than float32's, else "float32"; measured for 50 ms."""
    seconds = {dtype: matmul_seconds(dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    return "bfloat16" if seconds[torch.bfloat16] * MIN_GAIN < seconds[torch.float32] else "float32"


def matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The shortest time of a product of two square matrices."""
    a = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    times: list[float] = []
    (a @ a)[0, 0].item()  # the first call prepares the kernels
    end = time.perf_counter() + PROBE_SECONDS / 2
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times)
