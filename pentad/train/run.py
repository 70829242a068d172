"""A training run: one folder with the recipe, the log, checkpoints and the trained model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TextIO

import torch

import pentad
from pentad import adapters, build, text, weights
from pentad.convert import export_network
from pentad.datasets.examples import Encoder
from pentad.datasets.store import Examples, prepare
from pentad.errors import BadInput, PentadError
from pentad.memory import available_memory
from pentad.models import family_of
from pentad.models.language.config import read_family_config
from pentad.nn.decoder import Decoder
from pentad.nn.encoder_decoder import EncoderDecoder
from pentad.nn.lora import add_lora
from pentad.text import export
from pentad.train import checkpoint, processes
from pentad.train.data import Stage, TokenData
from pentad.train.loop import BadStep, Loop, StepRecord
from pentad.train.objectives.catalog import data_for, make_objective
from pentad.train.objectives.references import no_references, reference_log_probs
from pentad.train.objectives.reward import reward_head
from pentad.train.optimizers import MovingAverage, Optimizers
from pentad.train.plan import checkpointing, least_bytes, plan
from pentad.train.precision import faster_dtype
from pentad.train.recipe import Recipe
from pentad.train.schedules import learning_rate
from pentad.train.trackers import open_trackers
from pentad.train.validation import Validation
from pentad.weights import registry
from pentad.weights.atomic import disk_errors, lock
from pentad.weights.checkpoint import Checkpoint


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
        held_out: the tokenized validation data, or None.
    """

    recipe: Recipe
    folder: Path
    source: Checkpoint
    tokenizer_source: Checkpoint
    tokenizer: text.Tokenizer
    stores: list[Examples]
    held_out: Examples | None = None

    @cached_property
    def device(self) -> torch.device:
        """Where it trains."""
        return processes.device(self.recipe.run.device)

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

    @processes.joined()
    def train(self, *, resume: bool = False, note: Callable[[str], None], report: Callable[[StepRecord], None]) -> Path:
        """Train, and return the folder of the trained model.

        Args:
            resume: continue from the newest checkpoint.
            note: receives what the user should know.
            report: receives each step's record, in the first process.

        Raises:
            BadInput: the folder has a run already, another process trains in it, `resume` doesn't fit the recipe or the
                data, or memory is short.
            PentadError: a step is bad (see `Loop`), or the disk is full or can't be written.
        """
        final, first, identity = self.folder / "final", 0, self._identity()
        with ExitStack() as stack:
            if processes.rank() == 0:
                self._take_folder(resume, stack)
            saved = checkpoint.latest(self.folder / "checkpoints") if resume else None
            if saved is not None:
                for line in saved.skipped:
                    note(line)
                self._check_resume(saved.info, identity, note)
                first = saved.step
            self._check_memory()
            processes.wait_for_all()  # until here a new run's folder is empty
            loop = self.loop()
            if saved is not None:
                self._restore(loop, saved)
                del saved
            write = self._writer(loop, first, identity, report, stack) if processes.rank() == 0 else None
            validation = None if self.held_out is None else self._validation(self.held_out)

            def after_step(record: StepRecord) -> None:
                if write is not None:
                    write(record)
                if validation is not None:
                    validation.after_step(loop, record.step)

            if validation is not None and first == 0:
                validation.after_step(loop, 0)
            try:
                loop.run(first, self.recipe.run.steps, after_step)
            except BadStep as error:
                process = f"-{processes.rank()}" if processes.world() > 1 else ""
                name = f"bad-step-{error.step}{process}.json"
                batches = [{"rows": self.data.rows(b), "ids": b.ids_N.tolist()} for b in error.batches]
                self._write(name, json.dumps({"error": str(error), "batches": batches}) + "\n")
                raise PentadError(f"{error}; the batch is in {self.folder / name}") from error
            if processes.rank() == 0:
                if loop.average is not None:
                    loop.average.apply()
                assert isinstance(loop.network, Decoder)
                shutil.rmtree(final, ignore_errors=True)  # of a process killed after writing it
                also = partial(self._save_adapter, loop.network)
                export_network(loop.network, self.source, final, tokenizer=self.tokenizer_source, also=also)
                self._write("card.md", self._card(identity))
        return final

    def _validation(self, held_out: Examples) -> Validation:
        run, part = self.recipe.run, (processes.rank(), processes.world())
        stages = [Stage(self.stores, None, 0), Stage([held_out], None, 1)]  # the sources as the objective counts them
        data = TokenData(stages, len(held_out), run.seed, run.micro_batch_tokens, None, *part, self.device)
        return Validation(data, self.folder / "validation.jsonl", run.validate_every, run.steps)

    def _writer(
        self, loop: Loop, first: int, identity: dict[str, Any], report: Callable[[StepRecord], None], stack: ExitStack
    ) -> Callable[[StepRecord], None]:
        """What happens after a step: it is logged and reported, and checkpoints are saved."""
        run = self.recipe.run
        self._write("recipe.json", self.recipe.model_dump_json(indent=2) + "\n")
        log = stack.enter_context(self._open_log(first, loop))
        trackers = open_trackers(run.trackers, self.folder, identity["recipe"], first, stack)
        saver = stack.enter_context(checkpoint.Saver(self.folder / "checkpoints", run.keep))

        def after_step(record: StepRecord) -> None:
            with disk_errors(self.folder / "log.jsonl"):
                log.write(json.dumps(record.as_json()) + "\n")
                log.flush()
            for receiver in (*trackers, report):
                receiver(record)
            saver.check()
            if run.checkpoint_every and record.step == first + 1:  # the optimizer has its state now
                saver.reserve(self.state(loop))
            if run.checkpoint_every and record.step % run.checkpoint_every == 0 and record.step != run.steps:
                saver.save(record.step, self.state(loop), identity)

        return after_step

    def loop(self, *, measures: bool = False) -> Loop:
        """The loop before its first step.

        Args:
            measures: the steps are only measured: the learning rate is 0, and a reference model isn't run.
        """
        options, run = self.recipe.optimizer, self.recipe.run
        torch.manual_seed(run.seed)
        network = self._network()
        known = no_references if measures else reference_log_probs
        stores = [*self.stores, *([] if self.held_out is None else [self.held_out])]
        objective = make_objective(self.recipe, network, stores, build.DTYPES[run.dtype], known)
        self._add_lora(network)  # after the objective, whose references are the base model's
        optimizers = Optimizers(network, options)

        def rate(step: int) -> float:
            peak = 0.0 if measures else options.lr
            return learning_rate(
                options.schedule, step, run.steps, peak=peak, warmup=options.warmup, decay=options.decay
            )

        return Loop(
            network,
            objective,
            self.data,
            optimizers,
            rate,
            seed=run.seed,
            max_grad_norm=options.max_grad_norm,
            dtype=build.DTYPES[run.dtype],
            checkpointing=checkpointing(self, network),
            average=MovingAverage(network, run.ema) if run.ema else None,
            max_spike=run.max_spike,
        )

    def state(self, loop: Loop) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: all that a run remembers but the number of steps."""
        parameters = ((name, p) for name, p in loop.network.named_parameters() if p.requires_grad)
        state: dict[str, torch.Tensor] = {f"parameters/{name}": parameter for name, parameter in parameters}
        state |= {f"optimizer/{name}": tensor for name, tensor in loop.optimizers.state().items()}
        if loop.average is not None:
            state |= {f"average/{name}": tensor for name, tensor in loop.average.tensors.items()}
        return state

    def _restore(self, loop: Loop, saved: checkpoint.Saved) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {"parameters": {}, "optimizer": {}, "average": {}}
        for name, tensor in saved.tensors.items():
            part, _, name = name.partition("/")
            parts[part][name] = tensor
        with torch.no_grad():
            for name, tensor in parts["parameters"].items():
                loop.network.get_parameter(name).copy_(tensor)
        loop.optimizers.load_state(parts["optimizer"])
        if loop.average is not None:
            loop.average.load(parts["average"])

    def _take_folder(self, resume: bool, stack: ExitStack) -> None:
        """Make the run's folder, and lock it."""
        if not resume and self.folder.exists() and any(self.folder.iterdir()):
            raise BadInput(f"{self.folder} has a run already; continue it with --resume, or choose another run.out")
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock(self.folder, stack)
            except BlockingIOError:
                raise BadInput(f"{self.folder}: another process trains in it; choose another run.out") from None

    def _check_memory(self) -> None:
        network, free = self._add_lora(build.meta_decoder(self.source)), available_memory(self.device)
        needed = least_bytes(self, network, checkpointing(self, network))
        if free is not None and needed > free:
            raise BadInput(
                f"the run needs about {needed / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are available. Set"
                ' run.checkpointing = "blocks", a smaller run.micro_batch_tokens, or choose a smaller model'
            )

    def _write(self, name: str, content: str) -> None:
        with disk_errors(self.folder / name):
            (self.folder / name).write_text(content)

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

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the uninterrupted one, bit for bit."""
        settings = self.recipe.model_dump()
        for name in (
            "out",
            "checkpoint_every",
            "keep",
            "max_spike",
            "trackers",
            "validate_every",
            "device",  # see below
        ):  # they change no number
            del settings["run"][name]
        data = {file: digest for store in self.stores for file, digest in store.facts["files"].items()}
        return {
            "recipe": settings,
            "data": sorted(data.values()),
            "torch": torch.__version__,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "processes": processes.world(),
            "pentad": pentad.__version__,
        }

    @staticmethod
    def _check_resume(old: Any, new: dict[str, Any], note: Callable[[str], None]) -> None:
        for name in ("recipe", "data"):
            if old[name] != new[name]:
                raise BadInput(f"--resume: the {name} differs from the run's: {_difference(old[name], new[name])}")
        for name in ("torch", "device", "threads", "processes", "pentad"):
            if old.get(name, "cpu") != new[name]:
                note(f"not bit-exact: {name} was {old[name]} and is {new[name]}")

    def _open_log(self, first: int, loop: Loop) -> TextIO:
        """The log without the lines of steps that are run again; the others are the loop's history."""
        path = self.folder / "log.jsonl"
        with disk_errors(path):
            lines = path.read_text().splitlines(keepends=True)[:first] if path.exists() else []
            partial = path.with_name(".log.jsonl.part")
            partial.write_text("".join(lines))
            os.replace(partial, path)
            loop.history.extend((r["loss"], r["grad_norm"]) for r in map(json.loads, lines))
            return path.open("a")

    def _card(self, identity: dict[str, Any]) -> str:
        records = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        shown = records[:: max(1, len(records) // 20)]
        curve = "\n".join(f"| {r['step']} | {r['loss']:.4f} | {r['grad_norm']:.3f} |" for r in shown)
        data = "\n".join(f"- `{f}`: {sha}" for store in self.stores for f, sha in store.facts["files"].items())
        settings = json.dumps(identity["recipe"], indent=2)
        return (
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
    processes.device(recipe.run.device)  # refused before the data is tokenized
    if recipe.run.batch_size < processes.world():
        raise BadInput(f"run.batch_size is {recipe.run.batch_size}; expected at least one for each process")
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
    return TrainingRun(recipe, Path(recipe.run.out), source, named, tokenizer, stores, held_out)


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


def _difference(old: Any, new: Any, name: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return _difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return f"{name or 'it'} was {old} and is {new}" if name else "the files have changed"
