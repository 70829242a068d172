"""Folders in the consolidated layout: all its forms, and inconsistent files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pentad.weights
from pentad.errors import BadInput
from pentad.weights.checkpoint import Checkpoint

DIM, HIDDEN, VOCAB, KV = 8, 24, 16, 4
SHAPES: dict[str, tuple[int, ...]] = {
    "tok_embeddings.weight": (VOCAB, DIM),
    "layers.0.attention.wq.weight": (DIM, DIM),
    "layers.0.attention.wk.weight": (KV, DIM),
    "layers.0.attention.wv.weight": (KV, DIM),
    "layers.0.attention.wo.weight": (DIM, DIM),
    "layers.0.feed_forward.w1.weight": (HIDDEN, DIM),
    "layers.0.feed_forward.w2.weight": (DIM, HIDDEN),
    "layers.0.feed_forward.w3.weight": (HIDDEN, DIM),
    "layers.0.attention_norm.weight": (DIM,),
    "norm.weight": (DIM,),
    "rope.freqs": (2,),
    "output.weight": (VOCAB, DIM),
}
# The dimension along which Llama 2's model.py slices each tensor (fairscale's ParallelEmbedding, ColumnParallelLinear,
# RowParallelLinear). Every file contains the whole of the other tensors.
LLAMA_2 = {
    "tok_embeddings.weight": 1,
    "layers.0.attention.wq.weight": 0,
    "layers.0.attention.wk.weight": 0,
    "layers.0.attention.wv.weight": 0,
    "layers.0.attention.wo.weight": 1,
    "layers.0.feed_forward.w1.weight": 0,
    "layers.0.feed_forward.w2.weight": 1,
    "layers.0.feed_forward.w3.weight": 0,
    "output.weight": 0,
}
LLAMA_3 = {**LLAMA_2, "tok_embeddings.weight": 0}  # VocabParallelEmbedding
PARAMS = {"dim": DIM, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}


def write(folder: Path, files: Mapping[str, dict[str, Tensor]], params: Mapping[str, Any] | None = PARAMS) -> Path:
    """Write a folder with params.json and weights (file name -> tensors)."""
    folder.mkdir(exist_ok=True)
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))
    for file, tensors in files.items():
        if file.endswith(".safetensors"):
            save_file(tensors, folder / file)
        else:
            torch.save(tensors, folder / file)
    return folder


def halves(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: state[name] for name in list(state)[first::2]} for first in (0, 1)]


def slices(state: dict[str, Tensor], count: int, axes: Mapping[str, int]) -> list[dict[str, Tensor]]:
    return [
        {
            name: tensor.chunk(count, axes[name])[rank].contiguous() if name in axes else tensor.clone()
            for name, tensor in state.items()
        }
        for rank in range(count)
    ]


def write_index(folder: Path, files: Mapping[str, dict[str, Tensor]]) -> None:
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def assert_holds(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    assert checkpoint.format == "consolidated"
    assert set(checkpoint.tensors) == set(state)
    for name, entry in checkpoint.tensors.items():
        tensor = entry.read()
        assert isinstance(tensor, Tensor)
        assert (entry.name, entry.quantization) == (name, None)
        assert (entry.shape, entry.dtype, entry.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert torch.equal(tensor, state[name])


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        pentad.weights.open(path)
    assert "\n" not in str(caught.value)
    assert str(path.parent) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "file", ["consolidated.safetensors", "consolidated.00.safetensors", "consolidated.00.pth", "consolidated.00.pt"]
)
def test_one_file(tmp_path: Path, state: dict[str, Tensor], file: str) -> None:
    write(tmp_path, {file: state})
    for path in (tmp_path, tmp_path / file, tmp_path / "params.json"):
        checkpoint = pentad.weights.open(path)
        assert (checkpoint.path, checkpoint.config, checkpoint.generation) == (tmp_path, PARAMS, {})
        assert_holds(checkpoint, state)


@pytest.mark.parametrize("name", ["consolidated.0{}.pt", "consolidated.0{}.pth", "consolidated.0{}.safetensors"])
def test_files_with_different_tensors(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    write(tmp_path, {name.format(number): half for number, half in enumerate(halves(state))})
    for path in (tmp_path, tmp_path / name.format(1)):
        assert_holds(pentad.weights.open(path), state)


@pytest.mark.parametrize("with_index", [True, False])
def test_parts_by_count(tmp_path: Path, state: dict[str, Tensor], with_index: bool) -> None:
    files = {f"consolidated-0000{i}-of-00002.safetensors": half for i, half in enumerate(halves(state), 1)}
    write(tmp_path, files)
    paths = [tmp_path, tmp_path / min(files)]
    if with_index:
        write_index(tmp_path, files)
        paths.append(tmp_path / "consolidated.safetensors.index.json")
    for path in paths:
        assert_holds(pentad.weights.open(path), state)


@pytest.mark.parametrize("axes", [LLAMA_2, LLAMA_3], ids=["Llama 2", "Llama 3"])
@pytest.mark.parametrize("count", [2, 4])
def test_slices_of_every_tensor(tmp_path: Path, state: dict[str, Tensor], axes: dict[str, int], count: int) -> None:
    parts = slices(state, count, axes)
    write(tmp_path, {f"consolidated.0{i}.pth": part for i, part in enumerate(parts)})
    assert_holds(pentad.weights.open(tmp_path), state)
    assert_holds(pentad.weights.open(tmp_path / "consolidated.01.pth"), state)


def test_a_folder_with_hf_and_consolidated_weights_opens_as_hf(tmp_path: Path, state: dict[str, Tensor]) -> None:
    write(tmp_path, {"consolidated.safetensors": state, "model.safetensors": {"x": torch.ones(2)}})
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    for name in ("", "config.json", "model.safetensors"):
        checkpoint = pentad.weights.open(tmp_path / name)
        assert (checkpoint.format, list(checkpoint.tensors)) == ("hf", ["x"])
    for name in ("params.json", "consolidated.safetensors"):
        checkpoint = pentad.weights.open(tmp_path / name)
        assert checkpoint.generation == {"temperature": 0.7}
        assert_holds(checkpoint, state)
    (tmp_path / "model.safetensors").unlink()
    assert_holds(pentad.weights.open(tmp_path), state)


def test_params_json_alone(tmp_path: Path) -> None:
    write(tmp_path, {})
    for path in (tmp_path, tmp_path / "params.json"):
        checkpoint = pentad.weights.open(path)
        assert (checkpoint.format, checkpoint.config) == ("consolidated", PARAMS)
        assert not checkpoint.tensors
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    assert pentad.weights.open(tmp_path).format == "hf"
    assert pentad.weights.open(tmp_path / "params.json").format == "consolidated"


def test_missing_or_invalid_params_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    write(tmp_path, {"consolidated.safetensors": state})
    (tmp_path / "params.json").write_text("[]")
    assert "params.json: JSON of type list" in refusal(tmp_path)
    (tmp_path / "params.json").unlink()
    for path in (tmp_path, tmp_path / "consolidated.safetensors"):
        assert refusal(path).startswith(f"{tmp_path}: ")
        assert "params.json" in refusal(path)


def test_hf_weights_without_config_json_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"x": torch.ones(2)}})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert "no config.json" in refusal(path)
        assert "params.json" in refusal(path)


def test_two_sets_of_weights_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    parts = slices(state, 2, LLAMA_2)
    write(tmp_path, {"consolidated.safetensors": {"x": torch.ones(2)}, "consolidated.00.pth": parts[0]})
    torch.save(parts[1], tmp_path / "consolidated.01.pth")
    for path in (tmp_path, tmp_path / "params.json"):
        message = refusal(path)
        assert "2 sets of weights" in message
        assert "consolidated.00.pth, consolidated.safetensors" in message
    assert list(pentad.weights.open(tmp_path / "consolidated.safetensors").tensors) == ["x"]
    assert_holds(pentad.weights.open(tmp_path / "consolidated.01.pth"), state)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ([0, 2], "1 of 3 files missing: consolidated.01.pth"),
        ([2], "2 of 3 files missing: consolidated.00.pth, consolidated.01.pth"),
        ([0], "1 of 4 files are there: tok_embeddings.weight has 2 of the 8"),
        ([0, 1], "2 of 4 files"),
    ],
)
def test_missing_slices_are_named(tmp_path: Path, state: dict[str, Tensor], there: list[int], message: str) -> None:
    parts = slices(state, 4, LLAMA_2)
    write(tmp_path, {f"consolidated.0{i}.pth": parts[i] for i in there})
    assert message in refusal(tmp_path)


def test_a_missing_slice_of_llama_3(tmp_path: Path, state: dict[str, Tensor]) -> None:
    params = {**PARAMS, "vocab_size": VOCAB}
    write(tmp_path, {"consolidated.00.pth": slices(state, 2, LLAMA_3)[0]}, params)
    assert "1 of 2 files are there: tok_embeddings.weight has 8 of the 16" in refusal(tmp_path)


def test_missing_parts_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    files = {f"consolidated-0000{i}-of-00002.safetensors": half for i, half in enumerate(halves(state), 1)}
    write(tmp_path, files)
    (tmp_path / "consolidated-00001-of-00002.safetensors").unlink()
    missing = "1 of 2 files missing: consolidated-00001-of-00002.safetensors"
    assert missing in refusal(tmp_path)
    write_index(tmp_path, files)
    assert missing in refusal(tmp_path)
    assert missing in refusal(tmp_path / "consolidated-00002-of-00002.safetensors")
    (tmp_path / "consolidated-00002-of-00002.safetensors").unlink()
    assert "2 of 2 files missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"x": torch.ones(2, 4), "y": torch.ones(2)}, "'x' is [2, 2] torch.float32 in consolidated.00.pth and [2, 4]"),
        ({"x": torch.ones(2, 2).half(), "y": torch.ones(2)}, "[2, 2] torch.float16 in consolidated.01.pth"),
        ({"x": torch.ones(2, 2)}, "'y' is in consolidated.00.pth and not in consolidated.01.pth, 'x'"),
        ({"x": torch.ones(2, 2), "y": torch.ones(2), "z": torch.ones(2)}, "'z' is in consolidated.01.pth and not in"),
    ],
)
def test_inconsistent_files_are_refused(tmp_path: Path, second: dict[str, Tensor], message: str) -> None:
    first = {"x": torch.ones(2, 2), "y": torch.ones(2)}
    write(tmp_path, {"consolidated.00.pth": first, "consolidated.01.pth": second})
    assert message in refusal(tmp_path)


def test_invalid_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "consolidated.00.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    for path in (tmp_path, tmp_path / "consolidated.00.pth"):
        assert "consolidated.00.pth: " in refusal(path)
        assert "Git LFS pointer" in refusal(path)
    (tmp_path / "consolidated.00.pth").unlink()
    (tmp_path / "consolidated.safetensors").symlink_to(tmp_path / "gone")
    assert "missing: consolidated.safetensors" in refusal(tmp_path)


def test_other_file_names_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, {"consolidated.x.safetensors": {"x": torch.ones(2)}, "consolidated.000.pth": {"x": torch.ones(2)}})
    assert not pentad.weights.open(tmp_path).tensors
