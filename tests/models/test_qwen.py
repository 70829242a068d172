"""The first Qwen against transformers' Qwen2, and with dynamic NTK and log-n attention against float64 loops."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pentad.weights
from pentad.convert import convert
from pentad.generate.plan_step import PlanStep
from pentad.generate.step import PlainStep
from pentad.models.language import qwen
from pentad.models.language.config import read_family_config, write_family_config
from pentad.weights.checkpoint import Checkpoint
from tests.helpers.gguf_file import stored, write_file
from tests.helpers.gguf_llama import NAMES
from tests.helpers.tiny import (
    assert_equal_logits,
    contains,
    edit_json,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    refused,
    rms,
    tiny_peer,
)
from tests.helpers.tiny_qwen import qwen_checkpoint

# --- without dynamic NTK and log-n attention --------------------------------------------------------


def test_uncached_logits(tmp_path: Path) -> None:
    tiny, ids = qwen_checkpoint(tmp_path), random_ids(60)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


@torch.inference_mode()
def test_prefill_and_20_cached_steps(tmp_path: Path) -> None:
    tiny, ids = qwen_checkpoint(tmp_path), random_ids(43)
    run = PlainStep(network_of(tmp_path), page_size=4)
    sequence = run.cache.open(23)
    ours = [run([(sequence, ids[:23])], range(23))]
    ours += [run([(sequence, [token])], [0]) for token in ids[23:]]
    out = tiny.peer(torch.tensor([ids[:23]]), use_cache=True)
    theirs = [out.logits[0]]
    for token in ids[23:]:
        out = tiny.peer(torch.tensor([[token]]), past_key_values=out.past_key_values)
        theirs.append(out.logits[0])
    assert_equal_logits(torch.cat(ours), torch.cat(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny = qwen_checkpoint(tmp_path, dtype=dtype)
    half, whole = network_of(tmp_path, dtype), network_of(tmp_path, torch.float32)
    ours = theirs = 0.0
    for ids in (random_ids(60, seed=i) for i in range(8)):
        exact = logits_of(whole, ids)
        ours += rms(logits_of(half, ids) - exact)
        theirs += rms(peer_logits(tiny.peer, ids) - exact)
    assert 0 < ours <= 1.2 * theirs


def test_the_names_of_august_2023(tmp_path: Path) -> None:
    tiny, ids = qwen_checkpoint(tmp_path), random_ids(20)
    config = json.loads((tmp_path / "config.json").read_text())
    older = {new: config[new] for new in qwen.QwenConfig.OLD_HF_NAMES.values()}
    edit_json(
        tmp_path / "config.json",
        **dict.fromkeys(older),
        **{old: older[new] for old, new in qwen.QwenConfig.OLD_HF_NAMES.items()},
        padded_vocab_size=96,
        activation="swiglu",
    )
    network = network_of(tmp_path)
    assert network.config.max_position_embeddings == 256
    assert_equal_logits(logits_of(network, ids), peer_logits(tiny.peer, ids))


# --- with dynamic NTK and log-n attention -----------------------------------------------------------

OPTIONS = {
    "dynamic ntk": {"use_dynamic_ntk": True},
    "log-n": {"use_logn_attn": True},
    "both": {"use_dynamic_ntk": True, "use_logn_attn": True},
}


def reference_logits(folder: Path, ids: list[int], prompt: int) -> torch.Tensor:
    """Compute logits in float64 as modeling_qwen.py does, position by position and head by head.

    `prompt` is the number of prefilled tokens; the other tokens are decoded one by one.
    """
    c = json.loads((folder / "config.json").read_text())
    w = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, dim = c["num_attention_heads"], c["kv_channels"]
    base = float(c["rotary_emb_base"])
    if c["use_dynamic_ntk"]:
        context = math.log(prompt / c["seq_length"], 2) + 1
        base *= max(2 ** math.ceil(context) - 1, 1) ** (dim / (dim - 2))

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / math.sqrt((x * x).mean() + c["layer_norm_epsilon"]) * w[f"{name}.weight"]

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        y, turned = x.copy(), int(dim * c["rotary_pct"])
        for i in range(turned // 2):
            angle, j = position * base ** (-2 * i / turned), i + turned // 2
            y[i] = x[i] * math.cos(angle) - x[j] * math.sin(angle)
            y[j] = x[j] * math.cos(angle) + x[i] * math.sin(angle)
        return y

    stream = [w["transformer.wte.weight"][token] for token in ids]
    for layer in range(c["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}"
        keys: list[list[np.ndarray]] = []
        values: list[list[np.ndarray]] = []
        for position, x in enumerate(stream):
            q, k, v = np.split(linear(norm(x, f"{prefix}.ln_1"), f"{prefix}.attn.c_attn"), 3)
            keys.append([rotate(head, position) for head in np.split(k, heads)])
            values.append(np.split(v, heads))
            out = []
            for head, query in enumerate(np.split(q, heads)):
                query = rotate(query, position)
                if c["use_logn_attn"] and position + 1 > c["seq_length"]:
                    query = query * math.log(position + 1, c["seq_length"])
                scores = np.array([query @ key[head] for key in keys]) / math.sqrt(dim)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out.append(sum(weight * value[head] for weight, value in zip(weights, values, strict=True)))
            x = x + linear(np.concatenate(out), f"{prefix}.attn.c_proj")
            y = norm(x, f"{prefix}.ln_2")
            gate = linear(y, f"{prefix}.mlp.w2")
            stream[position] = x + linear(
                linear(y, f"{prefix}.mlp.w1") * gate / (1 + np.exp(-gate)), f"{prefix}.mlp.c_proj"
            )
    return torch.tensor(np.array([w["lm_head.weight"] @ norm(x, "transformer.ln_f") for x in stream])).float()


@pytest.mark.parametrize("tokens", [15, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("options", OPTIONS)
def test_dynamic_ntk_and_log_n_attention(tmp_path: Path, options: str, tokens: int) -> None:
    tiny, ids = qwen_checkpoint(tmp_path, seq_length=16, **OPTIONS[options]), random_ids(tokens)
    ours = logits_of(network_of(tmp_path), ids)
    assert_equal_logits(ours, reference_logits(tmp_path, ids, tokens))
    difference = float((ours - peer_logits(tiny.peer, ids)).abs().max())
    assert difference > 0.01 if tokens > 16 else difference < 1e-4


@pytest.mark.parametrize("prompt", [10, 17, 33])
def test_dynamic_ntk_and_log_n_attention_with_a_cache(tmp_path: Path, prompt: int) -> None:
    """The prompt's length determines the base of all later tokens; the log-n factor depends on each position."""
    qwen_checkpoint(tmp_path, seq_length=16, **OPTIONS["both"])
    ids = random_ids(prompt + 20)
    run = PlainStep(network_of(tmp_path), page_size=4)
    sequence = run.cache.open(prompt)
    ours = [run([(sequence, ids[:prompt])], range(prompt))]
    ours += [run([(sequence, [token])], [0]) for token in ids[prompt:]]
    assert_equal_logits(torch.cat(ours), reference_logits(tmp_path, ids, prompt))


