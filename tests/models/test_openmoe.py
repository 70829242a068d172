"""OpenMoE against its published code as a description, in loops; what its capacity changes; its folders both ways.

test_invariants.py has the rest, of a model whose experts take all tokens.
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

import pentad
import pentad.weights
from pentad.convert import convert
from pentad.errors import BadInput, PentadError
from pentad.generate.step import PlainStep
from pentad.models import family_of
from pentad.models.language import openmoe
from pentad.nn.batch import pack
from pentad.nn.moe.losses import mixtral_balance_loss
from tests.helpers.commands import show
from tests.helpers.tiny import (
    add_tokenizer,
    assert_equal_logits,
    edit_json,
    logits_of,
    network_of,
    random_ids,
    refused,
    rms,
)
from tests.helpers.tiny_openmoe import PUBLISHED, openmoe_checkpoint, shapes

UNBOUNDED = {"router_drop_tks": False}
OPENMOE_8B = {  # as openmoe_8b_config.json beside it
    "architectures": ["OpenMoeForCausalLM"],
    "intermediate_size": 8192,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "head_dim": 128,
    "num_attention_heads": 24,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-06,
    "vocab_size": 256384,
    "hidden_act": "swiglu",
    "num_experts": 32,
    "topk": 2,
    "capacity_factor_train": 1.25,
    "capacity_factor_eval": 2.0,
    "min_capacity": 4,
    "noisy_policy": None,
    "drop_tks": True,
    "expert_parallel": None,
    "gated": True,
    "moe_layer_interval": 6,
}
OPENMOE_34B = PUBLISHED | {  # as openmoe_34b_config.json has it
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_attention_heads": 24,
    "num_experts": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 24,
}

# --- the description ------------------------------------------------------------------------------


def published(folder: Path, *chunks: list[int]) -> Tensor:
    """Logits of a sequence that comes in chunks, as modeling_openmoe.py and colossalai/moe compute them: one position,
    head, pair of numbers and expert after the other, in float64."""
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

    def attend(at: str, x: list[np.ndarray], keys: list[np.ndarray], values: list[np.ndarray]) -> None:
        for i, row in enumerate(x):
            y, position = norm(row, f"{at}.input_layernorm"), len(keys)
            q, k, v = (w[f"{at}.self_attn.{part}_proj.weight"] @ y for part in "qkv")
            keys.append(np.array([rotate(head, position) for head in np.split(k, groups)]))
            values.append(np.array(np.split(v, groups)))
            out = []
            for head, query in enumerate(np.split(q, heads)):
                query = rotate(query, position)
                scores = np.array([query @ key[head * groups // heads] for key in keys])  # not divided by anything
                p = np.exp(scores - scores.max())
                p /= p.sum()
                out.append(sum(p[j] * value[head * groups // heads] for j, value in enumerate(values)))
            x[i] = row + w[f"{at}.self_attn.o_proj.weight"] @ np.concatenate(out)

    def mixture(at: str, x: list[np.ndarray]) -> list[np.ndarray]:
        experts, k = c["num_experts"], c["router_topk"]
        capacity = math.floor(k * c["router_capacity_factor_eval"] * len(x) / experts)
        capacity = max(capacity + capacity % 2, c["router_min_capacity"])
        if not c["router_drop_tks"]:
            capacity = len(x)
        out, taken = [np.zeros(len(row)) for row in x], [0] * experts
        probabilities = [np.exp(w[f"{at}.gate_weight"] @ row) for row in x]
        probabilities = [p / p.sum() for p in probabilities]
        for choice in range(k):  # all first choices before all second ones
            for i, p in enumerate(probabilities):
                expert = int(np.argsort(-p, kind="stable")[choice])
                if taken[expert] < capacity:
                    matrices = (w[f"{at}.experts.{part}"][expert].T for part in ("wi_gate", "wi_up", "wo"))
                    out[i] = out[i] + p[expert] * gated(x[i], *matrices)
                taken[expert] += 1
        return out

    cache: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in range(c["num_hidden_layers"])]
    logits = []
    for chunk in chunks:
        stream = [w["model.embed_tokens.weight"][token] for token in chunk]
        for layer, (keys, values) in enumerate(cache):
            at = f"model.layers.{layer}"
            attend(at, stream, keys, values)
            rows = [norm(x, f"{at}.post_attention_layernorm") for x in stream]
            if (layer + 1) % c["moe_layer_interval"]:
                stream = [x + dense(y, f"{at}.mlp") for x, y in zip(stream, rows, strict=True)]
                continue
            stream = [x + y for x, y in zip(stream, mixture(f"{at}.mlp", rows), strict=True)]
            stream = [x + dense(norm(x, f"{at}.pre_extra_mlp_layernorm"), f"{at}.extra_mlp") for x in stream]
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        logits += [head @ norm(x, "model.norm") for x in stream]
    return torch.tensor(np.array(logits)).float()


def stepwise(folder: Path, *chunks: list[int]) -> Tensor:
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
def test_whole(tmp_path: Path, config: str) -> None:
    openmoe_checkpoint(tmp_path, **CONFIGS[config])
    ids = random_ids(40)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), published(tmp_path, ids))


@pytest.mark.parametrize("config", ["none dropped", "tight", "every layer, grouped keys, tied"])
def test_prefill_and_20_cached_steps(tmp_path: Path, config: str) -> None:
    openmoe_checkpoint(tmp_path, **CONFIGS[config])
    ids = random_ids(43)
    chunks = [ids[:23], *([token] for token in ids[23:])]
    ours = stepwise(tmp_path, *chunks)
    assert_equal_logits(ours, published(tmp_path, *chunks))
    if config == "none dropped":
        assert_equal_logits(ours, logits_of(network_of(tmp_path), ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Where the router decides alike; a near tie may fall the other way."""
    openmoe_checkpoint(tmp_path, dtype=dtype, **UNBOUNDED)
    exact = logits_of(network_of(tmp_path, torch.float32), random_ids(60))
    half = logits_of(network_of(tmp_path, dtype), random_ids(60))
    ratio = (half - exact).square().mean(-1).sqrt().median() / rms(exact)
    assert 0 < float(ratio) < 8 * torch.finfo(dtype).eps


