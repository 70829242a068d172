"""Masked autoencoders (arXiv:2111.06377): an encoder that was pretrained by filling in masked patches of unlabeled
images learns to classify from fewer labels than one that starts from random weights.

The images are crops of scenes (see `pentad.datasets.scenes`): digits in any color, size and angle, on photographs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pentad.reproduce.report import Interval, Report, Row
from pentad.reproduce.runs import Workshop

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
    size, started, shop = size or Size(), time.perf_counter(), Workshop(folder, note)
    shop.draw_scenes(size.scenes, size.held_out)
    pretrained = shop.train(
        "pretrained",
        "mae",
        shop.write("mae.json", {"model_type": "vit_mae", **ENCODER, **DECODER}),
        size.pretraining,
        size.batch,
        optimizer={"lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]},
        images={"crop": 0.5},
    )
    starts = {
        "pretrained": ({"base": str(pretrained / "final")}, 0.75),
        "from random weights": (shop.write("vit.json", {"model_type": "vit", **ENCODER}), 1.0),
    }
    accuracy: dict[str, list[float]] = {name: [] for name in starts}
    for seed in range(seeds):
        for name, (model, decay) in starts.items():
            run = shop.train(
                f"{name.replace(' ', '-')}-{seed}",
                "classify",
                model,
                size.tuning,
                size.batch // 2,
                seed,
                data={"validation": str(folder / "held-out")},
                images={"fraction": size.labels, "crop": 0.6, "global_pool": "avg"},
                optimizer={"lr": 1e-3, "weight_decay": 0.05, "layer_decay": decay},
            )
            accuracy[name].append(100 * shop.held_out(run)["accuracy"])
    gains = [ours - theirs for ours, theirs in zip(*accuracy.values(), strict=True)]
    return Report(
        name="mae",
        claim="a ViT pretrained as a masked autoencoder beats the same ViT from scratch",
        source="He et al. 2021, Masked Autoencoders Are Scalable Vision Learners (arXiv:2111.06377), section 4",
        setting=f"digits in scenes, {size.labels:.0%} of the labels",
        rows=[Row(name, "% right", values) for name, values in accuracy.items()],
        difference=Interval.of(gains),
        unit="points of accuracy",
        expected=EXPECTED,
        seconds=time.perf_counter() - started,
    )
