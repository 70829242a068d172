"""The safetensors library, transformers and pentad read the files that pentad writes."""

import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import pentad.weights
from pentad.errors import BadInput
from pentad.weights.safetensors import DTYPES, read_safetensors
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import PendingTensor
from tests.helpers.progress import Watcher


def pending_tensors(tensors: dict[str, Tensor]) -> list[PendingTensor]:
    return [PendingTensor(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]  # type: ignore[misc]


def same(one: Tensor, other: Tensor) -> bool:
    """Equal bits, NaN included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


def assert_file_holds(path: Path, tensors: dict[str, Tensor]) -> None:
    by_library = load_file(path)
    assert set(by_library) == set(tensors)
    assert all(same(by_library[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours = read_safetensors(path)
    for name, entry in ours.items():
        tensor = entry.read()
        assert isinstance(tensor, Tensor)
        assert same(tensor, tensors[name])
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    tensors = {}
    for name in draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), unique=True, max_size=6)):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = torch.empty(shape).numel() * dtype.itemsize
        bits = draw(st.binary(min_size=size, max_size=size))
        if dtype is torch.bool:
            bits = bytes(byte & 1 for byte in bits)
        flat = torch.frombuffer(bytearray(bits), dtype=torch.uint8).view(dtype) if size else torch.empty(0, dtype=dtype)
        tensors[name] = flat.view(shape)
    return tensors


@settings(max_examples=150)
@given(tensors=named_tensors())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor]) -> None:
    folder = tmp_path_factory.mktemp("written")
    paths = write_safetensors(folder, "model", pending_tensors(tensors), shard_bytes=10**9)
    assert paths == [folder / "model.safetensors"]
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert_file_holds(paths[0], tensors)


@settings(max_examples=50)
@given(tensors=named_tensors(), shard_bytes=st.integers(1, 200))
def test_round_trip_in_shards(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    paths = write_safetensors(folder, "model", pending_tensors(tensors), shard_bytes=shard_bytes)
    assert sorted(paths) == sorted(folder.iterdir())
    files = [path for path in paths if path.suffix == ".safetensors"]
    if len(files) == 1:
        assert_file_holds(files[0], tensors)
        return
    found: dict[str, Tensor] = {}
    for number, file in enumerate(files, 1):
        assert file.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        shard = load_file(file)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= shard_bytes
        assert not found.keys() & shard.keys()
        found |= shard
        assert_file_holds(file, shard)
    assert all(same(found[name], tensors[name]) for name in tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    (folder / "config.json").write_text("{}")
    assert set(pentad.weights.open(folder).tensors) == set(index["weight_map"]) == set(tensors)


@pytest.mark.parametrize("shard_bytes", [10**9, 8000])
def test_transformers_reads_the_files(tmp_path: Path, shard_bytes: int) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).bfloat16()
    config.save_pretrained(tmp_path)
    write_safetensors(tmp_path, "model", pending_tensors(model.state_dict()), shard_bytes=shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes == 8000)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(same(again[name], tensor) for name, tensor in model.state_dict().items())


def test_pentad_reads_consolidated_shards(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5), "c": torch.randn(2, 2)}
    write_safetensors(tmp_path, "consolidated", pending_tensors(tensors), shard_bytes=50)
    (tmp_path / "params.json").write_text("{}")
    checkpoint = pentad.weights.open(tmp_path)
    assert checkpoint.format == "consolidated"
    assert sorted(checkpoint.tensors) == ["a", "b", "c"]
    assert (tmp_path / "consolidated.safetensors.index.json").is_file()


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(3), "c": torch.randn(3), "ß": torch.randn(5).half()}
    one, other = (
        write_safetensors(tmp_path / name, "model", pending_tensors(tensors), shard_bytes=10**9)[0]
        for name in ("x", "y")
    )
    assert one.read_bytes() == other.read_bytes()
    save_file(tensors, tmp_path / "library.safetensors", {"format": "pt"})
    assert (
        one.read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    )  # the library also orders tensors by name


def test_tensors_are_made_once_and_freed_before_the_next(tmp_path: Path) -> None:
    made: list[str] = []
    memory: list[weakref.ref[np.ndarray]] = []

    def make(name: str) -> Tensor:
        assert all(reference() is None for reference in memory)
        numbers = np.ones(4, np.float32)
        made.append(name)
        memory.append(weakref.ref(numbers))
        return torch.from_numpy(numbers)

    tensors = [PendingTensor(name, (4,), torch.float32, partial(make, name)) for name in "abc"]
    write_safetensors(tmp_path, "model", tensors, shard_bytes=32)
    assert made == ["a", "b", "c"]


def test_progress_counts_bytes(tmp_path: Path) -> None:
    watcher = Watcher()
    paths = write_safetensors(
        tmp_path, "m", pending_tensors({"a": torch.ones(9), "b": torch.ones(9)}), shard_bytes=40, progress=watcher
    )
    ((_, total),) = watcher.tasks
    assert [total] == watcher.counts == [sum(path.stat().st_size for path in paths)]
    assert watcher.open == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("x", torch.float32), ("x", torch.float32)], "'x' is there twice"),
        ([("__metadata__", torch.float32)], "'__metadata__'"),
        ([("x", "q8_0")], "'x': .* q8_0"),
        ([("x", torch.complex128)], "'x': .* torch.complex128"),
    ],
)
def test_invalid_tensors_are_refused(
    tmp_path: Path, tensors: Sequence[tuple[str, torch.dtype | str]], message: str
) -> None:
    wanted = [PendingTensor(name, (32,), target, lambda: torch.ones(32)) for name, target in tensors]
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path, "model", wanted, shard_bytes=10**9)
    assert not list(tmp_path.iterdir())


def test_a_value_outside_the_dtypes_range_leaves_no_file(tmp_path: Path) -> None:
    tensors = [
        PendingTensor("a", (2,), torch.float16, lambda: torch.ones(2)),
        PendingTensor("b", (2,), torch.float16, lambda: torch.full((2,), 1e6)),
    ]
    with pytest.raises(BadInput, match=r"'b' .*1e\+06"):
        write_safetensors(tmp_path, "model", tensors, shard_bytes=4)
    assert not list(tmp_path.iterdir())


# Copies a sparse file of gigabytes through the writer, with one tensor converted to float32. The output file skips
# large pieces without reading them, so the copy is sparse too, and only the converted tensor is read. The system can
# reclaim mapped pages of the source, so the test counts only anonymous memory.
COPY = """
import dataclasses, pathlib, re, sys, threading
import torch
from pentad.weights import atomic
from pentad.weights.safetensors import read_safetensors
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import PendingTensor
from tests.helpers.progress import Watcher

torch.set_num_threads(1)

class Sparse:
    def __init__(self, file):
        self.file = file
    def write(self, piece):
        return self.file.seek(len(piece), 1) if len(piece) > 1_000_000 else self.file.write(piece)
    def flush(self):
        self.file.truncate(max(self.file.tell(), self.file.seek(0, 2)))
        self.file.flush()
    def __getattr__(self, name):
        return getattr(self.file, name)

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

source, folder = map(pathlib.Path, sys.argv[1:])
open_new = atomic.open_new
atomic.open_new = lambda path: Sparse(open_new(path))
entries = read_safetensors(source)
tensors = [PendingTensor(e.name, e.shape, e.dtype, e.read) for e in entries.values()]
tensors[3] = dataclasses.replace(tensors[3], type=torch.float32)
torch.ones(1000).bfloat16().float()
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
write_safetensors(folder, "model", tensors, shard_bytes=10**12)
done.set()
watcher.join()
print(peak - before)
"""


def write_zeros(path: Path, tensors: int, numbers: int) -> int:
    """Write a sparse safetensors file of bfloat16 zeros and return its size."""
    header = {
        f"t{i}": {
            "dtype": "BF16",
            "shape": [numbers // 1024, 1024],
            "data_offsets": [2 * numbers * i, 2 * numbers * (i + 1)],
        }
        for i in range(tensors)
    }
    content = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + 2 * numbers * tensors)
    return path.stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_writing_gigabytes_needs_less_memory_than_one_tensor(tmp_path: Path) -> None:
    numbers, count = 1 << 27, 9
    source, to = tmp_path / "zeros.safetensors", tmp_path / "to"
    assert write_zeros(source, count, numbers) > 2_400_000_000
    command = [sys.executable, "-c", COPY, str(source), str(to)]
    peak = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert peak < 64 << 20  # far less than a tensor, which is 256 MiB: the source is mapped
    copied = {entry.name: (entry.shape, entry.dtype) for entry in read_safetensors(to / "model.safetensors").values()}
    assert copied == {
        f"t{i}": ((numbers // 1024, 1024), torch.float32 if i == 3 else torch.bfloat16) for i in range(count)
    }
