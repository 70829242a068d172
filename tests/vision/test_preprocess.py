"""Resizing as the peers do it."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import tests.helpers.torchvision_stub  # noqa: F401 - before torchvision
from pentad.vision.preprocess import center_crop, fit_sides, resize_opencv, resize_pillow, yolox_letterbox

SIZES = [((57, 76), (41, 41)), (((30, 20)), (41, 27)), ((7, 9), (7, 31)), ((1, 1), (5, 4)), ((50, 3), (1, 1))]


def picture(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).permute(2, 0, 1)


def to_numpy(image_3HW: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image_3HW.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("size", "resized"), SIZES)
def test_resize_gives_opencvs_bytes(size: tuple[int, int], resized: tuple[int, int]) -> None:
    for image in (picture(*size), picture(*size).contiguous()):
        theirs = cv2.resize(to_numpy(image), resized[::-1], interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(to_numpy(resize_opencv(image, *resized)), theirs.reshape(*resized, 3))


def test_resize_gives_the_input_of_opencvs_networks() -> None:
    image = picture(90, 120)
    blob = cv2.dnn.blobFromImage(to_numpy(image.flip(0)), 1 / 255, (64, 48), swapRB=True, crop=False)
    assert np.allclose(resize_opencv(image, 48, 64).numpy() / 255, blob[0], atol=1e-6)


@pytest.mark.parametrize("size", [(60, 90), (91, 50), (20, 20)])
def test_yolox_pads_at_the_bottom_right(size: tuple[int, int]) -> None:
    image = picture(*size)
    scale = min(64 / size[0], 64 / size[1])
    bgr = to_numpy(image.flip(0))
    expected = np.full((64, 64, 3), 114, np.uint8)
    resized = cv2.resize(bgr, (int(size[1] * scale), int(size[0] * scale)), interpolation=cv2.INTER_LINEAR)
    expected[: resized.shape[0], : resized.shape[1]] = resized
    padded = yolox_letterbox(image, 64, 64)
    assert np.array_equal(to_numpy(padded.image), expected.astype(np.float32))
    assert padded.scale == scale


@pytest.mark.parametrize("size", [(60, 90), (91, 50), (10, 400)])
def test_sides_fit_as_in_torchvisions_detectors(size: tuple[int, int]) -> None:
    from torchvision.models.detection.transform import _resize_image_and_masks

    image = picture(*size).float() / 255
    assert torch.equal(fit_sides(image, 80, 133), _resize_image_and_masks(image, 80, 133)[0])


@pytest.mark.parametrize("bicubic", [False, True])
def test_pillows_resize_and_crop_are_those_of_transformers(bicubic: bool) -> None:
    from PIL import Image
    from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

    image = picture(60, 91)
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    plain = {"do_rescale": False, "do_normalize": False, "resample": resample, "return_tensors": "pt"}
    whole = ViTImageProcessorPil(size={"height": 32, "width": 48}, **plain)(to_numpy(image))["pixel_values"][0]
    assert torch.equal(resize_pillow(image, (32, 48), bicubic=bicubic), whole.to(torch.uint8))
    cropping = ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875, **plain)
    cropped = center_crop(resize_pillow(image, 36, bicubic=bicubic), 32, 32)
    assert torch.equal(cropped, cropping(to_numpy(image))["pixel_values"][0].to(torch.uint8))


def test_a_crop_larger_than_the_image_has_a_black_border() -> None:
    cropped = center_crop(torch.ones(3, 2, 9), 4, 3)
    assert cropped.shape == (3, 4, 3)
    assert cropped.sum(0)[:, 1].tolist() == [0, 3, 3, 0]
