"""Detection with OpenCV's Darknet reader, as its users do it."""

from pathlib import Path

import cv2
import numpy as np
import torch

from pentad.nn.boxes import pairwise_iou
from pentad.vision.detector import Detections

cv2.setNumThreads(1)


class OpenCVDetector:
    """A .cfg file's network with its .weights."""

    def __init__(self, cfg: Path) -> None:
        self.net = cv2.dnn.readNetFromDarknet(str(cfg), str(cfg.with_suffix(".weights")))
        self.names = self.net.getUnconnectedOutLayersNames()
        options = dict(
            line.replace(" ", "").split("=") for line in cfg.read_text().splitlines()[:30] if "=" in line[1:]
        )
        self.size = int(options["width"]), int(options["height"])

    def __call__(self, photo: Path, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (x0, y0, x1, y1 in pixels), scores and classes."""
        image = cv2.imread(str(photo))
        self.net.setInput(cv2.dnn.blobFromImage(image, 1 / 255, self.size, swapRB=True, crop=False))
        rows = np.concatenate(self.net.forward(self.names))
        labels, scores = rows[:, 5:].argmax(1), rows[:, 5:].max(1)
        rows, labels, scores = (one[scores > threshold] for one in (rows, labels, scores))
        sizes = rows[:, 2:4] * image.shape[1::-1]
        boxes = np.concatenate((rows[:, :2] * image.shape[1::-1] - sizes / 2, sizes), 1)
        kept = []
        for label in np.unique(labels):
            (members,) = np.nonzero(labels == label)
            kept += list(members[cv2.dnn.NMSBoxes(boxes[members].tolist(), scores[members].tolist(), threshold, 0.45)])
        boxes[:, 2:] += boxes[:, :2]
        return boxes[kept], scores[kept], labels[kept]


def assert_same_boxes(found: Detections, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> None:
    """Each object has a partner of the same class, with IoU >= 0.98 and a score within 0.01."""
    assert len(found.detections) == len(boxes)
    partners = set()
    for one in found.detections:
        overlap = pairwise_iou(torch.tensor([one.box]), torch.from_numpy(boxes).float())[0]
        best = int((overlap * torch.from_numpy(labels == one.label_id)).argmax())
        assert overlap[best] >= 0.98
        assert labels[best] == one.label_id
        assert abs(scores[best] - one.score) < 0.01
        partners.add(best)
    assert len(partners) == len(boxes)
