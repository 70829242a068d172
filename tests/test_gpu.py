"""What holds on a CUDA device: `make gpu` runs it, with the Python and the packages at hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pentad
from pentad.generate.step import PlainStep
from tests.helpers.tiny import (
    assert_equal_logits,
    random_ids,
    rms,
    talking_checkpoint,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
IDS = random_ids(200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("llama")).folder


def load(folder: Path, dtype: str, device: str = DEVICE) -> pentad.LanguageModel:
    return pentad.load(folder, device=device, dtype=dtype)


def in_chunks(model: pentad.LanguageModel, page_size: int) -> Tensor:
    """All logits of `IDS`, run through the cache as a prefill of two chunks, then token by token."""
    run = PlainStep(model.network, page_size=page_size)
    sequence = run.cache.open(len(IDS))
    chunks = [IDS[:64], IDS[64:180], *([token] for token in IDS[180:])]
    return torch.cat([run([(sequence, chunk)], range(len(chunk))) for chunk in chunks]).cpu()


def test_float32_is_the_cpus(folder: Path) -> None:
    model = load(folder, "float32")
    exact = load(folder, "float32", "cpu").logits(IDS)
    assert_equal_logits(model.logits(IDS).cpu(), exact)
    assert_equal_logits(in_chunks(model, 256), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_as_the_cpus(folder: Path, dtype: str) -> None:
    model = load(folder, dtype)
    exact = load(folder, "float32", "cpu").logits(IDS)
    bound = 1.2 * rms(load(folder, dtype, "cpu").logits(IDS) - exact)
    assert 0 < rms(model.logits(IDS).cpu() - exact) <= bound
    assert 0 < rms(in_chunks(model, 256) - exact) <= bound


def test_text_is_the_same_in_any_batch(folder: Path) -> None:
    model = load(folder, "float32")
    prompts = ["Hello", "How are you", "?"]
    together = model.complete(prompts, max_tokens=16, temperature=0)
    alone = [model.complete(prompt, max_tokens=16, temperature=0) for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert all(c.completion_tokens for c in alone)
