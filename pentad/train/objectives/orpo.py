"""ORPO: supervised fine-tuning with a penalty for the odds of rejected replies (arXiv:2403.07691)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def odds_ratio_loss(mean_log_probs_P2: Tensor, beta: float) -> Tensor:
    """``-beta * log sigmoid(log(odds(chosen) / odds(rejected)))``, where ``odds = p / (1 - p)`` and p is the geometric
    mean of a reply's probabilities (equations 4 and 7; beta is their lambda). The loss adds it to that of the chosen
    replies (equation 6)."""
    log_p_P2 = mean_log_probs_P2.clamp(max=-1e-6)  # a reply that is certain would have infinite odds
    log_odds_P2 = log_p_P2 - torch.log(-torch.expm1(log_p_P2))
    return -beta * F.logsigmoid(log_odds_P2[:, 0] - log_odds_P2[:, 1])
