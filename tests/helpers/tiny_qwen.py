"""Tiny checkpoints of the first Qwen, and transformers' Qwen2 with the same weights: it has no class for the first."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.tiny import Tiny, tiny_peer

NAMES = {
    "model.embed_tokens": "transformer.wte",
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.w1",
    "mlp.gate_proj": "mlp.w2",
    "mlp.down_proj": "mlp.c_proj",
    "model.norm": "transformer.ln_f",
    "lm_head": "lm_head",
}
"""Qwen2's module names -> Qwen's, without q, k and v, which Qwen fuses."""


def qwen_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Qwen2's tensors to the first Qwen's names, with q, k and v fused."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if not module.startswith("model.layers."):
            out[f"{NAMES[module]}.{leaf}"] = tensor
            continue
        layer, part = module.removeprefix("model.layers.").split(".", 1)
        if part == "self_attn.q_proj":
            parts = [state[f"model.layers.{layer}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            out[f"transformer.h.{layer}.attn.c_attn.{leaf}"] = torch.cat(parts)
        elif part in NAMES:
            out[f"transformer.h.{layer}.{NAMES[part]}.{leaf}"] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}


def qwen_checkpoint(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> Tiny:
    """Save a checkpoint like Qwen-7B's, with dynamic NTK and log-n attention off unless `config` turns them on.

    The peer is a Qwen2 with the same weights, which supports neither.
    """
    peer = tiny_peer(dtype, "qwen2", num_key_value_heads=4)
    c = peer.config
    settings = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": 2 * c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "kv_channels": c.hidden_size // c.num_attention_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "layer_norm_epsilon": c.rms_norm_eps,
        "rotary_emb_base": c.rope_parameters["rope_theta"],
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "no_bias": True,
        "seq_length": 32,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
        "tie_word_embeddings": False,
        **config,
    }
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(qwen_state(peer.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    return Tiny(folder, peer)
