"""llama.cpp is about as close to float32 on the GGUF files that pentad writes as on those that it writes itself.

`make parity` runs these tests; `make test` doesn't, because compiling llama.cpp takes minutes.
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

FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q4_k": 14, "q5_0": 8, "q5_1": 9, "q8_0": 7, "f16": 1, "bf16": 32}
"""llama.cpp's numbers of its own quantizations (llama_ftype)."""
ALLOWED = 1.2


def requantize(file_type: int, target: Path, source: Path) -> None:
    """Quantize a GGUF with llama.cpp."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options) == 0


def distance(exact: pentad.LanguageModel, path: Path) -> float:
    """Root mean square of the differences between llama.cpp's logits on `path` and float32's."""
    total, count = 0.0, 0
    for ids, positions, answer in apart(answers, path):
        difference = torch.from_numpy(answer) - exact.logits(ids)[positions]
        total, count = total + float(difference.square().sum()), count + difference.numel()
    return (total / count) ** 0.5


@pytest.fixture(scope="module")
def whole(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a float32 GGUF, converted through a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("whole")
    convert(smollm2, folder / "hf", to="hf", dtype="float32")
    convert(folder / "hf", folder / "f32.gguf", to="gguf")
    shutil.rmtree(folder / "hf")
    return folder / "f32.gguf"


@pytest.fixture(scope="module")
def exact(whole: Path) -> pentad.LanguageModel:
    return pentad.load(whole)


def test_llama_cpp_logits_match_pentads_float32(exact: pentad.LanguageModel, whole: Path) -> None:
    assert distance(exact, whole) < 0.01


@pytest.mark.parametrize("type_name", FILE_TYPES)
def test_pentads_quantization_is_as_accurate_as_llama_cpps(
    type_name: str, exact: pentad.LanguageModel, whole: Path, tmp_path: Path
) -> None:
    convert(whole, tmp_path / "ours.gguf", to="gguf", quantize=type_name)
    apart(partial(requantize, FILE_TYPES[type_name], tmp_path / "theirs.gguf"), whole)
    ours, theirs = (distance(exact, tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    print(f"{type_name}: ours {ours:.4f}, llama.cpp's own {theirs:.4f}")
    assert ours <= max(ALLOWED * theirs, 0.01)