def test_biases_and_partial_rotation(tmp_path: Path) -> None:
    """No published config uses these options."""
    tiny = qwen_checkpoint(tmp_path, no_bias=False)
    state = load_file(tmp_path / "model.safetensors")
    parts = [name.removesuffix(".weight") for name in state if "c_proj" in name or ".w1." in name or ".w2." in name]
    without = logits_of(network_of(_with_biases(tmp_path, state, parts, 0.0)), random_ids(20))
    assert_equal_logits(without, peer_logits(tiny.peer, random_ids(20)))
    network = network_of(_with_biases(tmp_path, state, parts, 0.5))
    assert_equal_logits(logits_of(network, random_ids(20)), reference_logits(tmp_path, random_ids(20), 20))
    edit_json(tmp_path / "config.json", rotary_pct=0.5)
    assert_equal_logits(logits_of(network_of(tmp_path), random_ids(20)), reference_logits(tmp_path, random_ids(20), 20))


def _with_biases(folder: Path, state: Mapping[str, torch.Tensor], parts: list[str], size: float) -> Path:
    biases = {f"{part}.bias": size * torch.randn(state[f"{part}.weight"].shape[0]) for part in parts}
    save_file({**state, **biases}, folder / "model.safetensors")
    return folder


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"seq_length": None, "use_logn_attn": True}, "use_dynamic_ntk and use_logn_attn need a seq_length"),
        ({"seq_length": 1, "use_dynamic_ntk": True}, "need a seq_length of at least 2"),
        ({"seq_length": None, "use_dynamic_ntk": None, "use_logn_attn": None}, "need a seq_length of at least 2"),
        ({"rotary_pct": 0.4}, "RoPE rotates 3 of 8 dimensions"),
        ({"kv_channels": 6}, "transformer.h.0.attn.c_attn.weight is [96, 32]…[72, 32]"),
        ({"intermediate_size": 48}, "transformer.h.0.mlp.w1.weight is [48, 32]…[24, 32]"),
        ({"no_bias": False}, "8 missing: "),
    ],
    ids=str,
)
def test_an_invalid_config_is_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    qwen_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", **edit)
    assert contains(refused(tmp_path), message)


