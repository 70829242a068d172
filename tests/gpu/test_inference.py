"""Tests on a CUDA device: `make gpu` runs them with the installed packages."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pentad
from pentad.convert import convert
from pentad.generate.step import PlainStep
from pentad.nn.attention import attention
from pentad.nn.batch import PagedKV, SequenceLayout
from tests.helpers.tiny import assert_equal_logits, random_ids, rms, talking_checkpoint, tiny_checkpoint

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
IDS = random_ids(200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("llama")).folder


def load(folder: Path, dtype: str, device: str = DEVICE) -> pentad.LanguageModel:
    return pentad.load(folder, device=device, dtype=dtype)


def in_chunks(model: pentad.LanguageModel, page_size: int) -> Tensor:
    """Compute the logits of `IDS` through the cache: prefill in two chunks, then decode token by token."""
    run = PlainStep(model.network, page_size=page_size)
    sequence = run.cache.open(len(IDS))
    chunks = [IDS[:64], IDS[64:180], *([token] for token in IDS[180:])]
    return torch.cat([run([(sequence, chunk)], range(len(chunk))) for chunk in chunks]).cpu()


def test_float32_logits_equal_the_cpus(folder: Path) -> None:
    model = load(folder, "float32")
    exact = load(folder, "float32", "cpu").logits(IDS)
    assert_equal_logits(model.logits(IDS).cpu(), exact)
    assert_equal_logits(in_chunks(model, 256), exact)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_accurate_as_on_the_cpu(folder: Path, dtype: str) -> None:
    model = load(folder, dtype)
    exact = load(folder, "float32", "cpu").logits(IDS)
    bound = 1.2 * rms(load(folder, dtype, "cpu").logits(IDS) - exact)
    assert 0 < rms(model.logits(IDS).cpu() - exact) <= bound
    assert 0 < rms(in_chunks(model, 256) - exact) <= bound


def test_a_batch_gives_the_same_tokens_as_single_prompts(folder: Path) -> None:
    model = load(folder, "float32")
    prompts = ["Hello", "How are you", "?"]
    batched = model.complete(prompts, max_tokens=16, temperature=0)
    single = [model.complete(prompt, max_tokens=16, temperature=0) for prompt in prompts]
    assert [c.token_ids for c in batched] == [c.token_ids for c in single]
    assert all(c.completion_tokens for c in single)


@pytest.mark.parametrize("window", [None, 1, 37, 300])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ragged_attention_matches_float32(dtype: torch.dtype, paged: bool, window: int | None) -> None:
    """Several sequences of different lengths, on pages that are scattered and partly full."""
    lengths, new = (300, 5, 530), (1, 5, 40)
    q = torch.randn(sum(new), 4, 64, device=DEVICE, dtype=dtype)
    queries, keys = SequenceLayout.of(new), SequenceLayout.of(lengths)
    k, v = (torch.randn(7 * 256 if paged else sum(lengths), 2, 64, device=DEVICE, dtype=dtype) for _ in range(2))
    layout: SequenceLayout | PagedKV = keys
    if paged:
        slots = torch.zeros(0, dtype=torch.int64, device=DEVICE)
        layout = PagedKV([k], [v], 256, ((6, 0), (3,), (5, 1, 2)), lengths, slots)
    y = attention(q, k, v, queries, layout, causal=True, window=window)
    exact = attention(q.float(), k.float(), v.float(), queries, layout, causal=True, window=window)
    assert rms(y.float() - exact) <= 0.01 * rms(exact)


def test_gradients_through_ragged_attention() -> None:
    rows = SequenceLayout.of([3, 70])
    q, k, v = (torch.randn(73, 2, 64, device=DEVICE, requires_grad=True) for _ in range(3))
    half = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    attention(q, k, v, rows, rows, causal=True).square().sum().backward()
    attention(half[0], half[1], half[2], rows, rows, causal=True).square().sum().backward()
    for exact, near in zip((q, k, v), half, strict=True):
        assert exact.grad is not None
        assert near.grad is not None
        assert rms(near.grad.float() - exact.grad) <= 0.05 * rms(exact.grad)


def test_a_cache_of_another_dtype(folder: Path) -> None:
    model = pentad.load(folder, device=DEVICE, dtype="float32", cache_dtype="bfloat16")
    assert model.complete("Hello", max_tokens=4, temperature=0).completion_tokens > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "phi"])
def test_other_families(tmp_path: Path, family: str) -> None:
    small = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    tiny_checkpoint(tmp_path, family=family, **small)
    models = {device: load(tmp_path, "float32", device) for device in ("cpu", DEVICE)}
    assert_equal_logits(models[DEVICE].logits(IDS[:60]).cpu(), models["cpu"].logits(IDS[:60]))


@pytest.mark.parametrize("quantize", [None, "none"])
def test_a_quantized_file(folder: Path, tmp_path: Path, quantize: str | None) -> None:
    convert(folder, tmp_path / "tiny.gguf", to="gguf", quantize="q8_0")
    exact = pentad.load(tmp_path / "tiny.gguf", device="cpu", quantize="none", dtype="float32").logits(IDS)
    ours = pentad.load(tmp_path / "tiny.gguf", device=DEVICE, quantize=quantize, dtype="float32").logits(IDS)
    assert rms(ours.cpu() - exact) <= (0.2 if quantize is None else 1e-3) * rms(exact)


def test_sampling_options_run_beside_each_other(folder: Path) -> None:
    model = load(folder, "float32")
    alone = model.complete("Hello", max_tokens=12, temperature=0.8, top_p=0.9, seed=5)
    beside = model.complete(["Hello", "?"], max_tokens=12, temperature=0.8, top_p=0.9, seed=5)
    assert beside[0].token_ids == alone.token_ids
    limited = model.complete("Hello", max_tokens=12, temperature=0, constraint=pentad.Constraint.regex("[0-9]{3}"))
    assert limited.text.isdigit()
