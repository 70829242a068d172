"""SimPO: preferences without a reference model, by the mean log-probability of a reply's tokens (arXiv:2405.14734)."""

from torch import Tensor

from pentad.train.objectives.dpo import sigmoid_loss


def simpo_loss(mean_log_probs_P2: Tensor, beta: float, simpo_gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(beta * (chosen - rejected) - gamma)`` (equation 6), of means over tokens, for P pairs."""
    return sigmoid_loss(mean_log_probs_P2[:, 0] - mean_log_probs_P2[:, 1] - simpo_gamma / beta, beta, label_smoothing)
