"""Segment Anything's prompt encoder: points, boxes, words and masks become rows that the mask decoder reads.

Legend: P prompts, each with K points; T rows of a prompt; N = S * S patches of an image; D width; E width of CLIP's
embeddings.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pentad.nn.linear import Derived
from pentad.nn.norm import LayerNorm2d

PAD, BACKGROUND, FOREGROUND = -1, 0, 1
"""Labels of points; one that is `PAD` says nothing."""


@dataclass(frozen=True)
class Prompts:
    """P prompts for one image, each of any mix of points, a box, a mask and words. Coordinates are pixels of the
    network's input.

    Attributes:
        points_PK2: x and y.
        labels_PK: `FOREGROUND`, `BACKGROUND` or `PAD`.
        boxes_P4: x0, y0, x1, y1.
        masks_P1MM: logits of a mask, four times as many a side as patches.
        text_PE: CLIP's embedding of a text, or of a picture of the object, of length 1.
    """

    points_PK2: Tensor | None = None
    labels_PK: Tensor | None = None
    boxes_P4: Tensor | None = None
    masks_P1MM: Tensor | None = None
    text_PE: Tensor | None = None

    @property
    def count(self) -> int:
        """P."""
        return next((len(part) for part in vars(self).values() if part is not None), 1)


class FourierPositions(nn.Module):
    """Positions as sines and cosines of random frequencies (arXiv:2006.10739), always in float32.

    Args:
        frequencies: half of D.
    """

    weight: Tensor

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(2, frequencies))

    def forward(self, xy: Tensor) -> Tensor:
        """Coordinates from 0 to 1, [..., 2] -> [..., D]."""
        angles = 2 * math.pi * ((2 * xy.float() - 1) @ self.weight.float())
        return torch.cat((angles.sin(), angles.cos()), -1)


class PromptEncoder(nn.Module):
    """Each point and each corner of a box is one row: its position, plus what it is. Words are one row, a projection of
    CLIP's embedding. A mask is a map of rows.

    Args:
        width: D.
        side: S.
        pixels: of the network's input, a side.
        mask_channels: of the convolutions for masks.
        text_width: E; None for a network that takes no words, as the published ones.
    """

    def __init__(self, width: int, side: int, pixels: int, mask_channels: int, text_width: int | None = None) -> None:
        super().__init__()
        self.side, self.pixels = side, pixels
        self.pe_layer = FourierPositions(width // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 2, 2),
            LayerNorm2d(mask_channels // 4, 1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 2, 2),
            LayerNorm2d(mask_channels, 1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels, width, 1),
        )
        self.no_mask_embed = nn.Embedding(1, width)
        if text_width is not None:
            self.text_projection = nn.Linear(text_width, width)
        self._grid = Derived()

    def forward(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Encode prompts.

        Returns:
            Rows of points, boxes and words [P, T, D], and what is added to the image's rows: [P, N, D] for masks, else
            [1, 1, D].
        """
        kinds_5D = self._kinds()
        sparse = [kinds_5D.new_zeros(prompts.count, 0, kinds_5D.shape[1])]
        if prompts.points_PK2 is not None and prompts.labels_PK is not None:
            points_PKD = self.encode_points(prompts.points_PK2, prompts.labels_PK)
            sparse.append(points_PKD)
            if prompts.boxes_P4 is None:
                sparse.append(kinds_5D[PAD].expand(prompts.count, 1, -1))
        if prompts.boxes_P4 is not None:
            corners_P2 = torch.tensor([[2, 3]], device=kinds_5D.device).expand(prompts.count, -1)
            sparse.append(self.encode_points(prompts.boxes_P4.view(-1, 2, 2), corners_P2))
        if prompts.text_PE is not None:
            sparse.append(self.text_projection(prompts.text_PE.to(kinds_5D.dtype))[:, None])
        dense = self.no_mask_embed.weight[None]
        if prompts.masks_P1MM is not None:
            dense = self.mask_downscaling(prompts.masks_P1MM.to(dense.dtype)).flatten(2).transpose(1, 2)
        return torch.cat(sparse, 1), dense

    def encode_points(self, points_PK2: Tensor, labels_PK: Tensor) -> Tensor:
        """[P, K, D]; the labels 2 and 3 are the first and the last corner of a box."""
        kinds_5D = self._kinds()
        positions_PKD = self.pe_layer((points_PK2 + 0.5) / self.pixels).to(kinds_5D.dtype)
        positions_PKD = torch.where(labels_PK[..., None] == PAD, 0.0, positions_PKD)
        return positions_PKD + kinds_5D[labels_PK.long()]

    def _kinds(self) -> Tensor:
        """What a point is, by its label, [5, D]; the last is `PAD`."""
        embeddings = (*self.point_embeddings, self.not_a_point_embed)
        return torch.cat([embedding.weight for embedding in embeddings])

    def grid(self) -> Tensor:
        """The positions of an image's patches, [N, D]."""
        positions_ND: Tensor = self._grid.get((self.pe_layer.weight,), self._encode_grid)
        return positions_ND

    def _encode_grid(self) -> Tensor:
        at = (torch.arange(self.side, device=self.pe_layer.weight.device) + 0.5) / self.side
        y, x = torch.meshgrid(at, at, indexing="ij")
        positions_ND: Tensor = self.pe_layer(torch.stack((x, y), -1)).flatten(0, 1)
        return positions_ND.to(self.pe_layer.weight.dtype)
