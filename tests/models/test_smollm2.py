"""SmolLM2-135M-Instruct's GGUF against transformers and llama.cpp."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pentad
from pentad import kernels
from pentad.generate import LanguageModel
from pentad.nn.linear import QuantizedEmbedding, QuantizedLinear
from tests.helpers.gguf_llama import read_gguf
from tests.helpers.tiny import assert_equal_logits, rms

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "Q: What is 17 + 25?\nA:",
    "Die Donau ist ein Fluss, der",
    "water boils at",
    "Dear Sir or Madam,\n\nI am writing to",
    "<html>\n<head>\n<title>",
    "🙂 means",
]
TEXT = (
    "A lighthouse keeper rises before dawn. He winds the clock, trims the lamp and looks out over "
    "the water, where the first boats are coming home with their nets. The sea is calm today, but "
    "he has seen it otherwise: waves as high as the tower, and ships that did not come back. In "
    "the evening he writes into his book how strong the wind was, which ships went by, and at what "
    "hour the fog came in. Then he lights the lamp again, and it turns until morning."
)
GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_logits.json"


@pytest.fixture(scope="module")
def exact(smollm2: Path) -> LanguageModel:
    """The model in float32, with dequantized weights."""
    return pentad.load(smollm2, quantize="none", dtype="float32")


@pytest.fixture(scope="module")
def quantized(smollm2: Path) -> LanguageModel:
    """The model in four bits, as published."""
    return pentad.load(smollm2)


@pytest.fixture(scope="module")
def peer(smollm2: Path) -> nn.Module:
    """transformers' model in float32."""
    return read_gguf(smollm2)


@torch.inference_mode()
def steps(model: LanguageModel, ids: list[int], prompt: int) -> Tensor:
    """The logits of decoding with a cache: those after the prompt, then after each token."""
    run = type(model.step)(model.network)
    sequence = run.cache.open(prompt)
    out = [run([(sequence, ids[:prompt])], [prompt - 1])]
    out += [run([(sequence, [token])], [0]) for token in ids[prompt:]]
    return torch.cat(out)


@torch.inference_mode()
def test_greedy_tokens_equal_transformers(exact: LanguageModel, peer: nn.Module) -> None:
    """Given the tokens before, each token is transformers' argmax; a text that ends early ends there in both."""
    for completion in exact.complete(PROMPTS, temperature=0, max_tokens=64):
        prompt, ours = completion.prompt_token_ids, completion.token_ids
        argmax = peer(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 :].argmax(1)
        *theirs, following = argmax.tolist()
        assert ours == theirs
        assert len(ours) == 64 or following in exact.tokenizer.eos_ids


@torch.inference_mode()
def test_logits_equal_transformers(exact: LanguageModel, peer: nn.Module) -> None:
    ids = exact.tokenizer.encode(TEXT)
    assert_equal_logits(exact.logits(ids), peer(torch.tensor([ids])).logits[0])


def test_weights_stay_in_four_bits(quantized: LanguageModel) -> None:
    layers = [part for part in quantized.network.modules() if isinstance(part, QuantizedLinear)]
    assert Counter(part.weight.type for part in layers)["q4_1"] == 30 * 7
    if kernels.isas():
        assert isinstance(quantized.network.embed, QuantizedEmbedding)
        assert quantized.network.norm.weight.dtype == torch.float32
    else:
        assert quantized.network.norm.weight.dtype == torch.bfloat16


def test_four_bits_are_close_to_float32_on_the_same_weights(quantized: LanguageModel, exact: LanguageModel) -> None:
    """Compares logits and greedy tokens of decoding, and logits of a long prefill."""
    distances = []
    for completion in quantized.complete(PROMPTS[:5], temperature=0, max_tokens=20):
        prompt = len(completion.prompt_token_ids)
        ids = completion.prompt_token_ids + completion.token_ids
        ours, theirs = steps(quantized, ids, prompt), exact.logits(ids)[prompt - 1 :]
        distances.append((ours - theirs).square().mean())
        chosen = theirs[:-1].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert float((theirs[:-1].amax(1) - chosen).max()) <= 0.75
    assert math.sqrt(torch.stack(distances).mean()) <= 0.2
    ids = exact.tokenizer.encode(3 * TEXT)
    assert len(ids) > 256
    assert rms(quantized.logits(ids) - exact.logits(ids)) <= 0.2


def test_four_bits_have_the_perplexity_of_float32(quantized: LanguageModel, exact: LanguageModel) -> None:
    ours, theirs = quantized.score(TEXT), exact.score(TEXT)
    assert ours.tokens == theirs.tokens
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=0.01)


def test_four_bits_are_as_accurate_as_llama_cpp(quantized: LanguageModel, exact: LanguageModel) -> None:
    """Decodes token by token, as tests/parity/golden.py ran llama.cpp."""
    ours, theirs = [], []
    for case in json.loads(GOLDEN.read_text())["cases"]:
        ids, positions = case["ids"], case["positions"]
        logits = steps(quantized, ids, positions[0] + 1)
        ours.append(rms(logits - exact.logits(ids)[positions]) ** 2)
        theirs.append(case["rms"] ** 2)
    assert sum(ours) <= 1.1**2 * sum(theirs)


def test_chat_answers(quantized: LanguageModel) -> None:
    reply = quantized.chat("What is the capital of France?", temperature=0, max_tokens=30)
    assert "Paris" in reply.text
    assert reply.finish_reason == "stop"
