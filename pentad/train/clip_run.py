"""Runs of CLIP on images with texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from pentad import build, text, weights
from pentad.errors import BadInput
from pentad.models import check_task, family_of
from pentad.models.language.config import read_family_config
from pentad.models.vision.clip import CLIP, CLIPConfig
from pentad.text.clip_bpe import learn
from pentad.text.export import hf_files
from pentad.train import processes
from pentad.train.image_run import VisionRun, only_folder
from pentad.train.objectives.contrastive import ContrastiveObjective, clamp_scale
from pentad.train.objectives.loss import Objective
from pentad.train.pair_data import PairBatch, PairData, PairExamples, read_pairs
from pentad.train.recipe import Recipe
from pentad.vision.classifier import read_preprocessing
from pentad.vision.clip import text_ids
from pentad.vision.export import export
from pentad.weights import registry
from pentad.weights.checkpoint import Checkpoint


@dataclass
class ClipRun(VisionRun):
    """A run of a CLIP.

    Attributes:
        config: of the trained network.
        examples: the pairs to train on.
        held_out: the pairs of the validation, or None.
        tokenizer: the tokenizer.
        tokenizer_files: name -> content of its files.
    """

    config: CLIPConfig
    examples: PairExamples
    held_out: PairExamples | None
    tokenizer: text.Tokenizer
    tokenizer_files: Mapping[str, bytes]

    @cached_property
    def data(self) -> PairData:
        return replace(self._data(self.examples, self.recipe.run.batch_size), shuffle=True)

    def validation_data(self) -> PairData | None:
        return None if self.held_out is None else self._data(self.held_out, len(self.held_out.examples))

    def _data(self, examples: PairExamples, batch_size: int) -> PairData:
        run, recipe = self.recipe.run, self.recipe
        assert self.config.vision_config is not None
        assert self.config.text_config is not None
        length, truncate = self.config.text_config.max_position_embeddings, recipe.data.truncate

        def encode(one: str) -> list[int]:
            return text_ids(self.tokenizer, one, length, truncate=truncate)

        side, how = self.config.vision_config.image_size, read_preprocessing(self.source, self.config.preprocessing)
        part: dict[str, Any] = {"flip": recipe.images.flip, "device": self.device, "shuffle": False}
        return PairData(examples, batch_size, run.batch_size, run.seed, side, how, encode, recipe.clip, **part)

    def network_and_objective(self, *, measures: bool) -> tuple[nn.Module, Objective]:
        source = self.source if self.source.tensors else self.config
        network = build.build(source, device=self.device, trainable=True, seed=self.recipe.run.seed)
        return network, ContrastiveObjective()

    def describe(self, batch: PairBatch) -> dict[str, Any]:
        return {"rows": self.data.rows(batch), "texts": list(batch.texts)}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the trained network, with its tokenizer, as transformers' CLIPModel."""
        assert isinstance(network, CLIP)
        clamp_scale(network)
        export(network, family_of(self.source), folder, read_preprocessing(self.source, self.config.preprocessing))
        for name, content in self.tokenizer_files.items():
            (folder / name).write_bytes(content)


def open_clip_run(recipe: Recipe) -> ClipRun:
    """Open the model's files and list the pairs.

    Raises:
        BadInput: the model is no CLIP with both encoders, the data have no pairs, or an option doesn't apply.
    """
    if processes.world() > 1:
        raise BadInput("objective clip compares all pairs of a batch in one process; expected no torchrun")
    if recipe.optimizer.layer_decay != 1:
        raise BadInput("optimizer.layer_decay is for one stack of blocks; expected 1 for CLIP")
    if recipe.clip.texts == "names" and (wrong := [one for one in recipe.clip.templates if "{}" not in one]):
        raise BadInput(f"clip.templates has {wrong[0]!r}; expected {{}} in it, which the class's name replaces")
    source = weights.open(Path(recipe.model.config) if recipe.model.config else registry.locate(str(recipe.model.base)))
    check_task(source, "embed")
    config = read_family_config(family_of(source), source)
    assert isinstance(config, CLIPConfig)
    if config.text_config is None or config.vision_config is None:
        raise BadInput(f"{source.path} is one encoder of a CLIP; expected both")
    examples = read_pairs(Path(only_folder(recipe)), recipe.clip.texts, skip_bad=recipe.data.skip_bad)
    held_out = read_pairs(Path(recipe.data.validation), recipe.clip.texts) if recipe.data.validation else None
    files = _tokenizer_files(recipe, source, config.text_config.vocab_size, examples)
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = text.load(Checkpoint(Path(folder), "hf", {}, {}, {}), vocab_size=config.text_config.vocab_size)
    if tokenizer is None or not tokenizer.closing or tokenizer.bos_id is None:
        raise BadInput(
            f"{recipe.model.tokenizer or source.path}: expected a tokenizer of CLIP's kind, with an end token"
        )
    if not source.tensors:
        fitted = replace(
            config.text_config,
            vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.closing[-1],
        )
        config = replace(config, text_config=fitted)
    return ClipRun(recipe, Path(recipe.run.out), source, config, examples, held_out, tokenizer, files)


def _tokenizer_files(recipe: Recipe, source: Checkpoint, size: int, examples: PairExamples) -> dict[str, bytes]:
    """The files of the tokenizer: the named one's, the base's, or those of one that is learned from the texts."""
    if recipe.model.tokenizer is not None:
        return hf_files(weights.open(registry.locate(recipe.model.tokenizer)))
    if source.tensors:
        return hf_files(source)
    templates = recipe.clip.templates if recipe.clip.texts == "names" else ["{}"]
    return learn((template.replace("{}", pair.text) for pair in examples.examples for template in templates), size)
