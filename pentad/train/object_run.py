"""Runs of detectors on images with labeled objects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pentad import build, weights
from pentad.datasets.object_batches import ObjectBatch
from pentad.datasets.object_folders import read_objects
from pentad.errors import BadInput
from pentad.models import check_task, family_of
from pentad.models.family import ModelConfig
from pentad.models.language.config import read_family_config
from pentad.models.vision.yolox import YOLOXConfig
from pentad.train import processes
from pentad.train.image_run import VisionRun
from pentad.train.object_data import ObjectData, ObjectExamples
from pentad.train.objectives.loss import Objective
from pentad.train.objectives.yolox import YOLOXObjective
from pentad.train.recipe import Recipe
from pentad.vision.export import export
from pentad.vision.yolox import fit_objects
from pentad.weights import registry


@dataclass
class ObjectRun(VisionRun):
    """A run of a detector.

    Attributes:
        config: of the trained network, with the data's classes.
        examples: the images to train on.
        held_out: the images of the validation, or None.
    """

    config: YOLOXConfig
    examples: ObjectExamples
    held_out: ObjectExamples | None

    @cached_property
    def data(self) -> ObjectData:
        run, objects = self.recipe.run, self.recipe.objects
        plain = round(run.steps * (1 - objects.plain_end))
        data = self._data(self.examples, run.batch_size)
        return replace(data, changes=objects, flip=self.recipe.images.flip, plain_from=plain)

    def validation_data(self) -> ObjectData | None:
        return None if self.held_out is None else self._data(self.held_out, self.held_out.count)

    def _data(self, examples: ObjectExamples, batch_size: int) -> ObjectData:
        run, size = self.recipe.run, self.config.test_size

        def fit(image_3HW: Tensor, boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
            return fit_objects(image_3HW, boxes_N4, *size)

        part: dict[str, Any] = {"rank": processes.rank(), "world": processes.world(), "device": self.device}
        return ObjectData(examples, batch_size, run.micro_batch_images, run.seed, size, fit, **part)

    def network_and_objective(self, *, measures: bool) -> tuple[nn.Module, Objective]:
        """The network, with all weights of the source that fit; convolutions for other classes are new."""
        network = build.build(self.config, device=self.device, trainable=True, seed=self.recipe.run.seed)
        if self.source.tensors:
            old, new = build.build(self.source, device=self.device).state_dict(), network.state_dict()
            network.load_state_dict(new | {name: t for name, t in old.items() if t.shape == new[name].shape})
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network, YOLOXObjective()

    def describe(self, batch: ObjectBatch) -> dict[str, Any]:
        objects = zip(batch.boxes, batch.labels, strict=True)
        return {"rows": self.data.rows(batch), "objects": [[b.tolist(), one.tolist()] for b, one in objects]}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the trained network as a folder."""
        export(network, family_of(self.source), folder)


def open_object_run(recipe: Recipe) -> ObjectRun:
    """Open the model's files and the data set.

    Raises:
        BadInput: the model is no detector that can be trained, the data have no objects, or an option doesn't apply.
    """
    data, images = recipe.data, recipe.images
    source = weights.open(Path(recipe.model.config) if recipe.model.config else registry.locate(str(recipe.model.base)))
    check_task(source, "detect")
    config: ModelConfig = read_family_config(family_of(source), source)
    if not isinstance(config, YOLOXConfig):
        raise BadInput(f"{source.path}: only YOLOX can be trained yet")
    if len(mixtures := data.mixtures()) > 1 or len(mixtures[0]) > 1 or recipe.lora is not None:
        raise BadInput("objectives on images have one data.train, without stages, mixtures or [lora]")
    examples = _read(mixtures[0][0].path, images.fraction, data.skip_bad)
    held_out = None if data.validation is None else _read(data.validation, 1.0, data.skip_bad)
    if held_out is not None and held_out.names != examples.names:
        raise BadInput(f"{held_out.path}: the classes are {held_out.names}; expected {examples.names}")
    size = config.test_size if images.size is None else (images.size, images.size)
    labels = {str(i): name for i, name in enumerate(examples.names)}
    config = replace(config, test_size=size, id2label=labels).resolve(source)
    return ObjectRun(recipe, Path(recipe.run.out), source, config, examples, held_out)


def _read(path: str, fraction: float, skip_bad: bool) -> ObjectExamples:
    dataset = read_objects(path, skip_bad=skip_bad)
    if not any(image.objects for image in dataset.images):
        raise BadInput(f"{path} has no objects to learn")
    return ObjectExamples(path, dataset, max(1, round(len(dataset) * fraction)))
