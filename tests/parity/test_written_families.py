"""llama.cpp on the GGUF files that pentad writes gives transformers' logits, for each family.

The models are tiny and random, without a tokenizer. llama.cpp stores keys and values in float16.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pentad.convert import convert
from tests.helpers.tiny import assert_equal_logits, logits_of, network_of, peer_logits, random_ids, tiny_checkpoint
from tests.helpers.tiny_qwen import qwen_checkpoint
from tests.parity.golden import apart

pytest.importorskip("llama_cpp", reason="make parity installs it")

IDS = random_ids(90)
BOUND = 5e-3
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, wide heads": {"head_dim": 20},
    "llama, linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, yarn": {"family": "qwen2", "tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3, tied": {"family": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "phi": {"family": "phi", "num_key_value_heads": 4},
    "phi, shared keys": {"family": "phi"},
    "phi, tied": {"family": "phi", "num_key_value_heads": 4, "tie_word_embeddings": True},
}


def scores(ids: list[int], path: Path) -> np.ndarray[Any, Any]:
    """llama.cpp's logits, [tokens, vocab]."""
    import llama_cpp

    model = llama_cpp.Llama(model_path=str(path), n_ctx=256, logits_all=True, verbose=False)
    model.eval(ids)
    return model.scores[: len(ids)].copy()


@pytest.mark.parametrize("dims", [2, 6])
def test_llama_cpp_rotates_a_part_of_each_head_as_pentad_does(dims: int, tmp_path: Path) -> None:
    """Only qwen and phi2 files may do so: llama.cpp refuses others. CONFIGS compares phi2, which rotates half."""
    file = convert(qwen_checkpoint(tmp_path / "a", rotary_pct=dims / 8).folder, tmp_path / "b.gguf", to="gguf").path
    theirs = torch.from_numpy(apart(partial(scores, IDS), file))
    assert_equal_logits(theirs, logits_of(network_of(file), IDS), BOUND)


@pytest.mark.parametrize("name", [*CONFIGS, "qwen"])
def test_llama_cpp_logits_match_transformers(name: str, tmp_path: Path) -> None:
    tiny = qwen_checkpoint(tmp_path / "a") if name == "qwen" else tiny_checkpoint(tmp_path / "a", **CONFIGS[name])
    file = convert(tiny.folder, tmp_path / "b.gguf", to="gguf").path
    theirs = torch.from_numpy(apart(partial(scores, IDS), file))
    assert_equal_logits(theirs, peer_logits(tiny.peer, IDS), BOUND)
