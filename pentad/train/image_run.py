"""Runs on images: classification (fine-tuning, linear probing, from scratch) and masked autoencoding."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from pentad import build, weights
from pentad.errors import BadInput
from pentad.memory import available_memory, keep_freed_memory, process_bytes
from pentad.models import family_of
from pentad.models.family import TASKS, Family, ModelConfig
from pentad.models.language.config import read_family_config
from pentad.models.vision import vit
from pentad.models.vision.config import ClassifierConfig, Preprocessing
from pentad.models.vision.mae import MAEConfig
from pentad.models.vision.vit import ViTConfig
from pentad.train import processes
from pentad.train.base import TrainingRun
from pentad.train.image_data import ImageBatch, ImageData, ImageExamples, read_examples
from pentad.train.loop import Loop
from pentad.train.objectives.images import ClassifyObjective, MAEObjective
from pentad.train.objectives.loss import Objective
from pentad.train.recipe import Recipe
from pentad.vision.classifier import read_preprocessing
from pentad.vision.export import export
from pentad.weights import registry


@dataclass
class VisionRun(TrainingRun):
    """A run of a vision model.

    Attributes:
        config: of the trained network, with the data's classes.
        examples: the images to train on.
        held_out: the images of the validation, or None.
    """

    config: Any
    examples: Any
    held_out: Any

    def files(self) -> dict[str, str]:
        files: dict[str, str] = self.examples.files
        return files

    @property
    def skipped(self) -> list[str]:
        skipped: list[str] = self.examples.skipped
        return skipped

    def check_memory(self) -> None:
        """Weights, gradients, the optimizer's state and an average; activations aren't counted."""
        parameters = sum(p.numel() for p in build.meta_network(self.config).parameters())
        needed, free = parameters * (4 + 4 + 8 + 4 * bool(self.recipe.run.ema)), available_memory(self.device)
        if free is not None and needed > free:
            sizes = f"{needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are available"
            raise BadInput(f"the run needs at least {sizes}: choose a smaller model")

    def loop(self, *, measures: bool = False) -> Loop:
        """See `TrainingRun.loop`. Maps of images are large, and made anew in each step."""
        keep_freed_memory()
        return super().loop(measures=measures)

    def checkpointing(self, network: nn.Module) -> str:
        return "blocks" if self.recipe.run.checkpointing == "blocks" else "none"

    def plan(self) -> dict[str, Any]:
        """Count the images, and measure one step with a learning rate of 0."""
        run, network = self.recipe.run, build.meta_network(self.config)
        loop = self.loop(measures=True)
        loop.step(0)
        started = time.perf_counter()
        loop.step(1)
        seconds = (time.perf_counter() - started) * run.steps
        return {
            "images": len(self.examples.examples),
            "classes": len(self.examples.names),
            "skipped": self.examples.skipped,
            "steps": run.steps,
            "epochs": run.steps * run.batch_size / len(self.examples.examples),
            "parameters": sum(p.numel() for p in network.parameters()),
            "trained_parameters": sum(p.numel() for p in loop.network.parameters() if p.requires_grad),
            "estimated_bytes": process_bytes(self.device),
            "memory_bytes": process_bytes(self.device),
            "seconds": seconds,
        }


@dataclass
class ImageRun(VisionRun):
    """A run on whole images or crops of objects.

    Attributes:
        family: of the trained network, which for classification gets the data's classes as its labels.
    """

    config: ClassifierConfig
    examples: ImageExamples
    held_out: ImageExamples | None
    family: Family

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How the network expects its images, without crops."""
        size = self.recipe.images.size or int(getattr(self.config, "image_size", 224))
        how = read_preprocessing(self.source, self.config.preprocessing)
        return replace(how, size=(size, size), crop=None)

    @cached_property
    def data(self) -> ImageData:
        images, run = self.recipe.images, self.recipe.run
        return replace(self._data(self.examples, run.batch_size), crop=images.crop, flip=images.flip, shuffle=True)

    def validation_data(self) -> ImageData | None:
        return None if self.held_out is None else self._data(self.held_out, len(self.held_out.examples))

    def _data(self, examples: ImageExamples, batch_size: int) -> ImageData:
        run, how = self.recipe.run, self.preprocessing
        assert isinstance(how.size, tuple)
        part = {"rank": processes.rank(), "world": processes.world(), "device": self.device}
        size = {"batch_size": batch_size, "micro_batch": run.micro_batch_images}
        return ImageData(examples, seed=run.seed, size=how.size[0], how=how, shuffle=False, **part, **size)  # type: ignore[arg-type]

    def network_and_objective(self, *, measures: bool) -> tuple[nn.Module, Objective]:
        network, images = self._network(), self.recipe.images
        if self.recipe.objective == "mae":
            return network, MAEObjective()
        if images.probe:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name.startswith("head."))
        return network, ClassifyObjective(images.mixup, images.label_smoothing)

    def _network(self) -> nn.Module:
        """The network, with all weights of the source that fit; the head is new unless the classes are the same."""
        options: dict[str, Any] = {"device": self.device, "trainable": True, "seed": self.recipe.run.seed}
        network = build.build(self.config, **options)
        if self.source.tensors:
            old = build.build(self.source, device=self.device)
            state, config = old.state_dict(), old.config
            assert isinstance(config, ClassifierConfig)
            if config.num_labels != self.config.num_labels or (config.id2label != self.config.id2label):
                state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
            absent, _ = network.load_state_dict(state, strict=False)
            if lost := [name for name in absent if not name.startswith("head.")]:
                raise BadInput(f"{self.source.path}: tensors are missing: {', '.join(lost[:8])}")
        return network

    def describe(self, batch: ImageBatch) -> dict[str, Any]:
        return {"rows": self.data.rows(batch), "labels": batch.labels_B.tolist()}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the trained network as its family's published folders are."""
        export(network, self.family, folder, self.preprocessing)


