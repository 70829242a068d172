"""The processes of a run under torchrun: each computes a part of every step; the first one writes the files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined() -> Iterator[None]:
    """Connect with the other processes, if there are any."""
    if world() > 1:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def wait_for_all() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()
