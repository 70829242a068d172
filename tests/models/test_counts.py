"""Parameters and KV cache bytes of published models, from their configs alone."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import show

MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_2_13B = {
    **LLAMA_2_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
LLAMA_2_70B = {
    **LLAMA_2_7B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}
TINY_LLAMA = {
    **LLAMA_2_7B,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}
SMOLLM2_135M = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
SMOLLM2_360M = {
    **SMOLLM2_135M,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_attention_heads": 15,
    "num_hidden_layers": 32,
    "num_key_value_heads": 5,
}
SMOLLM2_1_7B = {
    **SMOLLM2_135M,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": 32,
    "rope_theta": 130000,
}
QWEN_14B = {
    "model_type": "qwen",
    "bf16": False,
    "fp16": False,
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "no_bias": True,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "vocab_size": 152064,
}
PHI_1 = {
    "model_type": "phi",
    "hidden_act": "gelu_new",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 24,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 51200,
}
PHI_2 = {
    **PHI_1,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.4,
    "torch_dtype": "float16",
}
PHI_1_OF_2023 = {
    "model_type": "mixformer-sequential",
    "activation_function": "gelu_new",
    "architecture": {"block_cls": "parallel", "mixer": {}, "mlp": {"mlp_cls": "mlp"}},
    "layer_norm_epsilon": 1e-05,
    "n_embd": 2048,
    "n_head": 32,
    "n_inner": None,
    "n_layer": 24,
    "n_positions": 2048,
    "rotary_dim": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 51200,
}
MISTRAL_PARAMS = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
LLAMA_2_70B_PARAMS = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": -1,  # as published: the tokenizer has the size
}
LLAMA_2_7B_PARAMS = {
    "dim": 4096,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}

PARAMETERS: dict[str, tuple[dict[str, Any], int]] = {
    "Mistral 7B": (MISTRAL, 7_241_732_096),
    "Mistral 7B, params.json": (MISTRAL_PARAMS, 7_241_732_096),
    "Llama 2 7B": (LLAMA_2_7B, 6_738_415_616),
    "Llama 2 7B, params.json": (LLAMA_2_7B_PARAMS, 6_738_415_616),
    "Llama 2 13B": (LLAMA_2_13B, 13_015_864_320),
    "Llama 2 70B": (LLAMA_2_70B, 68_976_648_192),
    "Llama 2 70B, params.json": (LLAMA_2_70B_PARAMS, 68_976_648_192),
    "TinyLlama": (TINY_LLAMA, 1_100_048_384),
    "SmolLM2 135M": (SMOLLM2_135M, 134_515_008),
    "SmolLM2 360M": (SMOLLM2_360M, 361_821_120),
    "SmolLM2 1.7B": (SMOLLM2_1_7B, 1_711_376_384),
    "Qwen-14B": (QWEN_14B, 14_167_290_880),
    "phi-1": (PHI_1, 1_418_270_720),
    "phi-1, 2023": (PHI_1_OF_2023, 1_418_270_720),
    "phi-2": (PHI_2, 2_779_683_840),
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters(tmp_path: Path, model: str) -> None:
    config, count = PARAMETERS[model]
    facts = show(tmp_path, config)
    assert facts["parameters"] == facts["active_parameters"] == count


def test_a_window_bounds_the_cache(tmp_path: Path) -> None:
    """The Mistral paper states a factor of 8 at 32k tokens."""
    at_32k = ("--context", "32768", "--dtype", "bfloat16")
    with_window = show(tmp_path, MISTRAL, *at_32k)
    assert with_window["kv_cache_bytes"] == 512 * 2**20
    without = show(tmp_path, {**MISTRAL, "sliding_window": None}, *at_32k)
    assert without["kv_cache_bytes"] == 8 * with_window["kv_cache_bytes"]


@pytest.mark.parametrize(
    ("config", "bytes_a_token"),
    [(MISTRAL, 128 * 2**10), (LLAMA_2_7B, 512 * 2**10), (PHI_2, 320 * 2**10), (QWEN_14B, 800 * 2**10)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_cache_bytes_a_token(tmp_path: Path, config: dict[str, Any], bytes_a_token: int) -> None:
    facts = show(tmp_path, config, "--context", "1000", "--dtype", "bfloat16")
    assert facts["kv_cache_bytes"] == 1000 * bytes_a_token
