"""Each family against transformers on tiny random configs: without and with a cache, from one file and from shards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.generate.step import PlainStep
from tests.helpers.tiny import (
    Tiny,
    assert_equal_logits,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    rms,
    tiny_checkpoint,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {"family": "mistral"},
    "mistral, window": {"family": "mistral", "sliding_window": 12},
    "mistral, window of 2": {"family": "mistral", "sliding_window": 2},
    "mistral, wide heads, tied": {"family": "mistral", "head_dim": 20, "tie_word_embeddings": True},
    "mixtral": {"family": "mixtral"},
    "mixtral, 3 of 5 experts, window": {
        "family": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "sliding_window": 12,
    },
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, mha": {"family": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen2, late layers have a window": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 1,
    },
    "qwen2, yarn": {
        "family": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_theta": 10000.0,
        },
    },
    "phi": {"family": "phi"},
    "phi, mha, tied": {"family": "phi", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "phi, a quarter of each head rotates": {"family": "phi", "partial_rotary_factor": 0.25},
    "phi, normalized queries and keys": {"family": "phi", "qk_layernorm": True, "layer_norm_eps": 0.01},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3, tied": {"family": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "qwen3, attention bias": {"family": "qwen3", "head_dim": 8, "attention_bias": True},
}


@pytest.fixture(params=CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> Tiny:
    return tiny_checkpoint(tmp_path, **CONFIGS[request.param])


def test_uncached_logits(tiny: Tiny) -> None:
    ids = random_ids(60)
    assert_equal_logits(logits_of(network_of(tiny.folder), ids), peer_logits(tiny.peer, ids))


@torch.inference_mode()
def test_prefill_and_20_cached_steps(tiny: Tiny) -> None:
    """The sequence is longer than three windows."""
    ids = random_ids(43)
    run = PlainStep(network_of(tiny.folder), page_size=4)
    sequence = run.cache.open(len(ids))
    ours = [run([(sequence, ids[:23])], range(23))]
    ours += [run([(sequence, [token])], [0]) for token in ids[23:]]
    out = tiny.peer(torch.tensor([ids[:23]]), use_cache=True)
    theirs = [out.logits[0]]
    for token in ids[23:]:
        out = tiny.peer(torch.tensor([[token]]), past_key_values=out.past_key_values)
        theirs.append(out.logits[0])
    assert_equal_logits(torch.cat(ours), torch.cat(theirs))


@pytest.mark.parametrize("family", sorted({config["family"] for config in CONFIGS.values()}))
def test_shards(family: str, tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path, family=family, shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = random_ids(30)
    assert_equal_logits(logits_of(network_of(tiny.folder), ids), peer_logits(tiny.peer, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted({config["family"] for config in CONFIGS.values()}))
def test_half_precision_is_as_accurate_as_transformers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours = theirs = 0.0
    for seed, shape in enumerate([{}, {"num_hidden_layers": 4}, {"hidden_size": 64}]):
        folder = tmp_path / str(seed)
        tiny = tiny_checkpoint(folder, dtype=dtype, family=family, **shape)
        half, whole = network_of(folder, dtype), network_of(folder, torch.float32)
        for ids in (random_ids(60, seed=i) for i in range(3)):
            exact = logits_of(whole, ids)
            ours += rms(logits_of(half, ids) - exact)
            theirs += rms(peer_logits(tiny.peer, ids) - exact)
    assert 0 < ours <= 1.2 * theirs
