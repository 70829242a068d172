"""The processes of a run under torchrun: each computes a part of every step; the first one writes the files."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from pentad.loading import device_named


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device(name: str) -> torch.device:
    """This process's device: a recipe's `run.device`, where "auto" is CUDA if available. Each process has its own GPU.

    Raises:
        BadInput: the device can't be used here.
    """
    found = device_named(None if name == "auto" else name)
    if found.type == "cuda" and ":" not in name:
        found = device_named(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(found)
    return found


@contextmanager
def joined() -> Iterator[None]:
    """Connect with the other processes, if there are any."""
    if world() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process is here."""
    sum_over_processes([0.0])


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Each value's sum over all processes, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return [float(value) for value in total]


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes; each holds its part of the step's mean already."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
