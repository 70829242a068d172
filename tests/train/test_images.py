"""Training on images: classes, masked patches, fine-tuning, probing, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import ViTForImageClassification, ViTMAEForPreTraining

import pentad
from pentad.train.image_data import ImageData, read_examples
from pentad.train.objectives.images import mixed, soft_cross_entropy
from pentad.train.optimizers import Optimizers
from pentad.train.recipe import Optimizer, Recipe, read_recipe
from pentad.train.run import open_run
from tests.helpers.training import log_of, train

COLORS = {"blue": (30, 40, 220), "green": (20, 200, 40), "red": (220, 30, 20)}
VIT = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
MAE = {
    **VIT,
    "model_type": "vit_mae",
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "norm_pix_loss": True,
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Noisy images of three colors, in a subfolder for each."""
    generator = torch.Generator().manual_seed(0)
    for name, color in COLORS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            noise = torch.randint(-20, 20, (20, 24, 3), generator=generator)
            pixels = (torch.tensor(color) + noise).clamp(0, 255).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path


def recipe_of(folder: Path, model: dict[str, Any] | Path, *overrides: str, objective: str = "classify") -> Recipe:
    if isinstance(model, dict):
        (folder / "config.json").write_text(json.dumps(model))
    named = f'config = "{folder}/config.json"' if isinstance(model, dict) else f'base = "{model}"'
    file = folder / "recipe.toml"
    file.write_text(
        f'objective = "{objective}"\n[model]\n{named}\n[data]\ntrain = "{folder}/data"\n'
        f'[run]\nout = "{folder}/run"\nsteps = 6\nbatch_size = 8\nmicro_batch_images = 5\ncheckpoint_every = 2\n'
        "[optimizer]\nlr = 3e-3\n"
    )
    return read_recipe(file, overrides)


def test_a_vit_learns_colors_and_loads_everywhere(folder: Path) -> None:
    validation = f"data.validation={folder}/data"
    final, records = train(recipe_of(folder, VIT, "run.steps=20", validation, "images.flip=true", "images.crop=0.5"))
    assert records[-1].loss < 0.5 * records[0].loss
    measured = [json.loads(line) for line in (folder / "run" / "validation.jsonl").read_text().splitlines()]
    assert measured[-1]["accuracy"] == pytest.approx(1.0)
    model: Any = pentad.load(final)
    image = folder / "data" / "red" / "0.png"
    assert (model.classify(image)[0].label, model.labels) == ("red", ["blue", "green", "red"])
    peer = ViTForImageClassification.from_pretrained(final)
    with torch.no_grad():
        theirs = peer(model.preprocess(image)[None]).logits
    assert torch.allclose(model.logits([image]), theirs, atol=1e-5)
    assert peer.config.id2label == dict(enumerate(COLORS))


SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "vit": (VIT, ("images.drop_path=0.2", "images.mixup=0.8", "images.label_smoothing=0.1", "images.crop=0.3")),
    "resnet": (RESNET, ("images.size=32", "optimizer.name=sgd", "optimizer.adaptive_clip=0.02", "run.ema=0.9")),
    "mae": (MAE, ("images.crop=0.5", "optimizer.weight_decay=0.05")),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_in_the_same_bytes(folder: Path, name: str) -> None:
    model, overrides = SETTINGS[name]
    objective = "mae" if name == "mae" else "classify"
    whole, _ = train(recipe_of(folder, model, *overrides, f"run.out={folder}/whole", objective=objective))
    parts = recipe_of(folder, model, *overrides, objective=objective)
    train(parts, kill_after=5)
    resumed, records = train(parts, resume=True)
    assert [record.step for record in records] == [5, 6]
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    untimed = [
        [{k: v for k, v in r.items() if k not in ("seconds", "peak_bytes")} for r in log_of(f)]
        for f in (folder / "whole", folder / "run")
    ]
    assert untimed[0] == untimed[1]


def test_a_pretrained_encoder_is_fine_tuned_and_probed(folder: Path) -> None:
    pretrained, _ = train(recipe_of(folder, MAE, objective="mae"))
    peer = ViTMAEForPreTraining.from_pretrained(pretrained)
    assert peer.config.norm_pix_loss
    encoder = load_file(pretrained / "model.safetensors")
    probe = recipe_of(folder, pretrained, "images.probe=true", f"run.out={folder}/probe", "images.global_pool=avg")
    final, records = train(probe)
    probed = load_file(final / "model.safetensors")
    kept = [name for name in probed if name in encoder]
    assert len(kept) > 30
    assert all(torch.equal(probed[name], encoder[name]) for name in kept)
    assert records[-1].loss < records[0].loss
    tuned, _ = train(recipe_of(folder, pretrained, f"run.out={folder}/tuned", "optimizer.layer_decay=0.5"))
    changed = load_file(tuned / "model.safetensors")
    assert not torch.equal(changed["vit.embeddings.cls_token"], encoder["vit.embeddings.cls_token"])
    again, _ = train(recipe_of(folder, tuned, f"run.out={folder}/again", "optimizer.lr=1e-9"))
    assert torch.allclose(load_file(again / "model.safetensors")["classifier.weight"], changed["classifier.weight"])


