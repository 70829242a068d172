"""Families that aren't language models: recognized by tensors, with batch norms, and with a runner of their own."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pentad
from pentad import loading, models, weights
from pentad.build import build
from pentad.convert import convert
from pentad.models.family import ArchitectureNames, Family, ModelConfig
from pentad.vision.runner import VisionModel
from pentad.weights.keytable import KeyTable, Rule


@dataclass(frozen=True, kw_only=True)
class BlobConfig(ModelConfig):
    channels: int = 4


class Blob(nn.Module):
    def __init__(self, config: BlobConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv2d(3, config.channels, 3)
        self.norm = nn.BatchNorm2d(config.channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.conv(x_BCHW)).mean((2, 3))


class BlobModel(VisionModel):
    task = "classify"


def draw(network: nn.Module, config: BlobConfig, generator: torch.Generator) -> None:
    for parameter in network.parameters():
        parameter.uniform_(generator=generator)


FAMILY = Family(
    BlobConfig,
    Blob,
    key_tables={"state_dict": lambda _: [KeyTable([Rule("conv", "c"), Rule("norm", "n")], [r".*num_batches_tracked"])]},
    names=ArchitectureNames("blob", "Blob"),
    recognizes=lambda checkpoint: checkpoint.tensors.keys() >= {"c.weight", "n.running_mean"},
    task="classify",
    read_config=lambda checkpoint: BlobConfig(channels=checkpoint.tensors["c.weight"].shape[0]),
    initialize=draw,
)


@pytest.fixture
def blob(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, nn.Module]:
    """A file of a peer's weights in training mode's format, and the peer."""
    known = list(models.families())
    monkeypatch.setattr(models, "families", lambda: iter([*known, FAMILY]))
    monkeypatch.setattr("pentad.build.families", models.families)
    monkeypatch.setitem(loading.VISION_RUNNERS, "classify", f"{__name__}:BlobModel")
    monkeypatch.setattr(loading, "import_module", lambda _: SimpleNamespace(BlobModel=BlobModel))
    peer = Blob(BlobConfig(channels=6)).requires_grad_(False)
    peer(torch.randn(4, 3, 8, 8))  # changes the statistics
    names = {"conv": "c", "norm": "n"}
    state = {f"{names[k.partition('.')[0]]}.{k.partition('.')[2]}": v for k, v in peer.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "blob.pth")
    return tmp_path / "blob.pth", peer.eval()


def test_a_file_of_weights_alone_loads_with_its_statistics(blob: tuple[Path, nn.Module]) -> None:
    path, peer = blob
    model: Any = pentad.load(path)
    x = torch.randn(2, 3, 8, 8)
    assert isinstance(model, BlobModel)
    assert torch.equal(model.network(x), peer(x))
    assert {name for name, _ in model.network.named_buffers()} >= {"norm.running_mean", "norm.running_var"}
    learns = build(weights.open(path), trainable=True)
    learns(x).sum().backward()
    assert all(p.grad is not None for p in learns.parameters())
    assert learns.norm.num_batches_tracked == 1
    assert not torch.equal(learns.norm.running_mean, model.network.norm.running_mean)
    assert torch.equal(build(BlobConfig(), seed=3).conv.weight, build(BlobConfig(), seed=3).conv.weight)


@pytest.mark.parametrize("option", [{"context": 5}, {"quantize": "q8_0"}, {"fast": True}, {"cache_dtype": "int8"}])
def test_options_of_language_models_are_refused(blob: tuple[Path, nn.Module], option: dict[str, Any]) -> None:
    with pytest.raises(pentad.BadInput, match=f"{next(iter(option))} is for language models; .* pentad classify"):
        pentad.load(blob[0], **option)


def test_commands_for_language_models_name_the_right_one(blob: tuple[Path, nn.Module], tmp_path: Path) -> None:
    from pentad.cli.options import Loading

    for command in (
        lambda: Loading(str(blob[0])).load(),
        lambda: convert(blob[0], tmp_path / "out", to="hf", adapter=tmp_path),
    ):
        with pytest.raises(pentad.BadInput, match=r"blob.* a classifier of images: use pentad classify"):
            command()


def test_tensors_of_no_known_architecture(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(pentad.BadInput, match=r"no config\.json beside it, .*1 tensors \(x.* no known"):
        pentad.load(tmp_path / "x.safetensors")
