"""`pentad models`, `pull`, `rm` and `show`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pentad import kernels
from pentad.weights.registry import KNOWN
from tests.models.test_vit import saved

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
# embedding; attention, feed-forward and two norms in each layer; the final norm
PARAMETERS = 100 * 16 + 3 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16) + 16


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an empty file of smollm2's size."""
    monkeypatch.setenv("PENTAD_CACHE", str(tmp_path))
    path = KNOWN["smollm2"].path
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(KNOWN["smollm2"].nbytes)
    return path


def listed(pentad) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pentad("models", "--json").out.splitlines()]


def test_models_lists_pulled_and_unpulled(pentad, cached: Path) -> None:
    row = next(row for row in listed(pentad) if row["name"] == "smollm2")
    assert (row["name"], row["path"]) == ("smollm2", str(cached))
    assert row["nbytes"] == 98_362_432
    header, line, *_ = pentad("models").out.splitlines()
    assert header.split() == ["name", "size", "pulled", "description", "license"]
    assert line.split()[:4] == ["smollm2", "98.4", "MB", "yes"]
    cached.unlink()
    assert {row["name"]: row["path"] for row in listed(pentad)} == dict.fromkeys(KNOWN)


def test_pull_prints_the_path(pentad, cached: Path) -> None:
    assert pentad("pull", "smollm2").out == f"{cached}\n"
    assert pentad("pull", "smollm2", "--json").json == {"name": "smollm2", "path": str(cached)}


def test_rm(pentad, cached: Path) -> None:
    assert "--yes" in pentad("rm", "smollm2").error
    assert cached.exists()
    done = pentad("rm", "smollm2", "--yes", "--json")
    assert done.json == {"name": "smollm2", "nbytes": 98_362_432}
    assert not cached.exists()
    gone = pentad("rm", "smollm2", "--yes")
    assert gone.code == 2
    assert "nothing to remove" in gone.error


@pytest.mark.parametrize(("reply", "stays"), [(b"n\n", True), (b"\n", True), (b"", True), (b"y\n", False)])
def test_rm_asks_for_confirmation(pentad, cached: Path, reply: bytes, stays: bool) -> None:
    done = pentad("rm", "smollm2", stdin=reply, terminal=True)
    assert "smollm2" in done.err
    assert "[y/N]" in done.err
    assert cached.exists() == stays
    assert done.code == (1 if stays else 0)


def show(pentad, folder: Path, config: dict[str, Any], *options: object) -> Any:
    (folder / "config.json").write_text(json.dumps(config))
    done = pentad("show", folder, "--json", *options)
    assert (done.code, done.err) == (0, "")
    return done.json


def test_show_a_config(pentad, tmp_path: Path) -> None:
    shown = show(pentad, tmp_path, LLAMA)
    assert shown["family"] == "llama"
    assert shown["parameters"] == shown["active_parameters"] == PARAMETERS
    assert shown["context_length"] == shown["context"] == 64
    assert shown["quantization"] is None
    assert shown["kv_cache_bytes"] == 3 * 2 * 2 * 4 * 64 * 2
    assert shown["weight_bytes"] == PARAMETERS * 2
    assert shown["memory_bytes"] > shown["kv_cache_bytes"] + shown["weight_bytes"]
    assert shown["chat_template"] is None


def test_show_with_context_and_dtype(pentad, tmp_path: Path) -> None:
    shown = show(pentad, tmp_path, LLAMA, "--context", "10", "--dtype", "float32")
    assert shown["kv_cache_bytes"] == 3 * 2 * 2 * 4 * 10 * 4
    assert shown["weight_bytes"] == PARAMETERS * 4
    assert (shown["dtype"], shown["context"], shown["context_length"]) == ("float32", 10, 64)
    untied = show(pentad, tmp_path, {**LLAMA, "tie_word_embeddings": False})
    assert untied["parameters"] == PARAMETERS + 100 * 16


def test_show_with_quantized_weights(pentad, tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "torch_dtype": "float32"}
    floats = show(pentad, tmp_path, config)
    shown = show(pentad, tmp_path, config, "--quantize", "q8_0")
    assert (shown["quantization"], floats["quantization"]) == ("q8_0", None)
    assert shown["weight_bytes"] == pytest.approx(floats["weight_bytes"] * 34 / 32 / 4, rel=0.02)
    if kernels.isas():
        assert shown["kv_cache_bytes"] == floats["kv_cache_bytes"] / 2


def test_show_as_text(pentad, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    text = pentad("show", tmp_path / "config.json", "--context", "100").out
    assert "llama, 3 layers" in text
    assert f"{PARAMETERS:,}" in text
    assert re.search(r"100 tokens in bfloat16.* 64\b", text)
    assert "no tokenizer" in text


def test_show_smollm2(pentad, smollm2: Path) -> None:
    shown = pentad("show", smollm2, "--json", "--context", "2048").json
    assert (shown["family"], shown["quantization"]) == ("llama", "q4_1")
    assert shown["parameters"] == 134_515_008
    assert shown["kv_cache_bytes"] == 30 * 2 * 3 * 64 * 2048 * 2
    assert shown["runs"].startswith("by the kernels") if kernels.isas() else kernels.reason() in shown["runs"]
    assert "<|im_start|>" in shown["chat_template"]
    dequantized = pentad("show", smollm2, "--json", "--quantize", "none").json
    assert "plain torch" in dequantized["runs"]
    assert "dequantiz" in dequantized["runs"]
    assert dequantized["weight_bytes"] == 2 * 134_515_008 > shown["weight_bytes"] > 96_000_000
    assert shown["chat_template"].splitlines()[0] in pentad("show", smollm2).out


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**LLAMA, "model_type": "nonsense"}, "nonsense"),
        ({"model_type": "llama"}, "vocab_size"),
        ({**LLAMA, "hidden_size": -1}, "hidden_size"),
    ],
)
def test_show_an_invalid_config(pentad, tmp_path: Path, config: dict[str, Any], named: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = pentad("show", tmp_path)
    assert done.code == 2
    assert named in done.error


def test_show_reports_the_tokenizer(pentad, smollm2: Path, tmp_path: Path) -> None:
    assert pentad("show", smollm2, "--json").json["tokenizer"] is True
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert pentad("show", tmp_path, "--json").json["tokenizer"] is False
    (tmp_path / "tokenizer.json").write_text("{")
    broken = pentad("show", tmp_path, "--json")
    assert broken.json["tokenizer"] is False
    assert "tokenizer" in broken.err


def test_pull_of_a_file_says_that_it_is_there(pentad, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    done = pentad("pull", file)
    assert (done.code, done.out) == (0, f"{file}\n")
    assert "needs no pull" in done.err


def test_show_a_vision_model(pentad, tmp_path: Path) -> None:
    saved(tmp_path, id2label=dict(enumerate("abcde")))
    shown = pentad("show", tmp_path, "--json").json
    assert (shown["family"], shown["task"], shown["labels"], shown["dtype"]) == ("vit", "classify", 5, "float32")
    assert shown["weight_bytes"] == 4 * shown["parameters"]
    halves = pentad("show", tmp_path, "--json", "--dtype", "float16").json
    assert halves["weight_bytes"] == 2 * shown["parameters"]
    assert "a classifier of images" in pentad("show", tmp_path).out
    assert "--context and --quantize are for language models" in pentad("show", tmp_path, "--context", "9").error