def test_seq_length_is_optional_without_dynamic_ntk_and_log_n(tmp_path: Path) -> None:
    tiny, ids = qwen_checkpoint(tmp_path, seq_length=None), random_ids(9)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


# --- GGUF -----------------------------------------------------------------------------------------


def write_qwen(path: Path, peer: nn.Module, type_name: str = "F32", **metadata: int) -> Path:
    """Write a GGUF as llama.cpp's converter does; `metadata` has "__" for dots."""
    c, tensors = peer.config, {}
    for name, array in stored(peer, type_name).items():
        module, _, end = name.rpartition(".")
        if module.startswith("model.layers."):
            number, part = module.removeprefix("model.layers.").split(".", 1)
            tensors[f"blk.{number}.{NAMES[part]}.{end}"] = array
        else:
            tensors[f"{NAMES[module]}.{end}"] = array
    for layer in range(c.num_hidden_layers):
        for end in ("weight", "bias"):
            qkv = [tensors.pop(f"blk.{layer}.attn_{p}.{end}") for p in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.{end}"] = np.concatenate(qkv)
    known = {
        "context_length": 256,
        "block_count": 2,
        "embedding_length": c.hidden_size,
        "feed_forward_length": 2 * c.intermediate_size,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": c.hidden_size // 4,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    given = {key.replace("__", "."): value for key, value in metadata.items()}
    write_file(path, "qwen", {**known, **given}, tensors, type_name)
    return path


@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q8_0", "Q4_1"])
def test_gguf_logits_match_transformers(tmp_path: Path, type_name: str) -> None:
    peer = tiny_peer(family="qwen2", num_key_value_heads=4, hidden_size=64, intermediate_size=96)
    file, ids = write_qwen(tmp_path / "m.gguf", peer, type_name), random_ids(60)
    assert_equal_logits(logits_of(network_of(file), ids), peer_logits(peer, ids))


@pytest.mark.parametrize("dims", [2, 6, 8])
def test_a_gguf_may_rotate_a_part_of_each_head(tmp_path: Path, dims: int) -> None:
    tiny, ids = qwen_checkpoint(tmp_path / "hf", rotary_pct=dims / 8), random_ids(60)
    files = [write_qwen(tmp_path / "a.gguf", tiny.peer, rope__dimension_count=dims)]
    files += convert(tiny.folder, tmp_path / "b.gguf", to="gguf").files
    expected = reference_logits(tiny.folder, ids, len(ids))
    for network in map(network_of, (tiny.folder, *files)):
        assert network.config.rotary_dim == dims
        assert_equal_logits(logits_of(network, ids), expected)
        kernels = PlanStep(network)
        assert_equal_logits(kernels([(kernels.cache.open(len(ids)), ids)], range(len(ids))), expected)


@pytest.mark.parametrize(("dims", "head"), [(30, 44), (26, 46), (62, 78)])
def test_a_share_of_a_head_that_is_no_round_number(dims: int, head: int) -> None:
    config = qwen.QwenConfig(
        vocab_size=8, hidden_size=head, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=head
    )
    assert replace(config, rotary_pct=dims / head).rotary_dim == dims


@pytest.mark.parametrize("dims", [0, 3, 10])
def test_a_gguf_that_rotates_an_impossible_part_is_refused(tmp_path: Path, dims: int) -> None:
    tiny = qwen_checkpoint(tmp_path / "hf")
    file = write_qwen(tmp_path / "m.gguf", tiny.peer, rope__dimension_count=dims)
    assert f"qwen.rope.dimension_count is {dims}; expected an even number up to 8" in refused(file)


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_written_config_reads_back(tmp_path: Path, format: str) -> None:
    qwen_checkpoint(tmp_path, layer_norm_epsilon=0.01, rotary_emb_base=500, **({"seq_length": 7} | OPTIONS["both"]))
    checkpoint = pentad.weights.open(tmp_path)
    config = read_family_config(qwen.FAMILY, checkpoint)
    written = write_family_config(qwen.FAMILY, config, format)
    tensors = {"token_embd.weight": checkpoint.tensors["transformer.wte.weight"], "output.weight": None}
    again = read_family_config(
        qwen.FAMILY, Checkpoint(tmp_path, format, written, {}, tensors if format == "gguf" else {})
    )
    lost = {"seq_length", "use_dynamic_ntk", "use_logn_attn"} if format == "gguf" else set()
    differ = {name for name, value in vars(config).items() if getattr(again, name) != value}
    assert differ - {"rope_parameters"} == lost
    if format == "hf":
        original = json.loads((tmp_path / "config.json").read_text())
        common = set(written) & set(original)
        assert {name: original[name] for name in common} == {name: written[name] for name in common}
        assert set(written) - set(original) <= {"initializer_range"}