# --- what a bounded capacity changes --------------------------------------------------------------


def crowded(folder: Path, **config: Any) -> Path:
    """A folder whose only mixture is in the last of two layers, and sends every token to expert 3, then to 5."""
    tiny = openmoe_checkpoint(folder, num_hidden_layers=2, **config)
    router = torch.zeros(8, 32)
    router[3], router[5] = 2.0, 1.0
    tiny.tensors["model.layers.1.mlp.gate_weight"] = router
    # Positive rows have positive scores: the token's own numbers don't matter.
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
        (42, {}, 22),  # of 21, which is odd
        (43, {}, 22),  # of 21.5
        (7, {}, 4),  # of 3, and the least
        (3, {}, 4),
        (40, {"router_capacity_factor_eval": 0.1}, 4),  # the least, of 1
        (40, {"router_capacity_factor_eval": 0.1, "router_min_capacity": 1}, 2),  # of 1, which is odd
        (40, UNBOUNDED, 40),
    ],
    ids=str,
)
def test_experts_take_the_first_tokens(tmp_path: Path, tokens: int, config: dict[str, Any], capacity: int) -> None:
    """The others pass the mixture by, but not the dense layer behind it; nothing changes for those that were taken."""
    folder, ids = crowded(tmp_path / "a", **config), random_ids(tokens)
    ours, (_, routing) = logits_of(network_of(folder), ids), network_of(folder).forward_with_routing(*pack(ids))[1]
    assert routing.experts.unique(dim=0).tolist() == [[3, 5]]
    assert routing.kept.tolist() == [[place < capacity] * 2 for place in range(tokens)]
    assert_equal_logits(ours, published(folder, ids))
    unbounded = logits_of(network_of(crowded(tmp_path / "b", **UNBOUNDED)), ids)
    assert torch.equal(ours[:capacity], unbounded[:capacity])
    if tokens <= capacity:
        return
    assert ((ours - unbounded)[capacity:].abs().amax(-1) > 0.1).all()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.wo"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_equal_logits(ours[capacity:], logits_of(network_of(folder), ids)[capacity:])


