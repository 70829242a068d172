"""`pentad convert`."""

from pathlib import Path

import pytest

from tests.helpers.tiny import talking_checkpoint, tiny_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return talking_checkpoint(tmp_path / "source").folder


def test_what_was_written(pentad, source: Path, tmp_path: Path) -> None:
    done = pentad("convert", source, tmp_path / "there", "--to", "mistral", "--json")
    assert done.code == 0
    facts = done.json
    assert (facts["path"], facts["format"], facts["family"]) == (str(tmp_path / "there"), "mistral", "mistral")
    assert facts["nbytes"] == sum(Path(file).stat().st_size for file in facts["files"])
    assert {"params.json", "consolidated.safetensors"} <= {Path(file).name for file in facts["files"]}
    assert facts["notes"] == []
    line = pentad("convert", tmp_path / "there", tmp_path / "back", "--to", "hf", "--dtype", "float16").out
    assert line.startswith(f"{tmp_path / 'back'}: mistral, ")
    same = ("complete", "ab", "--max-tokens", 4, "--temperature", 0, "--dtype", "float32", "--json", "--model")
    one, two = (pentad(*same, folder).json["token_ids"] for folder in (source, tmp_path / "there"))
    assert one == two


def test_a_note_goes_to_standard_error(pentad, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", family="mistral", sliding_window=16)
    done = pentad("convert", tmp_path / "a", tmp_path / "m.gguf", "--to", "gguf")
    assert done.code == 0
    assert done.err.startswith("pentad: gguf files have no place for the sliding window")
    assert done.out == f"{tmp_path / 'm.gguf'}: llama, {(tmp_path / 'm.gguf').stat().st_size / 1000:.1f} kB\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "darknet"], "--to is 'darknet'; it takes hf, mistral, gguf"),
        ([], "Missing option '--to'"),
        (["--to", "hf", "--shard-size", "many"], "--shard-size is 'many'; it takes a size such as 500MB"),
        (["--to", "hf", "--shard-size", "0"], "--shard-size is '0'"),
        (["--to", "hf", "--quantize", "q4_0"], "only GGUF is quantized"),
    ],
    ids=str,
)
def test_refusals(pentad, source: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = pentad("convert", source, tmp_path / "there", *options)
    assert done.code == 2
    assert message in done.error
    assert not (tmp_path / "there").exists()


def test_onto_itself(pentad, source: Path) -> None:
    before = sorted(path.name for path in source.iterdir())
    for destination in (source, source / "..", source / "model.safetensors"):
        assert pentad("convert", source, destination, "--to", "hf").code == 2
    assert sorted(path.name for path in source.iterdir()) == before


def test_shards(pentad, source: Path, tmp_path: Path) -> None:
    done = pentad("convert", source, tmp_path / "there", "--to", "hf", "--shard-size", "20kB", "--json")
    assert len([file for file in done.json["files"] if file.endswith(".safetensors")]) > 1
    assert pentad("show", tmp_path / "there", "--json").json["family"] == "llama"
