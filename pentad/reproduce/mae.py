"""Masked autoencoders (arXiv:2111.06377): an encoder that was pretrained by filling in masked patches of unlabeled
images learns to classify from fewer labels than one that starts from random weights.

The images are crops of scenes (see `pentad.datasets.scenes`): digits in any color, size and angle, on photographs.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pentad.datasets.object_folders import write_objects
from pentad.datasets.scenes import Scenes
from pentad.reproduce.report import Interval, Report
from pentad.train.recipe import Recipe
from pentad.train.run import open_run

ENCODER = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": 32,
    "patch_size": 4,
}
DECODER = {
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 256,
    "norm_pix_loss": True,
}
EXPECTED = 5.0  # points of accuracy


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        scenes, held_out: the numbers of scenes to train on and to measure with; each has some three objects.
        pretraining, tuning: steps.
        batch: images a step of pretraining; half as many when tuning.
        labels: the share of the images whose labels are used.
    """

    scenes: int = 2000
    held_out: int = 300
    pretraining: int = 900
    tuning: int = 200
    batch: int = 128
    labels: float = 0.05


def run(folder: Path, seeds: int, note: Callable[[str], None], size: Size | None = None) -> Report:
    """Pretrain once, then fine-tune from pretrained and from random weights with each seed.

    Args:
        folder: an empty folder for data and runs.
        seeds: how many.
        note: receives what is being done.
        size: how much is done.
    """
    size, started = size or Size(), time.perf_counter()
    note("drawing scenes")
    write_objects(Scenes(size.scenes, seed=1), folder / "train")
    write_objects(Scenes(size.held_out, seed=2, held_out=True), folder / "held-out")
    (folder / "mae.json").write_text(json.dumps({"model_type": "vit_mae", **ENCODER, **DECODER}))
    (folder / "vit.json").write_text(json.dumps({"model_type": "vit", **ENCODER}))

    def train(name: str, objective: str, model: dict[str, str], steps: int, batch: int, **tables: Any) -> Path:
        data = {"train": str(folder / "train")} | tables.pop("data", {})
        settings = {"out": str(folder / name), "steps": steps, "batch_size": batch, "micro_batch_images": batch}
        recipe = {
            "objective": objective,
            "model": model,
            "data": data,
            "run": settings | tables.pop("run", {}),
            **tables,
        }
        open_run(Recipe.model_validate(recipe)).train(note=note, report=lambda _: None)
        return folder / name

    note(f"pretraining for {size.pretraining} steps")
    optimizer = {"lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]}
    pretrained = train(
        "pretrained", "mae", {"config": str(folder / "mae.json")}, size.pretraining, size.batch, optimizer=optimizer,
        images={"crop": 0.5},
    )  # fmt: skip
    rows: dict[str, list[float]] = {"pretrained": [], "from random weights": []}
    for seed in range(seeds):
        for name, model, decay in (
            ("pretrained", {"base": str(pretrained / "final")}, 0.75),
            ("from random weights", {"config": str(folder / "vit.json")}, 1.0),
        ):
            note(f"seed {seed}: {name}")
            run_folder = train(
                f"{name.replace(' ', '-')}-{seed}", "classify", model, size.tuning, size.batch // 2,
                data={"validation": str(folder / "held-out")}, run={"seed": seed},
                images={"fraction": size.labels, "crop": 0.6, "global_pool": "avg"},
                optimizer={"lr": 1e-3, "weight_decay": 0.05, "layer_decay": decay},
            )  # fmt: skip
            last = (run_folder / "validation.jsonl").read_text().splitlines()[-1]
            rows[name].append(100 * json.loads(last)["accuracy"])
    gains = [ours - theirs for ours, theirs in zip(*rows.values(), strict=True)]
    return Report(
        name="mae",
        claim="a ViT pretrained as a masked autoencoder beats the same ViT from scratch",
        source="He et al. 2021, Masked Autoencoders Are Scalable Vision Learners (arXiv:2111.06377), section 4",
        setting=f"digits in scenes, {size.labels:.0%} of the labels; expected: at least {EXPECTED:g} points",
        unit="% right",
        rows=rows,
        difference=Interval.of(gains),
        expected=EXPECTED,
        seconds=time.perf_counter() - started,
    )
