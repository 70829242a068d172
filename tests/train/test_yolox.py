"""SimOTA and the loss of YOLOX against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from pentad.build import build
from pentad.datasets.object_batches import ObjectBatch
from pentad.models.vision.yolox import YOLOX, YOLOXConfig, cells, decode
from pentad.train.objectives.yolox import YOLOXObjective, assign

CONFIG = YOLOXConfig(
    depth=1 / 3, width=0.125, depthwise=True, test_size=(64, 64), id2label={str(i): f"{i}" for i in range(3)}
)


def scene(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=generator) * 50
    boxes = torch.cat((start, start + 4 + torch.rand(count, 2, generator=generator) * 30), 1)
    return boxes, torch.randint(3, (count,), generator=generator)


def out(seed: int) -> Tensor:
    return torch.randn(84, 8, generator=torch.Generator().manual_seed(seed)) * 1.5


def iou(a: list[float], b: list[float]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def assigned(raw: Tensor, predicted: Tensor, boxes: Tensor, labels: Tensor) -> dict[int, int]:
    """Cell -> object, by the paper's rules (section 2.3, SimOTA)."""
    at = [(float(x) + 0.5, float(y) + 0.5, float(s)) for x, y, s in zip(*cells(64, 64), strict=True)]
    cost: dict[tuple[int, int], float] = {}
    overlap: dict[tuple[int, int], float] = {}
    near = set()
    for m, box in enumerate(boxes.tolist()):
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        for n, (x, y, stride) in enumerate(at):
            if abs(x * stride - middle[0]) < 1.5 * stride and abs(y * stride - middle[1]) < 1.5 * stride:
                near.add((m, n))
    candidates = sorted({n for _, n in near})
    for m, box in enumerate(boxes.tolist()):
        for n in candidates:
            overlap[m, n] = iou(box, predicted[n].tolist())
            loss = 0.0
            for k in range(3):
                p = math.sqrt(sigmoid(float(raw[n, 5 + k])) * sigmoid(float(raw[n, 4])))
                loss -= math.log(p) if k == labels[m] else math.log(1 - p)
            cost[m, n] = loss - 3 * math.log(overlap[m, n] + 1e-8) + (0 if (m, n) in near else 1e6)
    takers: dict[int, list[int]] = {}
    for m in range(len(boxes)):
        best = sorted((overlap[m, n] for n in candidates), reverse=True)[:10]
        for n in sorted(candidates, key=lambda n: cost[m, n])[: max(1, int(sum(best)))]:
            takers.setdefault(n, []).append(m)
    return {n: ms[0] if len(ms) == 1 else min(range(len(boxes)), key=lambda m: cost[m, n]) for n, ms in takers.items()}


@pytest.mark.parametrize("count", [1, 4, 9])
def test_simota_is_the_papers(count: int) -> None:
    for seed in range(4):
        raw, (boxes, labels) = out(seed), scene(seed, count)
        predicted = decode(raw, cells(64, 64))
        found = assign(raw, predicted, boxes, labels, cells(64, 64))
        ours = dict(zip(found.cells.tolist(), found.objects.tolist(), strict=True))
        assert ours == assigned(raw, predicted, boxes, labels)
        for n, m, value in zip(*(one.tolist() for one in found), strict=True):
            assert value == pytest.approx(iou(boxes[m].tolist(), predicted[n].tolist()), abs=1e-5)


def test_the_loss_is_the_papers() -> None:
    network = build(CONFIG, trainable=True, seed=0)
    assert isinstance(network, YOLOX)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255
    truth = [scene(1, 3), scene(2, 0), scene(3, 2)]
    batch = ObjectBatch(images, tuple(b for b, _ in truth), tuple(one for _, one in truth))
    objective = YOLOXObjective()
    loss = objective(network, batch, objective.totals(network, batch))
    raw = network(images).detach()
    expected, learning = {"box_loss": 0.0, "object_loss": 0.0, "class_loss": 0.0}, 0
    for i, (boxes, labels) in enumerate(truth):
        predicted = decode(raw[i], cells(64, 64))
        found = assigned(raw[i], predicted, boxes, labels) if len(boxes) else {}
        learning += len(found)
        for n in range(84):
            p = sigmoid(float(raw[i, n, 4]))
            expected["object_loss"] -= math.log(p) if n in found else math.log(1 - p)
            if n in found:
                overlap = iou(boxes[found[n]].tolist(), predicted[n].tolist())
                expected["box_loss"] += 5 * (1 - overlap**2)
                for k in range(3):
                    p, target = sigmoid(float(raw[i, n, 5 + k])), overlap * (k == int(labels[found[n]]))
                    expected["class_loss"] -= target * math.log(p) + (1 - target) * math.log(1 - p)
    for name, value in expected.items():
        assert float(loss.metrics[name]) == pytest.approx(value / learning, rel=1e-3)
    assert float(loss.share.detach()) == pytest.approx(sum(expected.values()) / learning, rel=1e-3)
    loss.share.backward()
    assert all(p.grad is not None for p in network.parameters())


def test_without_objects_only_objectness_is_learned() -> None:
    network = build(CONFIG, trainable=True, seed=0)
    batch = ObjectBatch(torch.rand(1, 3, 64, 64), (torch.zeros(0, 4),), (torch.zeros(0, dtype=torch.int64),))
    loss = YOLOXObjective()(network, batch, [1.0])
    assert float(loss.metrics["box_loss"]) == float(loss.metrics["class_loss"]) == 0
    assert float(loss.share.detach()) > 0
