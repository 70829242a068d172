"""Training Segment Anything: its prompts and losses, exact resume, and a masked autoencoder to start from."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers.loss.loss_for_object_detection import dice_loss, sigmoid_focal_loss

import pentad
from pentad.datasets.object_folders import write_objects
from pentad.datasets.scenes import Scenes
from pentad.errors import BadInput
from pentad.models.vision.sam.prompt_encoder import BACKGROUND, FOREGROUND, Prompts
from pentad.train.objectives.segment import SegmentObjective, first_prompts, mask_losses, next_prompts
from pentad.train.recipe import Recipe, read_recipe
from pentad.train.run import open_run
from tests.helpers.training import log_of, train

ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
SAM = {
    "model_type": "sam",
    "vision_config": {**ENCODER, "mlp_dim": 32, "window_size": 3, "global_attn_indexes": [1], "output_channels": 16},
    "mask_decoder_config": {"mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}
MAE = {
    "model_type": "vit_mae",
    **ENCODER,
    "image_size": 32,
    "intermediate_size": 32,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 1,
    "decoder_intermediate_size": 8,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_objects(Scenes(6, size=64, objects=(1, 2)), folder)
    return folder


def recipe(tmp_path: Path, scenes: Path, *overrides: str, **models: object) -> Recipe:
    (tmp_path / "sam.json").write_text(json.dumps(models.get("model", SAM)))
    (tmp_path / "recipe.toml").write_text(
        f'objective = "segment"\n[model]\nconfig = "{tmp_path}/sam.json"\n[data]\ntrain = "{scenes}"\n'
        f'[run]\nout = "{tmp_path}/run"\nsteps = 4\nbatch_size = 4\nmicro_batch_images = 3\ncheckpoint_every = 2\n'
        "[optimizer]\nlr = 2e-3\n[segment]\nclicks = 2\n"
    )
    return read_recipe(tmp_path / "recipe.toml", overrides)


def blocks(*corners: tuple[int, int, int, int], side: int = 32) -> torch.Tensor:
    masks = torch.zeros(len(corners), side, side, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def test_losses_are_those_of_detr_for_the_best_mask() -> None:
    truth = blocks((2, 3, 20, 12), (5, 5, 30, 31))
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    predicted = torch.rand(2, 3, generator=torch.Generator().manual_seed(2))
    found, ious = mask_losses(logits, predicted, truth)
    large = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False).flatten(2)
    expected = torch.zeros(3)
    for p in range(2):
        target = truth[p].flatten()[None].float()
        pairs = [
            (float(sigmoid_focal_loss(one[None], target, 1)), float(dice_loss(one[None], target, 1)))
            for one in large[p]
        ]
        focal, dice = min(pairs, key=lambda pair: 20 * pair[0] + pair[1])
        expected += torch.tensor([focal, dice, 0.0])
        for m in range(3):
            inside = large[p, m] > 0
            iou = (inside & truth[p].flatten()).sum() / (inside | truth[p].flatten()).sum()
            assert float(ious[p, m]) == pytest.approx(float(iou))
            expected[2] += (predicted[p, m] - iou) ** 2 / 3
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("predicted", "label", "area"),
    [
        (blocks((0, 0, 16, 32)), FOREGROUND, blocks((16, 0, 24, 32))),  # a part is missing
        (blocks((0, 0, 32, 32)), BACKGROUND, blocks((24, 0, 32, 32))),  # too much
        (blocks((0, 0, 24, 32)), FOREGROUND, blocks((0, 0, 24, 32))),  # all right
    ],
)
def test_clicks_are_where_the_mask_is_wrong(predicted: torch.Tensor, label: int, area: torch.Tensor) -> None:
    truth = blocks((0, 0, 24, 32))
    logits = torch.where(predicted, 5.0, -5.0)[:, None]
    first = Prompts(torch.tensor([[[3.0, 3.0]]]), torch.tensor([[FOREGROUND]]))
    for seed in range(5):
        torch.manual_seed(seed)
        found = next_prompts(first, logits, truth, click=True)
        assert found.labels_PK.tolist() == [[FOREGROUND, label]]
        x, y = found.points_PK2[0, 1].long().tolist()
        assert area[0, y, x]
        assert torch.equal(found.masks_P1MM, logits)
    alone = next_prompts(first, logits, truth, click=False)
    assert alone.points_PK2.shape == (1, 1, 2)


def test_first_prompts_are_points_or_boxes_of_the_objects() -> None:
    truth, boxes = blocks((4, 6, 20, 30), (10, 10, 12, 12)), torch.tensor([[4.0, 6, 20, 30], [10, 10, 12, 12]])
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        found = first_prompts(boxes, truth)
        kinds.add(found.boxes_P4 is None)
        if found.boxes_P4 is None:
            for mask, (x, y) in zip(truth, found.points_PK2[:, 0].long().tolist(), strict=True):
                assert mask[y, x]
        else:
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            assert 0 < ((found.boxes_P4 - boxes).abs() / sides).max() < 0.5
    assert kinds == {True, False}


def test_a_killed_run_ends_in_the_same_bytes_and_a_segmenter(tmp_path: Path, scenes: Path) -> None:
    whole, records = train(recipe(tmp_path, scenes, f"run.out={tmp_path / 'whole'}", f"data.validation={scenes}"))
    assert {"focal_loss", "dice_loss", "iou_loss", "first_iou", "last_iou"} == records[0].metrics.keys()
    given = recipe(tmp_path, scenes, f"data.validation={scenes}")
    train(given, kill_after=3)
    resumed, _ = train(given, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [r["loss"] for r in log_of(resumed.parent)] == [r["loss"] for r in log_of(whole.parent)]
    [mask] = pentad.load(whole).image(next(scenes.glob("images/*"))).masks(points=[(20, 30)])
    assert mask.mask.shape == (64, 64)


def test_an_image_is_learned(tmp_path: Path, scenes: Path) -> None:
    options = "images.fraction=0.1", "objects.color=false", "run.steps=20", "run.batch_size=2", "segment.clicks=0"
    _, records = train(recipe(tmp_path, scenes, *options, "optimizer.warmup=0.05", "optimizer.lr=1e-2"))
    assert records[-1].loss < 0.85 * records[0].loss


def test_every_object_counts_once_whatever_the_micro_batches(tmp_path: Path, scenes: Path) -> None:
    run = open_run(recipe(tmp_path, scenes, "segment.objects=1"))
    batches = run.data.step(0)
    objective = SegmentObjective(objects=1)
    network, _ = run.network_and_objective(measures=True)
    assert [objective.totals(network, batch) for batch in batches] == [[3], [1]]


def test_the_encoder_starts_from_a_masked_autoencoder(tmp_path: Path, scenes: Path) -> None:
    (tmp_path / "mae.json").write_text(json.dumps(MAE))
    (tmp_path / "mae.toml").write_text(
        f'objective = "mae"\n[model]\nconfig = "{tmp_path}/mae.json"\n[data]\ntrain = "{scenes}"\n'
        f'[run]\nout = "{tmp_path}/mae"\nsteps = 1\nbatch_size = 2\n[optimizer]\nlr = 1e-3\n'
    )
    pretrained, _ = train(read_recipe(tmp_path / "mae.toml", ()))
    run = open_run(recipe(tmp_path, scenes, f"model.backbone={pretrained}"))
    network, _ = run.network_and_objective(measures=True)
    mae = pentad.build.build(pentad.weights.open(pretrained)).state_dict()
    ours = network.image_encoder.state_dict()
    copied = [name for name in mae if name.startswith(("layers.", "patch_embed."))]
    assert len(copied) > 20
    assert all(torch.equal(ours[name], mae[name]) for name in copied)
    corners = mae["positions.weight"][0, 1:].view(4, 4, 16)[::3, ::3]
    assert torch.allclose(ours["pos_embed"][0, ::7, ::7], corners, atol=0.5)
    other = {**SAM, "vision_config": {**SAM["vision_config"], "num_hidden_layers": 1, "global_attn_indexes": [0]}}
    with pytest.raises(BadInput, match="num_hidden_layers is 2; expected 1"):
        open_run(recipe(tmp_path, scenes, f"model.backbone={pretrained}", model=other)).network_and_objective(
            measures=True
        )


def test_layer_decay_is_for_the_image_encoder(tmp_path: Path, scenes: Path) -> None:
    optimizers = open_run(recipe(tmp_path, scenes, "optimizer.layer_decay=0.5")).loop().optimizers
    optimizers.step(1.0)
    rates = {
        name: next(g["lr"] for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        for name, (optimizer, parameter) in optimizers.owners.items()
    }
    assert rates["image_encoder.patch_embed.weight"] == rates["image_encoder.pos_embed"] == 0.125
    assert rates["image_encoder.layers.0.attention.q_proj.weight"] == 0.25
    assert rates["image_encoder.layers.1.feedforward.up_proj.bias"] == 0.5
    assert rates["image_encoder.neck.0.weight"] == rates["mask_decoder.iou_token.weight"] == 1.0
    assert rates["prompt_encoder.no_mask_embed.weight"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["objective=detect"], "sam"),
        (["images.size=32"], "64"),
        (["model.backbone=nowhere"], "nowhere"),
        (["segment.clicks=-1"], "clicks"),
    ],
)
def test_what_is_refused(tmp_path: Path, scenes: Path, overrides: list[str], facts: str) -> None:
    with pytest.raises(BadInput, match=facts):
        open_run(recipe(tmp_path, scenes, *overrides))
