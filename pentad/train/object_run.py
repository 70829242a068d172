"""Runs of detectors and segmenters on images with labeled objects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pentad import build, text, weights
from pentad.datasets.object_batches import ObjectBatch
from pentad.datasets.object_folders import read_objects
from pentad.errors import BadInput
from pentad.models import check_task, family_of
from pentad.models.family import Family, ModelConfig
from pentad.models.language.config import read_family_config
from pentad.models.vision.clip import CLIP, CLIPConfig
from pentad.models.vision.darknet import Darknet, DarknetConfig
from pentad.models.vision.mask_rcnn import MaskRCNNConfig, start_from_resnet
from pentad.models.vision.sam.sam import SamConfig
from pentad.models.vision.sam.start import start_from_vit
from pentad.models.vision.yolox import YOLOXConfig
from pentad.train import processes
from pentad.train.image_run import VisionRun, only_folder
from pentad.train.object_data import ObjectData, ObjectExamples
from pentad.train.objectives.detection import YoloObjective
from pentad.train.objectives.loss import Objective
from pentad.train.objectives.mask_rcnn import MaskRCNNObjective
from pentad.train.objectives.segment import SegmentObjective
from pentad.train.objectives.words import Words
from pentad.train.objectives.yolox import YOLOXObjective
from pentad.train.recipe import Recipe
from pentad.vision import darknet, mask_rcnn, segmenter, yolox
from pentad.vision.classifier import read_preprocessing
from pentad.vision.darknet_files import export_darknet
from pentad.vision.export import export, rewrite
from pentad.weights import darknet_cfg, registry
from pentad.weights.atomic import new_folder
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.darknet_edit import adapted


class Kind(NamedTuple):
    """What differs between the models.

    Attributes:
        adapt: a config for other classes, and another size unless it is None.
        size: height and width of the network's input, or the least and the largest side of images.
        fit: makes the network's input of a size, and moves the boxes.
        objective: what it is trained for, by the recipe's options.
        export: writes the trained network as a folder.
        divisor: the images of a batch are padded to a multiple of it.
        mosaic: the share of mosaics, if the recipe has none.
        start: copies the layers of another network; None if it can't.
    """

    adapt: Callable[[Any, Sequence[str], int | None], ModelConfig]
    size: Callable[[Any], tuple[int, int]]
    fit: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
    objective: Callable[[Recipe], Objective]
    export: Callable[[Any, Family, Path], None]
    divisor: Callable[[Any], int] = lambda config: 1
    mosaic: float = 1.0
    start: Callable[[Any, nn.Module], None] | None = None


def _adapt_yolox(config: YOLOXConfig, names: Sequence[str], size: int | None) -> YOLOXConfig:
    labels = {str(i): name for i, name in enumerate(names)}
    return replace(config, test_size=config.test_size if size is None else (size, size), id2label=labels)


def _adapt_mask_rcnn(config: MaskRCNNConfig, names: Sequence[str], size: int | None) -> MaskRCNNConfig:
    config = replace(config, names=("background", *names))
    return config if size is None else replace(config, min_size=size, max_size=size)


def _adapt_darknet(config: DarknetConfig, names: Sequence[str], size: int | None) -> DarknetConfig:
    return replace(config, cfg=adapted(config.cfg, len(names), size), names=tuple(names))


def _darknet_size(config: DarknetConfig) -> tuple[int, int]:
    _, height, width = darknet_cfg.parse(config.cfg).shape
    return height, width


def _adapt_sam(config: SamConfig, names: Sequence[str], size: int | None) -> SamConfig:
    if size not in (None, config.image_size):
        raise BadInput(f"images.size is {size}; expected the model's {config.image_size}")
    return config


def _export_darknet(network: Darknet, family: Family, folder: Path) -> None:
    with new_folder(folder) as partial_folder:
        export_darknet(network, partial_folder / "model.cfg")


KINDS: dict[type[ModelConfig], Kind] = {
    YOLOXConfig: Kind(
        adapt=_adapt_yolox,
        size=lambda config: config.test_size,
        fit=yolox.fit_objects,
        objective=lambda recipe: YOLOXObjective(),
        export=export,
    ),
    DarknetConfig: Kind(
        adapt=_adapt_darknet,
        size=_darknet_size,
        fit=darknet.fit_objects,
        objective=lambda recipe: YoloObjective(),
        export=_export_darknet,
    ),
    MaskRCNNConfig: Kind(
        adapt=_adapt_mask_rcnn,
        size=lambda config: (config.min_size, config.max_size),
        fit=mask_rcnn.fit_objects,
        objective=lambda recipe: MaskRCNNObjective(recipe.objects.proposals),
        export=export,
        divisor=lambda config: mask_rcnn.DIVISOR,
        mosaic=0.0,
        start=start_from_resnet,
    ),
    SamConfig: Kind(
        adapt=_adapt_sam,
        size=lambda config: (config.image_size, config.image_size),
        fit=segmenter.fit_objects,
        objective=lambda recipe: SegmentObjective(recipe.segment.clicks, recipe.segment.objects),
        export=export,
        divisor=lambda config: config.image_size,
        mosaic=0.0,
        start=start_from_vit,
    ),
}


@dataclass
class ObjectRun(VisionRun):
    """A run of a detector.

    Attributes:
        config: of the trained network, with the data's classes.
        examples: the images to train on.
        held_out: the images of the validation, or None.
        clip: of a segmenter that learns words.
    """

    config: ModelConfig
    examples: ObjectExamples
    held_out: ObjectExamples | None
    clip: Checkpoint | None = None

    @property
    def kind(self) -> Kind:
        """What is special about the detector."""
        return KINDS[type(self.config)]

    @property
    def with_masks(self) -> bool:
        """Whether it learns masks."""
        return isinstance(self.config, SamConfig) or bool(getattr(self.config, "masks", False))

    @cached_property
    def data(self) -> ObjectData:
        run, objects = self.recipe.run, self.recipe.objects
        plain = round(run.steps * (1 - objects.plain_end))
        data = self._data(self.examples, run.batch_size)
        if objects.mosaic is None:
            objects = objects.model_copy(update={"mosaic": self.kind.mosaic})
        return replace(data, changes=objects, flip=self.recipe.images.flip, plain_from=plain)

    def validation_data(self) -> ObjectData | None:
        return None if self.held_out is None else self._data(self.held_out, self.held_out.count)

    def _data(self, examples: ObjectExamples, batch_size: int) -> ObjectData:
        run, size = self.recipe.run, self.kind.size(self.config)

        def fit(image_3HW: Tensor, boxes_N4: Tensor) -> tuple[Tensor, Tensor]:
            return self.kind.fit(image_3HW, boxes_N4, *size)

        part: dict[str, Any] = {"rank": processes.rank(), "world": processes.world(), "device": self.device}
        part |= {"divisor": self.kind.divisor(self.config), "masks": self.with_masks}
        return ObjectData(examples, batch_size, run.micro_batch_images, run.seed, size, fit, **part)

    def network_and_objective(self, *, measures: bool) -> tuple[nn.Module, Objective]:
        """The network, with all weights of the source that fit; convolutions for other classes are new."""
        network = build.build(self.config, device=self.device, trainable=True, seed=self.recipe.run.seed)
        if self.source.tensors:
            old, new = build.build(self.source, device=self.device).state_dict(), network.state_dict()
            fitting = {name: t for name, t in old.items() if name in new and t.shape == new[name].shape}
            network.load_state_dict(new | fitting)
        if self.recipe.model.backbone is not None:
            backbone = build.build(weights.open(registry.locate(self.recipe.model.backbone)), device=self.device)
            assert self.kind.start is not None
            self.kind.start(network, backbone)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = self.kind.objective(self.recipe)
        if self.clip is not None:
            assert isinstance(objective, SegmentObjective)
            objective = replace(objective, words=self._words(self.clip))
        return network, objective

    def _words(self, checkpoint: Checkpoint) -> Words:
        assert isinstance(self.config, SamConfig)
        clip, options = build.build(checkpoint, device=self.device), self.recipe.segment
        assert isinstance(clip, CLIP)
        area = (self.config.image_size * 100 / 1024) ** 2 if options.words_area is None else options.words_area
        return Words(clip, read_preprocessing(checkpoint, clip.config.preprocessing), options.words, area)

    def files(self) -> dict[str, str]:
        if self.clip is None:
            return super().files()
        digest, path = hashlib.sha256(), self.clip.path
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            digest.update(file.read_bytes() if file.is_file() else b"")
        return {**super().files(), str(path): digest.hexdigest()}

    def describe(self, batch: ObjectBatch) -> dict[str, Any]:
        objects = zip(batch.boxes, batch.labels, strict=True)
        return {"rows": self.data.rows(batch), "objects": [[b.tolist(), one.tolist()] for b, one in objects]}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the trained network as a folder."""
        self.kind.export(network, family_of(self.source), folder)
        if self.clip is not None:
            rewrite(self.clip, folder / segmenter.CLIP_FOLDER, "hf")


