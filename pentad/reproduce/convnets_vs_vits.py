"""ConvNets match vision transformers at scale (arXiv:2310.16764): with the same compute for training an NFNet learns as
much as a ViT, and the loss on held-out images falls as a power of the compute.

The images are crops of scenes (see `pentad.datasets.scenes`): digits in any color, size and angle, on photographs.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pentad.build import meta_network
from pentad.models.vision.nfnet import NFNetConfig
from pentad.models.vision.vit import ViTConfig
from pentad.reproduce.report import Curves, Interval, Report, Row
from pentad.reproduce.runs import Workshop

SIDE, CLASSES = 64, 10
NFNET: dict[str, Any] = {
    "stem_size": 32,
    "hidden_sizes": (32, 64, 128, 128),
    "depths": (1, 1, 2, 1),
    "head_size": 256,
    "group_size": 16,
}
VIT: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": SIDE,
    "patch_size": 8,
}
EXPECTED = -0.05  # nats: the NFNet may be so much worse and still match


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        scenes, held_out: the numbers of scenes to train on and to measure with; each has some three objects.
        budgets: of compute, in floating-point operations.
        batch: images a step.
    """

    scenes: int = 2500
    held_out: int = 400
    budgets: tuple[float, ...] = (5e11, 1e12, 2e12, 4e12)
    batch: int = 64


def training_flops(config: Any) -> int:
    """Floating-point operations of an image's forward and backward pass, three times those of the forward pass."""
    network = meta_network(config)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network(torch.empty(1, 3, SIDE, SIDE))
    return 3 * int(counter.get_total_flops())


def run(folder: Path, seeds: int, note: Callable[[str], None], size: Size | None = None) -> Report:
    """Train both networks on each budget with each seed.

    Args:
        folder: an empty folder for data and runs.
        seeds: how many.
        note: receives what is being done.
        size: how much is done.
    """
    size, started, shop = size or Size(), time.perf_counter(), Workshop(folder, note)
    shop.draw_scenes(size.scenes, size.held_out)
    models: dict[str, tuple[dict[str, str], int, dict[str, Any]]] = {
        "NFNet": (
            shop.write("nfnet.json", {"model_type": "nfnet", **NFNET}),
            training_flops(NFNetConfig(num_labels=CLASSES, **NFNET)),
            {"lr": 2e-3, "weight_decay": 0.02, "adaptive_clip": 0.02},
        ),
        "ViT": (
            shop.write("vit.json", {"model_type": "vit", **VIT}),
            training_flops(ViTConfig(num_labels=CLASSES, **VIT)),
            {"lr": 1e-3, "weight_decay": 0.05},
        ),
    }
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for seed in range(seeds):
        for budget in size.budgets:
            for name, (model, flops, optimizer) in models.items():
                trained = shop.train(
                    f"{name}-{budget:.0e}-{seed}",
                    "classify",
                    model,
                    max(1, round(budget / flops / size.batch)),
                    size.batch,
                    seed,
                    data={"validation": str(folder / "held-out")},
                    images={"size": SIDE, "crop": 0.6},
                    optimizer=optimizer,
                )
                points[name].append((budget, shop.held_out(trained)["loss"]))
    last = {name: [y for x, y in of if x == size.budgets[-1]] for name, of in points.items()}
    gains = [vit - nfnet for nfnet, vit in zip(last["NFNet"], last["ViT"], strict=True)]
    return Report(
        name="convnets-vs-vits",
        claim="with equal compute an NFNet's loss matches a ViT's, and falls as a power of the compute",
        source="Smith et al. 2023, ConvNets Match Vision Transformers at Scale (arXiv:2310.16764), figures 1 and 2",
        setting=f"digits in scenes, budgets of {size.budgets[0]:.0e} to {size.budgets[-1]:.0e} operations;"
        " the paper pretrains on 4 billion images",
        rows=[
            *(Row(f"{name}: loss with the largest budget", "nats", values) for name, values in last.items()),
            *(Row(f"{name}: exponent of the loss", "", [exponent(of)]) for name, of in points.items()),
        ],
        difference=Interval.of(gains),
        unit="nats less than the ViT's",
        expected=EXPECTED,
        seconds=time.perf_counter() - started,
        curves=(Curves("compute for training (floating-point operations)", "loss on held-out images", points),),
    )


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of a straight line through points on logarithmic axes; NaN for one place."""
    x, y = zip(*points, strict=True)
    if len(set(x)) < 2:
        return math.nan
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
