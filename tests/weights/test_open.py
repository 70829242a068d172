"""Opening a path: folders, files in folders, and paths that are not models."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import pentad.weights
from pentad.errors import BadInput
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.gguf_writer import write_gguf
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import PendingTensor
from tests.helpers.resident import resident


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def folder_with(path: Path, **files: Any) -> Path:
    """Write a config.json and more JSON files to a folder; `index` is model.safetensors.index.json."""
    names = {"index": "model.safetensors.index.json", "generation": "generation_config.json"}
    files.setdefault("config", {"model_type": "llama"})
    for name, value in files.items():
        (path / names.get(name, f"{name}.json")).write_text(json.dumps(value))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        pentad.weights.open(path)
    assert "\n" not in str(caught.value)
    assert str(path.parent) in str(caught.value)
    return str(caught.value)


def assert_holds(checkpoint: Checkpoint, model: LlamaForCausalLM) -> None:
    state = model.state_dict()
    assert set(checkpoint.tensors) == set(state)
    for name, entry in checkpoint.tensors.items():
        tensor = entry.read()
        assert isinstance(tensor, torch.Tensor)
        assert torch.equal(tensor, state[name])


@pytest.mark.parametrize("size", ["5GB", "8KB"])
def test_folders_saved_by_transformers(tmp_path: Path, model: LlamaForCausalLM, size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (size == "8KB")
    others = [tmp_path / "config.json", *tmp_path.glob("*.index.json")]
    for path in (tmp_path, shards[-1], *others):
        checkpoint = pentad.weights.open(path)
        assert (checkpoint.format, checkpoint.path) == ("hf", tmp_path)
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.generation["transformers_version"]
        assert_holds(checkpoint, model)


def test_pytorch_files(tmp_path: Path, model: LlamaForCausalLM) -> None:
    folder_with(tmp_path)
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_holds(pentad.weights.open(tmp_path), model)
    assert_holds(pentad.weights.open(tmp_path / "pytorch_model.bin"), model)
    (tmp_path / "pytorch_model.bin").unlink()
    shard = "pytorch_model-0000{}-of-00002.bin"
    halves = {shard.format(1): list(state)[::2], shard.format(2): list(state)[1::2]}
    for file, names in halves.items():
        torch.save({name: state[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in halves.items() for name in names}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, tmp_path / shard.format(2), index):
        assert_holds(pentad.weights.open(path), model)


def test_a_safetensors_file_of_another_name(tmp_path: Path) -> None:
    folder_with(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "mine.safetensors")
    assert list(pentad.weights.open(tmp_path / "mine.safetensors").tensors) == ["x"]
    assert not pentad.weights.open(tmp_path).tensors
    (tmp_path / "config.json").unlink()
    alone = pentad.weights.open(tmp_path / "mine.safetensors")
    assert (alone.format, alone.path, list(alone.tensors)) == ("state_dict", tmp_path / "mine.safetensors", ["x"])
    (tmp_path / "adapter_config.json").touch()
    assert "an adapter, not a model" in refusal(tmp_path / "mine.safetensors")


def test_a_config_alone(tmp_path: Path) -> None:
    folder_with(tmp_path, generation={"temperature": 0.2}, other={"model_type": "phi"})
    for path in (tmp_path, tmp_path / "config.json"):
        checkpoint = pentad.weights.open(path)
        assert checkpoint.config == {"model_type": "llama"}
        assert checkpoint.generation == {"temperature": 0.2}
        assert not checkpoint.tensors
    alone = pentad.weights.open(str(tmp_path / "other.json"))
    assert (alone.config, alone.generation) == ({"model_type": "phi"}, {})
    assert not alone.tensors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON but an empty file"),
        (b"{'a': 1}", "broken JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b"[1, 2]", "type list"),
        (b'"text"', "type str"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        (b'{"a": ' * 100_000, "JSON nested too deeply"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_invalid_json_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder_with(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path)
    assert message in refusal(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"x": "a.safetensors", "y": "b.safetensors"}, "1 of 2 files missing: b.safetensors"),
        ({"x": "a.safetensors", "z": "a.safetensors"}, "tensor 'z' is not in a.safetensors"),
        ({"x": "../a.safetensors"}, "'x' is put in '../a.safetensors'"),
        ({"x": "/a.safetensors"}, "'x'"),
        ({"x": "c/a.safetensors"}, "'x'"),
        ({"x": "..\\a.safetensors"}, "'x'"),
        ({"x": ".."}, "'x'"),
        ({"x": ""}, "'x'"),
        ({"x": 3}, "'x' is put in 3"),
        ({"x": "a\0b"}, "'x'"),
        ({"x": "a.safetensors", "w": "c.safetensors"}, "'x' is both in a.safetensors and in c"),
        ({}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_an_invalid_index_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder_with(tmp_path, index={"weight_map": weight_map})
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(2), "w": torch.ones(2)}, tmp_path / "c.safetensors")
    assert message in refusal(tmp_path)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, index={"weight_map": {"x": "a.safetensors"}})
    save_file({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-1])
    assert "a.safetensors: truncated: 1 of" in refusal(tmp_path)


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    folder_with(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "model.safetensors: No such file" in refusal(tmp_path)


def test_folders_of_ggufs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert re.search(r"2 GGUF files.*: a\.gguf, b\.gguf$", refusal(tmp_path))
    (tmp_path / "b.gguf").unlink()
    assert pentad.weights.open(tmp_path).path == tmp_path / "a.gguf"
    (tmp_path / "a.gguf").rename(tmp_path / "no-suffix")
    assert pentad.weights.open(tmp_path / "no-suffix").format == "gguf"


@pytest.mark.parametrize(
    ("content", "noun"),
    [
        (b"", "an empty file"),
        (b"Dear model,\nhow are you?", "text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page or XML"),
        (b"tjgg\1\0\0\0", "a GGML file from before GGUF"),
        (b"%PDF-1.7", "a PDF"),
        (b'{"a": 1}', "JSON"),
        (bytes(64), "no format that pentad knows"),
    ],
)
def test_files_that_are_not_models_are_described(tmp_path: Path, content: bytes, noun: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert noun in message
    assert all(known in message for known in ("GGUF", "config.json", "params.json"))


def test_absent_and_empty_paths_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "an empty file" in refusal(tmp_path / "model.safetensors")


def test_a_device_is_refused() -> None:
    with pytest.raises(BadInput, match="/dev/null: "):
        pentad.weights.open("/dev/null")


def test_json_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pentad.weights.files.MAX_JSON_BYTES", 100)
    folder_with(tmp_path, config={"a": "b" * 100})
    assert "config.json: longer than 100 bytes" in refusal(tmp_path)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, pentad.weights; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"])
def test_shards_without_an_index_are_refused(tmp_path: Path, name: str) -> None:
    folder_with(tmp_path)
    (tmp_path / name).write_bytes(b"")
    index = f"{name.partition('-')[0]}{Path(name).suffix}.index.json"
    assert re.search(f"{name} .*{index} is missing", refusal(tmp_path))


MANY = 1 << 22


def pending(name: str) -> PendingTensor:
    return PendingTensor(name, (MANY // 1024, 1024), torch.float32, lambda: torch.zeros(MANY // 1024, 1024))


def write_slices(folder: Path) -> None:
    (folder / "params.json").write_text("{}")
    for number in range(2):
        torch.save({"output.weight": torch.zeros(MANY // 1024, 1024)}, folder / f"consolidated.0{number}.pth")


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda folder: write_safetensors(folder, "model", [pending("x")], shard_bytes=10**9),
    "shards": lambda folder: write_safetensors(folder, "model", [pending("x"), pending("y")], shard_bytes=1),
    "pickled": lambda folder: torch.save({"x": torch.zeros(MANY)}, folder / "pytorch_model.bin"),
    "slices": write_slices,
    "consolidated shards": lambda folder: (
        (folder / "params.json").write_text("{}"),
        write_safetensors(folder, "consolidated", [pending("x"), pending("y")], shard_bytes=1),
    ),
    "gguf": lambda folder: write_gguf(folder / "m.gguf", {"general.architecture": "llama"}, [pending("x")]),
    "gguf in parts": lambda folder: write_gguf(
        folder / "m.gguf", {"general.architecture": "llama"}, [pending("x"), pending("y")], shard_bytes=1
    ),
}


def bytes_read() -> int:
    """Bytes that this process has read with system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_opening_reads_no_tensor(tmp_path: Path, write: Callable[[Path], object]) -> None:
    """Opening reads tensor data neither with system calls nor through a mapping."""
    write(tmp_path)
    if not (tmp_path / "params.json").exists():
        (tmp_path / "config.json").write_text("{}")
    pentad.weights.open(tmp_path)  # the first call also reads the modules that it imports
    before = bytes_read()
    checkpoint = pentad.weights.open(tmp_path)
    assert checkpoint.tensors
    assert bytes_read() - before < 1 << 20
    weights = [path for path in tmp_path.iterdir() if path.stat().st_size > 1 << 20]
    assert weights
    assert sum(map(resident, weights)) < 1 << 20
    for entry in checkpoint.tensors.values():
        tensor = entry.read()
        assert isinstance(tensor, torch.Tensor)
        assert not tensor.any()
    assert bytes_read() - before + sum(map(resident, weights)) >= 4 * MANY
