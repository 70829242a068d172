"""Cross-entropy and log-probabilities of a language model's head, computed a chunk of rows at a time.

No tensor holds the logits of more than a chunk, forward or backward, so memory doesn't grow with rows x vocabulary
(Liger Kernel, arXiv:2410.10989). Softmax and sums are float32, or float64 for float64 inputs; the matmuls run in
autocast's dtype where autocast is on. Equal inputs and threads give equal bits.

Legend: M target rows, R rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ROWS = 256  # 50 MB of float32 logits at a vocabulary of 49,152; fewer rows are slower, more hardly faster


def linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """The sum over rows of ``-log softmax(hidden W^T + b)[target]``.

    If gradients are needed, forward computes them from the logits that it has at hand; backward only scales them.

    Args:
        hidden_MD: the rows to predict from; all of them count.
        weight_VD: the head's weight.
        bias_V: the head's bias or None.
        targets_M: int64 ids in [0, V).
        chunk_rows: R, the most rows whose logits exist at a time.

    Returns:
        A scalar, float32 or float64.
    """
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_MD, weight_VD, bias_V, targets_M, chunk_rows, torch.is_grad_enabled()
    )
    return loss


def linear_log_probs(
    hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """``log softmax(hidden W^T + b)[target]`` of each row, for losses that weigh rows; backward recomputes the logits.

    Args:
        hidden_MD: the rows to predict from.
        weight_VD: the head's weight.
        bias_V: the head's bias or None.
        targets_M: int64 ids in [0, V).
        chunk_rows: R, the most rows whose logits exist at a time.

    Returns:
        [M], float32 or float64.
    """
    log_probs_M: Tensor = _LogProbs.apply(hidden_MD, weight_VD, bias_V, targets_M, chunk_rows)  # type: ignore[no-untyped-call]
    return log_probs_M


class _Head:
    """The head in the dtype of its matmuls, and the sums over chunks of the gradients that are needed."""

    def __init__(
        self, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, dtype: torch.dtype, needed: tuple[bool, ...]
    ) -> None:
        self.hidden_MD = hidden_MD.to(dtype)
        self.weight_VD = weight_VD.to(dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype)
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.hidden_gradient = torch.empty_like(hidden_MD) if needed[0] else None
        self.weight_gradient = torch.zeros_like(weight_VD, dtype=self.sum_dtype) if needed[1] else None
        self.bias_gradient = (
            torch.zeros_like(bias_V, dtype=self.sum_dtype) if bias_V is not None and needed[2] else None
        )

    def logits(self, rows: slice) -> Tensor:
        """A new tensor [R, V]."""
        return F.linear(self.hidden_MD[rows], self.weight_VD, self.bias_V).to(self.sum_dtype)

    def add_gradients(self, rows: slice, probabilities_RV: Tensor, targets_R: Tensor, scale_R: Tensor | float) -> None:
        """Add the gradients of ``sum(-scale * log_probs)``; overwrites the probabilities.

        Args:
            rows: the rows of this chunk.
            probabilities_RV: softmax of the logits, already multiplied by the scale.
            targets_R: the ids whose log-probabilities are summed.
            scale_R: a factor for each row.
        """
        index = torch.arange(len(targets_R), device=targets_R.device)
        probabilities_RV[index, targets_R] -= scale_R
        if self.bias_gradient is not None:
            self.bias_gradient += probabilities_RV.sum(0)
        gradient_RV = probabilities_RV.to(self.hidden_MD.dtype)
        if self.hidden_gradient is not None:
            self.hidden_gradient[rows] = gradient_RV @ self.weight_VD
        if self.weight_gradient is None:
            return
        if gradient_RV.dtype == self.sum_dtype:
            self.weight_gradient.addmm_(gradient_RV.T, self.hidden_MD[rows])
        else:
            self.weight_gradient += gradient_RV.T @ self.hidden_MD[rows]

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden_gradient, self.weight_gradient, self.bias_gradient


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        chunk: int,
        learns: bool,
    ) -> Tensor:
        needed = tuple(learns and need for need in ctx.needs_input_grad[:3])
        head = _Head(hidden_MD, weight_VD, bias_V, _matmul_dtype(hidden_MD), needed)
        losses_M = hidden_MD.new_empty(len(targets_M), dtype=head.sum_dtype)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for rows in _chunks(len(targets_M), chunk):
                exponentials_RV, log_probs_R, _ = _softmax_parts(head.logits(rows), targets_M[rows])
                losses_M[rows] = -log_probs_R
                if any(needed):
                    probabilities_RV = exponentials_RV.div_(exponentials_RV.sum(1, keepdim=True))
                    head.add_gradients(rows, probabilities_RV, targets_M[rows], 1.0)
        ctx.save_for_backward(*head.gradients())
        return losses_M.sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        in_place = not torch._C._autograd._get_current_graph_task_keep_graph()  # then nobody reads the saved ones again
        scaled = [
            saved if saved is None else saved.mul_(outer[0]) if in_place else saved * outer[0]
            for saved in ctx.saved_tensors
        ]
        return *scaled, None, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_M: Tensor, chunk: int
    ) -> Tensor:
        ctx.chunk, ctx.dtype = chunk, _matmul_dtype(hidden_MD)
        head = _Head(hidden_MD, weight_VD, bias_V, ctx.dtype, (False, False, False))
        log_probs_M = hidden_MD.new_empty(len(targets_M), dtype=head.sum_dtype)
        normalizers_M = torch.empty_like(log_probs_M)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for rows in _chunks(len(targets_M), chunk):
                _, log_probs_M[rows], normalizers_M[rows] = _softmax_parts(head.logits(rows), targets_M[rows])
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, targets_M, normalizers_M)
        return log_probs_M

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, bias_V, targets_M, normalizers_M = ctx.saved_tensors
        head = _Head(hidden_MD, weight_VD, bias_V, ctx.dtype, ctx.needs_input_grad)
        with torch.autocast(hidden_MD.device.type, enabled=False):
            for rows in _chunks(len(targets_M), ctx.chunk):
                scale_R = -outer[0][rows]
                probabilities_RV = head.logits(rows).sub_(normalizers_M[rows, None]).exp_().mul_(scale_R[:, None])
                head.add_gradients(rows, probabilities_RV, targets_M[rows], scale_R)
        return *head.gradients(), None, None


def _softmax_parts(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the logits' memory ``exp(logits - largest)``; the targets' log-probabilities [R]; log-sum-exp [R]."""
    largest_R1 = logits_RV.amax(1, keepdim=True)
    shifted_R1 = logits_RV.gather(1, targets_R[:, None]) - largest_R1
    exponentials_RV = logits_RV.sub_(largest_R1).exp_()
    log_total_R1 = exponentials_RV.sum(1, keepdim=True).log_()
    return exponentials_RV, (shifted_R1 - log_total_R1).squeeze(1), (largest_R1 + log_total_R1).squeeze(1)


def _matmul_dtype(hidden_MD: Tensor) -> torch.dtype:
    device = hidden_MD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_MD.dtype


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    return (slice(first, first + chunk) for first in range(0, rows, chunk))
