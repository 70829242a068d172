"""Next-token prediction: pretraining, and supervised fine-tuning on replies."""

from dataclasses import dataclass

from torch import Tensor

from pentad.datasets.batches import TokenBatch
from pentad.nn.decoder import Decoder
from pentad.nn.linear_loss import linear_cross_entropy, linear_log_probs
from pentad.train.objectives.loss import Loss


@dataclass(frozen=True)
class CausalLM:
    """Cross-entropy of the target tokens. The head runs on rows with a target only.

    Attributes:
        learns: "documents" (every token is a target) or "replies" (those of the assistant's turns).
    """

    learns: str

    def count(self, batch: TokenBatch) -> int:
        """The number of target tokens."""
        return len(batch.targets_M)

    def __call__(self, network: Decoder, batch: TokenBatch, *, checkpointing: str = "none") -> Loss:
        """The sum over target tokens."""
        hidden_MD = network(batch.ids_N, batch.batch, checkpointing=checkpointing)[batch.rows_M]
        return Loss(linear_cross_entropy(hidden_MD, network.head.weight, network.head.bias, batch.targets_M), {})


def reply_log_probs(network: Decoder, batch: TokenBatch, *, checkpointing: str = "none") -> Tensor:
    """The log-probability of each sequence's targets: [B]."""
    hidden_MD = network(batch.ids_N, batch.batch, checkpointing=checkpointing)[batch.rows_M]
    return batch.sequence_sums(linear_log_probs(hidden_MD, network.head.weight, network.head.bias, batch.targets_M))