@torch.inference_mode()
def test_first_choices_go_before_second_ones(tmp_path: Path) -> None:
    """A first choice has its place though the token comes last, and a dropped one counts all the same."""
    openmoe_checkpoint(tmp_path, router_capacity_factor_eval=1.0, moe_layer_interval=4)
    *_, routing = network_of(tmp_path).forward_with_routing(*pack(random_ids(60)))[1]
    capacity, taken = 16, [0] * 8  # 2 * 1.0 * 60 / 8 = 15, made even
    for choice in (0, 1):
        for token, expert in enumerate(routing.experts[:, choice].tolist()):
            assert bool(routing.kept[token, choice]) is (taken[expert] < capacity)
            taken[expert] += 1
    dropped = [set(routing.experts[:, choice][~routing.kept[:, choice]].tolist()) for choice in (0, 1)]
    assert dropped[1] - dropped[0]


@torch.inference_mode()
def test_capacity_is_of_a_sequence_in_a_step(tmp_path: Path) -> None:
    folder, ids = crowded(tmp_path), random_ids(40)
    network = network_of(folder)
    together = network.head(network(*pack(ids, ids[:7], ids)))
    for logits, one in zip(together.split([40, 7, 40]), (ids, ids[:7], ids), strict=True):
        assert_equal_logits(logits, published(folder, one))
    steps = stepwise(folder, *([token] for token in ids))
    unbounded = published(crowded(tmp_path / "unbounded", **UNBOUNDED), ids)
    assert_equal_logits(steps, unbounded)  # a token that comes alone is never dropped


@torch.inference_mode()
def test_training_has_a_capacity_of_its_own(tmp_path: Path) -> None:
    ids = random_ids(40)
    for folder in (crowded(tmp_path / "a"), crowded(tmp_path / "b", **UNBOUNDED)):
        network = network_of(folder).train()
        _, (_, routing) = network.forward_with_routing(*pack(ids))
        assert routing.kept.sum(0).tolist() == [12, 12]  # 2 * 1.25 * 40 / 8 = 12.5


@torch.inference_mode()
def test_weights_are_the_probabilities_and_the_balance_loss_is_the_port_s(tmp_path: Path) -> None:
    tiny = openmoe_checkpoint(tmp_path, moe_layer_interval=4)
    *_, routing = network_of(tmp_path).forward_with_routing(*pack(random_ids(60)))[1]
    probabilities = routing.logits.double().softmax(-1)
    top, chosen = probabilities.topk(2)
    assert torch.equal(routing.experts, chosen)
    torch.testing.assert_close(routing.weights.double(), top, rtol=1e-5, atol=0)
    assert (routing.weights.sum(-1) < 1).all()
    went = torch.zeros_like(probabilities).scatter(1, chosen, 1.0)
    theirs = tiny.config["num_experts"] ** 2 * (went.mean(0) * probabilities.mean(0)).mean()
    torch.testing.assert_close(mixtral_balance_loss([routing]).double(), theirs, rtol=1e-5, atol=0)


# --- folders --------------------------------------------------------------------------------------


