"""Segment Anything as two ONNX files: the image encoder, and prompts to masks with the published names.

Legend: see `pentad.models.vision.sam.sam`; the batch of the decoder is one prompt.
"""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pentad.build import build
from pentad.errors import BadInput
from pentad.models import family_of
from pentad.models.family import TASKS
from pentad.models.vision.sam.mask_decoder import ImageRows
from pentad.models.vision.sam.sam import Sam
from pentad.weights.atomic import new_folder
from pentad.weights.checkpoint import Checkpoint

INPUTS = "image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size"
OUTPUTS = "masks", "iou_predictions", "low_res_masks"
OPSET = 17
AMBIGUOUS = 2.5  # a prompt with fewer points, the pad included, gets the best of the masks for ambiguous prompts


class OnnxEncoder(nn.Module):
    """The image encoder, without options: torch's exporter would pass them as inputs."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.encoder = sam.image_encoder

    def forward(self, images_BCHW: Tensor) -> Tensor:
        maps_BDSS: Tensor = self.encoder(images_BCHW)
        return maps_BDSS


class OnnxDecoder(nn.Module):
    """The prompt encoder, the mask decoder and the choice of one mask, as the published ONNX file has them.

    Points are in pixels of the network's input. A box's corners are points with the labels 2 and 3; without a box there
    is one more point with the label -1.
    """

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.sam = sam

    def forward(
        self,
        map_1DSS: Tensor,
        points_1K2: Tensor,
        labels_1K: Tensor,
        mask_11UU: Tensor,
        has_mask_1: Tensor,
        size_2: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits in the image's size (height, width) [1, 1, H, W], predicted IoU [1, 1], and logits [1, 1, U, U]."""
        encoder = self.sam.prompt_encoder
        sparse_1TD = encoder.encode_points(points_1K2, labels_1K)
        mask_1ND = encoder.mask_downscaling(mask_11UU).flatten(2).transpose(1, 2)
        dense_1ND = has_mask_1 * mask_1ND + (1 - has_mask_1) * encoder.no_mask_embed.weight
        positions_ND = encoder.grid()
        image = ImageRows.of(map_1DSS[0].flatten(1).T + dense_1ND, positions_ND)
        logits, iou = self.sam.mask_decoder(image, positions_ND, sparse_1TD, multimask=None)
        first_M = torch.eye(iou.shape[1])[0] * 1000
        best_1 = (iou + (points_1K2.shape[1] - AMBIGUOUS) * first_M).argmax(1)
        logits, iou = logits[:, best_1], iou[:, best_1]
        pixels = self.sam.config.image_size
        square = F.interpolate(logits, (pixels, pixels), mode="bilinear", align_corners=False)
        inner = torch.floor(size_2 * (pixels / size_2.max()) + 0.5).long()
        height, width = size_2.long()
        masks = F.interpolate(
            square[..., : inner[0], : inner[1]], (height, width), mode="bilinear", align_corners=False
        )
        return masks, iou, logits


def export_onnx(checkpoint: Checkpoint, folder: Path) -> list[Path]:
    """Write encoder.onnx (normalized, padded ``images`` -> ``image_embeddings``) and decoder.onnx.

    Args:
        checkpoint: of a Segment Anything.
        folder: is made.

    Raises:
        BadInput: the checkpoint is of another family, the folder exists, or the package onnx is missing.
    """
    family = family_of(checkpoint)
    if family.task != "segment":
        raise BadInput(f"--to onnx is for Segment Anything; {checkpoint.path} is {TASKS[family.task]}")
    try:
        import_module("onnx")
    except ModuleNotFoundError as error:
        raise BadInput("--to onnx needs the package onnx; install it: pip install 'pentad[onnx]'") from error
    sam: Any = build(checkpoint)
    c = sam.config
    images = torch.zeros(1, c.num_channels, c.image_size, c.image_size)
    prompt = torch.zeros(1, 2, 2), torch.tensor([[1.0, -1.0]]), torch.zeros(1, 1, 4 * c.side, 4 * c.side)
    decoder = (
        torch.zeros(1, c.output_channels, c.side, c.side),
        *prompt,
        torch.zeros(1),
        torch.tensor([c.image_size, 9.0]),
    )
    counts = {name: {1: "num_points"} for name in ("point_coords", "point_labels")}
    sizes = {"masks": {2: "height", 3: "width"}}
    with new_folder(folder) as partial:
        _write(OnnxEncoder(sam), (images,), partial / "encoder.onnx", ("images",), ("image_embeddings",), {})
        _write(OnnxDecoder(sam), decoder, partial / "decoder.onnx", INPUTS, OUTPUTS, counts | sizes)
    return [folder / "encoder.onnx", folder / "decoder.onnx"]


@torch.no_grad()
def _write(
    part: nn.Module, inputs: tuple[Tensor, ...], path: Path, names: tuple[str, ...], outputs: tuple[str, ...], axes: Any
) -> None:
    options: dict[str, Any] = {"input_names": names, "output_names": outputs, "dynamic_axes": axes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes that are constants, on purpose
        torch.onnx.export(part, inputs, path, **options, opset_version=OPSET, dynamo=False)
