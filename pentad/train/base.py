"""A training run of any kind: one folder with the recipe, the log, checkpoints and the trained model."""

from __future__ import annotations

import json
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

import pentad
from pentad import build
from pentad.errors import BadInput, PentadError
from pentad.train import checkpoint, processes
from pentad.train.loop import BadStep, Data, Loop, StepRecord
from pentad.train.objectives.loss import Objective
from pentad.train.optimizers import MovingAverage, Optimizers, statistics
from pentad.train.recipe import Recipe
from pentad.train.schedules import learning_rate
from pentad.train.trackers import open_trackers
from pentad.train.validation import Validation
from pentad.weights.atomic import disk_errors, lock
from pentad.weights.checkpoint import Checkpoint

COMPLETE = "complete.json"
"""Written last into the folder of a run: what it was a function of."""


@dataclass
class TrainingRun(ABC):
    """A run that is ready to start.

    Attributes:
        recipe: its recipe.
        folder: its folder.
        source: the checkpoint that it starts from, or its config.
    """

    recipe: Recipe
    folder: Path
    source: Checkpoint

    @property
    @abstractmethod
    def data(self) -> Data:
        """The batches."""

    @abstractmethod
    def validation_data(self) -> Data | None:
        """Held-out data, all in the first step; None if there are none."""

    @abstractmethod
    def files(self) -> dict[str, str]:
        """The files of the data, with their SHA-256."""

    @property
    @abstractmethod
    def skipped(self) -> list[str]:
        """What was left out of the data, and why."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What the run would do, without writing anything."""

    @abstractmethod
    def check_memory(self) -> None:
        """Raise BadInput if memory is short."""

    @abstractmethod
    def checkpointing(self, network: Any) -> str:
        """Activation checkpointing, "none" or "blocks"."""

    @abstractmethod
    def network_and_objective(self, *, measures: bool) -> tuple[nn.Module, Objective]:
        """The network with its weights before the first step, and what it is trained for; see `loop`."""

    @abstractmethod
    def describe(self, batch: Any) -> dict[str, Any]:
        """A micro-batch, for the report of a bad step."""

    @abstractmethod
    def export(self, network: nn.Module, folder: Path) -> None:
        """Write the trained network."""

    @cached_property
    def device(self) -> torch.device:
        """Where it trains."""
        return processes.device(self.recipe.run.device)

    @processes.joined()
    def train(self, *, resume: bool = False, note: Callable[[str], None], report: Callable[[StepRecord], None]) -> Path:
        """Train, and return the folder of the trained model.

        Args:
            resume: continue from the newest checkpoint; a complete run isn't repeated.
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
            complete = self.folder / COMPLETE
            if resume and complete.exists():
                self._check_resume(json.loads(complete.read_text()), identity, note)
                note(f"{self.folder}: the run is complete")
                return final
            saved = checkpoint.latest(self.folder / "checkpoints") if resume else None
            if saved is not None:
                for line in saved.skipped:
                    note(line)
                self._check_resume(saved.info, identity, note)
                first = saved.step
            self.check_memory()
            processes.wait_for_all()  # until here a new run's folder is empty
            loop = self.loop()
            if saved is not None:
                self._restore(loop, saved)
                del saved
            write = self._writer(loop, first, identity, report, stack) if processes.rank() == 0 else None
            validation = None
            if (data := self.validation_data()) is not None:
                validation = Validation(
                    data, self.folder / "validation.jsonl", self.recipe.run.validate_every, self.recipe.run.steps
                )

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
                content = {"error": str(error), "batches": [self.describe(batch) for batch in error.batches]}
                self._write(name, json.dumps(content) + "\n")
                raise PentadError(f"{error}; the batch is in {self.folder / name}") from error
            if processes.rank() == 0:
                if loop.average is not None:
                    loop.average.apply()
                shutil.rmtree(final, ignore_errors=True)  # of a process killed after writing it
                self.export(loop.network, final)
                self._write("card.md", self._card(identity))
                self._write(COMPLETE, json.dumps(identity) + "\n")
        return final

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
        network, objective = self.network_and_objective(measures=measures)
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
            adaptive_clip=options.adaptive_clip,
            dtype=build.DTYPES[run.dtype],
            checkpointing=self.checkpointing(network),
            average=MovingAverage(network, run.ema) if run.ema else None,
            max_spike=run.max_spike,
        )

    def state(self, loop: Loop) -> dict[str, torch.Tensor]:
        """What a checkpoint holds: all that a run remembers but the number of steps."""
        parameters = ((name, p) for name, p in loop.network.named_parameters() if p.requires_grad)
        state: dict[str, torch.Tensor] = {f"parameters/{name}": parameter for name, parameter in parameters}
        state |= {f"buffers/{name}": buffer for name, buffer in statistics(loop.network).items()}
        state |= {f"optimizer/{name}": tensor for name, tensor in loop.optimizers.state().items()}
        if loop.average is not None:
            state |= {f"average/{name}": tensor for name, tensor in loop.average.tensors.items()}
        return state

    def _restore(self, loop: Loop, saved: checkpoint.Saved) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {"parameters": {}, "buffers": {}, "optimizer": {}, "average": {}}
        for name, tensor in saved.tensors.items():
            part, _, name = name.partition("/")
            parts[part][name] = tensor
        with torch.no_grad():
            for name, tensor in parts["parameters"].items():
                loop.network.get_parameter(name).copy_(tensor)
            for name, tensor in parts["buffers"].items():
                loop.network.get_buffer(name).copy_(tensor)
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

    def _write(self, name: str, content: str) -> None:
        with disk_errors(self.folder / name):
            (self.folder / name).write_text(content)

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
        return {
            "recipe": settings,
            "data": sorted(self.files().values()),
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
        data = "\n".join(f"- `{file}`: {digest}" for file, digest in self.files().items())
        settings = json.dumps(identity["recipe"], indent=2)
        return (
            f"# {self.folder.name}\n\nTrained by pentad {pentad.__version__} (torch {torch.__version__},"
            f" Python {sys.version.split()[0]}, {identity['threads']} threads).\n\nParent: {self.source.path}\n\n"
            f"Data, with SHA-256:\n{data}\n\n```json\n{settings}\n```\n\n| step | loss | gradient norm |\n"
            f"|---|---|---|\n{curve}\n"
        )


def _difference(old: Any, new: Any, name: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return _difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return f"{name or 'it'} was {old} and is {new}" if name else "the files have changed"