def rewritten(tiny_folder: Path, folder: Path) -> Path:
    """The same model as its rewriting without ColossalAI saves it: each expert by itself."""
    folder.mkdir()
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"architectures": ["HFOpenMoeForCausalLM"], "model_type": "openmoe"}
    (folder / "config.json").write_text(json.dumps(config))
    out = {}
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        ours = {"wi_gate": "gate_proj", "wi_up": "up_proj", "wo": "down_proj"}.get(part)
        if ours:
            out |= {f"{module}.{e}.{ours}.weight": matrix.T.contiguous() for e, matrix in enumerate(tensor)}
        else:
            out[name.replace("gate_weight", "gate.weight")] = tensor
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["published", "rewritten"])
def test_from_both_layouts_to_the_published_one(tmp_path: Path, source: str, dtype: torch.dtype) -> None:
    """And the same bits at the end."""
    tiny, ids = openmoe_checkpoint(tmp_path / "published", dtype=dtype), random_ids(40)
    start = tiny.folder if source == "published" else rewritten(tiny.folder, tmp_path / "rewritten")
    assert family_of(pentad.weights.open(start)).names.family == "openmoe"
    done = convert(start, tmp_path / "out", to="hf")
    assert (done.family, done.notes) == ("openmoe", [])
    tensors = load_file(done.path / "model.safetensors")
    assert tensors.keys() == tiny.tensors.keys()
    for name, tensor in tiny.tensors.items():
        assert tensors[name].dtype == dtype
        assert torch.equal(tensor, tensors[name]), name
    said = json.loads((done.path / "config.json").read_text())
    assert (said["model_type"], said["architectures"]) == ("llama", ["OpenMoeForCausalLM"])
    assert {name: said[name] for name in tiny.config if name in said} == {
        name: value for name, value in tiny.config.items() if name in said
    }
    assert_equal_logits(logits_of(network_of(done.path), ids), logits_of(network_of(start), ids))


def test_stacks_are_used_where_they_lie_in_the_file(tmp_path: Path) -> None:
    openmoe_checkpoint(tmp_path)
    experts = network_of(tmp_path).layers[1].feedforward.experts
    assert experts.gate_proj.weight.shape == (8, 96, 32)
    assert experts.gate_proj.weight.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("to", ["gguf", "mistral"])
def test_there_are_no_other_files(tmp_path: Path, to: str) -> None:
    openmoe_checkpoint(tmp_path / "a")
    with pytest.raises(BadInput, match=r"files can't store this openmoe model"):
        convert(tmp_path / "a", tmp_path / ("m.gguf" if to == "gguf" else "b"), to=to)


def test_a_llama_is_a_llama(tmp_path: Path) -> None:
    """OpenMoE's config.json says "llama", and only its class says what it is."""
    openmoe_checkpoint(tmp_path)
    for architectures in (["LlamaForCausalLM"], None, "OpenMoeForCausalLM", [3]):
        edit_json(tmp_path / "config.json", architectures=architectures)
        assert family_of(pentad.weights.open(tmp_path)).names.family == "llama"


