"""Direct preference optimization (arXiv:2305.18290) and its relatives, on pairs of a chosen and a rejected reply.

Legend: P pairs; the margin of a pair is log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected), where the
log-probability of a reply is the sum over its tokens.
"""

import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(beta * margin)``; with label smoothing, cDPO (https://ericmitchell.ai/cdpo.pdf, equation 3)."""
    kept = -F.logsigmoid(beta * margin_P) * (1 - label_smoothing)
    return kept - F.logsigmoid(-beta * margin_P) * label_smoothing


def robust_loss(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """An unbiased loss when a fraction `label_smoothing` of the pairs is flipped (arXiv:2403.00409, equation 12)."""
    kept = -F.logsigmoid(beta * margin_P) * (1 - label_smoothing)
    return (kept + F.logsigmoid(-beta * margin_P) * label_smoothing) / (1 - 2 * label_smoothing)


def hinge_loss(margin_P: Tensor, beta: float) -> Tensor:
    """``max(0, 1 - beta * margin)`` (SLiC, arXiv:2305.10425, as in RSO, arXiv:2309.06657)."""
    return F.relu(1 - beta * margin_P)


def ipo_loss(margin_P: Tensor, beta: float) -> Tensor:
    """``(margin - 1 / (2 beta))^2`` (arXiv:2310.12036, equation 17).

    The margin of means over tokens instead of sums is the form in which the paper's results were computed, as its
    authors told TRL.
    """
    return (margin_P - 1 / (2 * beta)) ** 2
