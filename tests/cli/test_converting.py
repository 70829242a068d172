"""`pentad convert`."""

from pathlib import Path

import pytest

from tests.helpers.tiny import talking_checkpoint, tiny_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return talking_checkpoint(tmp_path / "source").folder


def test_the_result_names_the_written_files(pentad, source: Path, tmp_path: Path) -> None:
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
    assert done.err.startswith("pentad: ")
    assert "sliding window" in done.err
    assert done.out == f"{tmp_path / 'm.gguf'}: llama, {(tmp_path / 'm.gguf').stat().st_size / 1000:.1f} kB\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "tflite"], "--to is 'tflite'; expected one of hf, mistral, gguf, state_dict, onnx, darknet"),
        ([], "Missing option '--to'"),
        (["--to", "hf", "--shard-size", "many"], "--shard-size is 'many'"),
        (["--to", "hf", "--shard-size", "0"], "--shard-size is '0'"),
        (["--to", "hf", "--shard-size", "9" * 400], "--shard-size is '999"),
        (["--to", "hf", "--quantize", "q4_0"], "is only for gguf"),
        (["--upcycle", "8"], "--upcycle is '8'; expected "),
        (["--upcycle", "experts=8,top=2"], "--upcycle is 'experts=8,top=2'"),
        (["--upcycle", "experts=8,experts=4"], "--upcycle is 'experts=8,experts=4'"),
        (["--upcycle", "top_k=-1"], "--upcycle is 'top_k=-1'"),
        (["--upcycle", "experts=2,top_k=3"], "top_k is 3 with 2 experts"),
        (["--upcycle", "experts=2", "--to", "gguf"], "--upcycle writes hf"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(pentad, source: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = pentad("convert", source, tmp_path / "there", *options)
    assert done.code == 2
    assert message in done.error
    assert not (tmp_path / "there").exists()


def test_the_source_is_not_overwritten(pentad, source: Path) -> None:
    before = sorted(path.name for path in source.iterdir())
    for destination in (source, source / "..", source / "model.safetensors"):
        assert pentad("convert", source, destination, "--to", "hf").code == 2
    assert sorted(path.name for path in source.iterdir()) == before


def test_shards(pentad, source: Path, tmp_path: Path) -> None:
    done = pentad("convert", source, tmp_path / "there", "--to", "hf", "--shard-size", "20kB", "--json")
    assert len([file for file in done.json["files"] if file.endswith(".safetensors")]) > 1
    assert pentad("show", tmp_path / "there", "--json").json["family"] == "llama"


def test_upcycling(pentad, source: Path, tmp_path: Path) -> None:
    done = pentad("convert", source, tmp_path / "there", "--upcycle", "experts=4, top_k=1,seed=7", "--json")
    assert (done.json["family"], done.json["format"]) == ("mixtral", "hf")
    facts = pentad("show", tmp_path / "there", "--json").json
    expert = 3 * 32 * 48
    router = 4 * 32
    dense = pentad("show", source, "--json").json["parameters"]
    assert facts["active_parameters"] == dense + 2 * router
    assert facts["parameters"] == dense + 2 * (router + 3 * expert)


def test_the_name_tells_the_format(pentad, tmp_path: Path) -> None:
    talking_checkpoint(tmp_path / "source")
    done = pentad("convert", tmp_path / "source", tmp_path / "a.gguf", "--json").json
    assert done["format"] == "gguf"
