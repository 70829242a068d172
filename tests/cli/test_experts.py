"""`pentad show MODEL --experts TEXT`."""

import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import talking_checkpoint

TEXT = "abc aaa\nbcé " * 30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return talking_checkpoint(tmp_path / "model", family="mixtral", num_local_experts=4).folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_json_output(pentad, model: Path, text: Path) -> None:
    facts = pentad("show", model, "--experts", text, "--json").json
    assert facts["tokens"] == len(TEXT.encode())
    assert [layer["layer"] for layer in facts["layers"]] == [0, 1]
    for layer in facts["layers"]:
        assert sum(layer["load"]) == pytest.approx(1)
        assert 0 < layer["evenness"] <= 1
        assert layer["drop_rate"] == 0
    first = facts["frequent"][0]
    assert (first["token_id"], first["token"], first["times"]) == (97, "'a'", 120)
    assert sum(first["taken"]["1"]) == 2 * 120
    assert facts["picture"] is None
    assert {"'\\\\xc3'", "'\\n'", "' '"} <= {token["token"] for token in facts["frequent"]}


def test_table_output(pentad, model: Path) -> None:
    done = pentad("show", model, "--experts", "-", stdin=TEXT.encode())
    lines = done.out.splitlines()
    assert lines[0].split() == ["layer", "evenness", "busiest", "idlest", "router", "entropy", "dropped"]
    assert lines[1].split()[0] == "0"
    assert lines[4].startswith(f"{len(TEXT.encode())} tokens, 4 experts a layer.")
    assert lines[6].split() == ["token", "times", "layer", "0", "layer", "1"]
    assert lines[7].split()[:2] == ["'a'", "120"]


def test_the_text_is_split_into_sequences_of_context_tokens(pentad, model: Path, text: Path) -> None:
    short, long, default = (
        pentad("show", model, "--experts", text, *options, "--json").json["layers"]
        for options in (["--context", 20], ["--context", 256], [])
    )
    assert short != long == default


def test_the_picture_is_written(pentad, model: Path, text: Path, tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "use.png"
    done = pentad("show", model, "--experts", text, "--out", out)
    assert done.code == 0
    assert done.out.endswith(f"\n{out}\n")
    with Image.open(out) as image:
        assert image.width == 1720
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 24)}
    assert {(255, 255, 255), (0, 0, 0)} <= colors
    assert any(blue > red + 60 for red, _, blue in colors)
    before = out.read_bytes()
    assert pentad("show", model, "--experts", text, "--out", out, "--json").json["picture"] == str(out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(("layers", "experts", "tokens"), [(1, 1, 1), (40, 256, 3), (3, 9, 24)])
def test_pictures_of_all_sizes(layers: int, experts: int, tokens: int, tmp_path: Path) -> None:
    import torch
    from PIL import Image

    from pentad.cli.experts import shown_layers
    from pentad.cli.heatmaps import draw
    from pentad.generate.expert_use import ExpertUse
    from pentad.nn.moe.statistics import Usage

    counts = torch.arange(experts)
    use = ExpertUse(
        9,
        {layer: Usage(9, counts, counts, 1.0) for layer in range(layers)},
        [(token, 9) for token in range(tokens)],
        {layer: torch.ones(tokens, experts, dtype=torch.int64) for layer in range(layers)},
    )
    draw(use, ["a $very long_ $token's name"] * tokens, shown_layers(use), tmp_path / "a.png", title="x" * 200)
    with Image.open(tmp_path / "a.png") as image:
        assert image.width == 1720
        assert image.height < 3000


def test_invalid_arguments_are_refused(
    pentad, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = talking_checkpoint(tmp_path / "dense").folder
    (tmp_path / "empty.txt").write_text("")
    for arguments, message in (
        ((dense, "--experts", text), f"{dense} is a dense model"),
        ((model, "--experts", tmp_path / "empty.txt"), "the text is empty"),
        ((model, "--experts", tmp_path / "none.txt"), "none.txt: no such file"),
        ((model, "--out", "a.png"), "--out needs --experts"),
        ((model, "--experts", text, "--out", tmp_path / "a.jpg"), "ends in .png"),
        ((model, "--experts", text, "--out", tmp_path / "none/a.png"), f"{tmp_path / 'none'} doesn't exist"),
    ):
        done = pentad("show", *arguments)
        assert done.code == 2
        assert message in done.error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = pentad("show", model, "--experts", text, "--out", tmp_path / "a.png")
    assert done.code == 2
    assert "pip install 'pentad[plot]'" in done.error
    assert not (tmp_path / "a.png").exists()


def test_an_output_path_that_is_a_folder_is_refused(pentad, model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    done = pentad("show", model, "--experts", text, "--out", tmp_path / "a.png")
    assert done.code == 1
    assert f"{tmp_path / 'a.png'}: is a directory" in done.error
