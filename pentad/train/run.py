"""A training run: one folder with the recipe, the log, checkpoints and the trained model."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import pentad
from pentad import build, text, weights
from pentad.convert import export_network
from pentad.datasets.examples import Encoder
from pentad.datasets.store import Examples, prepare
from pentad.errors import BadInput
from pentad.memory import available_memory
from pentad.models import family_of
from pentad.models.language.config import read_family_config
from pentad.nn.decoder import Decoder
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.text import export
from pentad.train import checkpoint, processes
from pentad.train.data import TokenData
from pentad.train.loop import Loop, StepRecord
from pentad.train.objectives.catalog import data_for, make_objective
from pentad.train.objectives.reward import reward_head
from pentad.train.optimizers import Optimizers
from pentad.train.recipe import Recipe
from pentad.train.schedules import learning_rate
from pentad.weights import registry
from pentad.weights.checkpoint import Checkpoint

_BYTES_A_TOKEN_AND_WIDTH = 90  # activations of a layer in float32, without checkpointing; measured with SmolLM2


@dataclass
class TrainingRun:
    """A run that is ready to start.

    Attributes:
        recipe: its recipe.
        folder: its folder.
        source: the checkpoint that it starts from, or its config.
        tokenizer_source: the checkpoint of the tokenizer.
        tokenizer: the tokenizer.
        stores: the tokenized data.
    """

    recipe: Recipe
    folder: Path
    source: Checkpoint
    tokenizer_source: Checkpoint
    tokenizer: text.Tokenizer
    stores: list[Examples]

    @cached_property
    def data(self) -> TokenData:
        """The batches."""
        run, sources = self.recipe.run, self.recipe.data.sources
        return TokenData(
            self.stores,
            [source.weight for source in sources] if len(sources) > 1 else None,
            run.batch_size,
            run.seed,
            run.micro_batch_tokens,
            run.sequence_length if self.recipe.data.pack else None,
            processes.rank(),
            processes.world(),
        )

    def plan(self) -> dict[str, Any]:
        """What the run would do, without loading weights."""
        facts, run, data = [store.facts for store in self.stores], self.recipe.run, self.data
        network = build.meta_network(self.source)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        lengths = sum(int(store.lengths.sum()) for store in self.stores)
        return {
            "rows": sum(fact["rows"] for fact in facts),
            "examples": sum(map(len, self.stores)),
            "tokens": lengths,
            "target_tokens": sum(fact["targets"] for fact in facts),
            "truncated": sum(fact["truncated"] for fact in facts),
            "skipped": [line for fact in facts for line in fact["skipped"]],
            "sequences": data.units,
            "steps": run.steps,
            "epochs": run.steps * run.batch_size / data.units,
            "parameters": parameters,
            "memory_bytes": 16 * parameters + self._activation_bytes(network),
        }

    def _activation_bytes(self, network: Decoder) -> int:
        """Memory of the activations of the largest micro-batch, without checkpointing."""
        tokens = max(self.recipe.run.micro_batch_tokens, *(int(store.lengths.max()) for store in self.stores))
        width, layers = network.embed.weight.shape[1], len(network.layers)
        return tokens * width * layers * _BYTES_A_TOKEN_AND_WIDTH

    @processes.joined()
    def train(self, *, resume: bool = False, note: Callable[[str], None], report: Callable[[StepRecord], None]) -> Path:
        """Train, and return the folder of the trained model.

        Args:
            resume: continue from the newest checkpoint.
            note: receives what the user should know.
            report: receives each step's record.

        Raises:
            BadInput: the folder has a run already, or `resume` doesn't fit the recipe or the data.
            PentadError: the loss isn't finite, or the disk is full.
        """
        checkpoints, run = self.folder / "checkpoints", self.recipe.run
        saved = checkpoint.latest(checkpoints) if resume else None
        if not resume and self.folder.exists() and any(self.folder.iterdir()):
            raise BadInput(f"{self.folder} has a run already; continue it with --resume, or choose another run.out")
        processes.wait_for_all()  # until here a new run's folder is empty
        writes = processes.rank() == 0
        for line in saved.skipped if saved else []:
            note(line)
        identity = self._identity()
        if saved is not None:
            self._check_resume(saved.info, identity, note)
        torch.manual_seed(run.seed)
        network = self._network()
        # Before the checkpoint's weights, since references are the base model's.
        objective = make_objective(self.recipe, network, self.stores, build.DTYPES[run.dtype])
        optimizers = Optimizers(network, self.recipe.optimizer)
        first = 0
        if saved is not None:
            first = saved.step
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(saved.tensors[f"parameters/{name}"])
            prefix = "optimizer/"
            optimizers.load_state({k.removeprefix(prefix): t for k, t in saved.tensors.items() if k.startswith(prefix)})
        options = self.recipe.optimizer
        loop = Loop(
            network,
            objective,
            self.data,
            optimizers,
            lambda step: learning_rate(
                options.schedule, step, run.steps, peak=options.lr, warmup=options.warmup, decay=options.decay
            ),
            seed=run.seed,
            max_grad_norm=options.max_grad_norm,
            dtype=build.DTYPES[run.dtype],
            checkpointing=self._checkpointing(network),
        )
        log = self._open_log(first) if writes else None

        def after_step(record: StepRecord) -> None:
            if log is None:
                return
            log.write(json.dumps({**record._asdict(), **record.metrics, "metrics": None}) + "\n")
            log.flush()
            report(record)
            if run.checkpoint_every and record.step % run.checkpoint_every == 0 and record.step < run.steps:
                state: dict[str, torch.Tensor] = {f"parameters/{name}": p for name, p in network.named_parameters()}
                state |= {f"optimizer/{name}": tensor for name, tensor in optimizers.state().items()}
                checkpoint.save(checkpoints, record.step, state, identity, keep=run.keep)

        with log or nullcontext():
            loop.run(first, run.steps, after_step)
        final = self.folder / "final"
        if writes:
            self._write_card(identity)
            export_network(network, self.source, final, tokenizer=self.tokenizer_source)
        return final

    def _network(self) -> Decoder:
        config = read_family_config(family_of(self.source), self.source)
        network = build.build(self.source if self.source.tensors else config, trainable=True, seed=self.recipe.run.seed)
        if self.recipe.objective == "reward":
            network.head = reward_head(network)
        return network

    def _checkpointing(self, network: Decoder) -> str:
        if self.recipe.run.checkpointing != "auto":
            return self.recipe.run.checkpointing
        free = available_memory(network.device)
        return "blocks" if free is not None and self._activation_bytes(network) > free // 2 else "none"

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the uninterrupted one, bit for bit."""
        settings = self.recipe.model_dump()
        for name in ("out", "checkpoint_every", "keep"):
            del settings["run"][name]
        data = {file: digest for store in self.stores for file, digest in store.facts["files"].items()}
        return {
            "recipe": settings,
            "data": sorted(data.values()),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "processes": processes.world(),
            "pentad": pentad.__version__,
        }

    @staticmethod
    def _check_resume(old: Any, new: dict[str, Any], note: Callable[[str], None]) -> None:
        for name in ("recipe", "data"):
            if old[name] != new[name]:
                raise BadInput(f"--resume: the {name} differs from the run's: {_difference(old[name], new[name])}")
        for name in ("torch", "threads", "processes", "pentad"):
            if old[name] != new[name]:
                note(f"not bit-exact: {name} was {old[name]} and is {new[name]}")

    def _open_log(self, first: int) -> Any:
        """Write the recipe, and open the log without the lines of steps that are run again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.json").write_text(self.recipe.model_dump_json(indent=2) + "\n")
        path = self.folder / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True)[:first] if path.exists() else []
        partial = path.with_name(".log.jsonl.part")
        partial.write_text("".join(lines))
        os.replace(partial, path)
        return path.open("a")

    def _write_card(self, identity: dict[str, Any]) -> None:
        records = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        shown = records[:: max(1, len(records) // 20)]
        curve = "\n".join(f"| {r['step']} | {r['loss']:.4f} | {r['grad_norm']:.3f} |" for r in shown)
        data = "\n".join(f"- `{f}`: {sha}" for store in self.stores for f, sha in store.facts["files"].items())
        settings = json.dumps(identity["recipe"], indent=2)
        (self.folder / "card.md").write_text(
            f"# {self.folder.name}\n\nTrained by pentad {pentad.__version__} (torch {torch.__version__},"
            f" Python {sys.version.split()[0]}, {identity['threads']} threads).\n\nParent: {self.source.path}\n\n"
            f"Data, with SHA-256:\n{data}\n\n```json\n{settings}\n```\n\n| step | loss | gradient norm |\n"
            f"|---|---|---|\n{curve}\n"
        )


def open_run(recipe: Recipe, *, progress: Callable[[int], None] | None = None) -> TrainingRun:
    """Open the model's files and tokenize the data.

    Raises:
        BadInput: an unknown objective or model, a broken row, no tokenizer or no chat template.
    """
    learns = data_for(recipe.objective)
    if recipe.run.batch_size < processes.world():
        raise BadInput(f"run.batch_size is {recipe.run.batch_size}; expected at least one for each process")
    source = weights.open(Path(recipe.model.config) if recipe.model.config else registry.locate(str(recipe.model.base)))
    named = weights.open(registry.locate(recipe.model.tokenizer)) if recipe.model.tokenizer else source
    tokenizer = text.load(named)
    if tokenizer is None:
        raise BadInput(f"{named.path} has no tokenizer; name one in model.tokenizer")
    network = build.meta_network(source)
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
    data = recipe.data
    encoder = Encoder(tokenizer, learns, recipe.run.sequence_length, data.truncate)
    fingerprint = _fingerprint(named)
    stores = [
        prepare(Path(part.path), encoder, fingerprint, skip_bad=data.skip_bad, progress=progress)
        for part in data.sources
    ]
    return TrainingRun(recipe, Path(recipe.run.out), source, named, tokenizer, stores)


def _fingerprint(source: Checkpoint) -> str:
    """Hash of a tokenizer's files."""
    digest = hashlib.sha256()
    for name, content in sorted(export.hf_files(source).items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _difference(old: Any, new: Any, name: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return _difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return f"{name or 'it'} was {old} and is {new}" if name else "the files have changed"
