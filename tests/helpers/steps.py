"""Run a step over a whole sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pentad.generate.step import Step


def all_logits(step: Step, ids: Sequence[int], sizes: Sequence[int] = (1000,)) -> Tensor:
    """Run one sequence in chunks of these sizes, repeated in turn; returns the logits of all tokens."""
    sequence, out, at = step.cache.open(len(ids)), [], 0
    for i in range(len(ids)):
        chunk = ids[at : at + sizes[i % len(sizes)]]
        if not chunk:
            break
        out.append(step([(sequence, chunk)], range(len(chunk))))
        at += len(chunk)
    step.cache.close(sequence)
    return torch.cat(out)
