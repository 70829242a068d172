"""Each loss of Mask R-CNN, and the gradients, equal torchvision's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.models.vision import mask_rcnn
from pentad.nn.boxes import roi_align
from pentad.train.objectives.mask_rcnn import Truth, mask_rcnn_losses
from tests.helpers.images import assert_close, images
from tests.models.test_mask_rcnn import detection, ours_of, tiny_peer


@pytest.mark.parametrize("empty", [False, True])
def test_each_loss_and_the_gradients_equal_those_of_torchvision(
    tmp_path: Path, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = tiny_peer(frozen=True).train()
    for name in ("pre_nms_top_n", "post_nms_top_n"):
        monkeypatch.setitem(getattr(mask_rcnn, name.removesuffix("_top_n").upper()), True, 60)
        getattr(peer.rpn, f"_{name}")["training"] = 60

    def align(masks: Any, rois: Any, size: tuple[int, int], scale: float) -> Any:
        """In place of torchvision's, which takes minutes without its operators; see tests/nn/test_boxes.py."""
        return roi_align(masks, rois[:, 1:], rois[:, 0].long(), size, scale, aligned=False)

    monkeypatch.setattr(detection.roi_heads, "roi_align", align)
    peer.roi_heads.fg_bg_sampler.batch_size_per_image = 32
    network = ours_of(peer, tmp_path / "rcnn.pth").requires_grad_().train()
    x, sizes = images(2, 3, 96, 128), [(96, 128), (96, 128)]
    boxes = [torch.tensor([[10.0, 12, 60, 70], [50, 20, 110, 90], [5, 5, 20, 18]]), torch.tensor([[30.0, 30, 80, 90]])]
    labels = [torch.tensor([1, 3, 2]), torch.tensor([2])]
    if empty:
        boxes[1], labels[1] = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    shapes = []
    for one in boxes:
        mask = torch.zeros(len(one), 96, 128, dtype=torch.uint8)
        for i, (x0, y0, x1, y1) in enumerate(one.long().tolist()):
            mask[i, y0 : (y0 + y1) // 2, x0:x1] = 1
        shapes.append(mask)
    peer.transform._skip_resize = True
    peer.transform.image_mean, peer.transform.image_std = [0.0] * 3, [1.0] * 3
    targets = [{"boxes": b, "labels": n, "masks": m} for b, n, m in zip(boxes, labels, shapes, strict=True)]
    torch.manual_seed(5)
    expected = peer([*x], targets)
    torch.manual_seed(5)
    truths = [Truth(*one) for one in zip(boxes, labels, shapes, strict=True)]
    found = mask_rcnn_losses(network, x, sizes, truths, 32)
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert float(loss.detach()) == pytest.approx(float(expected[name].detach()), abs=1e-4, rel=1e-4), name
    sum(found.values()).backward()
    sum(expected.values()).backward()
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    for name, parameter in network.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-3)
