"""Direct preference optimization (arXiv:2305.18290) and its relatives, on pairs of a chosen and a rejected reply.

Legend: P pairs; the margin of a pair is log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected), where the
log-probability of a reply is the sum over its tokens.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.datasets.batches import TokenBatch, collate
from pentad.datasets.examples import PAIRS
from pentad.datasets.store import Examples
from pentad.nn.decoder import Decoder
from pentad.train.objectives.causal import reply_log_probs
from pentad.train.objectives.loss import Loss
from pentad.weights.atomic import NewFile, cache_entry, write_files
from pentad.weights.cache import cache_folder


def sigmoid_loss(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """``-log sigmoid(beta * margin)``; with label smoothing, cDPO (https://ericmitchell.ai/cdpo.pdf, equation 3)."""
    kept = -F.logsigmoid(beta * margin_P) * (1 - label_smoothing)
    return kept - F.logsigmoid(-beta * margin_P) * label_smoothing


def robust_loss(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """An unbiased loss when a fraction `label_smoothing` of the pairs is flipped (arXiv:2403.00409, equation 12)."""
    kept = -F.logsigmoid(beta * margin_P) * (1 - label_smoothing)
    return (kept + F.logsigmoid(-beta * margin_P) * label_smoothing) / (1 - 2 * label_smoothing)


def hinge_loss(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """``max(0, 1 - beta * margin)`` (SLiC, arXiv:2305.10425, as in RSO, arXiv:2309.06657)."""
    return F.relu(1 - beta * margin_P)


def ipo_loss(margin_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """``(margin - 1 / (2 beta))^2`` (arXiv:2310.12036, equation 17), without length normalization."""
    return (margin_P - 1 / (2 * beta)) ** 2


LOSSES = {"dpo": sigmoid_loss, "ipo": ipo_loss, "hinge": hinge_loss, "robust": robust_loss}
"""Name of an objective -> its loss of margins."""


@dataclass(frozen=True)
class DPO:
    """A loss of pairs against a frozen reference model.

    Attributes:
        loss: a key of `LOSSES`.
        beta: the inverse of the allowed distance to the reference.
        label_smoothing: see the losses.
        references: for each store, float32 [examples, 2]: the reference's log-probability of chosen and rejected.
        learns: see `pentad.datasets.examples`.
    """

    loss: str
    beta: float = 0.1
    label_smoothing: float = 0.0
    references: Sequence[np.ndarray] = ()
    learns: str = PAIRS

    def count(self, batch: TokenBatch) -> int:
        """The number of pairs."""
        return len(batch.targets_per_sequence) // 2

    def __call__(self, network: Decoder, batch: TokenBatch, *, checkpointing: str = "none") -> Loss:
        """The sum over pairs."""
        log_probs_P2 = reply_log_probs(network, batch, checkpointing=checkpointing).view(-1, 2)
        known = np.stack([self.references[source][number] for source, number in batch.examples])
        ratios_P2 = log_probs_P2 - torch.from_numpy(known).to(log_probs_P2.device)
        margin_P = ratios_P2[:, 0] - ratios_P2[:, 1]
        losses_P = LOSSES[self.loss](margin_P, self.beta, self.label_smoothing)
        rewards_P2 = self.beta * ratios_P2.detach()
        metrics = {
            "accuracy": (margin_P.detach() > 0).float().sum(),
            "reward_chosen": rewards_P2[:, 0].sum(),
            "reward_rejected": rewards_P2[:, 1].sum(),
        }
        return Loss(losses_P.sum(), metrics)


def reference_log_probs(network: Decoder, stores: Sequence[Examples], dtype: torch.dtype) -> list[np.ndarray]:
    """The network's log-probabilities of every pair: for each store float32 [examples, 2].

    They are computed once and kept in pentad's cache, under the hash of the data and of the network's weights.
    """
    weights = hashlib.sha256()
    for name, parameter in network.named_parameters():
        weights.update(name.encode())
        weights.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    references = []
    for store in stores:
        key = hashlib.sha256(f"{store.path.stem} {dtype} {weights.hexdigest()}".encode()).hexdigest()
        path = cache_folder() / "references" / f"{key[:32]}.npy"
        with cache_entry(path):
            if not path.exists():
                content = io.BytesIO()
                np.save(content, _log_probs(network, store, dtype))
                write_files([NewFile(path, content.getbuffer().nbytes, [content.getbuffer()])])
        references.append(np.load(path, allow_pickle=False))
    return references


def _log_probs(network: Decoder, store: Examples, dtype: torch.dtype) -> np.ndarray:
    with torch.no_grad(), torch.autocast(network.device.type, dtype, enabled=dtype != torch.float32):
        batches = (collate(store[number], device=network.device) for number in range(len(store)))
        return np.stack([reply_log_probs(network, batch).float().cpu().numpy() for batch in batches])
