"""A dense model upcycled to a Mixtral gives the same logits, and its experts and routers can be trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from pentad.convert import convert
from pentad.errors import BadInput
from pentad.nn.batch import pack
from pentad.upcycle import Upcycling
from tests.helpers.conversions import LINEAR, LLAMA3, WIDE, YARN, assert_same_bits, tensors_of
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.tiny import (
    assert_equal_logits,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    talking_checkpoint,
    tiny_checkpoint,
    tiny_peer,
)

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, wide heads": {"head_dim": 20},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "llama, linear": {"rope_parameters": LINEAR},
    "llama, yarn": {"rope_parameters": YARN},
    "mistral, window": {"family": "mistral", "sliding_window": 12},
}


@pytest.mark.parametrize("name", DENSE)
def test_logits_equal_the_dense_models_in_pentad_and_transformers(name: str, tmp_path: Path) -> None:
    tiny, ids = tiny_checkpoint(tmp_path / "a", **DENSE[name]), random_ids(80)
    result = convert(tiny.folder, tmp_path / "b", to="hf", upcycle=Upcycling(experts=4, top_k=3))
    assert (result.family, result.notes) == ("mixtral", [])
    expected = peer_logits(tiny.peer, ids)
    assert_equal_logits(logits_of(network_of(tmp_path / "b"), ids), expected)
    peer, seen = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", attn_implementation="eager", output_loading_info=True
    )
    assert isinstance(peer, MixtralForCausalLM)
    assert not any(seen.values())
    assert (peer.config.num_local_experts, peer.config.num_experts_per_tok) == (4, 3)
    assert (peer.config.eos_token_id, peer.dtype) == (tiny.peer.config.eos_token_id, torch.float32)
    assert_equal_logits(peer_logits(peer, ids), expected)
    assert ("lm_head.weight" in tensors_of(tmp_path / "b")) is ("tied" not in name)


@pytest.mark.parametrize("to", ["mistral", "gguf"])
def test_upcycling_from_other_formats_and_converting_back(to: str, tmp_path: Path) -> None:
    tiny, ids = tiny_checkpoint(tmp_path / "a"), random_ids(40)
    names = [tmp_path / f"{name}{'.gguf' if to == 'gguf' else ''}" for name in ("there", "mixture")]
    convert(tiny.folder, names[0], to=to)
    convert(names[0], tmp_path / "b", to="hf", dtype="float32", upcycle=Upcycling())
    convert(tmp_path / "b", names[1], to=to)
    for path in (tmp_path / "b", names[1]):
        assert_equal_logits(logits_of(network_of(path), ids), peer_logits(tiny.peer, ids))


def test_upcycling_quantized_weights(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", peer := tiny_peer(**WIDE), "Q4_1")
    convert(tmp_path / "a.gguf", tmp_path / "b", to="hf", dtype="float32", upcycle=Upcycling())
    ids = random_ids(40)
    assert_equal_logits(logits_of(network_of(tmp_path / "b"), ids), peer_logits(peer, ids))
    convert(tmp_path / "a.gguf", tmp_path / "half", to="hf", upcycle=Upcycling())
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.bfloat16}


def test_tensors_keep_their_bits(tmp_path: Path) -> None:
    """Each expert is a copy of the dense layer; all other tensors except routers are unchanged."""
    tiny_checkpoint(tmp_path / "a", dtype=torch.bfloat16)
    convert(tmp_path / "a", tmp_path / "b", to="hf", upcycle=Upcycling(experts=3, top_k=1), shard_bytes=9_000)
    before, after = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for name, tensor in before.items():
        layer, mlp, part = name.partition(".mlp.")
        theirs = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}.get(part)
        copies = [f"{layer}.block_sparse_moe.experts.{e}.{theirs}.weight" for e in range(3)] if mlp else [name]
        assert all(torch.equal(after.pop(copy), tensor) for copy in copies), name
    assert after.keys() == {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)}


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a")
    seeds = {"b": 0, "c": 0, "d": 1}
    files = {
        name: {
            path.name: path.read_bytes()
            for path in convert(tmp_path / "a", tmp_path / name, to="hf", upcycle=Upcycling(seed=seed)).files
        }
        for name, seed in seeds.items()
    }
    assert files["b"] == files["c"]
    assert files["b"]["config.json"] == files["d"]["config.json"]
    one, other = tensors_of(tmp_path / "b"), tensors_of(tmp_path / "d")
    routers = sorted(name for name in one if name.endswith(".gate.weight"))
    assert not torch.equal(one[routers[0]], one[routers[1]])
    assert not any(torch.equal(one.pop(name), other.pop(name)) for name in routers)
    assert_same_bits(one, other)


def test_experts_diverge_and_routers_get_gradients(tmp_path: Path) -> None:
    """Experts process different tokens, so they diverge after one step. The router's gradient is zero while the experts
    are equal, and nonzero after that."""
    tiny_checkpoint(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="hf", upcycle=Upcycling(experts=4, top_k=2))
    network, ids = network_of(tmp_path / "b").requires_grad_(), random_ids(200)
    routers = [layer.feedforward.router.weight for layer in network.layers]
    norms = []
    for _ in range(2):
        network.zero_grad()
        hidden_ND, routings = network.forward_with_routing(*pack(ids))
        assert all(len(routing.experts.unique()) == 4 for routing in routings)
        loss = torch.nn.functional.cross_entropy(network.head(hidden_ND)[:-1], torch.tensor(ids[1:]))
        loss.backward()
        norms.append(min(float(router.grad.norm()) for router in routers))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.5 * parameter.grad
    assert norms[0] < 1e-5
    assert norms[1] > 1e-3
    for layer in network.layers:
        stack = layer.feedforward.experts.up_proj.weight
        assert all(not torch.equal(stack[0], other) for other in stack[1:])


def test_the_tokenizer_is_kept(tmp_path: Path) -> None:
    from pentad import load

    talking_checkpoint(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to="hf", upcycle=Upcycling())
    one, other = (load(tmp_path / name).complete("Grüße", max_tokens=8, temperature=0) for name in "ab")
    assert one.token_ids == other.token_ids


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"family": "qwen2"}, {}, "a qwen2 model can't be upcycled"),
        ({"family": "mixtral"}, {}, "a mixtral model can't be upcycled"),
        ({"attention_bias": True}, {}, "has biases (attention_bias); Mixtral supports none"),
        ({"mlp_bias": True}, {}, "has biases (mlp_bias)"),
        ({}, {"upcycle": Upcycling(experts=2, top_k=3)}, "top_k is 3 with 2 experts"),
        ({}, {"upcycle": Upcycling(experts=0)}, "num_local_experts is 0"),
        ({}, {"upcycle": Upcycling(top_k=0)}, "num_experts_per_tok is 0"),
        ({}, {"upcycle": Upcycling(experts=10**9)}, "num_local_experts is 1000000000"),
        ({}, {"to": "gguf"}, "--upcycle writes hf; convert the result to gguf afterwards"),
    ],
    ids=str,
)
def test_invalid_arguments_are_refused(
    config: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_checkpoint(tmp_path / "a", **config)
    with pytest.raises(BadInput) as raised:
        convert(tmp_path / "a", tmp_path / "b", **{"to": "hf", "upcycle": Upcycling(), **options})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "b").exists()


def test_upcycling_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2's head is tied."""
    import pentad

    convert(smollm2, tmp_path / "b", to="hf", dtype="float32", upcycle=Upcycling(experts=2, top_k=2))
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["num_local_experts"]) == ("mixtral", True, 2)
    dense, mixture = pentad.load(smollm2, quantize="none", dtype="float32"), pentad.load(tmp_path / "b")
    ids = dense.tokenizer.encode("The capital of France is")
    assert mixture.tokenizer.encode("The capital of France is") == ids
    assert_equal_logits(mixture.logits(ids), dense.logits(ids))
    shutil.rmtree(tmp_path / "b")  # it is large, and pytest keeps temporary folders
