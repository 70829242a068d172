"""Objectives on images: classification, and masked autoencoding.

Legend: B images, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.models.vision.mae import MAE, Masking, mae_loss
from pentad.train.image_data import ImageBatch
from pentad.train.objectives.loss import Loss


def soft_cross_entropy(logits_BV: Tensor, targets_BV: Tensor) -> Tensor:
    """Cross-entropy with distributions as targets, summed over images."""
    return -(targets_BV * logits_BV.float().log_softmax(1)).sum()


def mixed(images_B3HW: Tensor, targets_BV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv:1710.09412): each image and its target mixed with those of the image at the other end of the batch,
    in one proportion from Beta(alpha, alpha)."""
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    return images_B3HW.lerp(images_B3HW.flip(0), 1 - share), targets_BV.lerp(targets_BV.flip(0), 1 - share)


@dataclass(frozen=True)
class ClassifyObjective:
    """The mean cross-entropy of images.

    Attributes:
        mixup: see `mixed`; 0 for none. Only in training.
        label_smoothing: the share of a target that is spread over all classes. Only in training.
    """

    mixup: float = 0.0
    label_smoothing: float = 0.0

    def totals(self, network: nn.Module, batch: ImageBatch) -> list[float]:
        """The number of images."""
        return [len(batch.labels_B)]

    def __call__(
        self, network: nn.Module, batch: ImageBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over images."""
        images_B3HW, labels_B = batch.images_B3HW, batch.labels_B
        targets_BV = F.one_hot(labels_B, network.config.num_labels).float()  # type: ignore[arg-type,union-attr]
        if network.training:
            targets_BV = targets_BV.lerp(torch.full_like(targets_BV, 1 / targets_BV.shape[1]), self.label_smoothing)
            if self.mixup:
                images_B3HW, targets_BV = mixed(images_B3HW, targets_BV, self.mixup)
        logits_BV = network(images_B3HW, checkpointing=checkpointing)
        right = (logits_BV.detach().argmax(1) == labels_B).float().sum() / totals[0]
        return Loss(soft_cross_entropy(logits_BV, targets_BV) / totals[0], {"accuracy": right})


@dataclass(frozen=True)
class MAEObjective:
    """The mean error of the masked patches; which are masked is random, in each step anew."""

    def totals(self, network: nn.Module, batch: ImageBatch) -> list[float]:
        """The number of images."""
        return [len(batch.images_B3HW)]

    def __call__(
        self, network: nn.Module, batch: ImageBatch, totals: Sequence[float], *, checkpointing: str = "none"
    ) -> Loss:
        """The share of the mean over images."""
        assert isinstance(network, MAE)
        config, images_B3HW = network.config, batch.images_B3HW
        noise_BP = torch.rand(len(images_B3HW), config.patches, device=images_B3HW.device)
        masking = Masking.random(noise_BP, config.kept)
        pixels_BMQ = network(images_B3HW, masking, checkpointing=checkpointing)
        loss = mae_loss(pixels_BMQ, images_B3HW, masking, config.patch_size, norm_pix=config.norm_pix_loss)
        return Loss(loss * len(images_B3HW) / totals[0], {})
