"""Tiny vision models of peers, saved as they publish them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

import pentad.weights
from pentad.build import build

disable_progress_bar()


def randomized(peer: nn.Module, seed: int = 0) -> Any:
    """The peer with random parameters and statistics, also where its initial ones are zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in peer.state_dict().items():
            if tensor.is_floating_point() and "position" not in name and "pos_embed" not in name:
                spread = torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=generator)
                noise = torch.empty(tensor.shape).normal_(0.0, 0.2, generator=generator)
                tensor.copy_(spread if name.endswith("running_var") else tensor + noise)
    return peer.eval()


def network_of(path: Path) -> Any:
    """The network of a checkpoint."""
    return build(pentad.weights.open(path))


def images(*shape: int, seed: int = 1) -> Tensor:
    """Random normalized images."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    """Equal shapes, and values within `atol` of the largest."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= atol * max(1.0, float(theirs.abs().max()))
