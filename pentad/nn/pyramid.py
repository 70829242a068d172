"""Feature pyramids (arXiv:1612.03144): maps of equal width at several strides, and boxes pooled from the map that fits.

Legend: B images, C channels, H by W positions, K boxes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.nn.boxes import box_area, roi_align, roi_pool

CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4
"""A box of this side is pooled from the map at stride 2 ** 4."""


class Pyramid(nn.Module):
    """Top-down sums of a backbone's stages, each smoothed by a 3 by 3 convolution; parts have torchvision's names.

    Args:
        sizes: the channels of the stages, fine to coarse.
        channels: of each map.
    """

    def __init__(self, sizes: Sequence[int], channels: int) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(size, channels, 1)) for size in sizes)
        self.layer_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1)) for _ in sizes)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """A map for each stage, fine to coarse, and the coarsest one again at half the size."""
        inner_BCHW = self.inner_blocks[-1](stages[-1])
        maps = [self.layer_blocks[-1](inner_BCHW)]
        for i in range(len(stages) - 2, -1, -1):
            finer_BCHW = self.inner_blocks[i](stages[i])
            inner_BCHW = finer_BCHW + F.interpolate(inner_BCHW, finer_BCHW.shape[2:], mode="nearest")
            maps.insert(0, self.layer_blocks[i](inner_BCHW))
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]


def pool_levels(
    maps: Sequence[Tensor], boxes: Sequence[Tensor], side: int, height: int, *, align: bool = True
) -> Tensor:
    """Pool each box from the map whose stride fits the box's size.

    Args:
        maps: fine to coarse.
        boxes: [K, 4] for each image.
        side: rows and columns of the result.
        height: of the padded images in pixels.
        align: by RoIAlign with 2 by 2 samples; by RoIPool otherwise.

    Returns:
        [sum of K, C, side, side].
    """
    all_K4 = torch.cat(list(boxes))
    images_K = torch.cat([torch.full((len(one),), i, device=one.device) for i, one in enumerate(boxes)])
    scales = [2.0 ** round(torch.tensor(one.shape[2] / height).log2().item()) for one in maps]
    finest, coarsest = (-round(torch.tensor(scale).log2().item()) for scale in (scales[0], scales[-1]))
    levels_K = torch.floor(CANONICAL_LEVEL + torch.log2(box_area(all_K4).sqrt() / CANONICAL_SIDE) + 1e-6)
    levels_K = levels_K.clamp(finest, coarsest).long() - finest
    out = maps[0].new_zeros(len(all_K4), maps[0].shape[1], side, side)
    for level, (one, scale) in enumerate(zip(maps, scales, strict=True)):
        at = (levels_K == level).nonzero()[:, 0]
        if len(at):
            where = one, all_K4[at], images_K[at], (side, side), scale
            pooled = roi_align(*where, sampling_ratio=2, aligned=False) if align else roi_pool(*where)
            out = out.index_copy(0, at, pooled.to(out.dtype))
    return out
