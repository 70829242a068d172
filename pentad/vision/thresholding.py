"""Masks of an image's size from logits of a segmenter's input, which are upscaled around the mask only.

Legend: U rows and columns of the logits; H and W of the image, of which h rows are near the mask.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pentad.models.vision.sam.sam import MASK_THRESHOLD
from pentad.vision.masks import RLE, encode
from pentad.vision.prompts import Fitted

STABILITY_OFFSET = 1.0
MARGIN = 1e-3  # of a logit; more than upscaling rounds
COLUMNS = 64  # that are upscaled together, in the second-level cache


class Thresholded(NamedTuple):
    """A mask.

    Attributes:
        columns_WH: the columns of the image that it lies in, bool.
        left: the first of them.
        width: of the image.
        stability_score: IoU of the masks at thresholds above and below; 0 for an empty one.
    """

    columns_WH: NDArray[np.bool_]
    left: int
    width: int
    stability_score: float

    @property
    def rle(self) -> RLE:
        """COCO's code of the mask."""
        return encode(torch.from_numpy(self.columns_WH.T), self.left, self.width)


class Axis(NamedTuple):
    """How one axis of the image depends on that of the logits.

    Attributes:
        weights_LU: of the logits, for each pixel.
        first_L, last_L: the logits whose weights are not 0.
    """

    weights_LU: Tensor
    first_L: NDArray[np.int64]
    last_L: NDArray[np.int64]

    @classmethod
    def of(cls, side: int, pixels: int, inner: int, length: int) -> "Axis":
        """The published way: to the network's input, without its padding to the image.

        Args:
            side: U.
            pixels: of the network's input.
            inner: of the image's picture in it.
            length: of the image.
        """
        square_1UX = F.interpolate(torch.eye(side)[None], pixels, mode="linear")
        weights_LU = F.interpolate(square_1UX[..., :inner], length, mode="linear")[0].T.contiguous()
        used_LU = weights_LU.numpy() != 0
        return cls(weights_LU, used_LU.argmax(1), side - 1 - used_LU[:, ::-1].argmax(1))

    def near(self, chosen_UU: NDArray[np.bool_], other: int) -> slice:
        """The pixels that depend on any of the chosen logits, of which `other` is the other axis."""
        index = np.flatnonzero(chosen_UU.any(axis=other))
        return slice(
            int(np.searchsorted(self.last_L, index[0])), int(np.searchsorted(self.first_L, index[-1], "right"))
        )

    def used(self, pixels: slice) -> slice:
        """The logits that some pixels depend on."""
        return slice(int(self.first_L[pixels.start]), int(self.last_L[pixels.stop - 1]) + 1)


class Thresholder:
    """Thresholds logits for images of one size. Bilinear upscaling twice, as published, is a product with one matrix a
    side, nearly all of whose elements are 0.

    Args:
        fitted: the image.
        side: U.
        whole: height and width of an image that this one is a part of; masks are of that.
        top, left: where the part begins.
    """

    def __init__(
        self, fitted: Fitted, side: int, whole: tuple[int, int] | None = None, top: int = 0, left: int = 0
    ) -> None:
        self._height, self._width = whole or (fitted.height, fitted.width)
        self._top, self._left = top, left
        self._rows = Axis.of(side, fitted.pixels, fitted.inner[0], fitted.height)
        self._columns = Axis.of(side, fitted.pixels, fitted.inner[1], fitted.width)

    @torch.inference_mode()
    def __call__(self, logits_UU: Tensor) -> Thresholded:
        """The mask of float32 logits on the CPU."""
        near_UU = (logits_UU > MASK_THRESHOLD - STABILITY_OFFSET - MARGIN).numpy()
        near_UU = near_UU[: self._rows.last_L[-1] + 1, : self._columns.last_L[-1] + 1]
        if not near_UU.any():
            return Thresholded(np.zeros((0, self._height), np.bool_), 0, self._width, 0.0)
        rows, columns = self._rows.near(near_UU, 1), self._columns.near(near_UU, 0)
        used = self._rows.used(rows)
        upscaled_Uh = logits_UU[used].T @ self._rows.weights_LU[rows, used].T
        mask_WH = np.zeros((columns.stop - columns.start, self._height), np.bool_)
        inside_Wh = mask_WH[:, self._top + rows.start : self._top + rows.stop]
        above = below = 0
        for start in range(columns.start, columns.stop, COLUMNS):
            some = slice(start, min(start + COLUMNS, columns.stop))
            used = self._columns.used(some)
            part_Wh = (self._columns.weights_LU[some, used] @ upscaled_Uh[used]).numpy()
            np.greater(part_Wh, MASK_THRESHOLD, out=inside_Wh[start - columns.start :][: len(part_Wh)])
            above += int(np.count_nonzero(part_Wh > MASK_THRESHOLD + STABILITY_OFFSET))
            below += int(np.count_nonzero(part_Wh > MASK_THRESHOLD - STABILITY_OFFSET))
        return Thresholded(mask_WH, self._left + columns.start, self._width, above / max(1, below))
