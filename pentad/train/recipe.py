"""A training recipe: a TOML file, checked before anything is loaded."""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pentad.errors import BadInput

IMAGE_OBJECTIVES = ("classify", "mae", "clip", "detect", "segment")
"""Objectives on images, of vision models."""

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """A table of a recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Table):
    """The model to train.

    Attributes:
        base: a model's name or path.
        config: path of a config.json, instead of `base`: training starts from random weights.
        tokenizer: whose tokenizer is used with `config`, a name or path; without it a new CLIP learns one from texts.
        backbone: a model to take the first layers from: a ResNet for a Mask R-CNN, a ViT or a masked autoencoder for
            Segment Anything.
        router_aux_loss_coef: factor of a mixture's load-balancing loss, with pretrain and sft.
    """

    base: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    backbone: str | None = None
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = 0.0


class Source(Table):
    """Training data: a file or folder, and its share of the mixture."""

    path: str
    weight: Annotated[float, Field(gt=0)] = 1.0


class Stage(Table):
    """A part of a curriculum: its data (see `Data.train`), and its number of steps."""

    train: str | list[Source]
    steps: Positive


class Data(Table):
    """The training data.

    Attributes:
        train: a file or folder, or a weighted mixture of them.
        stages: a curriculum instead of `train`: data sets that follow each other.
        validation: held-out data, measured before the first step, after the last one, and see `run.validate_every`.
        pack: a sequence of a step is a bin of several rows, up to `sequence_length` tokens. Rows don't see each other.
        truncate: cut rows that are longer than `sequence_length`, which are otherwise errors.
        skip_bad: leave out malformed rows, which are otherwise errors.
    """

    train: str | list[Source] | None = None
    stages: list[Stage] = []
    validation: str | None = None
    pack: bool = False
    truncate: bool = False
    skip_bad: bool = False

    def mixtures(self) -> list[list[Source]]:
        """The sources of each stage; without stages, of the only one."""
        given = [stage.train for stage in self.stages] if self.train is None else [self.train]
        return [[Source(path=train)] if isinstance(train, str) else train for train in given]


class Run(Table):
    """The length of the run, and the folder of its results.

    Attributes:
        out: the folder of the run.
        steps: optimizer steps; left out with `data.stages`, whose sum they are.
        batch_size: sequences (of pairs: pairs) a step, over all processes.
        sequence_length: the most tokens of a sequence.
        seed: seed of the order of rows, dropout and initial weights.
        device: "auto" is CUDA if there is a GPU, else the CPU. Under torchrun each process takes a GPU of its own.
        dtype: what is computed in; weights and the optimizer's state are float32. "auto" chooses bfloat16 where this
            machine multiplies in it faster; a resumed run keeps its choice.
        checkpoint_every: steps between checkpoints; 0 for none.
        keep: the number of checkpoints to keep.
        micro_batch_tokens: the most tokens of one forward pass; a longer sequence goes alone.
        micro_batch_images: the most images of one forward pass.
        checkpointing: activation checkpointing, "none" or "blocks"; "auto" chooses by the memory that is available.
        validate_every: steps between measurements of `data.validation`; 0 for the first and the last only.
        ema: decay of an exponential moving average of the parameters, which is then the trained model; 0 for none.
        max_spike: stop before a step whose loss, or gradient norm, exceeds the median of the last 50 by more than this
            factor of the median (of 1, if that is larger); 0 to stop for numbers that aren't finite only.
        trackers: besides log.jsonl, "tensorboard" (in the run's folder) and "trackio".
    """

    out: str
    steps: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive = 8
    sequence_length: Annotated[int, Field(ge=2)] = 512
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    keep: Positive = 2
    micro_batch_tokens: Positive = 1024
    micro_batch_images: Positive = 32
    checkpointing: Literal["auto", "none", "blocks"] = "auto"
    validate_every: Annotated[int, Field(ge=0)] = 0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_spike: Annotated[float, Field(ge=0)] = 10.0
    trackers: list[Literal["tensorboard", "trackio"]] = []


class Group(Table):
    """Parameters with settings of their own; of several groups that name a parameter the first holds.

    Attributes:
        parameters: a pattern of names in the network, such as "embed.*" or "layers.0.*".
        lr_scale: factor of the learning rate; 0 freezes them.
        weight_decay: by default the optimizer's.
    """

    parameters: str
    lr_scale: Annotated[float, Field(ge=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] | None = None


class Optimizer(Table):
    """The optimizer and the schedule of its learning rate; see `pentad.train.optimizers`.

    Attributes:
        name: of sgd (with Nesterov's momentum) the momentum is the first of `betas`.
        layer_decay: factor of the learning rate from each block to the one before it, and of the embeddings (BEiT).
        adaptive_clip: the most that a gradient's norm may be of its unit's norm (NFNet), besides the head; 0 for none.
    """

    name: Literal["adamw", "adafactor", "muon", "sgd"] = "adamw"
    lr: Annotated[float, Field(gt=0, lt=100)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: list[Fraction] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    warmup: Fraction = 0.1
    decay: Fraction = 0.2
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    adaptive_clip: Annotated[float, Field(ge=0)] = 0.0
    groups: list[Group] = []


class Preference(Table):
    """Options of the preference objectives, named as in TRL.

    Attributes:
        beta: 0.1 by default; 2.0 for simpo.
        label_smoothing: the share of pairs in wrong order: dpo, robust, simpo.
        simpo_gamma: the margin of simpo.
        desirable_weight, undesirable_weight: factors of kto's losses.
        center_rewards_coefficient: keeps the rewards of a reward model around 0.
    """

    beta: Annotated[float, Field(gt=0)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5
    desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    center_rewards_coefficient: Annotated[float, Field(ge=0)] = 0.0


class Images(Table):
    """Options of the objectives on images.

    Attributes:
        size: side of the network's input in pixels; by default the model's.
        crop: the least part of an image's area that a random crop shows; 1 for no crops.
        flip: mirror half of the images.
        fraction: the part of each class, or of all images, to train on.
        mixup: parameter of the beta distribution from which images and labels are mixed (arXiv:1710.09412); 0 for none.
        label_smoothing: the share of a label that is spread over all classes.
        drop_path: stochastic depth of the last block.
        global_pool: what the head of a ViT sees: the class "token", or the "avg" of the patches.
        probe: train the head only, on a frozen network (linear probing).
    """

    size: Annotated[int, Field(ge=8, le=4096)] | None = None
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    flip: bool = False
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    global_pool: Literal["token", "avg"] | None = None
    probe: bool = False


class Objects(Table):
    """Options of detect, with YOLOX's defaults for small models (arXiv:2107.08430).

    Attributes:
        mosaic: the share of images that are composed of four; by default all, and none for Mask R-CNN.
        mixup: the share of mosaics that are mixed with another one.
        scale: the least and the largest factor of the objects' sizes in a mosaic.
        color: shift hue, saturation and brightness.
        plain_end: the part of the steps, at the end, without mosaics.
        proposals: boxes an image that the heads of Mask R-CNN learn from.
    """

    mosaic: Fraction | None = None
    mixup: Fraction = 0.0
    scale: list[Annotated[float, Field(gt=0, le=10)]] = Field(default=[0.5, 1.5], min_length=2, max_length=2)
    color: bool = True
    plain_end: Fraction = 0.1
    proposals: Positive = 512


class Segment(Table):
    """Options of segment, with Segment Anything's defaults (arXiv:2304.02643, appendix A).

    Attributes:
        clicks: rounds that begin with a click where the last mask was wrong; two more have no click.
        objects: the most objects of an image.
        clip: a CLIP whose embeddings stand for words; the trained model then takes words.
        words: the share of objects that begin with words, among those that are large enough.
        words_area: the least area of such an object, in pixels of the network's input; by default as much of the input
            as 100 x 100 pixels are of 1024 x 1024.
    """

    clicks: Annotated[int, Field(ge=0, le=100)] = 8
    objects: Positive = 64
    clip: str | None = None
    words: Fraction = 0.5
    words_area: Annotated[int, Field(ge=0)] | None = None


class Clip(Table):
    """Options of clip.

    Attributes:
        texts: "names", of the classes of objects, or "captions", of whole images in captions.jsonl.
        templates: texts of a class, whose name replaces ``{}``; each time one at random.
        zoom: the least and the largest side of the square around an object, by the longer side of its box.
        alone: the share of objects whose background is removed.
    """

    texts: Literal["names", "captions"] = "names"
    templates: Annotated[list[str], Field(min_length=1)] = ["{}", "a {}", "the {}", "a photo of a {}."]
    zoom: list[Annotated[float, Field(ge=0.1, le=10)]] = Field(default=[1.0, 2.0], min_length=2, max_length=2)
    alone: Fraction = 0.5


class Lora(Table):
    """Train low-rank layers beside frozen linear layers (LoRA). Defaults are PEFT's.

    Attributes:
        rank: R.
        alpha: the low-rank product is multiplied by alpha / R.
        dropout: probability of dropping an input of a low-rank layer.
        use_rslora: multiply by alpha / sqrt(R) instead (arXiv:2312.03732).
        targets: "all-linear" for every linear layer of the blocks, or published names of modules: ["q_proj", "v_proj"].
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    targets: str | Annotated[list[str], Field(min_length=1)] = "all-linear"

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class Recipe(Table):
    """A training recipe.

    Attributes:
        objective: a key of `pentad.train.objectives.catalog.OBJECTIVES`; or losses of pairs -> their weights.
        images: options of objectives on images.
        objects: options of detect.
        segment, clip: options of these objectives.
        lora: if given, adapters are trained, not the weights.
    """

    objective: str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    model: Model
    data: Data
    run: Run
    optimizer: Optimizer
    preference: Preference = Preference()
    images: Images = Images()
    objects: Objects = Objects()
    segment: Segment = Segment()
    clip: Clip = Clip()
    lora: Lora | None = None


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a TOML file. Relative paths in it are relative to the current folder.
        overrides: settings ``table.key=value`` that replace the file's; the value is TOML, or else a string.

    Raises:
        BadInput: the file can't be read, a key is unknown (the nearest known one is named), or a value is refused.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"{path}: not TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise BadInput(f"{path}: {_explain(error)}") from error
    if (recipe.data.train is None) == (not recipe.data.stages):
        raise BadInput(f"{path}: [data] needs train, or stages, and not both")
    if recipe.data.stages:
        total = sum(stage.steps for stage in recipe.data.stages)
        if recipe.run.steps not in (0, total):
            raise BadInput(f"{path}: run.steps is {recipe.run.steps}, but the stages have {total} steps; leave it out")
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": total})})
    elif not recipe.run.steps:
        raise BadInput(f"{path}: run.steps is missing, or 0")
    if (recipe.model.base is None) == (recipe.model.config is None):
        raise BadInput(f"{path}: [model] needs base, or config to start from random weights, and not both")
    if recipe.model.backbone is not None and recipe.objective not in ("detect", "segment"):
        raise BadInput(f"{path}: model.backbone is for detect and segment; leave it out")
    if recipe.objective in IMAGE_OBJECTIVES:
        return recipe
    if recipe.model.config is not None and recipe.model.tokenizer is None:
        raise BadInput(f"{path}: [model] has a config; it also needs tokenizer, a model whose tokenizer is used")
    if recipe.objective == "reward" and recipe.lora is not None:
        raise BadInput(f"{path}: [lora] can't train a reward model, whose head is new; leave it out")
    if recipe.model.config is not None and recipe.lora is not None:
        raise BadInput(f"{path}: [lora] needs model.base: with model.config it would adapt random weights")
    return recipe


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals:
        raise BadInput(f"--set is {override!r}; expected key=value, such as run.steps=100")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = name.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise BadInput(f"--set is {override!r}; {table} is not a table")
    values[key] = value


def _table(annotation: Any) -> Any:
    """The first table in a field's type, such as Group in list[Group]; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    return next(filter(None, map(_table, get_args(annotation))), None)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        table: Any = Recipe
        for part in first["loc"][:-1]:  # among the fields' names are indices and names of types
            if part in table.model_fields:
                table = _table(table.model_fields[part].annotation)
        near = difflib.get_close_matches(str(first["loc"][-1]), table.model_fields, 1, 0)
        return f"unknown key {location!r}; the nearest known one is {near[0]!r}"
    if first["type"] == "missing":
        return f"{location} is missing"
    return f"{location} is {first['input']!r}; {first['msg'][:1].lower()}{first['msg'][1:]}"