def test_older_names(tmp_path: Path) -> None:
    openmoe_checkpoint(tmp_path, router_capacity_factor_eval=0.5, router_min_capacity=1)
    expected = logits_of(network_of(tmp_path), random_ids(40))
    names = openmoe.OpenMoeConfig.OLD_HF_NAMES
    config = json.loads((tmp_path / "config.json").read_text())
    edit_json(tmp_path / "config.json", **{old: config[new] for old, new in names.items()}, model_type=None)
    edit_json(tmp_path / "config.json", **dict.fromkeys(names.values()))
    assert torch.equal(logits_of(network_of(tmp_path), random_ids(40)), expected)


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "parameters", "active"),
    [
        (PUBLISHED, 799_663_104, 535_421_952),
        (OPENMOE_8B, 11_855_046_656, 3_801_982_976),
        (OPENMOE_34B, 46_270_737_408, 10_031_950_848),
    ],
    ids=["base", "8B", "34B"],
)
def test_parameters(tmp_path: Path, config: dict[str, Any], parameters: int, active: int) -> None:
    """Of the configs in ColossalAI's repository: what the port builds of them, with gates of twice the width and a head
    of its own. The names say less: they count feed-forward layers of three equal matrices and no head."""
    facts = show(tmp_path, {**config, "model_type": "llama"})
    assert facts["family"] == "openmoe"
    assert (facts["parameters"], facts["active_parameters"]) == (parameters, active)
    said = {**config, "num_key_value_heads": config["num_attention_heads"], "tie_word_embeddings": False}
    sizes = {name: math.prod(shape) for name, shape in shapes(said).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert sum(sizes.values()) == parameters
    assert experts * (config["num_experts"] - 2) // config["num_experts"] == parameters - active


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"router_topk": 9}, "top_k is 9 with 8 experts"),
        ({"num_experts": 7}, "model.layers.1.mlp.gate_weight is [8, 32], the config asks for [7, 32]"),
        ({"num_experts": None}, "the config lacks num_experts"),
        ({"num_experts": 0}, "num_experts is 0, which is not a possible size"),
        ({"num_experts": 10**7}, "10000000 experts of"),
        ({"moe_layer_interval": None}, "the config lacks moe_layer_interval"),
        ({"moe_layer_interval": 4}, "not used: model.layers.1"),
        ({"moe_layer_interval": 0}, "moe_layer_interval is 0, which is not a possible size"),
        ({"router_min_capacity": 0}, "router_min_capacity is 0, which is not a possible size"),
        ({"router_capacity_factor_eval": 0}, "router_capacity_factor_eval is 0, which is not a possible size"),
        ({"router_capacity_factor_train": -1.5}, "router_capacity_factor_train is -1.5, which is not a possible size"),
        ({"router_drop_tks": "no"}, "router_drop_tks is 'no', not of type bool"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"mlp_gated": False}, "mlp_gated is false"),
        ({"head_dim": 11}, "heads of 11 dimensions"),
        ({"head_dim": 8}, "model.layers.0.self_attn.q_proj.weight is [48, 32], the config asks for [32, 32]"),
    ],
    ids=str,
)
def test_configs_that_are_wrong(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    openmoe_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", **edit)
    assert message in refused(tmp_path)


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    tiny = openmoe_checkpoint(tmp_path / "a")
    del tiny.tensors["model.layers.3.mlp.experts.wo"]
    save_file(tiny.tensors, tmp_path / "a/model.safetensors", metadata={"format": "pt"})
    assert "1 missing: model.layers.3.mlp.experts.wo" in refused(tmp_path / "a")
    openmoe_checkpoint(tmp_path / "a")
    folder = rewritten(tmp_path / "a", tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    gone = [f"model.layers.1.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up", "down")]
    for name in gone:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(folder)
    assert "3 missing" in message
    assert all(name in message for name in gone)
    assert "not used" not in message


def test_a_layer_in_the_other_layout(tmp_path: Path) -> None:
    openmoe_checkpoint(tmp_path / "a", num_hidden_layers=6)
    folder = rewritten(tmp_path / "a", tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp" not in name}
    stacked = load_file(tmp_path / "a/model.safetensors")
    mixed |= {name: tensor for name, tensor in stacked.items() if "layers.1.mlp" in name}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused(folder)
    assert "25 missing: model.layers.1.mlp.gate.weight" in message
    assert "4 not used: model.layers.1.mlp" in message


def test_a_router_that_is_not_a_number_is_told(tmp_path: Path) -> None:
    tiny = openmoe_checkpoint(tmp_path, vocab_size=264)
    tiny.tensors["model.layers.3.mlp.gate_weight"].fill_(torch.nan)
    save_file(tiny.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    add_tokenizer(tmp_path)
    model = pentad.load(tmp_path)
    for use in (model.complete, model.score):
        with pytest.raises(PentadError, match=r"logits are not numbers .*: its weights are damaged"):
            use("text")
    with pytest.raises(PentadError, match=r"logits are not numbers .*: its weights are damaged"):
        model.chat([{"role": "user", "content": "text"}])
