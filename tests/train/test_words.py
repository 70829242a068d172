"""Training Segment Anything with words: CLIP's embeddings of pictures of the objects come first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pentad
from pentad.datasets.object_batches import ObjectBatch
from pentad.errors import BadInput
from pentad.models.vision.config import Preprocessing
from pentad.train.objectives.segment import SegmentObjective
from pentad.train.objectives.words import Words
from pentad.train.recipe import Recipe
from pentad.train.run import open_run
from pentad.vision.segmenter import MEAN, STD
from tests.helpers.clip_files import write_clip
from tests.helpers.training import log_of, train
from tests.train.test_segment import SAM, blocks, recipe, scenes  # noqa: F401
from tests.vision.test_segmenter import photo


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_clip(folder)
    return folder


def words_recipe(tmp_path: Path, scenes: Path, clip: Path, *overrides: str, **models: object) -> Recipe:  # noqa: F811
    return recipe(tmp_path, scenes, f"segment.clip={clip}", "segment.clicks=1", *overrides, **models)


class Seen:
    """Stands for a CLIP; remembers the pictures."""

    def __init__(self) -> None:
        self.config = type("Config", (), {"vision_config": type("Vision", (), {"image_size": 16})})

    def embed_images(self, images: Tensor, masks: Tensor) -> Tensor:
        self.images, self.masks = images, masks
        return images.flatten(1) + 0.5


def test_pictures_are_squares_of_the_objects_half_of_them_alone() -> None:
    truth = blocks((8, 8, 16, 16), (20, 4, 28, 12))
    boxes = torch.tensor([[8.0, 8, 16, 16], [20, 4, 28, 12]])
    pixels = torch.full((1, 3, 32, 32), 100.0)
    pixels[0][:, truth.any(0)] = 200.0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    batch = ObjectBatch((pixels - mean) / std, (boxes,), (torch.zeros(2),), sizes=((32, 32),))
    seen: Any = Seen()
    words = Words(seen, Preprocessing(size=16, mean=(0.5,) * 3, std=(0.5,) * 3), 1.0, 0)
    alone, shares = set(), list[float]()
    for seed in range(8):
        torch.manual_seed(seed)
        found = words.embed(batch, torch.zeros(2, dtype=torch.int64), boxes, truth)
        assert torch.allclose(found.norm(dim=1), torch.ones(2))
        for image, mask in zip(seen.images, seen.masks, strict=True):
            shares.append(float(mask.float().mean()))
            assert torch.allclose(image[:, 7:9, 7:9], torch.tensor(200 / 127.5 - 1), atol=0.01)
            if not mask.all():
                outer = image[:, ~mask]
                alone.add(bool((outer == -1).all()))
                assert outer.max() == -1 or outer.min() > -0.3
    assert min(shares) < 0.4 < 0.6 < max(shares)  # factors from 1 to 2
    assert alone == {True, False}


def test_large_objects_begin_with_words() -> None:
    truth = blocks((0, 0, 10, 10), (0, 0, 20, 20), (5, 5, 30, 31))
    clip: Any = Seen()
    assert Words(clip, Preprocessing(size=16), 1.0, 101).choose(truth).tolist() == [False, True, True]
    torch.manual_seed(0)
    drawn = torch.stack([Words(clip, Preprocessing(size=16), 0.5, 0).choose(truth) for _ in range(40)])
    assert 0.3 < drawn.float().mean() < 0.7


def test_a_killed_run_ends_in_the_same_bytes_and_takes_words(tmp_path: Path, scenes: Path, clip: Path) -> None:  # noqa: F811
    options = ["segment.words_area=20", "run.steps=3", "run.batch_size=2", "run.micro_batch_images=1"]
    whole, records = train(words_recipe(tmp_path, scenes, clip, *options, f"run.out={tmp_path / 'whole'}"))
    assert any(0 < record.metrics.get("words_iou", 0) < 1 for record in records)
    given = words_recipe(tmp_path, scenes, clip, *options)
    train(given, kill_after=2)
    resumed, _ = train(given, resume=True)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [r["loss"] for r in log_of(resumed.parent)] == [r["loss"] for r in log_of(whole.parent)]
    sam: Any = pentad.load(whole)
    [mask] = sam.image(photo(40, 60)).masks(text="a red cat")
    assert mask.mask.shape == (40, 60)
    plain = recipe(tmp_path, scenes)
    base = plain.model.model_copy(update={"base": str(whole), "config": None})
    again = open_run(plain.model_copy(update={"model": base}))
    network, objective = again.network_and_objective(measures=True)  # keeps its CLIP
    assert isinstance(objective, SegmentObjective)
    assert objective.words is not None
    assert torch.equal(network.prompt_encoder.text_projection.weight, sam.sam.prompt_encoder.text_projection.weight)  # type: ignore[union-attr]


def test_words_are_learned_and_clip_is_not(tmp_path: Path, scenes: Path, clip: Path) -> None:  # noqa: F811
    run = open_run(
        words_recipe(tmp_path, scenes, clip, "segment.words=1.0", "segment.words_area=0", "run.batch_size=2")
    )
    loop = run.loop()
    network: Any = loop.network
    assert not any("clip" in name for name, _ in network.named_parameters())
    before = network.prompt_encoder.text_projection.weight.clone()
    loop.step(1)
    assert not torch.equal(before, network.prompt_encoder.text_projection.weight)
    batch = run.data.step(0)[0]
    objects = sum(map(len, batch.boxes))
    assert loop.objective.totals(network, batch) == [objects, objects]


@pytest.mark.parametrize(
    ("clip_of", "facts"),
    [
        (lambda clip, path: "nowhere", "nowhere"),
        (lambda clip, path: path / "sam.json", "segment"),
        (lambda clip, path: path / "plain", "no tokenizer"),
    ],
)
def test_what_is_refused(tmp_path: Path, scenes: Path, clip: Path, clip_of: Any, facts: str) -> None:  # noqa: F811
    (tmp_path / "plain").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "plain" / name).write_bytes((clip / name).read_bytes())
    (tmp_path / "sam.json").write_text(json.dumps(SAM))
    with pytest.raises(BadInput, match=facts):
        open_run(words_recipe(tmp_path, scenes, clip_of(clip, tmp_path)))
