"""`pentad data annotate`."""

from pathlib import Path

import pytest

from pentad.datasets.object_folders import read_objects
from tests.helpers.annotation_world import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def test_a_simulated_annotator_and_training(pentad, world: Path, tmp_path: Path) -> None:
    arguments = ["data", "annotate", world / "scenes", "--model", world / "sam", "--out", tmp_path / "out"]
    arguments += ["--stage", "assisted", "--simulate", "--max-clicks", "1"]
    facts = pentad(*arguments, "--train", world / "recipe.toml", "--json").json
    assert (facts["stage"], facts["images"], facts["clicks_per_mask"]) == ("assisted", 4, 1)
    assert facts["masks"] == facts["clicked"] + facts["drawn"]
    assert len(read_objects(tmp_path / "out")) == 4
    automatic = ["--points-per-side", "1", "--min-iou", "-100", "--min-stability", "0", "--json"]
    done = pentad("data", "annotate", world / "scenes", "-m", facts["model"], "-o", tmp_path / "next", *automatic)
    assert done.json["proposed"] == done.json["masks"]
    again = pentad(*arguments)
    assert again.code == 0
    assert "clicks per mask" in again.out
    assert again.out.splitlines()[-1] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "assisted"], "--stage assisted needs an annotator: --view"),
        (["--stage", "assisted", "--simulate", "--view"], "two annotators"),
        (["--view"], "leave --view out"),
        (["--stage", "semi"], "--stage semi needs --detector NAME"),
        (["--stage", "automatic", "--simulate"], "has no annotator"),
        (["--stage", "automatic", "--detector", "x"], "--detector is for --stage semi"),
        (["--also", "x"], "--also is for --train"),
        (["--train", "gone.toml"], "gone.toml is not there"),
        (["--stage", "manual"], "--stage"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(pentad, world: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    command = "data", "annotate", world / "scenes", "--model", world / "sam", "--out", tmp_path / "out"
    done = pentad(*command, *arguments)
    assert done.code == 2
    assert message in done.error
    assert not (tmp_path / "out").exists()
