"""Write a transformers Llama as a GGUF file, as llama.cpp's converter does, and read one."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.blocks import random_blocks

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Permute a projection's rows, head by head, from half-split RoPE's order to the interleaved one."""
    rows = weight.unflatten(0, (heads, 2, -1))  # [heads, half, D/2, ...]
    return rows.transpose(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, part = module.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def write_gguf(
    path: Path,
    peer: LlamaForCausalLM,
    type_name: str = "F32",
    *,
    other_types: dict[str, str] | None = None,
    skip: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
    rope: dict[str, object] | None = None,
) -> None:
    """Write `peer`'s weights to a GGUF, and put the dequantized values into `peer`.

    Args:
        path: the file.
        peer: the model.
        type_name: the ggml type of the matrices. ggml's package doesn't quantize to K types: their blocks are random.
        other_types: the ggml types of some matrices, by a part of their names in the file.
        skip: tensors to leave out, by their names in the file.
        extra: tensors to add.
        rope: the metadata of RoPE scaling: {"type", "factor", "original_context_length"}.
    """
    c = peer.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if c.head_dim != c.hidden_size // c.num_attention_heads:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    for key, value in (rope or {}).items():
        name = f"llama.rope.scaling.{key}"
        match value:
            case str():
                writer.add_string(name, value)
            case float():
                writer.add_float32(name, value)
            case int():
                writer.add_uint32(name, value)
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}
    state = peer.state_dict()
    for name, weight in state.items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        if gguf_name(name) in skip:
            continue
        stored = weight.float()
        permuted = [heads[p] for p in heads if f".self_attn.{p}_proj." in name]
        if permuted:
            stored = interleaved(stored, permuted[0])
        numbers = stored.contiguous().numpy()
        if weight.ndim == 1:
            writer.add_tensor(gguf_name(name), numbers)
            continue
        others = [other for part, other in (other_types or {}).items() if part in gguf_name(name)]
        stored_as = GGMLQuantizationType[others[0] if others else type_name]
        if stored_as.name.endswith("_K"):
            blocks = random_blocks(stored_as.name.lower(), *numbers.shape, scale=1e-4).blocks.numpy()
        else:
            blocks = quantize(numbers, stored_as)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=stored_as)
        dequantized = torch.from_numpy(np.array(dequantize(blocks, stored_as)))
        if permuted:
            order = interleaved(torch.arange(len(dequantized)), permuted[0])
            dequantized = dequantized[order.argsort()]  # undo the permutation
        weight.copy_(dequantized)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> LlamaForCausalLM:
    """Read a Llama's GGUF into a float32 transformers model, with ggml's package.

    transformers' own GGUF loader needs accelerate and is ten times slower.
    """
    reader = GGUFReader(path)

    def value(key: str) -> Any:
        return reader.get_field(f"llama.{key}").contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        peer = LlamaForCausalLM(config)
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    state = {}
    for name in peer.state_dict():
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        tensor = tensors[gguf_name("model.embed_tokens.weight" if tied else name)]
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        for part, count in heads.items():
            if f".self_attn.{part}_proj." in name:
                weight = weight[interleaved(torch.arange(len(weight)), count).argsort()]
        state[name] = weight
    peer.load_state_dict(state, assign=True)
    peer.tie_weights()
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config)  # its buffers were on the meta device too
    return peer.eval()
