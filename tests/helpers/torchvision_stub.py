"""torchvision as a peer, also where its compiled operators don't load: PyPI's wheel needs torch's CUDA build.

Import it before torchvision or timm. They live in a folder of their own (scripts/install), as transformers would
import a torchvision that it sees, and fail.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

_PEERS = str(Path(sys.prefix) / "vision-peers")
sys.path.append(_PEERS)


def _nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """torchvision's loop, one kept box at a time; the comparison is in double, as in C++."""
    order = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        start, end = boxes[order, :2].maximum(boxes[best, :2]), boxes[order, 2:].minimum(boxes[best, 2:])
        inside = (end - start).clamp(min=0).prod(1)
        order = order[~((inside / (area[best] + area[order] - inside)).double() > threshold)]
    return torch.stack(kept) if kept else order


def _has_operators() -> bool:
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "torchvision is missing: scripts/install test"
    assert spec.origin is not None
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        return False
    return True


if not _has_operators():
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", _nms, "CPU")
    importlib.import_module("torchvision")
    for _module in ("boxes", "roi_align", "roi_pool"):
        sys.modules[f"torchvision.ops.{_module}"]._assert_has_ops = lambda: None
    _align = sys.modules["torchvision.ops.roi_align"]
    _align._roi_align = _align._roi_align.__wrapped__  # not compiled
for _name in ("torchvision", "timm"):
    importlib.import_module(_name)
sys.path.remove(_PEERS)  # a new process gets this path, but not the operators
