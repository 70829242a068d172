"""Training CLIP: the loss is transformers', equal texts aren't negatives, runs resume exactly, and it learns."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

import pentad
from pentad.datasets.scene_folders import write_scenes
from pentad.datasets.scenes import Scenes
from pentad.errors import BadInput
from pentad.text.clip_bpe import learn
from pentad.train.objectives.contrastive import contrastive_loss
from pentad.train.recipe import Recipe, read_recipe
from pentad.train.run import open_run
from tests.helpers.clip_files import write_clip
from tests.helpers.training import log_of, train

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CLIP = {
    "model_type": "clip",
    "projection_dim": 16,
    "text_config": {**ENCODER, "vocab_size": 700, "max_position_embeddings": 24},
    "vision_config": {**ENCODER, "image_size": 16, "patch_size": 8},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(Scenes(6, size=48, objects=(1, 2)), folder)
    return folder


def recipe(tmp_path: Path, scenes: Path, *overrides: str) -> Recipe:
    (tmp_path / "clip.json").write_text(json.dumps(CLIP))
    (tmp_path / "recipe.toml").write_text(
        f'objective = "clip"\n[model]\nconfig = "{tmp_path}/clip.json"\n[data]\ntrain = "{scenes}"\n'
        f'[run]\nout = "{tmp_path}/run"\nsteps = 4\nbatch_size = 6\ncheckpoint_every = 2\n[optimizer]\nlr = 2e-3\n'
    )
    return read_recipe(tmp_path / "recipe.toml", overrides)


def test_the_loss_is_transformers_where_texts_differ() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)) * 4
    expected = image_text_contrastive_loss(logits.T)  # of texts and images
    assert float(contrastive_loss(logits, torch.eye(5, dtype=torch.bool)) / 5) == pytest.approx(float(expected))


def test_equal_texts_are_positives_of_each_other() -> None:
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    logits = torch.where(same, 20.0, -20.0).requires_grad_()
    loss = contrastive_loss(logits, same)
    assert float(loss.detach() / 3) == pytest.approx(
        2 / 3 * math.log(2), abs=1e-5
    )  # of two equal texts neither is preferred
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-5


def test_a_killed_run_ends_in_the_same_bytes_and_a_clip(tmp_path: Path, scenes: Path) -> None:
    options = (f"data.validation={scenes}",)
    whole, records = train(recipe(tmp_path, scenes, *options, f"run.out={tmp_path / 'whole'}"))
    assert 0 <= records[-1].metrics["accuracy"] <= 1
    given = recipe(tmp_path, scenes, *options)
    train(given, kill_after=3)
    resumed, _ = train(given, resume=True)
    for file in whole.iterdir():
        assert (resumed / file.name).read_bytes() == file.read_bytes(), file.name
    assert [r["loss"] for r in log_of(resumed.parent)] == [r["loss"] for r in log_of(whole.parent)]
    model: Any = pentad.load(whole)
    image = next(scenes.glob("images/*"))
    peer: Any = CLIPModel.from_pretrained(whole).eval()
    words = CLIPTokenizer.from_pretrained(whole)(["a 7", "a photo of a 3."], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(peer.get_text_features(**words).pooler_output)
    assert torch.allclose(model.embed_text(["a 7", "a photo of a 3."]), expected, atol=1e-5)
    assert {one.label for one in model.classify(image, ["3", "7"], template="{}")} == {"3", "7"}


def test_captions_of_whole_images(tmp_path: Path, scenes: Path) -> None:
    run = open_run(recipe(tmp_path, scenes, "clip.texts=captions"))
    rows = [json.loads(line) for line in (scenes / "captions.jsonl").read_text().splitlines()]
    captions = {row["image"]: row["caption"] for row in rows}
    [batch] = run.data.step(0)
    files = [Path(file).relative_to(scenes).as_posix() for file in run.data.rows(batch)]
    assert list(batch.texts) == [captions[file] for file in files]
    assert batch.images_B3HW.shape == (6, 3, 16, 16)
    ids = batch.ids_N[: batch.layout.layout.lengths[0]].tolist()
    assert run.tokenizer.decode(ids[1:-1]).strip() == batch.texts[0].lower()  # type: ignore[attr-defined]


def test_the_scale_is_limited(tmp_path: Path, scenes: Path) -> None:
    run = open_run(recipe(tmp_path, scenes))
    loop = run.loop()
    network: Any = loop.network
    with torch.no_grad():
        network.logit_scale.weight.fill_(9.0)
    loop.step(0)
    assert network.logit_scale.weight < 4.7
    run.export(network, tmp_path / "final")
    [scale] = [e.read() for name, e in pentad.weights.open(tmp_path / "final").tensors.items() if "scale" in name]
    assert float(scale) <= math.log(100) + 1e-6


def test_fine_tuning_keeps_the_tokenizer(tmp_path: Path, scenes: Path) -> None:
    write_clip(tmp_path / "base")
    given = recipe(tmp_path, scenes, "run.steps=1")
    base = given.model.model_copy(update={"base": str(tmp_path / "base"), "config": None})
    final, _ = train(given.model_copy(update={"model": base}))
    assert (final / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    assert pentad.load(final).embed_text(["a red cat"]).shape == (1, 24)  # type: ignore[union-attr]


def test_a_learned_vocabulary_merges_the_most_frequent_pairs(tmp_path: Path) -> None:
    files = learn(["low low low lower", "a new low"], 600)
    assert files == learn(["low low low lower", "a new low"], 600)
    merges = files["merges.txt"].decode().splitlines()
    assert merges[1:3] == ["l o", "lo w</w>"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    ids = json.loads(files["vocab.json"])
    assert [*ids.values()] == [*range(len(ids))]
    assert CLIPTokenizer.from_pretrained(tmp_path)("Low").input_ids == [
        ids["<|startoftext|>"],
        ids["low</w>"],
        ids["<|endoftext|>"],
    ]
    assert len(json.loads(learn(["low low low lower"], 515)["vocab.json"])) == 515


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["clip.templates=['a dog']"], r"expected \{\} in it"),
        (["clip.texts=captions", "data.train=nowhere"], "captions.jsonl is not there"),
        (["clip.texts=words"], "clip.texts is 'words'"),
        (["optimizer.layer_decay=0.5"], "layer_decay"),
        (["objective=segment"], "clip"),
    ],
)
def test_what_is_refused(tmp_path: Path, scenes: Path, overrides: list[str], facts: str) -> None:
    with pytest.raises(BadInput, match=facts):
        open_run(recipe(tmp_path, scenes, *overrides))


def test_captions_that_are_malformed(tmp_path: Path, scenes: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    image = next(scenes.glob("images/*"))
    (folder / image.name).write_bytes(image.read_bytes())
    rows = [{"image": image.name, "caption": "a 7"}, {"image": image.name}, {"image": "gone.png", "caption": "a 7"}]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=r"captions.jsonl:2: .* is no object with image and caption"):
        open_run(recipe(tmp_path, folder, "clip.texts=captions"))
    run = open_run(recipe(tmp_path, folder, "clip.texts=captions", "data.skip_bad=true"))
    assert len(run.skipped) == 2
