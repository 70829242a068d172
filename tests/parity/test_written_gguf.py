"""llama.cpp reads the GGUF files that pentad writes, and is no further from float32 on them than on its own.

Not part of `make test`, since llama.cpp takes minutes to compile; `make parity` runs it.
"""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import pentad
from pentad.convert import convert
from tests.parity.golden import answers, apart

pytest.importorskip("llama_cpp", reason="make parity installs it")

FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7, "f16": 1, "bf16": 32}
"""llama.cpp's numbers of its own quantizations (llama_ftype)."""
ALLOWED = 1.2


def requantize(kind: int, target: Path, source: Path) -> None:
    """llama.cpp's own quantization of a GGUF."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = kind, 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options) == 0


def distance(exact: pentad.LanguageModel, path: Path) -> float:
    """Root mean square of llama.cpp's logits on `path` from float32's."""
    total, count = 0.0, 0
    for ids, positions, answer in apart(answers, path):
        off = torch.from_numpy(answer) - exact.logits(ids)[positions]
        total, count = total + float(off.square().sum()), count + off.numel()
    return (total / count) ** 0.5


@pytest.fixture(scope="module")
def whole(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in float32, by way of a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("whole")
    convert(smollm2, folder / "hf", to="hf", dtype="float32")
    convert(folder / "hf", folder / "f32.gguf", to="gguf")
    shutil.rmtree(folder / "hf")
    return folder / "f32.gguf"


@pytest.fixture(scope="module")
def exact(whole: Path) -> pentad.LanguageModel:
    return pentad.load(whole)


def test_llama_cpp_reads_it_and_agrees(exact: pentad.LanguageModel, whole: Path) -> None:
    assert distance(exact, whole) < 0.01


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_quantizing(kind: str, exact: pentad.LanguageModel, whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "ours.gguf", to="gguf", quantize=kind)
    apart(partial(requantize, FILE_TYPES[kind], tmp_path / "theirs.gguf"), whole)
    ours, theirs = (distance(exact, tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    print(f"{kind}: ours {ours:.4f}, llama.cpp's own {theirs:.4f}")
    assert ours <= max(ALLOWED * theirs, 0.01)
