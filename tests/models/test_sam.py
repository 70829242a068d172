"""Segment Anything equals Meta's code and transformers: maps, logits and predicted IoU, from files of both layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SamModel

import pentad
import pentad.weights
from pentad.build import build
from pentad.models.vision.sam.prompt_encoder import Prompts
from pentad.models.vision.sam.sam import FAMILY, SamConfig
from pentad.vision.export import export
from tests.helpers.images import assert_close, images, network_of
from tests.helpers.sam import PATCH, SIDE, hf_sam, meta_sam

PIXELS = SIDE * PATCH
POINTS = torch.tensor([[[10.0, 20], [40, 33]], [[5, 60], [63, 0]]])
LABELS = torch.tensor([[1, 0], [1, -1]])
BOXES = torch.tensor([[4.0, 8, 30, 50], [10, 10, 64, 64]])


def low_res(count: int) -> Tensor:
    return images(count, 1, 4 * SIDE, 4 * SIDE, seed=5) * 5


PROMPTS = {
    "points": Prompts(POINTS, LABELS),
    "one point": Prompts(POINTS[:1, :1], LABELS[:1, :1]),
    "boxes": Prompts(boxes_P4=BOXES),
    "masks": Prompts(masks_P1MM=low_res(2)),
    "points and boxes": Prompts(POINTS, LABELS, BOXES),
    "all": Prompts(POINTS, LABELS, BOXES, low_res(2)),
}


def meta_decode(peer: Any, map_DSS: Tensor, prompts: Prompts, multimask: bool) -> tuple[Tensor, Tensor]:
    points = None if prompts.points_PK2 is None else (prompts.points_PK2, prompts.labels_PK)
    sparse, dense = peer.prompt_encoder(points=points, boxes=prompts.boxes_P4, masks=prompts.masks_P1MM)
    position = peer.prompt_encoder.get_dense_pe()
    return peer.mask_decoder(map_DSS[None], position, sparse, dense, multimask_output=multimask)


@torch.no_grad()
def test_maps_equal_those_of_meta(tmp_path: Path) -> None:
    peer = meta_sam(tmp_path / "sam.pth")
    network = network_of(tmp_path / "sam.pth")
    assert (network.config.window_size, network.config.global_attn_indexes) == (3, (1,))
    x = images(2, 3, PIXELS, PIXELS)
    assert_close(network.image_encoder(x), peer.image_encoder(x), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_masks_and_their_quality_equal_those_of_meta(tmp_path: Path, prompts: Prompts, multimask: bool) -> None:
    peer = meta_sam(tmp_path / "sam.pth")
    network = network_of(tmp_path / "sam.pth")
    image = images(3, PIXELS, PIXELS)
    logits, iou = network(image, prompts, multimask=multimask)
    expected_logits, expected_iou = meta_decode(peer, peer.image_encoder(image[None])[0], prompts, multimask)
    assert logits.shape == (prompts.count, 3 if multimask else 1, 4 * SIDE, 4 * SIDE)
    assert_close(logits, expected_logits, 1e-4)
    assert_close(iou, expected_iou, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["points", "boxes", "points and boxes", "all"])
def test_a_folder_equals_transformers(tmp_path: Path, name: str) -> None:
    peer, prompts = hf_sam(tmp_path), PROMPTS[name]
    network = network_of(tmp_path)
    image = images(3, PIXELS, PIXELS)
    map_DSS = network.image_encoder(image[None])[0]
    assert_close(map_DSS, peer.get_image_embeddings(image[None])[0], 1e-5)
    for index in range(2):  # transformers adds a mask to all prompts of an image
        one = Prompts(*(None if part is None else part[index : index + 1] for part in vars(prompts).values()))
        inputs = {
            "input_points": None if one.points_PK2 is None else one.points_PK2[None],
            "input_labels": None if one.labels_PK is None else one.labels_PK[None],
            "input_boxes": None if one.boxes_P4 is None else one.boxes_P4[None],
            "input_masks": one.masks_P1MM,
        }
        expected = peer(image_embeddings=map_DSS[None], multimask_output=True, **inputs)
        logits, iou = network.decode(map_DSS, one)
        assert_close(logits, expected.pred_masks[0], 1e-4)
        assert_close(iou, expected.iou_scores[0], 1e-5)


@torch.no_grad()
def test_transformers_reads_an_exported_folder(tmp_path: Path) -> None:
    meta_sam(tmp_path / "sam.pth")
    network = network_of(tmp_path / "sam.pth")
    export(network, FAMILY, tmp_path / "folder")
    peer: Any = SamModel.from_pretrained(tmp_path / "folder").eval()
    image, prompts = images(3, PIXELS, PIXELS), PROMPTS["one point"]
    assert prompts.points_PK2 is not None
    assert prompts.labels_PK is not None
    expected = peer(image[None], input_points=prompts.points_PK2[None], input_labels=prompts.labels_PK[None])
    assert_close(network(image, prompts)[0], expected.pred_masks[0], 1e-4)
    assert_close(network_of(tmp_path / "folder")(image, prompts)[0], network(image, prompts)[0], 1e-6)


@torch.no_grad()
def test_bfloat16_is_close(tmp_path: Path) -> None:
    meta_sam(tmp_path / "sam.pth")
    exact, rounded = (
        network_of(tmp_path / "sam.pth"),
        build(pentad.weights.open(tmp_path / "sam.pth"), dtype=torch.bfloat16),
    )
    image = images(3, PIXELS, PIXELS)
    masks = [network(x, PROMPTS["boxes"])[0] > 0 for network, x in ((exact, image), (rounded, image.bfloat16()))]
    assert (masks[0] != masks[1]).float().mean() < 0.05


def test_an_initial_network_learns() -> None:
    config = SamConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, window_size=3,
        global_attn_indexes=(1,), output_channels=32, decoder_mlp_dim=48, drop_path_rate=0.1,
    )  # fmt: skip
    network: Any = build(config, seed=0, trainable=True)
    logits, iou = network(images(3, PIXELS, PIXELS), PROMPTS["all"])
    (logits.square().mean() + iou.square().mean()).backward()
    unused = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert unused == {"prompt_encoder.no_mask_embed.weight"} | {
        f"mask_decoder.output_hypernetworks_mlps.0.layers.{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_encoder.blocks.1.attn.rel_pos_h": None}, "tensor image_encoder.blocks.1.attn.rel_pos_h is missing"),
        (
            {"mask_decoder.transformer.layers.0.norm1.bias": None},
            "1 missing: mask_decoder.transformer.layers.0.norm1.bias",
        ),
        ({"image_encoder.blocks.0.attn.qkv.weight": torch.zeros(96, 16)}, r"of the wrong shape: .* \[96, 16\]"),
        ({"mask_decoder.hf_token.weight": torch.zeros(1, 32)}, "1 not used: mask_decoder.hf_token.weight"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    state = {**meta_sam().state_dict(), **change}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "sam.pth")
    with pytest.raises(pentad.BadInput, match=message):
        pentad.load(tmp_path / "sam.pth")
