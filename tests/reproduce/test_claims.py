"""The whole road of each claim, at a size that shows nothing but that it works."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.models.vision.vit import ViTConfig
from pentad.reproduce import NAMES, convnets_vs_vits
from pentad.weights.darknet_cfg import parse

SIZES: dict[str, dict[str, Any]] = {
    "yolo": {"scenes": 6, "held_out": 3, "side": 64, "images": 8, "batches": (4, 4), "width": 4},
    "mask-rcnn": {"scenes": 6, "held_out": 3, "side": 64, "steps": 2, "batch": 2, "proposals": 8},
    "convnets-vs-vits": {"scenes": 8, "held_out": 4, "budgets": (1e9, 2e9), "batch": 4},
    "sam": {
        "scenes": 4,
        "held_out": 2,
        "side": 32,
        "steps": 1,
        "batch": 2,
        "training_clicks": 0,
        "clicks": 2,
        "prompts": (1, 2),
    },
    "mae": {"scenes": 12, "held_out": 6, "pretraining": 2, "tuning": 2, "batch": 8, "labels": 0.5},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path / "cache"))
    module = import_module(f"pentad.reproduce.{name.replace('-', '_')}")
    notes = list[str]()
    report = module.run(tmp_path, 2, notes.append, module.Size(**SIZES[name]))
    assert report.name == name
    assert {len(row.values) for row in report.rows} <= {1, 2}
    assert len(notes) > 4
    report.write(tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_the_cfg_is_a_yolo_with_two_heads() -> None:
    from pentad.reproduce.yolo import network

    layers = parse(network(128, 16)).layers
    assert [layer.mask for layer in layers if layer.kind == "yolo"] == [(3, 4, 5), (0, 1, 2)]


def test_compute_is_counted_in_multiply_adds_of_all_tokens() -> None:
    """2 of each weight and token, three times for the backward pass, and attention's products."""
    config = ViTConfig(num_labels=10, global_pool="avg", **convnets_vs_vits.VIT)
    tokens, size, layers = 65, 128, 5
    linear = layers * 12 * size**2 * tokens + 64 * 3 * 64 * size + size * 10
    attention = layers * 2 * tokens**2 * size
    assert convnets_vs_vits.training_flops(config) == pytest.approx(6 * (linear + attention), rel=0.01)
    assert torch.get_default_device().type == "cpu"
