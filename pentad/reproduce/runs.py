"""Training runs on scenes, which the claims about images share."""

import json
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from pentad.datasets.object_folders import read_objects, write_objects
from pentad.datasets.scenes import Scenes
from pentad.evaluate.detectors import DetectorReport, evaluate_detector
from pentad.loading import load
from pentad.recipes.images import train_on_images
from pentad.vision.detector import Detector


@dataclass(frozen=True)
class Workshop:
    """A folder of scenes and runs.

    Attributes:
        folder: the folder; scenes are in train/ and held-out/.
        note: receives what is being done.
    """

    folder: Path
    note: Callable[[str], None]

    def draw_scenes(self, count: int, held_out: int, size: int = 160) -> None:
        """Draw scenes to train on, and others of other digits and other parts of photographs to measure with."""
        self.note("drawing scenes")
        write_objects(Scenes(count, seed=1, size=size), self.folder / "train")
        write_objects(Scenes(held_out, seed=2, size=size, held_out=True), self.folder / "held-out")

    def write(self, name: str, config: dict[str, Any] | str) -> dict[str, str]:
        """Write a config, and return the recipe's table that starts from it with random weights."""
        file = self.folder / name
        file.write_text(config if isinstance(config, str) else json.dumps(config))
        return {"config": str(file)}

    def train(
        self, name: str, objective: str, model: dict[str, str], steps: int, batch: int, seed: int = 0, **tables: Any
    ) -> Path:
        """Train a model, and return the run's folder.

        Args:
            name: of the folder.
            objective, model: of the recipe.
            steps, batch: steps, and images a step.
            seed: of the weights and of the order of images.
            tables: other tables of the recipe.
        """
        self.note(f"{name}: {steps} steps")
        tables["run"] = {"seed": seed, **tables.get("run", {})}
        data = self.folder / "train"
        train_on_images(self.folder / name, objective, model, data, steps, batch, note=self.note, **tables)
        return self.folder / name

    def held_out(self, run: Path) -> dict[str, float]:
        """The last measurement of a run with data.validation."""
        measured: dict[str, float] = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
        return measured

    def evaluate(self, detector: Detector) -> DetectorReport:
        """COCO's numbers on the held-out scenes."""
        return evaluate_detector(detector, read_objects(self.folder / "held-out"))

    def load(self, run: Path) -> Detector:
        """The trained detector of a run."""
        detector = load(next((run / "final").glob("*.cfg"), run / "final"))
        assert isinstance(detector, Detector)
        return detector

    def without_masks(self, detector: Detector) -> Detector:
        """The same Mask R-CNN without its mask branch."""
        network = copy(detector.network)
        network.config = replace(network.config, masks=False)  # type: ignore[type-var]
        return Detector(detector.name, network, detector.checkpoint)

    def milliseconds(self, detectors: Sequence[Detector], images: int = 40) -> list[float]:
        """The median time of each detector for one held-out scene; they take turns."""
        dataset = read_objects(self.folder / "held-out")
        seconds: list[list[float]] = [[] for _ in detectors]
        for number in range(min(images, len(dataset))):
            pixels = dataset.pixels(number)
            for detector, taken in zip(detectors, seconds, strict=True):
                started = time.perf_counter()
                detector.detect(pixels, threshold=0.5)
                taken.append(time.perf_counter() - started)
        return [1000 * median(taken) for taken in seconds]
