"""Training detectors: recipes on data sets of labeled objects, exact resume, what is refused, and what is learned."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch
from PIL import Image

import pentad
from pentad.datasets.object_folders import write_objects
from pentad.datasets.scenes import Scenes
from pentad.errors import BadInput
from pentad.nn.boxes import mask_boxes
from pentad.train.recipe import Recipe, read_recipe
from pentad.train.run import open_run
from pentad.weights.darknet_cfg import parse
from pentad.weights.darknet_edit import adapted
from tests.helpers import darknet_files
from tests.helpers.training import log_of, train

MODEL = {"model_type": "yolox", "depth": 0.3333, "width": 0.125, "depthwise": True, "test_size": [64, 64]}

MASK_RCNN = {
    "model_type": "mask_rcnn",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "frozen": False,
    "pyramid_size": 8,
    "head_size": 16,
    "min_size": 48,
    "max_size": 96,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_objects(Scenes(10, size=64, objects=(1, 2)), folder)
    return folder


def recipe(
    tmp_path: Path, scenes: Path, *overrides: str, base: Path | None = None, model: dict[str, object] = MODEL
) -> Recipe:
    (tmp_path / "config.json").write_text(json.dumps(model))
    file = tmp_path / "recipe.toml"
    model = f'config = "{tmp_path}/config.json"' if base is None else f'base = "{base}"'
    file.write_text(
        f'objective = "detect"\n[model]\n{model}\n[data]\ntrain = "{scenes}"\n'
        f'[run]\nout = "{tmp_path}/run"\nsteps = 6\nbatch_size = 4\ncheckpoint_every = 2\nema = 0.5\n'
        "[optimizer]\nlr = 1e-2\n"
    )
    return read_recipe(file, overrides)


def test_a_run_ends_in_a_detector_of_the_datas_classes(tmp_path: Path, scenes: Path) -> None:
    final, records = train(recipe(tmp_path, scenes, f"data.validation={scenes}"))
    assert [record.tokens for record in records] == [4] * 6
    assert {"box_loss", "object_loss", "class_loss"} <= records[0].metrics.keys()
    detector = pentad.load(final)
    assert list(detector.labels) == list(Scenes(1).names)
    [found] = detector.detect(next(scenes.glob("images/*")), threshold=0.0)
    assert found.width == 64
    measured = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [one["step"] for one in measured] == [0, 6]


def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, scenes: Path) -> None:
    whole, _ = train(recipe(tmp_path, scenes, f"run.out={tmp_path / 'whole'}", "run.micro_batch_images=3"))
    given = recipe(tmp_path, scenes, "run.micro_batch_images=3")
    train(given, kill_after=4)
    resumed, _ = train(given, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [r["loss"] for r in log_of(resumed.parent)] == [r["loss"] for r in log_of(whole.parent)]


def test_mask_rcnn_learns_boxes_and_masks(tmp_path: Path, scenes: Path) -> None:
    options = "optimizer.lr=2e-3", "run.ema=0.0", "objects.proposals=32", "run.micro_batch_images=3"
    whole, records = train(recipe(tmp_path, scenes, *options, f"run.out={tmp_path / 'whole'}", model=MASK_RCNN))
    assert {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"} == {
        *records[0].metrics
    }
    detector = pentad.load(whole)
    assert list(detector.labels)[1:] == list(Scenes(1).names)
    [found] = detector.detect(next(scenes.glob("images/*")), threshold=0.0)
    assert found.detections[0].mask is not None
    given = recipe(tmp_path, scenes, *options, model=MASK_RCNN)
    train(given, kill_after=4)
    resumed, _ = train(given, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_mask_rcnn_starts_from_a_resnet(tmp_path: Path, scenes: Path) -> None:
    sizes = {name: MASK_RCNN[name] for name in ("embedding_size", "hidden_sizes", "depths", "layer_type")}
    for name, fields in {"resnet": sizes, "deeper": {**sizes, "depths": [1, 1, 1, 2]}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"model_type": "resnet", **fields}))
        (tmp_path / f"{name}.toml").write_text(
            f'objective = "classify"\n[model]\nconfig = "{tmp_path}/{name}.json"\n[data]\ntrain = "{scenes}"\n'
            f'[run]\nout = "{tmp_path}/{name}"\nsteps = 1\nbatch_size = 2\n'
            "[images]\nsize = 32\n[optimizer]\nlr = 1e-3\n"
        )
        train(read_recipe(tmp_path / f"{name}.toml", ()))
    given = recipe(tmp_path, scenes, f"model.backbone={tmp_path / 'resnet/final'}", model=MASK_RCNN)
    network, _ = open_run(given).network_and_objective(measures=True)
    old = pentad.load(tmp_path / "resnet/final").network.state_dict()
    body = network.backbone.body.state_dict()
    same = [name for name in body if not name.endswith("num_batches_tracked")]
    assert len(same) > 30
    assert all(torch.equal(body[name], old[name]) for name in same)
    deeper = recipe(tmp_path, scenes, f"model.backbone={tmp_path / 'deeper/final'}", model=MASK_RCNN)
    with pytest.raises(BadInput, match=r"depths is \(1, 1, 1, 2\); expected \(1, 1, 1, 1\)"):
        open_run(deeper).network_and_objective(measures=True)
    with pytest.raises(BadInput, match="leave it out"):
        open_run(recipe(tmp_path, scenes, f"model.backbone={tmp_path / 'resnet/final'}"))


def test_images_of_several_sizes_are_padded(tmp_path: Path, scenes: Path) -> None:
    folder = tmp_path / "data"
    write_objects(Scenes(4, size=64, objects=(1, 2)), folder)
    content = json.loads((folder / "annotations.json").read_text())
    first = content["images"][0]
    wide = next(folder.rglob(first["file_name"]))
    Image.open(wide).resize((160, 64)).save(wide)
    first["width"] = 160
    for one in content["annotations"]:
        if one["image_id"] == first["id"]:
            one["segmentation"] = [[10, 10, 150, 10, 150, 50, 10, 50]]
            one["bbox"] = [10, 10, 140, 40]
    (folder / "annotations.json").write_text(json.dumps(content))
    run = open_run(recipe(tmp_path, folder, "objects.mosaic=0", "objects.color=false", model=MASK_RCNN))
    [batch] = run.data.step(0)
    assert batch.images_BCHW.shape == (4, 3, 64, 96)
    assert sorted(batch.sizes) == [(38, 96), *[(48, 48)] * 3]
    for size, boxes, masks in zip(batch.sizes, batch.boxes, batch.masks, strict=True):
        assert masks.shape[1:] == size
        assert (mask_boxes(masks) - boxes).abs().max() <= 1


def test_weights_of_other_classes_are_continued_but_for_the_classes(tmp_path: Path, scenes: Path) -> None:
    first, _ = train(recipe(tmp_path, scenes, "run.steps=1"))
    renamed = json.loads((scenes / "annotations.json").read_text())
    renamed["categories"] = renamed["categories"][:4]
    renamed["annotations"] = [one for one in renamed["annotations"] if one["category_id"] <= 4]
    (tmp_path / "images").symlink_to(scenes / "images")
    (tmp_path / "annotations.json").write_text(json.dumps(renamed))
    overrides = f"data.train={tmp_path / 'annotations.json'}", f"run.out={tmp_path / 'next'}", "run.steps=1"
    run = open_run(recipe(tmp_path, scenes, *overrides, base=first))
    network, _ = run.network_and_objective(measures=False)
    old = pentad.load(first).network.state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, old[name]) == ("cls_preds" not in name), name
    assert network.head.cls_preds[0].weight.shape[0] == 4


def test_one_image_is_learned(tmp_path: Path, scenes: Path) -> None:
    options = "images.fraction=0.1", "objects.mosaic=0.0", "objects.color=false", "run.steps=25", "run.ema=0"
    final, records = train(recipe(tmp_path, scenes, *options, "run.batch_size=2", "optimizer.warmup=0.05"))
    assert records[-1].loss < 0.6 * records[0].loss
    assert final.is_dir()


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["images.size=60"], "60"),
        (["data.train=nowhere"], "nowhere"),
        (["lora.rank=4"], "lora"),
        (["objects.mosaics=1"], "objects.mosaic"),
    ],
)
def test_what_is_refused(tmp_path: Path, scenes: Path, overrides: list[str], facts: str) -> None:
    with pytest.raises(BadInput, match=facts):
        open_run(recipe(tmp_path, scenes, *overrides))


def test_a_data_set_without_objects_is_refused(tmp_path: Path, scenes: Path) -> None:
    content = json.loads((scenes / "annotations.json").read_text())
    (tmp_path / "annotations.json").write_text(json.dumps({**content, "annotations": []}))
    (tmp_path / "images").symlink_to(scenes / "images")
    with pytest.raises(BadInput, match="no objects"):
        open_run(recipe(tmp_path, scenes, f"data.train={tmp_path / 'annotations.json'}"))


@pytest.mark.parametrize("version", [darknet_files.v2, darknet_files.v3])
def test_darknet_networks_learn_the_datas_classes(tmp_path: Path, scenes: Path, version: Callable[[], str]) -> None:
    base = darknet_files.write(tmp_path, version())
    whole, records = train(recipe(tmp_path, scenes, f"run.out={tmp_path / 'whole'}", "images.size=64", base=base))
    assert all(math.isfinite(record.loss) for record in records)
    detector = pentad.load(whole)
    assert list(detector.labels) == list(Scenes(1).names)
    assert detector.network.cfg.shape == (3, 64, 64)
    given = recipe(tmp_path, scenes, "images.size=64", base=base)
    train(given, kill_after=4)
    resumed, _ = train(given, resume=True)
    assert (resumed / "model.weights").read_bytes() == (whole / "model.weights").read_bytes()
    peer = cv2.dnn.readNetFromDarknet(str(whole / "model.cfg"), str(whole / "model.weights"))
    assert peer.getUnconnectedOutLayersNames()


def test_darknet_weights_are_continued_but_for_the_classes(tmp_path: Path, scenes: Path) -> None:
    base = darknet_files.write(tmp_path, darknet_files.v3())
    network, _ = open_run(recipe(tmp_path, scenes, base=base)).network_and_objective(measures=False)
    old, new = pentad.load(base).network.state_dict(), network.state_dict()
    same = [name for name, tensor in new.items() if tensor.shape == old[name].shape]
    assert 0 < len(new) - len(same) <= 2 * 2  # weight and bias of the convolutions before the detection layers
    assert all(torch.equal(new[name], old[name]) for name in same)


def test_a_cfg_for_other_classes() -> None:
    text = darknet_files.v3()
    network = parse(adapted(text, 7, 96))
    assert network.shape[1:] == (96, 96)
    heads = [layer for layer in network.layers if layer.kind == "yolo"]
    assert heads
    assert all(layer.texts["classes"] == "7" for layer in heads)
    with pytest.raises(BadInput, match="yolo"):
        adapted(darknet_files.v1(), 7)
