"""Logits of tiny random Llamas against transformers, with and without a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pentad
from pentad.errors import BadInput
from pentad.generate.step import PlainStep
from tests.helpers.tiny import (
    Tiny,
    assert_equal_logits,
    edit_json,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    rms,
    tiny_checkpoint,
)

D = 8  # the head_dim of most configs
FACTORS = {
    "short_factor": [1.0 + 0.1 * i for i in range(D // 2)],
    "long_factor": [2.0 + 3.0 * i for i in range(D // 2)],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 64, **FACTORS}

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 20},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "both biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "large eps": {"rms_norm_eps": 0.1},
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn, attention factor": {**YARN, "attention_factor": 0.7},
    "yarn, mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 1.3},
    "yarn, mscale alone": {**YARN, "mscale": 0.8},
    "yarn, betas": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, no original length": {"rope_type": "yarn", "factor": 4.0},
    "longrope": LONGROPE,
    "longrope, attention factor": {**LONGROPE, "attention_factor": 1.4},
    "longrope, factor": {**LONGROPE, "factor": 16.0},
}
LENGTHS_OF = {"dynamic": 256, "longrope": 64}
"""The length up to which these scalings don't change a sequence; beyond it they depend on the length."""


def scaled(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


def assert_parity(tiny: Tiny, tokens: int = 40) -> None:
    ids = random_ids(tokens)
    assert_equal_logits(logits_of(network_of(tiny.folder), ids), peer_logits(tiny.peer, ids))


@torch.inference_mode()
def assert_cached_parity(tiny: Tiny, prompt: int, steps: int = 20) -> None:
    """Compare prefill and token-by-token decoding, each with its own cache."""
    ids = random_ids(prompt + steps)
    run = PlainStep(network_of(tiny.folder), page_size=16)
    sequence = run.cache.open(prompt)
    ours = [run([(sequence, ids[:prompt])], range(prompt))]
    ours += [run([(sequence, [token])], [0]) for token in ids[prompt:]]
    out = tiny.peer(torch.tensor([ids[:prompt]]), use_cache=True)
    theirs = [out.logits[0]]
    for token in ids[prompt:]:
        out = tiny.peer(torch.tensor([[token]]), past_key_values=out.past_key_values)
        theirs.append(out.logits[0])
    assert_equal_logits(torch.cat(ours), torch.cat(theirs))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(tmp_path: Path, shape: str) -> None:
    tiny = tiny_checkpoint(tmp_path, **SHAPES[shape])
    assert_parity(tiny)
    assert_cached_parity(tiny, prompt=23)


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings(tmp_path: Path, name: str) -> None:
    tiny = tiny_checkpoint(tmp_path, **scaled(SCALINGS[name]))
    assert_parity(tiny, tokens=50)
    assert_cached_parity(tiny, prompt=33)  # 53 tokens: below every original length


@pytest.mark.parametrize("name", ["dynamic", "longrope", "longrope, attention factor"])
def test_rope_scalings_beyond_the_original_length(tmp_path: Path, name: str) -> None:
    tiny = tiny_checkpoint(tmp_path, **scaled(SCALINGS[name]))
    original = LENGTHS_OF[SCALINGS[name]["rope_type"]]
    for tokens in (original, original + 1, original + 60):
        rotary = type(tiny.peer.model.rotary_emb)  # a new one: the dynamic scaling remembers the longest sequence
        tiny.peer.model.rotary_emb = rotary(tiny.peer.config)
        assert_parity(tiny, tokens)
    if name != "dynamic":  # in transformers its base changes in each step, although keys are cached
        assert_cached_parity(tiny, prompt=original + 10)


@pytest.mark.parametrize("name", ["linear", "dynamic"])
def test_a_scaling_extends_the_context(tmp_path: Path, name: str) -> None:
    tiny = tiny_checkpoint(tmp_path, **scaled(SCALINGS[name]), max_position_embeddings=32)
    model, limit = pentad.load(tmp_path), int(32 * SCALINGS[name]["factor"])
    assert model.context_length == limit
    for tokens in (32, 33, limit):
        tiny.peer.model.rotary_emb = type(tiny.peer.model.rotary_emb)(tiny.peer.config)
        assert_equal_logits(model.logits(random_ids(tokens)), peer_logits(tiny.peer, random_ids(tokens)))
    with pytest.raises(BadInput, match=rf"context of {limit} \(max_position_embeddings 32, extended by RoPE"):
        model.logits(random_ids(limit + 1))
    with pytest.raises(BadInput, match=r"context of 40 \(as requested"):
        pentad.load(tmp_path, context=40).logits(random_ids(41))
    with pytest.raises(BadInput, match=f"expected 1 to {limit} tokens"):
        pentad.load(tmp_path, context=limit + 1)


def test_yarn_extends_the_context_of_its_original_length(tmp_path: Path) -> None:
    yarn = {**YARN, "original_max_position_embeddings": 64, "factor": 4.0}
    tiny = tiny_checkpoint(tmp_path, **scaled(yarn), max_position_embeddings=64)
    model = pentad.load(tmp_path)
    assert model.context_length == 256
    for tokens in (64, 65, 256):
        assert_equal_logits(model.logits(random_ids(tokens)), peer_logits(tiny.peer, random_ids(tokens)))


def test_a_dynamic_scaling_keeps_the_base_of_the_length_at_opening(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path, **scaled(SCALINGS["dynamic"]))
    network, ids = network_of(tiny.folder), random_ids(320)
    run = PlainStep(network)
    sequence = run.cache.open(320)
    cached = torch.cat([run([(sequence, ids[:300])], range(300)), run([(sequence, ids[300:])], range(20))])
    assert_equal_logits(cached, logits_of(network, ids))


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "yarn", "longrope"])
def test_rope_scaling_of_older_configs(tmp_path: Path, name: str) -> None:
    """Until 2025 configs had rope_theta and rope_scaling, whose key was first `type`, then `rope_type`."""
    new = {"rope_theta": 20000.0, **SCALINGS[name]}
    tiny = tiny_checkpoint(tmp_path, rope_parameters=new)
    old = {key: value for key, value in SCALINGS[name].items() if key != "rope_type"}
    for key in ("type", "rope_type"):
        edit_json(tmp_path / "config.json", rope_parameters=None, rope_theta=20000.0, rope_scaling={**old, key: name})
        assert_parity(tiny)


def test_a_config_of_2023(tmp_path: Path) -> None:
    """It has no head_dim, num_key_value_heads, RoPE parameters or bias fields."""
    absent = ("head_dim", "num_key_value_heads", "rope_parameters", "attention_bias", "mlp_bias")
    tiny = tiny_checkpoint(tmp_path, num_key_value_heads=4, edit=dict.fromkeys(absent))
    assert_parity(tiny)


@pytest.mark.parametrize("tied", [True, False])
def test_shards(tmp_path: Path, tied: bool) -> None:
    tiny = tiny_checkpoint(tmp_path, shard_size="10KB", tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_parity(tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    ours = theirs = 0.0
    for seed, shape in enumerate([{}, {"head_dim": 16, "num_hidden_layers": 4}, {"hidden_size": 64}]):
        folder = tmp_path / str(seed)
        tiny = tiny_checkpoint(folder, dtype=dtype, **shape)
        half, whole = network_of(folder, dtype), network_of(folder, torch.float32)
        for ids in (random_ids(60, seed=i) for i in range(3)):
            exact = logits_of(whole, ids)
            ours += rms(logits_of(half, ids) - exact)
            theirs += rms(peer_logits(tiny.peer, ids) - exact)
    assert 0 < ours <= 1.2 * theirs
