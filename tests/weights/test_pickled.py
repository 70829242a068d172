"""PyTorch files: tensors are mapped, and all other content is refused."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.errors import BadInput, PentadError
from pentad.weights.pickled import read_pickled


class CodeOnUnpickling:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        read_pickled(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def rewritten(path: Path, *, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    """Copy an archive, and replace members by the last part of their names."""
    copy = path.with_name("copy.bin")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w", compression) as target:
        for name in source.namelist():
            key = name.split("/")[-1].removesuffix(".pkl")
            target.writestr(name, members.get(key, source.read(name)))
    return copy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.arange(6.0).view(2, 3), "y": torch.ones(4).bfloat16()}, path)
    return path


def test_a_state_dict(path: Path) -> None:
    entries = read_pickled(path)
    entry = entries["y"]
    assert (entry.shape, entry.dtype, entry.nbytes) == ((4,), torch.bfloat16, 8)
    x = entries["x"].read()
    assert isinstance(x, torch.Tensor)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    again = entries["x"].read()
    assert isinstance(again, torch.Tensor)
    assert x.data_ptr() == again.data_ptr()


def test_parameters_are_read_as_tensors(path: Path) -> None:
    torch.save(dict(torch.nn.Linear(2, 3).named_parameters()), path)
    weight = read_pickled(path)["weight"].read()
    assert isinstance(weight, torch.Tensor)
    assert not weight.requires_grad


def test_a_state_dict_inside_a_training_checkpoint(path: Path) -> None:
    torch.save({"model": {"x": torch.ones(1)}, "optimizer": {"step": 3}, "epoch": 3}, path)
    assert list(read_pickled(path)) == ["x"]


def test_code_is_not_run(path: Path) -> None:
    trace = path.with_name("trace")
    torch.save({"x": torch.ones(1), "y": CodeOnUnpickling(trace)}, path)
    assert f"its pickle wants to run code ({os.name}.mkdir): refused" in refusal(path)
    path.write_bytes(pickle.dumps(CodeOnUnpickling(trace)))
    assert "not a PyTorch archive but a bare pickle, which could run code" in refusal(path)
    assert not trace.exists()


def test_the_format_before_2020(path: Path) -> None:
    torch.save({"x": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    x = read_pickled(path)["x"].read()
    assert isinstance(x, torch.Tensor)
    assert x.tolist() == [0, 1, 2]
    trace = path.with_name("trace")
    torch.save({"x": CodeOnUnpickling(trace)}, path, _use_new_zipfile_serialization=False)
    assert "wants to run code" in refusal(path)
    assert not trace.exists()
    content = path.read_bytes()
    for size in range(20, len(content), 9):
        path.write_bytes(content[:size])
        refusal(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([torch.ones(1)], "holds a list, not a dict of tensors"),
        ({"epoch": 3}, "'epoch' is a int, not a named tensor"),
        ({"net": {"x": torch.ones(1)}}, "'net' is a dict"),
        ({1: torch.ones(1)}, "1 is a Tensor, not a named tensor"),
        ({"x": torch.ones(1).expand(10**12)}, "'x' of .10+,. is more than the file holds"),
        ({"x": torch.eye(3).to_sparse()}, "'x' of .3, 3. is more than|not an archive of tensors"),
    ],
)
def test_other_values_than_named_tensors_are_refused(path: Path, value: object, message: str) -> None:
    torch.save(value, path)
    with pytest.raises(BadInput, match=message):
        read_pickled(path)


def test_every_truncation_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for size in range(0, len(content), 7):
        path.write_bytes(content[:size])
        refusal(path)


def test_compressed_members_are_refused(path: Path) -> None:
    assert "is compressed" in refusal(rewritten(path, compression=zipfile.ZIP_DEFLATED))


def test_a_shape_larger_than_the_file_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"K\x02K\x03\x86" in pickled  # the shape of x
    hostile = pickled.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86")
    assert "not an archive of tensors" in refusal(rewritten(path, data=hostile))


def test_a_file_that_cannot_be_mapped_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)\nat: c10")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(PentadError, match=r"cannot be mapped into memory: unable to mmap 9 .*\(12\)$") as caught:
        read_pickled(path)
    assert not isinstance(caught.value, BadInput)


def test_torchscript_archives_are_refused_with_what_to_do(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl", "version"):
            archive.writestr(f"ViT-B-32/{name}", b"")
    with pytest.raises(BadInput, match=r"a TorchScript archive, .*torch\.jit\.load\(.*state_dict"):
        read_pickled(path)
