"""Mask R-CNN equals torchvision's: boxes, scores, masks and losses on random weights, from files of both layouts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pentad
import tests.helpers.torchvision_stub  # noqa: F401
from pentad.build import build
from pentad.models.vision import mask_rcnn
from pentad.nn.boxes import pairwise_iou
from pentad.train.objectives.mask_rcnn import Truth, mask_rcnn_losses
from pentad.vision import masks
from pentad.vision.mask_rcnn import MaskRCNNPredictor
from tests.helpers.images import assert_close, images, network_of

torchvision: Any = import_module("torchvision")
detection: Any = import_module("torchvision.models.detection")


def tiny_peer(*, frozen: bool = False, mask: bool = True, classes: int = 4) -> Any:
    """torchvision's Mask R-CNN with a small ResNet and 16 channels, on small images."""
    torch.manual_seed(0)
    norm = (lambda size: torchvision.ops.FrozenBatchNorm2d(size, eps=0.0)) if frozen else nn.BatchNorm2d
    resnet = torchvision.models.resnet
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], norm_layer=norm)
    stages = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    backbone = detection.backbone_utils.BackboneWithFPN(body, stages, [64, 128, 256, 512], 16)
    anchors = detection.rpn.AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    parts: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "rpn_head": detection.rpn.RPNHead(16, 3),
        "box_head": detection.faster_rcnn.TwoMLPHead(16 * 49, 32),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(32, classes),
    }
    if mask:
        parts["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(16, (16,) * 4, 1)
        parts["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(16, 16, classes)
    kind = detection.MaskRCNN if mask else detection.FasterRCNN
    peer = kind(backbone, None, min_size=96, max_size=160, box_score_thresh=0.05, **parts)
    with torch.no_grad():
        for name, tensor in peer.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            elif "bbox_pred.weight" in name or "cls_score.weight" in name or "cls_logits.weight" in name:
                tensor.normal_(0, 0.3)
    return peer.eval()


def ours_of(peer: Any, path: Path) -> Any:
    torch.save(peer.state_dict(), path)
    network = network_of(path)
    object.__setattr__(network.config, "min_size", 96)
    object.__setattr__(network.config, "max_size", 160)
    return network


@torch.no_grad()
@pytest.mark.parametrize(("frozen", "mask"), [(False, True), (True, True), (True, False)])
def test_boxes_and_masks_equal_those_of_torchvision(tmp_path: Path, frozen: bool, mask: bool) -> None:
    peer = tiny_peer(frozen=frozen, mask=mask)
    network = ours_of(peer, tmp_path / "rcnn.pth")
    assert (network.config.frozen, network.config.masks, len(network.config.names)) == (frozen, mask, 4)
    generator = torch.Generator().manual_seed(1)
    photos = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in [(90, 120), (130, 70)]
    ]
    expected = peer([photo / 255 for photo in photos])
    found = MaskRCNNPredictor(network)(photos, 0.05)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(theirs["boxes"]) > 5
        assert ours.labels_N.tolist() == theirs["labels"].tolist()
        assert_close(ours.boxes_N4, theirs["boxes"], 1e-5)
        assert (ours.boxes_N4 - theirs["boxes"]).abs().max() < 1e-3
        assert_close(ours.scores_N, theirs["scores"], 1e-5)
        assert (ours.masks is None) == (not mask)
        for code, probability in zip(ours.masks or [], theirs.get("masks", []), strict=False):
            assert (masks.decode(code) != (probability[0] > 0.5)).sum() <= 2


@torch.no_grad()
def test_mask_probabilities_equal_those_of_torchvision(tmp_path: Path) -> None:
    peer = tiny_peer()
    network = ours_of(peer, tmp_path / "rcnn.pth")
    x = images(1, 3, 96, 128)
    features = peer.backbone(x)
    for ours, theirs in zip(network.maps(x), features.values(), strict=True):
        assert_close(ours, theirs)
    sizes = [(96, 128)]
    proposals, _ = peer.rpn(detection.image_list.ImageList(x, sizes), features)
    [ours] = network.propose(network.maps(x), (96, 128), sizes).boxes
    assert_close(ours, proposals[0])
    [expected], _ = peer.roi_heads(features, proposals, sizes)
    [found] = network(x, sizes)
    assert_close(found.masks_NMM, expected["masks"][:, 0], 1e-4)


@torch.no_grad()
def test_the_old_names_and_a_detector(tmp_path: Path) -> None:
    peer = tiny_peer(frozen=True)
    network = ours_of(peer, tmp_path / "new.pth")
    renamed = {}
    for name, tensor in peer.state_dict().items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for i in range(4):
            name = name.replace(f"roi_heads.mask_head.{i}.0.", f"roi_heads.mask_head.mask_fcn{i + 1}.")
            name = name.replace(f"_blocks.{i}.0.", f"_blocks.{i}.")
        renamed[name] = tensor
    torch.save(renamed, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # as files of 2019
    old = network_of(tmp_path / "old.pth")
    x = images(1, 3, 96, 128)
    assert torch.equal(old(x, [(96, 128)])[0].boxes_N4, network(x, [(96, 128)])[0].boxes_N4)
    detector: Any = pentad.load(tmp_path / "old.pth")
    object.__setattr__(detector.network.config, "min_size", 96)
    [result] = detector.detect(torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8), threshold=0.1)
    assert result.detections
    assert result.detections[0].mask["size"] == [90, 120]
    assert pairwise_iou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 0)


def test_a_step_lowers_the_losses_and_images_may_be_empty() -> None:
    config = mask_rcnn.MaskRCNNConfig(
        hidden_sizes=(8, 8, 16, 16),
        embedding_size=8,
        depths=(1, 1, 1, 1),
        layer_type="basic",
        names=("background", "a", "b"),
        pyramid_size=8,
        head_size=16,
    )
    network: Any = build(config, seed=0, trainable=True)
    x, sizes = images(2, 3, 64, 64), [(64, 64)] * 2
    truths = [
        Truth(torch.tensor([[10.0, 10, 50, 60]]), torch.tensor([2]), torch.ones(1, 64, 64)),
        Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64)),
    ]
    sums = []
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    for _ in range(3):
        torch.manual_seed(0)
        losses = mask_rcnn_losses(network, x, sizes, truths)
        assert losses.keys() >= {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        sums.append(float(total.detach()))
    assert sums[2] < sums[0]
