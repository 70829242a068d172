"""The ONNX files give what Meta's ONNX model computes."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import pentad
from pentad.convert import convert
from tests.helpers.images import assert_close, images
from tests.helpers.sam import PATCH, SIDE, WIDTH, meta_sam
from tests.helpers.tiny import tiny_checkpoint


def run(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(out) for out in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


@torch.no_grad()
def test_encoder_and_decoder(tmp_path: Path) -> None:
    peer = meta_sam(tmp_path / "sam.pth")
    files = convert(tmp_path / "sam.pth", tmp_path / "onnx", to="onnx").files
    assert sorted(path.name for path in files) == ["decoder.onnx", "encoder.onnx"]
    image = images(1, 3, SIDE * PATCH, SIDE * PATCH)
    [embeddings] = run(tmp_path / "onnx/encoder.onnx", {"images": image})
    assert_close(embeddings, peer.image_encoder(image), 1e-4)
    model: Any = import_module("segment_anything.utils.onnx").SamOnnxModel(peer, return_single_mask=True)
    for points, labels, has_mask, size in (
        ([[10.0, 20], [0, 0]], [1.0, -1], 0.0, [40.0, 60]),
        ([[10.0, 20], [33, 41], [5, 6], [50, 60]], [1.0, 0, 2, 3], 1.0, [90.0, 31]),
    ):
        inputs = {
            "image_embeddings": embeddings,
            "point_coords": torch.tensor([points]),
            "point_labels": torch.tensor([labels]),
            "mask_input": images(1, 1, 4 * SIDE, 4 * SIDE),
            "has_mask_input": torch.tensor([has_mask]),
            "orig_im_size": torch.tensor(size),
        }
        found, expected = run(tmp_path / "onnx/decoder.onnx", inputs), model(*inputs.values())
        assert found[0].shape == (1, 1, *map(int, size))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, 1e-4)
    assert embeddings.shape == (1, WIDTH, SIDE, SIDE)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "llama")
    with pytest.raises(pentad.BadInput, match=r"--to onnx is for Segment Anything; .* is a language model"):
        convert(tmp_path / "llama", tmp_path / "onnx", to="onnx")
    meta_sam(tmp_path / "sam.pth")
    with pytest.raises(pentad.BadInput, match="--to onnx writes float32 weights"):
        convert(tmp_path / "sam.pth", tmp_path / "onnx", to="onnx", dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(pentad.BadInput, match=r"pip install 'pentad\[onnx\]'"):
        convert(tmp_path / "sam.pth", tmp_path / "onnx", to="onnx")
