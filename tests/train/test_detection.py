"""The losses of YOLO's versions: their gradients are what Darknet's own loops write, here in plain Python."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pentad import weights
from pentad.build import build
from pentad.datasets.object_batches import ObjectBatch
from pentad.models.vision.darknet import AnchorHead, Darknet, DarknetConfig, GridHead
from pentad.nn.boxes import paired_iou, pairwise_iou, to_centers, to_corners
from pentad.train.objectives.detection import Objects, YoloObjective, anchor_loss, grid_loss
from pentad.weights.darknet_cfg import parse
from tests.helpers.darknet_files import net, section, v3, write

ANCHORS = [(4, 6), (9, 8), (12, 20), (20, 16), (30, 34), (40, 30)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def objects(*rows: tuple[float, float, float, float, int]) -> Objects:
    """Objects from centers and sizes."""
    boxes = torch.tensor([row[:4] for row in rows]).reshape(-1, 4)
    return Objects(to_corners(boxes), torch.tensor([row[4] for row in rows], dtype=torch.long))


TRUTH = [objects((0.3, 0.4, 0.3, 0.5, 2), (0.72, 0.2, 0.1, 0.15, 0), (0.31, 0.41, 0.32, 0.5, 1)), objects()]


def head(kind: str, **options: object) -> tuple[AnchorHead, Tensor]:
    """A detection layer of 3 anchors and 3 classes on a grid of 6 x 4 cells, and an input."""
    pairs = ANCHORS if kind == "yolo" else [(0.5, 0.6), (1.4, 1.1), (2.5, 3.0)]
    options = {"classes": 3, "num": len(pairs), "anchors": ",".join(f"{w},{h}" for w, h in pairs), **options}
    layer = parse(net(6, 4, 24) + section(kind, **options)).layers[0]
    return AnchorHead(layer, (3, 64, 96)), torch.randn(2, 24, 4, 6, generator=torch.Generator().manual_seed(1))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def iou(one: list[float], other: list[float]) -> float:
    return float(pairwise_iou(to_corners(torch.tensor([one])), to_corners(torch.tensor([other]))))


def darknets_deltas(layer: AnchorHead, x: Tensor, truth: list[Objects]) -> Tensor:
    """forward_region_layer and forward_yolo_layer (pjreddie's Darknet) for each number of the input."""
    delta = torch.zeros(2, 3, 8, 4, 6)
    raw = x.view(2, 3, 8, 4, 6)
    yolo = layer.is_yolo
    unit = (96, 64) if yolo else (6, 4)
    options = {"ignore_thresh": 0.5, "thresh": 0.5}
    options |= dict.fromkeys(("noobject_scale", "object_scale", "coord_scale", "class_scale"), 1)
    options |= {name: float(text) for name, text in layer.layer.texts.items() if name in options}
    for b in range(2):
        rows = [(*to_centers(box[None])[0].tolist(), int(k)) for box, k in zip(*truth[b], strict=True)]
        boxes = {}
        for n in range(3):
            for j in range(4):
                for i in range(6):
                    tx, ty, tw, th = raw[b, n, :4, j, i].tolist()
                    w, h = layer.anchors[n]
                    size = math.exp(tw) * w / unit[0], math.exp(th) * h / unit[1]
                    box = [(i + sigmoid(tx)) / 6, (j + sigmoid(ty)) / 4, *size]
                    boxes[n, j, i] = box
                    best = max([iou(box, list(row[:4])) for row in rows], default=0)
                    if best <= options["ignore_thresh" if yolo else "thresh"]:
                        delta[b, n, 4, j, i] = options["noobject_scale"] * (0 - sigmoid(raw[b, n, 4, j, i]))
        seen = set()
        for cx, cy, width, height, k in rows:
            i, j = int(cx * 6), int(cy * 4)
            shapes = ANCHORS if yolo else layer.anchors
            scores = [iou([0, 0, w / unit[0], h / unit[1]], [0, 0, width, height]) for w, h in shapes]
            n = scores.index(max(scores))
            if yolo:
                if n not in layer.layer.mask:
                    continue
                n = layer.layer.mask.index(n)
            w, h = layer.anchors[n]
            scale = options["coord_scale"] * (2 - width * height)
            wanted = cx * 6 - i, cy * 4 - j, math.log(width * unit[0] / w), math.log(height * unit[1] / h)
            now = [sigmoid(raw[b, n, 0, j, i]), sigmoid(raw[b, n, 1, j, i]), *raw[b, n, 2:4, j, i].tolist()]
            for entry in range(4):
                delta[b, n, entry, j, i] = scale * (wanted[entry] - now[entry])
            target = iou(boxes[n, j, i], [cx, cy, width, height]) if not yolo and "rescore" in layer.layer.texts else 1
            delta[b, n, 4, j, i] = options["object_scale"] * (target - sigmoid(raw[b, n, 4, j, i]))
            logits = raw[b, n, 5:, j, i]
            if not yolo and layer.layer.softmax:
                delta[b, n, 5:, j, i] = options["class_scale"] * (torch.eye(3)[k] - logits.softmax(0))
            elif (n, j, i) in seen:
                delta[b, n, 5 + k, j, i] = options["class_scale"] * (1 - sigmoid(logits[k]))
            else:
                delta[b, n, 5:, j, i] = options["class_scale"] * (torch.eye(3)[k] - logits.sigmoid())
            seen.add((n, j, i))
    return delta.view(2, 24, 4, 6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("yolo", {"mask": "3,4,5"}),
        ("yolo", {"mask": "0,1,2", "ignore_thresh": 0.1}),
        ("region", {"softmax": 1, "rescore": 1, "object_scale": 5, "thresh": 0.2, "coord_scale": 2}),
        ("region", {"noobject_scale": 0.5, "class_scale": 3}),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_gradients_are_darknets(kind: str, options: dict[str, object], several: bool) -> None:
    layer, x = head(kind, **options)
    truth = TRUTH if several else [objects((0.3, 0.4, 0.3, 0.5, 2)), objects((0.72, 0.2, 0.1, 0.15, 0))]
    x.requires_grad_()
    torch.stack(list(anchor_loss(layer, x, truth).values())).sum().backward()
    assert x.grad is not None
    expected = darknets_deltas(layer, x.detach(), truth)
    torch.testing.assert_close(-x.grad, expected, atol=1e-5, rtol=1e-4)


def test_version_1_is_darknets() -> None:
    """forward_detection_layer."""
    text = net(2, 2, 2 * 2 * (2 * 5 + 3) // 4)
    text += section("detection", classes=3, side=2, num=2, sqrt=1, rescore=1, noobject_scale=0.5, coord_scale=5)
    layer = GridHead(parse(text).layers[0], (3, 8, 8))
    x = torch.rand(2, 52, generator=torch.Generator().manual_seed(2)) / 2 + 0.4
    x.requires_grad_()
    truth = [objects((0.3, 0.4, 0.3, 0.5, 2), (0.7, 0.2, 0.1, 0.15, 0)), objects()]
    torch.stack(list(grid_loss(layer, x, truth).values())).sum().backward()
    expected = torch.zeros(2, 52)
    out = x.detach()
    expected[:, 12:20] = 0.5 * (0 - out[:, 12:20])
    for cx, cy, width, height, k in ((0.3, 0.4, 0.3, 0.5, 2), (0.7, 0.2, 0.1, 0.15, 0)):
        cell = int(cy * 2) * 2 + int(cx * 2)
        expected[0, cell * 3 : cell * 3 + 3] = torch.eye(3)[k] - out[0, cell * 3 : cell * 3 + 3]
        answers = [out[0, 20 + (cell * 2 + n) * 4 :][:4].tolist() for n in range(2)]
        boxes = [[(bx + cell % 2) / 2, (by + cell // 2) / 2, bw**2, bh**2] for bx, by, bw, bh in answers]
        overlaps = [iou(box, [cx, cy, width, height]) for box in boxes]
        assert max(overlaps) > 0
        n = overlaps.index(max(overlaps))
        expected[0, 12 + cell * 2 + n] = overlaps[n] - out[0, 12 + cell * 2 + n]
        wanted = torch.tensor([cx * 2 - cell % 2, cy * 2 - cell // 2, math.sqrt(width), math.sqrt(height)])
        place = slice(20 + (cell * 2 + n) * 4, 24 + (cell * 2 + n) * 4)
        expected[0, place] = 5 * (wanted - out[0, place])
    torch.testing.assert_close(-x.grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou", "ciou"])
def test_similarities(kind: str) -> None:
    one = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 4], [0, 0, 1, 1]])
    other = torch.tensor([[1.0, 0, 3, 2], [0, 0, 1, 4], [2, 2, 3, 3]])
    values = paired_iou(one, other, kind)
    assert values[1] == pytest.approx(1)
    expected = {
        "iou": (1 / 3, 0),
        "giou": (1 / 3, -7 / 9),
        "diou": (1 / 3 - 1 / 13, -8 / 18),
        "ciou": (1 / 3 - 1 / 13, -8 / 18),
    }
    assert values[[0, 2]].tolist() == pytest.approx(expected[kind])
    tall = paired_iou(torch.tensor([[0.0, 0, 1, 4]]), torch.tensor([[0.0, 0, 4, 1]]), kind)
    assert (tall < paired_iou(torch.tensor([[0.0, 0, 1, 4]]), torch.tensor([[0.0, 0, 1, 16]]), "iou")).all()


@pytest.mark.parametrize("options", [{"iou_loss": "ciou"}, {"iou_loss": "giou", "scale_x_y": 1.1}, {"iou_thresh": 0.2}])
def test_version_4_pulls_boxes_to_objects(options: dict[str, object]) -> None:
    """Steps along the gradient reduce the loss, and the box of the answering anchor reaches its object."""
    layer, x = head("yolo", mask="0,1,2", iou_normalizer=1, **options)
    truth = [objects((0.3, 0.4, 0.13, 0.31, 2)), objects()]
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], 0.1)
    values = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.stack(list(anchor_loss(layer, x, truth).values())).sum()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.2 * values[0]
    found = layer(x.detach())
    best = int(found.scores_BNK[0].amax(1).argmax())
    assert found.scores_BNK[0, best].argmax() == 2
    assert pairwise_iou(found.boxes_BN4[0, best][None], truth[0].boxes_T4).item() > 0.8
    if "iou_thresh" in options:
        assert (found.objectness_BN[0] > 0.5).sum() == 2


def test_the_objective_trains_a_network_and_counts_images(tmp_path: Path) -> None:
    network = build(weights.open(write(tmp_path, v3())), trainable=True)
    assert isinstance(network, Darknet)
    objective = YoloObjective()
    whole = torch.tensor([64.0, 48, 64, 48])
    batch = ObjectBatch(
        torch.rand(2, 3, 48, 64), tuple(one.boxes_T4 * whole for one in TRUTH), tuple(one.labels_T for one in TRUTH)
    )
    assert objective.totals(network, batch) == [2]
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    shares = []
    for _ in range(12):
        optimizer.zero_grad()
        share, metrics = objective(network, batch, [2.0])
        share.backward()
        optimizer.step()
        shares.append(share.item())
        assert share.item() == pytest.approx(sum(one.item() for one in metrics.values()), rel=1e-5)
    assert metrics.keys() == {"box_loss", "objectness_loss", "classes_loss"}
    assert shares[-1] < 0.5 * shares[0]
    halved, _ = objective(build(DarknetConfig(cfg=v3()), trainable=True, seed=1), batch, [4.0])
    whole, _ = objective(build(DarknetConfig(cfg=v3()), trainable=True, seed=1), batch, [2.0])
    assert whole.item() == pytest.approx(2 * halved.item())