def test_learning_rates_fall_from_the_head_to_the_embeddings() -> None:
    network = nn.ModuleDict(
        {"patch_embed": nn.Linear(2, 2), "layers": nn.ModuleList([nn.Linear(2, 2)] * 2), "norm": nn.LayerNorm(2)}
    )
    network.layers = network["layers"]
    network["head"] = nn.Linear(2, 2)
    optimizers = Optimizers(network, Optimizer(lr=1.0, layer_decay=0.5))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizers.step(1.0)
    moved = {name: float((before[name] - p.detach()).abs().max()) for name, p in network.named_parameters()}
    assert moved["head.weight"] == pytest.approx(1.0, rel=1e-3)
    assert moved["norm.bias"] == pytest.approx(1.0, rel=1e-3)
    assert moved["layers.0.weight"] == pytest.approx(0.25, rel=1e-3)
    assert moved["patch_embed.weight"] == pytest.approx(0.125, rel=1e-3)


def test_mixup_mixes_images_and_labels_alike() -> None:
    torch.manual_seed(0)
    x, targets = torch.randn(4, 3, 2, 2), torch.eye(4)
    images, labels = mixed(x, targets, 0.8)
    share = labels[0, 0]
    assert torch.allclose(images, share * x + (1 - share) * x.flip(0))
    logits = torch.randn(4, 4)
    both = share * nn.functional.cross_entropy(logits, torch.arange(4), reduction="sum")
    both += (1 - share) * nn.functional.cross_entropy(logits, torch.arange(4).flip(0), reduction="sum")
    assert torch.allclose(soft_cross_entropy(logits, labels), both)


def test_the_examples_of_a_folder(folder: Path) -> None:
    examples = read_examples(folder / "data", labeled=True)
    assert (examples.names, len(examples.examples)) == (list(COLORS), 24)
    some = examples.fraction(0.25)
    assert [example.label for example in some.examples] == [0, 0, 1, 1, 2, 2]
    assert examples.files != some.files
    assert len(read_examples(folder / "data" / "red", labeled=False).examples) == 8


def test_objects_of_a_coco_folder_are_examples(tmp_path: Path) -> None:
    from pentad.datasets.scene_folders import write_scenes
    from pentad.datasets.scenes import Scenes

    write_scenes(Scenes(3, seed=1), tmp_path / "scenes")
    examples = read_examples(tmp_path / "scenes", labeled=True)
    assert len(examples.names) == 10
    data = ImageData(examples, 4, 3, 0, 16, pentad_preprocessing())
    batches = data.step(2)
    assert [tuple(batch.images_B3HW.shape) for batch in batches] == [(3, 3, 16, 16), (1, 3, 16, 16)]
    assert torch.equal(data.step(2)[0].images_B3HW, batches[0].images_B3HW)


def pentad_preprocessing() -> Any:
    from pentad.models.vision.config import Preprocessing

    return Preprocessing(size=(16, 16))


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        (VIT, "data.train=gone", "gone is not a folder of images"),
        (VIT, "data.train={data}/red", "8 images are in no subfolder"),
        (RESNET, "images.probe=true", "for networks without batch normalization"),
        (RESNET, "images.drop_path=0.1", "images.drop_path is for ViT and NFNet; this is resnet"),
        (RESNET, "images.global_pool=avg", "images.global_pool is for ViT"),
        (VIT, "images.size=20", "images.size is 20; expected a multiple of the patches' 8"),
        (VIT, "objective=mae", r"vit is a classifier of images.*expected a masked autoencoder"),
        ({**VIT, "model_type": "llama"}, "images.flip=true", "llama is a language model"),
    ],
)
def test_recipes_that_are_wrong(folder: Path, model: dict[str, Any], override: str, message: str) -> None:
    with pytest.raises(pentad.BadInput, match=message):
        open_run(recipe_of(folder, model, override.replace("{data}", f"{folder}/data")))


def test_a_plan_counts_and_measures(folder: Path) -> None:
    plan = open_run(recipe_of(folder, VIT)).plan()
    assert (plan["images"], plan["classes"], plan["epochs"]) == (24, 3, 2.0)
    assert plan["seconds"] > 0