def open_object_run(recipe: Recipe) -> ObjectRun:
    """Open the model's files and the data set.

    Raises:
        BadInput: the model is no detector that can be trained, the data have no objects, or an option doesn't apply.
    """
    data, images = recipe.data, recipe.images
    source = weights.open(Path(recipe.model.config) if recipe.model.config else registry.locate(str(recipe.model.base)))
    check_task(source, str(recipe.objective))
    config: Any = read_family_config(family_of(source), source)
    if type(config) not in KINDS:
        raise BadInput(f"{source.path}: {family_of(source).names.family} can't be trained yet")
    if recipe.model.backbone is not None:
        if KINDS[type(config)].start is None:
            raise BadInput(f"model.backbone is for Mask R-CNN and Segment Anything; leave it out for {source.path}")
        check_task(weights.open(registry.locate(recipe.model.backbone)), "classify", "pretrain")
    clip = _open_clip(recipe, source, config)
    if clip is not None:
        config = replace(config, text_embed_dim=read_family_config(family_of(clip), clip).projection_dim)  # type: ignore[attr-defined]
    folder = only_folder(recipe)
    examples = _read(folder, images.fraction, data.skip_bad)
    held_out = None if data.validation is None else _read(data.validation, 1.0, data.skip_bad)
    if held_out is not None and held_out.names != examples.names:
        raise BadInput(f"{held_out.path}: the classes are {held_out.names}; expected {examples.names}")
    try:
        config = KINDS[type(config)].adapt(config, examples.names, images.size).resolve(source)
        build.meta_network(config)
    except BadInput as error:
        raise BadInput(f"images.size is {images.size}: {error}" if images.size else str(error)) from error
    return ObjectRun(recipe, Path(recipe.run.out), source, config, examples, held_out, clip)