def only_folder(recipe: Recipe) -> str:
    """The recipe's data; raise BadInput unless it is one folder, without low-rank layers."""
    if len(mixtures := recipe.data.mixtures()) > 1 or len(mixtures[0]) > 1 or recipe.lora is not None:
        raise BadInput("objectives on images have one data.train, without stages, mixtures or [lora]")
    return mixtures[0][0].path


def open_image_run(recipe: Recipe) -> ImageRun:
    """Open the model's files and list the images.

    Raises:
        BadInput: the model has another task, the data have no images or classes, or an option doesn't apply.
    """
    data, images = recipe.data, recipe.images
    source = weights.open(Path(recipe.model.config) if recipe.model.config else registry.locate(str(recipe.model.base)))
    family = family_of(source)
    labeled = recipe.objective == "classify"
    if family.task not in (("classify", "pretrain") if labeled else ("pretrain",)):
        expected = "a classifier or a pretrained encoder" if labeled else "a masked autoencoder (vit_mae)"
        raise BadInput(f"{source.path}: {family.names.family} is {TASKS[family.task]}; expected {expected}")
    folder = only_folder(recipe)
    config = read_family_config(family, source)
    assert isinstance(config, ClassifierConfig)
    if images.probe and any(isinstance(m, nn.BatchNorm2d) for m in build.meta_network(config).modules()):
        raise BadInput("images.probe is for networks without batch normalization, whose statistics would change")
    examples = read_examples(Path(folder), labeled=labeled, skip_bad=data.skip_bad)
    held_out = read_examples(Path(data.validation), labeled=labeled) if data.validation else None
    if labeled:
        if held_out is not None and held_out.names != examples.names:
            raise BadInput(f"{held_out.path}: the classes are {held_out.names}; expected {examples.names}")
        family, config = _classifier(family, config, examples.names, recipe)
    config = config.resolve(replace(source, format="state_dict"))
    if images.size and images.size % getattr(config, "patch_size", 1):
        raise BadInput(f"images.size is {images.size}; expected a multiple of the patches' {config.patch_size}")  # type: ignore[attr-defined]
    if not labeled and images.size not in (None, config.image_size):  # type: ignore[attr-defined]
        raise BadInput(f"images.size is {images.size}; expected the model's {config.image_size}")  # type: ignore[attr-defined]
    return ImageRun(recipe, Path(recipe.run.out), source, config, examples.fraction(images.fraction), held_out, family)


def _classifier(
    family: Family, config: ModelConfig, names: list[str], recipe: Recipe
) -> tuple[Family, ClassifierConfig]:
    """The family and config of the classifier that a run trains; of a masked autoencoder it is the encoder."""
    assert isinstance(config, ClassifierConfig)
    changes: dict[str, Any] = {"id2label": {str(i): name for i, name in enumerate(names)}, "num_labels": len(names)}
    images = recipe.images
    if images.drop_path:
        if not hasattr(config, "drop_path_rate"):
            raise BadInput(f"images.drop_path is for ViT and NFNet; this is {family.names.family}")
        changes["drop_path_rate"] = images.drop_path
    if images.global_pool is not None:
        if not isinstance(config, ViTConfig):
            raise BadInput(f"images.global_pool is for ViT; this is {family.names.family}")
        changes["global_pool"] = images.global_pool
    if isinstance(config, MAEConfig):
        config, family = ViTConfig(**{f.name: getattr(config, f.name) for f in fields(ViTConfig)}), vit.FAMILY
    return family, replace(config, **changes)
