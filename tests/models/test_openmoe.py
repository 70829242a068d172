"""OpenMoE: logits and capacity, against a float64 reference of its published code.

test_invariants.py tests caching and batching, with unbounded capacity.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pentad.generate.step import PlainStep
from pentad.nn.batch import pack
from pentad.nn.moe.losses import mixtral_balance_loss
from tests.helpers.tiny import assert_equal_logits, logits_of, network_of, random_ids, rms
from tests.helpers.tiny_openmoe import openmoe_checkpoint

UNBOUNDED = {"router_drop_tks": False}

# --- reference ------------------------------------------------------------------------------------


def reference_logits(folder: Path, *chunks: list[int]) -> Tensor:
    """Compute a chunked sequence's logits in float64 as modeling_openmoe.py and colossalai/moe do, one position, head
    and expert at a time."""
    c = json.loads((folder / "config.json").read_text())
    w = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    heads, groups, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / math.sqrt((x * x).mean() + c["rms_norm_eps"]) * w[f"{name}.weight"]

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        y = np.empty(dim)
        for i in range(dim // 2):
            angle, j = position * 10000.0 ** (-2 * i / dim), i + dim // 2
            y[i] = x[i] * math.cos(angle) - x[j] * math.sin(angle)
            y[j] = x[j] * math.cos(angle) + x[i] * math.sin(angle)
        return y

    def gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        x1, x2 = np.split(gate @ x, 2)
        return down @ (x1 * (x2 / (1 + np.exp(-x2))) * (up @ x))

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return gated(x, *(w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")))

    def attend(prefix: str, x: list[np.ndarray], keys: list[np.ndarray], values: list[np.ndarray]) -> None:
        for i, row in enumerate(x):
            y, position = norm(row, f"{prefix}.input_layernorm"), len(keys)
            q, k, v = (w[f"{prefix}.self_attn.{part}_proj.weight"] @ y for part in "qkv")
            keys.append(np.array([rotate(head, position) for head in np.split(k, groups)]))
            values.append(np.array(np.split(v, groups)))
            out = []
            for head, query in enumerate(np.split(q, heads)):
                query = rotate(query, position)
                scores = np.array([query @ key[head * groups // heads] for key in keys])  # not divided by sqrt(dim)
                p = np.exp(scores - scores.max())
                p /= p.sum()
                out.append(sum(p[j] * value[head * groups // heads] for j, value in enumerate(values)))
            x[i] = row + w[f"{prefix}.self_attn.o_proj.weight"] @ np.concatenate(out)

    def mixture(prefix: str, x: list[np.ndarray]) -> list[np.ndarray]:
        experts, k = c["num_experts"], c["router_topk"]
        capacity = math.floor(k * c["router_capacity_factor_eval"] * len(x) / experts)
        capacity = max(capacity + capacity % 2, c["router_min_capacity"])
        if not c["router_drop_tks"]:
            capacity = len(x)
        out, used = [np.zeros(len(row)) for row in x], [0] * experts
        probabilities = [np.exp(w[f"{prefix}.gate_weight"] @ row) for row in x]
        probabilities = [p / p.sum() for p in probabilities]
        for choice in range(k):  # all first choices before all second ones
            for i, p in enumerate(probabilities):
                expert = int(np.argsort(-p, kind="stable")[choice])
                if used[expert] < capacity:
                    matrices = (w[f"{prefix}.experts.{part}"][expert].T for part in ("wi_gate", "wi_up", "wo"))
                    out[i] = out[i] + p[expert] * gated(x[i], *matrices)
                used[expert] += 1
        return out

    cache: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in range(c["num_hidden_layers"])]
    logits = []
    for chunk in chunks:
        stream = [w["model.embed_tokens.weight"][token] for token in chunk]
        for layer, (keys, values) in enumerate(cache):
            prefix = f"model.layers.{layer}"
            attend(prefix, stream, keys, values)
            rows = [norm(x, f"{prefix}.post_attention_layernorm") for x in stream]
            if (layer + 1) % c["moe_layer_interval"]:
                stream = [x + dense(y, f"{prefix}.mlp") for x, y in zip(stream, rows, strict=True)]
                continue
            stream = [x + y for x, y in zip(stream, mixture(f"{prefix}.mlp", rows), strict=True)]
            stream = [x + dense(norm(x, f"{prefix}.pre_extra_mlp_layernorm"), f"{prefix}.extra_mlp") for x in stream]
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        logits += [head @ norm(x, "model.norm") for x in stream]
    return torch.tensor(np.array(logits)).float()


def cached_logits(folder: Path, *chunks: list[int]) -> Tensor:
    run = PlainStep(network_of(folder), page_size=4)
    sequence = run.cache.open(sum(map(len, chunks)))
    return torch.cat([run([(sequence, chunk)], range(len(chunk))) for chunk in chunks])


CONFIGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "none dropped": UNBOUNDED,
    "tight": {"router_capacity_factor_eval": 0.5, "router_min_capacity": 1},
    "tight, 3 of 5, every third": {
        "num_experts": 5,
        "router_topk": 3,
        "moe_layer_interval": 3,
        "router_capacity_factor_eval": 0.4,
    },
    "every layer, grouped keys, tied": {
        "moe_layer_interval": 1,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
    "dense": {"moe_layer_interval": 5},
    "one expert": {"router_topk": 1, "rms_norm_eps": 0.01},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_uncached_logits(tmp_path: Path, config: str) -> None:
    openmoe_checkpoint(tmp_path, **CONFIGS[config])
    ids = random_ids(40)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), reference_logits(tmp_path, ids))


@pytest.mark.parametrize("config", ["none dropped", "tight", "every layer, grouped keys, tied"])
def test_prefill_and_20_cached_steps(tmp_path: Path, config: str) -> None:
    openmoe_checkpoint(tmp_path, **CONFIGS[config])
    ids = random_ids(43)
    chunks = [ids[:23], *([token] for token in ids[23:])]
    ours = cached_logits(tmp_path, *chunks)
    assert_equal_logits(ours, reference_logits(tmp_path, *chunks))
    if config == "none dropped":
        assert_equal_logits(ours, logits_of(network_of(tmp_path), ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Compares the median token: a router's near tie may choose another expert in half precision."""
    openmoe_checkpoint(tmp_path, dtype=dtype, **UNBOUNDED)
    exact = logits_of(network_of(tmp_path, torch.float32), random_ids(60))
    half = logits_of(network_of(tmp_path, dtype), random_ids(60))
    ratio = (half - exact).square().mean(-1).sqrt().median() / rms(exact)
    assert 0 < float(ratio) < 8 * torch.finfo(dtype).eps


