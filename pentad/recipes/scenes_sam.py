"""``sam-scenes``: the small Segment Anything of `pentad segment`, trained on this machine, once, on scenes.

A CLIP learns the names of the objects; then the network learns from clicks, boxes and words (arXiv:2304.02643, appendix
A and D.5). It knows scenes only (see `pentad.datasets.scenes`): photographs want published weights.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pentad.datasets.object_folders import write_objects
from pentad.datasets.scenes import Scenes
from pentad.recipes.images import train_on_images
from pentad.train.loop import StepRecord
from pentad.weights.atomic import cache_entry
from pentad.weights.cache import Progress, task

SIDE = 160  # of the scenes, in pixels
CLIP: dict[str, Any] = {
    "model_type": "clip",
    "projection_dim": 64,
    "vision_config": {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    },
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 600,
        "max_position_embeddings": 16,
    },
}
SAM: dict[str, Any] = {
    "model_type": "sam",
    "vision_config": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlp_dim": 512,
        "image_size": SIDE,
        "patch_size": 8,
        "window_size": 10,
        "global_attn_indexes": [1, 3],
        "output_channels": 64,
    },
    "mask_decoder_config": {"mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 128},
}
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.05, "warmup": 0.05}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        scenes: the number of scenes.
        clip, pairs: steps of CLIP, and objects in each.
        steps, batch: steps of the network, and scenes in each.
        objects: the most of a scene.
        clicks: after the first prompt of an object.
        words: the share of objects that begin with words.
    """

    scenes: int = 10_000
    clip: int = 1500
    pairs: int = 64
    steps: int = 3000
    batch: int = 8
    objects: int = 2
    clicks: int = 2
    words: float = 0.25


def make(
    path: Path, *, note: Callable[[str], None], progress: Progress | None = None, size: Size | None = None
) -> Path:
    """Train the network and return its folder, which holds its CLIP; a training that was interrupted continues.

    Args:
        path: the folder to make; the runs are in a hidden folder beside it until then.
        note: receives what the user should know.
        progress: counts scenes and steps.
        size: how much is done.

    Raises:
        PentadError: the disk is full or can't be written.
    """
    size, progress = size or Size(), progress or Progress()
    work = path.with_name(f".{path.name}")
    with cache_entry(path, progress):
        if path.exists():
            return path
        work.mkdir(exist_ok=True)
        if not (work / "scenes").exists():
            write_objects(Scenes(size.scenes, seed=1, size=SIDE), work / "scenes", progress=progress)
        crops = {"clip": {"alone": 0.75, "zoom": [1.0, 1.5]}}
        clip = _train(work / "clip", "clip", CLIP, size.clip, size.pairs, crops, note, progress)
        segment = {"clip": str(clip), "words": size.words, "objects": size.objects, "clicks": size.clicks}
        final = _train(work / "sam", "segment", SAM, size.steps, size.batch, {"segment": segment}, note, progress)
        final.rename(path)
        shutil.rmtree(work)
    return path


def _train(
    out: Path,
    objective: str,
    network: dict[str, Any],
    steps: int,
    batch: int,
    tables: dict[str, Any],
    note: Callable[[str], None],
    progress: Progress,
) -> Path:
    """Train a network from random weights beside the folder of scenes, or go on; the folder of the trained one."""
    config = out.with_suffix(".json")
    config.write_text(json.dumps(network))
    model, scenes = {"config": str(config)}, out.with_name("scenes")
    tables = {"optimizer": OPTIMIZER, "run": {"ema": 0.998, "checkpoint_every": min(100, steps)}, **tables}
    with task(progress, f"Training {objective}", steps):
        seen = 0

        def report(record: StepRecord) -> None:
            nonlocal seen
            progress.advance(record.step - seen)
            seen = record.step

        settings: dict[str, Any] = {"note": note, "report": report, "resume": out.exists()}
        return train_on_images(out, objective, model, scenes, steps, batch, **settings, **tables)
