"""Opening a training run, and the runs of language models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from pentad import adapters, build, text, weights
from pentad.convert import export_network
from pentad.datasets.batches import TokenBatch
from pentad.datasets.examples import Encoder
from pentad.datasets.store import Examples, prepare
from pentad.errors import BadInput
from pentad.memory import available_memory
from pentad.models import family_of
from pentad.models.language.config import read_family_config
from pentad.nn.decoder import Decoder
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.nn.lora import add_lora
from pentad.text import export
from pentad.train import processes
from pentad.train.base import TrainingRun
from pentad.train.data import Stage, TokenData
from pentad.train.objectives.catalog import data_for, make_objective
from pentad.train.objectives.loss import Objective
from pentad.train.objectives.references import no_references, reference_log_probs
from pentad.train.objectives.reward import reward_head
from pentad.train.plan import checkpointing, least_bytes, plan
from pentad.train.precision import faster_dtype
from pentad.train.recipe import IMAGE_OBJECTIVES, Recipe
from pentad.weights import registry
from pentad.weights.checkpoint import Checkpoint


@dataclass
class TextRun(TrainingRun):
    """A run of a language model.

    Attributes:
        tokenizer_source: the checkpoint of the tokenizer.
        tokenizer: the tokenizer.
        stores: the tokenized data.
        held_out: the tokenized validation data, or None.
    """

    tokenizer_source: Checkpoint
    tokenizer: text.Tokenizer
    stores: list[Examples]
    held_out: Examples | None = None

    @cached_property
    def data(self) -> TokenData:
        """The batches."""
        run, stores = self.recipe.run, iter(self.stores)
        lengths = [stage.steps for stage in self.recipe.data.stages] or [run.steps]
        stages = [
            Stage([next(stores) for _ in mixture], [s.weight for s in mixture] if len(mixture) > 1 else None, steps)
            for mixture, steps in zip(self.recipe.data.mixtures(), lengths, strict=True)
        ]
        bin_size = run.sequence_length if self.recipe.data.pack else None
        processors = processes.rank(), processes.world()
        return TokenData(stages, run.batch_size, run.seed, run.micro_batch_tokens, bin_size, *processors, self.device)

    def plan(self) -> dict[str, Any]:
        """What the run would do; see `pentad.train.plan.plan`."""
        return plan(self, self._add_lora(build.meta_decoder(self.source)))

    def validation_data(self) -> TokenData | None:
        if self.held_out is None:
            return None
        run, part = self.recipe.run, (processes.rank(), processes.world())
        stages = [Stage(self.stores, None, 0), Stage([self.held_out], None, 1)]  # sources as the objective counts them
        return TokenData(stages, len(self.held_out), run.seed, run.micro_batch_tokens, None, *part, self.device)

    def files(self) -> dict[str, str]:
        return {file: digest for store in self.stores for file, digest in store.facts["files"].items()}

    @property
    def skipped(self) -> list[str]:
        return [line for store in self.stores for line in store.facts["skipped"]]

    def checkpointing(self, network: Decoder) -> str:
        return checkpointing(self, network)

    def network_and_objective(self, *, measures: bool) -> tuple[Decoder, Objective]:
        """A reference model isn't run if the steps are only measured."""
        network, known = self._network(), no_references if measures else reference_log_probs
        stores = [*self.stores, *([] if self.held_out is None else [self.held_out])]
        objective = make_objective(self.recipe, network, stores, build.DTYPES[self.recipe.run.dtype], known)
        return self._add_lora(network), objective  # the objective's references are the base model's

    def describe(self, batch: TokenBatch) -> dict[str, Any]:
        return {"rows": self.data.rows(batch), "ids": batch.ids_N.tolist()}

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the trained network as a folder of transformers, and its adapter."""
        assert isinstance(network, Decoder)
        also = partial(self._save_adapter, network)
        export_network(network, self.source, folder, tokenizer=self.tokenizer_source, also=also)

    def check_memory(self) -> None:
        network, free = self._add_lora(build.meta_decoder(self.source)), available_memory(self.device)
        needed = least_bytes(self, network, checkpointing(self, network))
        if free is not None and needed > free:
            raise BadInput(
                f"the run needs about {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are available. Set"
                ' run.checkpointing = "blocks", a smaller run.micro_batch_tokens, or choose a smaller model'
            )

    def _network(self) -> Decoder:
        config = read_family_config(family_of(self.source), self.source)
        source = self.source if self.source.tensors else config
        network = build.build(source, device=self.device, trainable=True, seed=self.recipe.run.seed)
        assert isinstance(network, Decoder)
        if self.recipe.objective == "reward":
            network.head = reward_head(network)
        return network

    def _add_lora(self, network: Decoder) -> Decoder:
        if (lora := self.recipe.lora) is not None:
            names = adapters.target_layers(self.source, lora.targets)
            options: dict[str, Any] = {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout}
            add_lora(network, names, **options, seed=self.recipe.run.seed)
        return network

    def _save_adapter(self, network: Decoder, folder: Path) -> None:
        if (lora := self.recipe.lora) is not None:
            options: dict[str, Any] = {"alpha": lora.alpha, "rslora": lora.use_rslora, "dropout": lora.dropout}
            adapters.save(network, self.source, folder / "adapter", **options, base=str(self.recipe.model.base))


def open_run(recipe: Recipe, *, progress: Callable[[int], None] | None = None) -> TrainingRun:
    """Open the model's files, and tokenize the data or list the images.

    Raises:
        BadInput: an unknown objective or model, a broken row, no tokenizer or no chat template.
    """
    processes.device(recipe.run.device)  # refused before the data is read
    if recipe.run.batch_size < processes.world():
        raise BadInput(f"run.batch_size is {recipe.run.batch_size}; expected at least one for each process")
    if recipe.objective in IMAGE_OBJECTIVES:
        from pentad.train.clip_run import open_clip_run
        from pentad.train.image_run import open_image_run
        from pentad.train.object_run import open_object_run

        special = {"detect": open_object_run, "segment": open_object_run, "clip": open_clip_run}
        return special.get(str(recipe.objective), open_image_run)(_with_dtype(recipe))
    learns = data_for(recipe.objective)
    source = weights.open(Path(recipe.model.config) if recipe.model.config else registry.locate(str(recipe.model.base)))
    named = weights.open(registry.locate(recipe.model.tokenizer)) if recipe.model.tokenizer else source
    tokenizer = text.load(named)
    if tokenizer is None:
        raise BadInput(f"{named.path} has no tokenizer; name one in model.tokenizer")
    network = build.meta_decoder(source)
    if isinstance(network, EncoderDecoder):
        raise BadInput(f"{source.path}: encoder-decoder models can't be trained yet")
    if tokenizer.vocab_size > network.config.vocab_size:
        raise BadInput(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the embedding {network.config.vocab_size} rows"
        )
    if recipe.objective == "reward" and not family_of(source).names.architecture.endswith("ForCausalLM"):
        raise BadInput(f"{source.path}: transformers has no sequence classifier of this family, as rewards need")
    if recipe.run.sequence_length > network.config.max_position_embeddings:
        limit = network.config.max_position_embeddings
        raise BadInput(f"run.sequence_length is {recipe.run.sequence_length}; this model has at most {limit} positions")
    if recipe.lora is not None:
        adapters.target_layers(source, recipe.lora.targets)  # refused before the data is tokenized
    recipe = _with_dtype(recipe)
    data = recipe.data
    encoder = Encoder(tokenizer, learns, recipe.run.sequence_length, data.truncate)
    fingerprint = _fingerprint(named)
    stores = [
        prepare(Path(part.path), encoder, fingerprint, skip_bad=data.skip_bad, progress=progress)
        for mixture in data.mixtures()
        for part in mixture
    ]
    held_out = prepare(Path(data.validation), encoder, fingerprint, skip_bad=data.skip_bad) if data.validation else None
    return TextRun(recipe, Path(recipe.run.out), source, named, tokenizer, stores, held_out)


def _with_dtype(recipe: Recipe) -> Recipe:
    """The recipe with the dtype that "auto" means: that of the run in its folder, or what a probe finds."""
    if recipe.run.dtype != "auto":
        return recipe
    if processes.world() > 1:
        raise BadInput('run.dtype is "auto", and processes could choose differently; name float32 or bfloat16')
    started = Path(recipe.run.out) / "recipe.json"
    dtype = (
        json.loads(started.read_text())["run"]["dtype"]
        if started.exists()
        else faster_dtype(processes.device(recipe.run.device))
    )
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"dtype": dtype})})


def _fingerprint(source: Checkpoint) -> str:
    """Hash of a tokenizer's files."""
    digest = hashlib.sha256()
    for name, content in sorted(export.hf_files(source).items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
