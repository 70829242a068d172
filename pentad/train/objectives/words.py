"""Words as the first prompts of Segment Anything (arXiv:2304.02643, appendix D.5): in training, CLIP's embedding of a
picture of the object stands for its embedding of a text.

Legend: P objects of all images of a batch, H by W pixels of the network's input, S of CLIP's, E width of embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.datasets.object_batches import ObjectBatch
from pentad.models.vision.clip import CLIP
from pentad.models.vision.config import Preprocessing
from pentad.vision.crops import object_crop
from pentad.vision.segmenter import MEAN, STD


@dataclass(frozen=True)
class Words:
    """Chooses the objects that begin with words, and embeds them.

    Attributes:
        clip: the network, frozen.
        how: the normalization that it expects.
        share: of the objects that are large enough.
        least_area: of such an object, in pixels of the network's input.
    """

    clip: CLIP
    how: Preprocessing
    share: float
    least_area: float

    def choose(self, truth_PHW: Tensor) -> Tensor:
        """Which objects begin with words, bool [P]; the draw doesn't depend on the device."""
        drawn_P = (torch.rand(len(truth_PHW)) < self.share).to(truth_PHW.device)
        return drawn_P & (truth_PHW.flatten(1).sum(1) >= self.least_area)

    @torch.no_grad()
    def embed(self, batch: ObjectBatch, image_P: Tensor, boxes_P4: Tensor, truth_PHW: Tensor) -> Tensor:
        """The embeddings [P, E], of length 1, of squares around the objects.

        A square is 1 to 2 times as large as the box; half of them show nothing but the object.
        """
        assert self.clip.config.vision_config is not None
        device, side = truth_PHW.device, self.clip.config.vision_config.image_size
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        factors, alone_P = (1 + torch.rand(len(image_P))).tolist(), (torch.rand(len(image_P)) < 0.5).to(device)
        crops, masks = list[Tensor](), list[Tensor]()
        for number, box, truth_HW, factor in zip(image_P.tolist(), boxes_P4.tolist(), truth_PHW, factors, strict=True):
            height, width = batch.sizes[number]
            image_3HW = (batch.images_BCHW[number, :, :height, :width].float() * std + mean).clamp(0, 255)
            crop_3SS, mask_SS = object_crop(image_3HW, truth_HW[:height, :width], box, factor, side)
            crops.append(crop_3SS)
            masks.append(mask_SS)
        masks_PSS = torch.stack(masks)
        shown_P3SS = torch.stack(crops) * (masks_PSS | ~alone_P[:, None, None])[:, None]
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.how.mean, self.how.std))
        return F.normalize(self.clip.embed_images((shown_P3SS / 255 - mean) / std, masks_PSS).float(), dim=1)
