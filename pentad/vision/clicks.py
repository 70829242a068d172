"""Clicks as a person makes them: deep inside of an object, or where a mask is most wrong."""

import numpy as np
from torch import Tensor

from pentad.errors import BadInput


def deepest_point(area_HW: Tensor) -> tuple[int, int]:
    """The x and y of the pixel that is farthest from the border of an area, bool [H, W]; the image's edge is a border.

    Raises:
        BadInput: the area is empty.
    """
    from scipy.ndimage import distance_transform_edt

    if not area_HW.any():
        raise BadInput("the area is empty; expected at least a pixel")
    depth_HW = distance_transform_edt(np.pad(area_HW.numpy(), 1))[1:-1, 1:-1]
    y, x = divmod(int(depth_HW.argmax()), area_HW.shape[1])
    return x, y


def next_click(found_HW: Tensor, truth_HW: Tensor) -> tuple[int, int, int] | None:
    """Where a person would correct a mask: x, y and label (1 in the object, 0 outside); None if the mask is right.

    As in the evaluation of Segment Anything, the point is the one deepest inside of the error.
    """
    wrong_HW = found_HW ^ truth_HW
    if not wrong_HW.any():
        return None
    x, y = deepest_point(wrong_HW)
    return x, y, int(truth_HW[y, x])


def mask_iou(one_HW: Tensor, other_HW: Tensor) -> float:
    """Intersection over union of two bool masks; 0 if both are empty."""
    return float((one_HW & other_HW).sum() / (one_HW | other_HW).sum().clamp(min=1))
