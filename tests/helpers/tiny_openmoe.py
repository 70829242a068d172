"""Tiny checkpoints of OpenMoE, for which transformers has no class."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PUBLISHED = {
    "architectures": ["OpenMoeForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_openmoe.OpenMoeForCausalLM"},
    "attention_bias": False,
    "bos_token_id": 0,
    "dropout_rate": 0.0,
    "enable_comm_overlap": False,
    "enable_hierarchical_alltoall": False,
    "enable_kernel": False,
    "enable_load_balance": False,
    "eos_token_id": 1,
    "expert_parallel": None,
    "head_dim": 64,
    "hidden_act": "swiglu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "label_smoothing": 0.001,
    "layer_norm_epsilon": 1e-06,
    "load_balance_beam_width": 8,
    "load_balance_group_swap_factor": 0.4,
    "load_balance_tolerance": 0.1,
    "max_position_embeddings": 2048,
    "mlp_gated": True,
    "model_type": "llama",
    "moe_layer_interval": 4,
    "num_attention_heads": 12,
    "num_experts": 16,
    "num_hidden_layers": 12,
    "num_key_value_heads": 12,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_factor": 0.01,
    "router_capacity_factor_eval": 2.0,
    "router_capacity_factor_train": 1.25,
    "router_drop_tks": True,
    "router_min_capacity": 4,
    "router_noisy_policy": None,
    "router_topk": 2,
    "router_z_loss_factor": 0.0001,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.34.0",
    "use_cache": True,
    "vocab_size": 256384,
    "z_loss_factor": 0.01,
}
"""ColossalAI's examples/language/openmoe/model/openmoe_base_config.json."""
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "num_experts": 8,
    "moe_layer_interval": 2,
}


@dataclass(frozen=True)
class TinyOpenMoe:
    """A saved checkpoint, its config and its tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published tensors, from modeling_openmoe.py and colossalai/moe."""
    width, hidden, vocab, experts = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_experts"]
    queries, keys = (c[f"num_{of}_heads"] * c["head_dim"] for of in ("attention", "key_value"))
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (vocab, width)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        sparse = (layer + 1) % c["moe_layer_interval"] == 0
        dense = f"{prefix}.extra_mlp" if sparse else f"{prefix}.mlp"
        out |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (queries, width),
            f"{prefix}.self_attn.k_proj.weight": (keys, width),
            f"{prefix}.self_attn.v_proj.weight": (keys, width),
            f"{prefix}.self_attn.o_proj.weight": (width, queries),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{dense}.gate_proj.weight": (2 * hidden, width),
            f"{dense}.up_proj.weight": (hidden, width),
            f"{dense}.down_proj.weight": (width, hidden),
        }
        if sparse:
            out |= {
                f"{prefix}.mlp.gate_weight": (experts, width),
                f"{prefix}.mlp.experts.wi_gate": (experts, width, 2 * hidden),
                f"{prefix}.mlp.experts.wi_up": (experts, width, hidden),
                f"{prefix}.mlp.experts.wo": (experts, hidden, width),
                f"{prefix}.pre_extra_mlp_layernorm.weight": (width,),
            }
    return out


def openmoe_checkpoint(folder: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> TinyOpenMoe:
    """Save a checkpoint like the published OpenMoE.

    The scales let every weight change the logits. Attention is neither uniform nor one-hot, although scores aren't
    divided by sqrt(D).
    """
    settings = {**PUBLISHED, **TINY, **config}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes(settings).items():
        noise = torch.randn(shape, generator=generator)
        inputs = shape[-2] if "mlp.experts." in name else shape[-1]
        if len(shape) == 1:
            noise = 1 + 0.2 * noise
        elif "embed" not in name:
            quieter = settings["head_dim"] ** -0.25 if "q_proj" in name or "k_proj" in name else 1.0
            noise *= 1.5 * quieter / inputs**0.5
        tensors[name] = noise.to(dtype)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return TinyOpenMoe(folder, settings, tensors)
