"""Sampling by the kernels: all rows of a step in one call."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pentad.kernels.binding import CDraw, isas, library


class Draw(NamedTuple):
    """The options of a row, in the order in which they apply.

    Attributes:
        temperature: 0 chooses the most likely token.
        top_k: 0 keeps all tokens.
        top_p, min_p: see `pentad.generate.sampling.Sampling`.
        uniform: a random number in [0, 1).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0


def sample(logits_MV: Tensor, draws: Sequence[Draw], *, isa: str | None = None) -> tuple[list[int], list[float]]:
    """Choose one token per row, independently of the other rows.

    Args:
        logits_MV: float32 [M, V] on the CPU.
        draws: one per row.
        isa: one of `isas()`; the fastest by default.

    Returns:
        M token ids, and each row's largest logit (NaN if the row has a NaN).

    Raises:
        ValueError: the logits don't fit the draws, or are not contiguous float32 numbers on the CPU.
    """
    rows, vocab = logits_MV.shape
    if logits_MV.dtype != torch.float32 or logits_MV.device.type != "cpu" or not logits_MV.is_contiguous():
        raise ValueError(f"the logits are {logits_MV.dtype} on {logits_MV.device}; expected contiguous float32 on cpu")
    if len(draws) != rows or not vocab:
        raise ValueError(f"there are {len(draws)} draws for logits of shape {tuple(logits_MV.shape)}")
    address, row_bytes = logits_MV.data_ptr(), 4 * vocab
    array = (CDraw * rows)(*(CDraw(address + row * row_bytes, *draw) for row, draw in enumerate(draws)))
    scratch = torch.empty(3 * (vocab + 16))
    index = isas()[isa or next(iter(isas()))]
    library().pentad_sample(index, array, rows, vocab, ctypes.c_void_p(scratch.data_ptr()))
    return [draw.token for draw in array], [draw.largest for draw in array]