def _open_clip(recipe: Recipe, source: Checkpoint, config: ModelConfig) -> Checkpoint | None:
    """The CLIP for the words of a segmenter; a model that takes words already keeps its own unless another is named.

    Raises:
        BadInput: it is no CLIP with both encoders and a tokenizer, or the model is no Segment Anything.
    """
    named, knows_words = recipe.segment.clip, getattr(config, "text_embed_dim", None) is not None
    if named is None and not knows_words:
        return None
    if not isinstance(config, SamConfig):
        raise BadInput(f"segment.clip is for Segment Anything; leave it out for {source.path}")
    if named is None and not (source.path / segmenter.CLIP_FOLDER).is_dir():
        raise BadInput(f"{source.path} takes words, but its CLIP is not there; name it in segment.clip")
    clip = weights.open(source.path / segmenter.CLIP_FOLDER if named is None else registry.locate(named))
    check_task(clip, "embed")
    found = read_family_config(family_of(clip), clip)
    assert isinstance(found, CLIPConfig)
    if found.text_config is None or found.vision_config is None:
        raise BadInput(f"{clip.path} is one encoder of a CLIP; expected both, for words and for images")
    if text.load(clip) is None:
        raise BadInput(f"{clip.path} has no tokenizer; expected CLIP's beside the weights")
    return clip


def _read(path: str, fraction: float, skip_bad: bool) -> ObjectExamples:
    dataset = read_objects(path, skip_bad=skip_bad)
    if not any(image.objects for image in dataset.images):
        raise BadInput(f"{path} has no objects to learn")
    return ObjectExamples(path, dataset, max(1, round(len(dataset) * fraction)))
