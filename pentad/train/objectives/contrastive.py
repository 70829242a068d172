"""CLIP's objective (arXiv:2103.00020): among the images and texts of a batch, which belong together?

Legend: B pairs of an image and a text, E width of the embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pentad.models.vision.clip import CLIP
from pentad.train.objectives.images import soft_cross_entropy
from pentad.train.objectives.loss import Loss
from pentad.train.pair_data import PairBatch

MAX_LOG_SCALE = math.log(100)
"""The learned scale of the cosines is 100 at most, as published."""


def contrastive_loss(logits_BB: Tensor, same_BB: Tensor) -> Tensor:
    """The mean of the cross-entropies over texts for each image, and over images for each text, summed over pairs.

    Args:
        logits_BB: scaled cosines of images and texts.
        same_BB: which pairs have the same text. They are positives of each other with equal shares of the target, as in
            UniCL (arXiv:2204.03610); where all texts differ this is CLIP's loss.
    """
    targets_BB = same_BB / same_BB.sum(1, keepdim=True)
    return (soft_cross_entropy(logits_BB, targets_BB) + soft_cross_entropy(logits_BB.T, targets_BB)) / 2


@dataclass(frozen=True)
class ContrastiveObjective:
    """`contrastive_loss` of a batch, which is never split: each pair is compared with all others."""

    def totals(self, network: CLIP, batch: PairBatch) -> list[float]:
        """The number of pairs."""
        return [len(batch.texts)]

    def __call__(
        self, network: CLIP, batch: PairBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over pairs."""
        clamp_scale(network)
        images_BE, texts_BE = network.embed_images(batch.images_B3HW), network.embed_text(batch.ids_N, batch.layout)
        with torch.autocast(images_BE.device.type, enabled=False):
            logits_BB = network.logits(images_BE.float(), texts_BE.float())
        number = {text: i for i, text in enumerate(dict.fromkeys(batch.texts))}
        texts_B = torch.tensor([number[text] for text in batch.texts], device=logits_BB.device)
        right = (texts_B[logits_BB.argmax(1)] == texts_B).float().sum() / totals[0]
        loss = contrastive_loss(logits_BB, texts_B[:, None] == texts_B)
        return Loss(loss / totals[0], {"accuracy": right})


@torch.no_grad()
def clamp_scale(network: CLIP) -> None:
    """Limit the learned scale."""
    network.logit_scale.weight.clamp_(max=MAX_LOG_SCALE)
