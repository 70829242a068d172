"""Draw docs/scenes.png: eight scenes, and a video's frames, with their boxes and masks: python docs/scenes.py"""

from pathlib import Path

import torch

from pentad.datasets.scenes import Scene, Scenes
from pentad.media.drawing import draw_detections
from pentad.media.images import write_image

SCENES = Scenes(100, seed=4)


def drawn(scene: Scene) -> torch.Tensor:
    """The picture with boxes and masks."""
    sample = scene.sample
    names = [SCENES.names[label] for label in sample.labels]
    return draw_detections(sample.image, sample.boxes, names, label_ids=sample.labels.tolist(), masks_NHW=sample.masks)


if __name__ == "__main__":
    rows = [
        torch.cat([SCENES[index].image for index in range(6)], 2),
        torch.cat([drawn(SCENES.scene(index)) for index in range(6, 12)], 2),
        torch.cat([drawn(frame) for frame in list(SCENES.video(14, 26))[::5]], 2),
    ]
    write_image(Path(__file__).with_name("scenes.png"), torch.cat(rows, 1))
