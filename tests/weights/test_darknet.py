"""Darknet's .weights and .names files: reading, writing, and files that don't fit the .cfg."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pentad import weights
from pentad.errors import BadInput
from pentad.weights.darknet import Header, slices, write_darknet
from pentad.weights.darknet_cfg import parse
from pentad.weights.labels import COCO, VOC
from tests.helpers.darknet_files import conv, net, v1, v3, v4, write, yolo


def head(classes: int) -> str:
    return net(8, 8) + conv(3 * (classes + 5), 1, 1, "linear", 0) + yolo("0,1,2", classes)


@pytest.mark.parametrize("header", [Header(0, 1, 0, 7), Header(0, 2, 5, 1 << 40), Header(1, 0, 0, 9)])
def test_either_file_opens_the_checkpoint(tmp_path: Path, header: Header) -> None:
    path = write(tmp_path, v3(), header=header)
    checkpoint = weights.open(path)
    assert checkpoint.format == "darknet"
    assert checkpoint.config["header"] == header
    assert checkpoint.config["cfg"] == v3()
    assert weights.open(path.with_suffix(".weights")).tensors.keys() == checkpoint.tensors.keys()
    content = np.frombuffer(path.with_suffix(".weights").read_bytes()[len(header.pack()) :], "<f4")
    read = [entry.read().flatten() for entry in checkpoint.tensors.values()]
    assert torch.equal(torch.cat(read), torch.from_numpy(content.copy()))
    assert list(checkpoint.tensors)[:5] == [
        *("layers.0.norm.bias", "layers.0.norm.weight", "layers.0.norm.running_mean", "layers.0.norm.running_var"),
        "layers.0.weight",
    ]


def test_a_cfg_alone_has_no_tensors(tmp_path: Path) -> None:
    (tmp_path / "x.cfg").write_text(v4())
    assert weights.open(tmp_path / "x.cfg").tensors == {}


def test_written_files_are_read_by_opencv_and_by_pentad(tmp_path: Path) -> None:
    old = write(tmp_path, v1(), header=Header(major=1001, seen=5))
    checkpoint = weights.open(old)
    tensors = {name: entry.read() for name, entry in checkpoint.tensors.items()}
    files = write_darknet(
        tmp_path / "new" / "x.cfg", v1(), ["a", "b", "c"], tensors, header=checkpoint.config["header"]
    )
    assert sorted(file.name for file in files) == ["x.cfg", "x.names", "x.weights"]
    again = weights.open(files[0])
    assert again.config["names"] == ("a", "b", "c")
    assert again.config["header"] == Header(seen=5)
    assert all(torch.equal(again.tensors[name].read(), tensor) for name, tensor in tensors.items())
    path = write(tmp_path, v4(), "four")
    tensors = {name: entry.read() for name, entry in weights.open(path).tensors.items()}
    write_darknet(tmp_path / "five.cfg", v4(), [], tensors)
    assert path.with_suffix(".weights").read_bytes() == (tmp_path / "five.weights").read_bytes()
    assert not (tmp_path / "five.names").exists()
    cv2.dnn.readNetFromDarknet(str(tmp_path / "five.cfg"), str(tmp_path / "five.weights"))
    with pytest.raises(BadInput, match="exists already"):
        write_darknet(tmp_path / "five.cfg", v4(), [], tensors)


def test_labels(tmp_path: Path) -> None:
    path = write(tmp_path, v4())

    def labels() -> tuple[str, ...]:
        names: tuple[str, ...] = weights.open(path).config["names"]
        return names

    assert labels() == ("class 0", "class 1", "class 2")
    (tmp_path / "other.names").write_text("x\ny\n")
    (tmp_path / "some.names").write_text("ant\nbee \r\ncow\n\n")
    assert labels() == ("ant", "bee", "cow")
    (tmp_path / "tiny.names").write_text("one\ntwo\nthree")
    assert labels() == ("one", "two", "three")
    (tmp_path / "tiny.names").write_text("one\ntwo")
    with pytest.raises(BadInput, match=r"tiny\.names: 2 labels; expected 3, the classes of tiny\.cfg"):
        labels()
    for count, names in ((80, COCO), (20, VOC)):
        assert weights.open(write(tmp_path, head(count), "known")).config["names"] == names
        assert len(set(names)) == count
    (tmp_path / "mixed.cfg").write_text(head(3) + conv(30, 1, 1, "linear", 0) + yolo("0,1,2", 5))
    with pytest.raises(BadInput, match=r"classes is 3 \(line 15\) and 5 \(line 30\); expected the same"):
        weights.open(tmp_path / "mixed.cfg")


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path, v4())
    file = path.with_suffix(".weights")
    whole = file.read_bytes()
    total = sum(int(np.prod(one.shape)) for one in slices(parse(v4())))

    def refused(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(BadInput) as caught:
            weights.open(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"10 of {total:,} floats are missing: it ends in layer 15 ([convolutional], line" in refused(whole[:-40])
    assert f"3 of {total:,} floats are missing" in refused(whole[:-9])
    assert f"{total:,} of {total:,} floats are missing: it ends in layer 0" in refused(whole[:20])
    assert f"2 floats are left after the {total:,} floats that the .cfg asks for" in refused(whole + bytes(8))
    assert "0 floats and 3 bytes are left" in refused(whole + bytes(3))
    assert "too short for a Darknet .weights file" in refused(whole[:14])
    assert "too short" in refused(whole[:18])
    assert "0 bytes, too short" in refused(b"")
    assert "doesn't begin with a version" in refused(b"PK\x03\x04" + whole)
    assert "doesn't begin with a version" in refused(struct.pack("<iii", 0, -2, 5) + whole)
    path.unlink()
    with pytest.raises(BadInput, match=r"tiny\.cfg, which describes the network of tiny\.weights, is missing"):
        weights.open(file)
    path.write_text("[net]\nwidth=x")
    with pytest.raises(BadInput, match=r"tiny\.cfg: line 1, \[net\]: width is x; expected"):
        weights.open(path)
    path.write_text("#" * 1_000_001)
    with pytest.raises(BadInput, match="longer than 1,000,000 bytes"):
        weights.open(path)


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.cfg").write_bytes(np.random.default_rng(0).bytes(3000))
    with pytest.raises(BadInput, match=r"x\.cfg: "):
        weights.open(tmp_path / "x.cfg")