# --- capacity -------------------------------------------------------------------------------------


def crowded(folder: Path, **config: Any) -> Path:
    """Save a model of two layers, whose mixture is in the last and always chooses experts 3 and 5."""
    tiny = openmoe_checkpoint(folder, num_hidden_layers=2, **config)
    router = torch.zeros(8, 32)
    router[3], router[5] = 2.0, 1.0
    tiny.tensors["model.layers.1.mlp.gate_weight"] = router
    # The mixture's input has one nonzero dimension, which is positive for every token.
    tiny.tensors["model.layers.1.post_attention_layernorm.weight"] = torch.zeros(32)
    tiny.tensors["model.layers.1.post_attention_layernorm.weight"][0] = 1.0
    tiny.tensors["model.embed_tokens.weight"][:, 0] = 20.0
    save_file(tiny.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.inference_mode()
@pytest.mark.parametrize(
    ("tokens", "config", "capacity"),
    [
        (40, {}, 20),  # 2 * 2.0 * 40 / 8
        (42, {}, 22),  # 21, rounded up to an even number
        (43, {}, 22),  # 21.5, rounded down to 21, then up to an even number
        (7, {}, 4),  # the minimum
        (3, {}, 4),
        (40, {"router_capacity_factor_eval": 0.1}, 4),  # the minimum
        (40, {"router_capacity_factor_eval": 0.1, "router_min_capacity": 1}, 2),  # 1, rounded up to an even number
        (40, UNBOUNDED, 40),
    ],
    ids=str,
)
def test_experts_accept_the_first_tokens(tmp_path: Path, tokens: int, config: dict[str, Any], capacity: int) -> None:
    """Dropped tokens skip the mixture, but not the dense layer after it; accepted tokens don't change."""
    folder, ids = crowded(tmp_path / "a", **config), random_ids(tokens)
    ours, (_, routing) = logits_of(network_of(folder), ids), network_of(folder).forward_with_routing(*pack(ids))[1]
    assert routing.experts.unique(dim=0).tolist() == [[3, 5]]
    assert routing.kept.tolist() == [[position < capacity] * 2 for position in range(tokens)]
    assert_equal_logits(ours, reference_logits(folder, ids))
    unbounded = logits_of(network_of(crowded(tmp_path / "b", **UNBOUNDED)), ids)
    assert_equal_logits(ours[:capacity], unbounded[:capacity])  # a matmul of fewer rows may round otherwise
    if tokens <= capacity:
        return
    assert ((ours - unbounded)[capacity:].abs().amax(-1) > 0.1).all()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.wo"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_equal_logits(ours[capacity:], logits_of(network_of(folder), ids)[capacity:])


@torch.inference_mode()
def test_first_choices_come_before_second_choices(tmp_path: Path) -> None:
    """The last token's first choice precedes every second choice. Dropped choices count towards the capacity."""
    openmoe_checkpoint(tmp_path, router_capacity_factor_eval=1.0, moe_layer_interval=4)
    *_, routing = network_of(tmp_path).forward_with_routing(*pack(random_ids(60)))[1]
    capacity, used = 16, [0] * 8  # 2 * 1.0 * 60 / 8 = 15, rounded up to an even number
    for choice in (0, 1):
        for token, expert in enumerate(routing.experts[:, choice].tolist()):
            assert bool(routing.kept[token, choice]) is (used[expert] < capacity)
            used[expert] += 1
    dropped = [set(routing.experts[:, choice][~routing.kept[:, choice]].tolist()) for choice in (0, 1)]
    assert dropped[1] - dropped[0]


@torch.inference_mode()
def test_each_sequence_of_a_step_has_its_own_capacity(tmp_path: Path) -> None:
    folder, ids = crowded(tmp_path), random_ids(40)
    network = network_of(folder)
    batched = network.head(network(*pack(ids, ids[:7], ids)))
    for logits, one in zip(batched.split([40, 7, 40]), (ids, ids[:7], ids), strict=True):
        assert_equal_logits(logits, reference_logits(folder, one))
    steps = cached_logits(folder, *([token] for token in ids))
    unbounded = reference_logits(crowded(tmp_path / "unbounded", **UNBOUNDED), ids)
    assert_equal_logits(steps, unbounded)  # a step of one token drops none


@torch.inference_mode()
def test_training_uses_router_capacity_factor_train(tmp_path: Path) -> None:
    ids = random_ids(40)
    for folder in (crowded(tmp_path / "a"), crowded(tmp_path / "b", **UNBOUNDED)):
        network = network_of(folder).train()
        _, (_, routing) = network.forward_with_routing(*pack(ids))
        assert routing.kept.sum(0).tolist() == [12, 12]  # 2 * 1.25 * 40 / 8 = 12.5


@torch.inference_mode()
def test_weights_are_probabilities_and_the_balance_loss_is_colossalais(tmp_path: Path) -> None:
    tiny = openmoe_checkpoint(tmp_path, moe_layer_interval=4)
    *_, routing = network_of(tmp_path).forward_with_routing(*pack(random_ids(60)))[1]
    probabilities = routing.logits.double().softmax(-1)
    top, chosen = probabilities.topk(2)
    assert torch.equal(routing.experts, chosen)
    torch.testing.assert_close(routing.weights.double(), top, rtol=1e-5, atol=0)
    assert (routing.weights.sum(-1) < 1).all()
    assigned = torch.zeros_like(probabilities).scatter(1, chosen, 1.0)
    theirs = tiny.config["num_experts"] ** 2 * (assigned.mean(0) * probabilities.mean(0)).mean()
    torch.testing.assert_close(mixtral_balance_loss([routing]).double(), theirs, rtol=1e-5, atol=0)
