"""Mixtral from every kind of file it was published in, what its routers decide, and what is wrong with some files.

test_parity.py has its forward pass and steps by a cache, test_invariants.py the rest.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pentad
import pentad.weights
from pentad.convert import convert
from pentad.errors import PentadError
from pentad.models import family_of
from pentad.nn.batch import pack
from pentad.nn.linear import QuantizedLinear
from pentad.nn.moe.losses import mixtral_balance_loss
from tests.helpers.commands import show
from tests.helpers.gguf_file import stored, write_file
from tests.helpers.gguf_llama import NAMES, interleaved
from tests.helpers.tiny import (
    Tiny,
    assert_equal_logits,
    edit_json,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    refused,
    talking_checkpoint,
    tiny_checkpoint,
    tiny_peer,
)

MIXTRAL = {"family": "mixtral", "num_local_experts": 4, "hidden_size": 64, "intermediate_size": 96}
PUBLISHED = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
PUBLISHED_PARAMS = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}


# --- what its routers decide ----------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("experts", [{}, {"num_local_experts": 5, "num_experts_per_tok": 3}], ids=str)
def test_router_logits_and_balance_loss(tmp_path: Path, experts: dict[str, int]) -> None:
    tiny, ids = tiny_checkpoint(tmp_path, **MIXTRAL | experts), random_ids(60)
    network = network_of(tmp_path)
    _, routings = network.forward_with_routing(*pack(ids))
    theirs = tiny.peer(torch.tensor([ids]), use_cache=False, output_router_logits=True)
    assert len(routings) == len(theirs.router_logits) == 2
    for ours, logits in zip(routings, theirs.router_logits, strict=True):
        assert_equal_logits(ours.logits, logits)
        weights, chosen = logits.softmax(-1).topk(experts.get("num_experts_per_tok", 2))
        assert torch.equal(ours.experts, chosen)
        torch.testing.assert_close(ours.weights, weights / weights.sum(-1, keepdim=True))
        assert ours.kept.all()
        assert len(ours.experts.unique()) > 3
    torch.testing.assert_close(mixtral_balance_loss(routings), theirs.aux_loss)


@torch.inference_mode()
def test_the_loss_of_packed_sequences_is_that_of_a_masked_batch(tmp_path: Path) -> None:
    tiny, sequences = tiny_checkpoint(tmp_path, **MIXTRAL), [random_ids(30), random_ids(11, seed=1)]
    _, routings = network_of(tmp_path).forward_with_routing(*pack(*sequences))
    padded = torch.tensor([sequences[0], sequences[1] + [0] * 19])
    mask = torch.tensor([[1] * 30, [1] * 11 + [0] * 19])
    theirs = tiny.peer(padded, attention_mask=mask, use_cache=False, output_router_logits=True)
    torch.testing.assert_close(mixtral_balance_loss(routings), theirs.aux_loss)


# --- Hugging Face's folders -----------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_published_and_fused_names(tmp_path: Path, fused: bool) -> None:
    """Those of transformers 5's memory are on disk where somebody asked it for them."""
    tiny = tiny_checkpoint(tmp_path, **MIXTRAL)
    if fused:
        tiny.peer.save_pretrained(tmp_path, save_original_format=False)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is fused
    assert ("model.layers.1.block_sparse_moe.experts.3.w2.weight" in names) is not fused
    ids = random_ids(40)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


def test_stacks_are_used_where_they_lie_in_the_file(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, **MIXTRAL).peer.save_pretrained(tmp_path, save_original_format=False)
    experts = network_of(tmp_path).layers[0].feedforward.experts
    gate, up = experts.gate_proj.weight, experts.up_proj.weight
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
    assert up.data_ptr() - gate.data_ptr() == 96 * 64 * 4


# --- Mistral's own files --------------------------------------------------------------------------


def params_of(peer: PreTrainedModel) -> dict[str, Any]:
    c = peer.config
    return {
        "dim": c.hidden_size,
        "n_layers": c.num_hidden_layers,
        "head_dim": c.hidden_size // c.num_attention_heads,
        "hidden_dim": c.intermediate_size,
        "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads,
        "norm_eps": c.rms_norm_eps,
        "vocab_size": c.vocab_size,
        "rope_theta": c.rope_parameters["rope_theta"],
        "moe": {"num_experts_per_tok": c.num_experts_per_tok, "num_experts": c.num_local_experts},
    }


RENAMED = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{p}_proj": f"attention.w{p}" for p in "qkvo"},
}


def mistrals(tiny: Tiny, *, stacked: bool) -> dict[str, Tensor]:
    """A saved folder's tensors as Mistral names them: each expert's by themselves, or all one below the other."""
    c, out = tiny.peer.config, {}
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    state = load_file(tiny.folder / "model.safetensors")
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if not module.startswith("model.layers."):
            out[f"{RENAMED[module]}.{kind}"] = tensor
            continue
        number, part = module.removeprefix("model.layers.").split(".", 1)
        if part in heads:
            tensor = interleaved(tensor, heads[part]).contiguous()
        if part in RENAMED:
            out[f"layers.{number}.{RENAMED[part]}.{kind}"] = tensor
        elif not stacked:
            out[f"layers.{number}.{part.replace('block_sparse_moe', 'feed_forward')}.{kind}"] = tensor
        elif part.endswith(".gate"):
            out[f"layers.{number}.{part}.{kind}"] = tensor
    for number in range(c.num_hidden_layers if stacked else 0):
        for w in ("w1", "w2", "w3"):
            each = [
                state[f"model.layers.{number}.block_sparse_moe.experts.{e}.{w}.weight"]
                for e in range(c.num_local_experts)
            ]
            out[f"layers.{number}.block_sparse_moe.{w}"] = torch.cat([x.T if w == "w2" else x for x in each])
    return out


def write_consolidated(folder: Path, tiny: Tiny, *, stacked: bool, files: int = 1, **params: Any) -> Path:
    folder.mkdir()
    said = params_of(tiny.peer) | params
    (folder / "params.json").write_text(json.dumps({name: value for name, value in said.items() if value is not None}))
    tensors = mistrals(tiny, stacked=stacked)
    for i in range(files):
        part = {name: tensors[name] for name in sorted(tensors)[i::files]}
        if stacked:
            torch.save(part, folder / f"consolidated.{i:02}.pt")
        else:
            torch.save(part, folder / f"consolidated.{i:02}.pth")
    return folder


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("stacked", [False, True])
def test_consolidated(tmp_path: Path, stacked: bool, files: int) -> None:
    tiny, ids = tiny_checkpoint(tmp_path / "a", **MIXTRAL), random_ids(40)
    network = network_of(write_consolidated(tmp_path / "b", tiny, stacked=stacked, files=files))
    assert_equal_logits(logits_of(network, ids), peer_logits(tiny.peer, ids))
    (down,) = {tuple(layer.feedforward.experts.down_proj.weight.shape) for layer in network.layers}
    assert down == (4, 64, 96)


@pytest.mark.parametrize(
    ("said", "theta"),
    [
        ({"moe": None, "num_experts": 4, "num_experts_per_tok": 2}, 10000.0),
        ({"rope_theta": None}, 1e6),  # as the first release, which says no base
        ({"max_seq_len": 64}, 10000.0),
    ],
    ids=str,
)
def test_params(tmp_path: Path, said: dict[str, Any], theta: float) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    tiny, ids = tiny_checkpoint(tmp_path / "a", **MIXTRAL, **rope), random_ids(40)
    network = network_of(write_consolidated(tmp_path / "b", tiny, stacked=False, **said))
    assert_equal_logits(logits_of(network, ids), peer_logits(tiny.peer, ids))


# --- GGUF -----------------------------------------------------------------------------------------


def write_gguf(path: Path, peer: PreTrainedModel, kind: str = "F32", *, stacked: bool = True, **more: int) -> None:
    """As llama.cpp's converter does: stacks of experts, or each by itself as until March 2024.

    `peer` then holds what the file's blocks mean.
    """
    c = peer.config
    heads = {"self_attn.q_proj": c.num_attention_heads, "self_attn.k_proj": c.num_key_value_heads}
    tensors: dict[str, np.ndarray] = {}
    for name, array in stored(peer, kind).items():
        module = name.removesuffix(".weight")
        number, _, part = module.removeprefix("model.layers.").partition(".")
        if "mlp.experts" in part:
            matrices = (
                {"down": array} if "down" in part else dict(zip(("gate", "up"), np.split(array, 2, 1), strict=True))
            )
            for what, stack in matrices.items():
                if stacked:
                    tensors[f"blk.{number}.ffn_{what}_exps.weight"] = np.ascontiguousarray(stack)
                else:
                    each = {f"blk.{number}.ffn_{what}.{e}.weight": matrix for e, matrix in enumerate(stack)}
                    tensors |= {name: np.ascontiguousarray(matrix) for name, matrix in each.items()}
        elif part in heads:
            rows = interleaved(torch.from_numpy(array), heads[part]).contiguous()
            tensors[f"blk.{number}.{NAMES[part]}.weight"] = rows.numpy()
        elif module.startswith("model.layers."):
            tensors[f"blk.{number}.{(NAMES | {'mlp.gate': 'ffn_gate_inp'})[part]}.weight"] = array
        else:
            tensors[f"{NAMES[module]}.weight"] = array
    metadata: dict[str, int | float] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "block_count": c.num_hidden_layers,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_parameters["rope_theta"],
        "expert_count": c.num_local_experts,
        "expert_used_count": c.num_experts_per_tok,
    }
    write_file(path, "llama", metadata | more, tensors, kind)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("stacked", [True, False])
def test_gguf_gives_the_logits_of_the_weights_that_it_holds(tmp_path: Path, stacked: bool, kind: str) -> None:
    file, peer, ids = tmp_path / "m.gguf", tiny_peer(**MIXTRAL), random_ids(40)
    write_gguf(file, peer, kind, stacked=stacked)
    assert family_of(pentad.weights.open(file)).names.family == "mixtral"
    assert_equal_logits(logits_of(network_of(file), ids), peer_logits(peer, ids))


def test_kept_quantized(tmp_path: Path) -> None:
    """Experts are dequantized, for now; all else stays in its blocks."""
    file, peer = tmp_path / "m.gguf", tiny_peer(**MIXTRAL)
    write_gguf(file, peer, "Q4_0")
    network, ids = network_of(file, torch.bfloat16), random_ids(40)
    kept = {name for name, part in network.named_modules() if isinstance(part, QuantizedLinear)}
    assert kept == {"head", *(f"layers.{i}.attention.{p}_proj" for i in range(2) for p in "qkvo")}
    for logits in (logits_of(network, ids), pentad.load(file).logits(ids)):
        assert float((logits - peer_logits(peer, ids)).abs().mean()) < 0.1


# --- conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "gguf", "mistral"])
@pytest.mark.parametrize("source", ["published", "fused", "consolidated", "stacked", "gguf", "gguf, one by one"])
def test_from_everything_to_everything_and_back(tmp_path: Path, source: str, to: str) -> None:
    """And the same bits at the end, as transformers reads them too."""
    tiny, ids = tiny_checkpoint(tmp_path / "hf", **MIXTRAL), random_ids(40)
    original = load_file(tmp_path / "hf/model.safetensors")
    start = tmp_path / "hf"
    if source == "fused":
        tiny.peer.save_pretrained(start, save_original_format=False)
    elif source in ("consolidated", "stacked"):
        start = write_consolidated(tmp_path / "mistral", tiny, stacked=source == "stacked")
    elif source.startswith("gguf"):
        write_gguf(start := tmp_path / "m.gguf", tiny.peer, stacked=source == "gguf")
    there = convert(start, tmp_path / ("there.gguf" if to == "gguf" else "there"), to=to)
    assert there.family == "mixtral"
    assert not there.notes
    assert_equal_logits(logits_of(network_of(there.path), ids), peer_logits(tiny.peer, ids))
    back = convert(there.path, tmp_path / "back", to="hf")
    tensors = load_file(back.path / "model.safetensors")
    assert tensors.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor, tensors[name]), name
    peer = AutoModelForCausalLM.from_pretrained(back.path, attn_implementation="eager")
    assert_equal_logits(peer_logits(peer, ids), peer_logits(tiny.peer, ids))


def test_what_a_converted_config_says(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", **MIXTRAL)
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    assert json.loads((tmp_path / "b/params.json").read_text())["moe"] == {"num_experts": 4, "num_experts_per_tok": 2}
    convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf")
    fields = GGUFReader(tmp_path / "m.gguf").fields
    values = {key: fields[f"llama.{key}"].contents() for key in ("expert_count", "expert_used_count")}
    assert values == {"expert_count": 4, "expert_used_count": 2}
    assert fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize("stacked", [True, False])
def test_blocks_pass_unchanged(tmp_path: Path, stacked: bool) -> None:
    """Between stacks and single experts too."""
    write_gguf(tmp_path / "a.gguf", tiny_peer(**MIXTRAL), "Q4_1", stacked=stacked)
    write_gguf(tmp_path / "stacked.gguf", tiny_peer(**MIXTRAL), "Q4_1")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", to="gguf")
    ours, theirs = (
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}
        for path in (tmp_path / "b.gguf", tmp_path / "stacked.gguf")
    )
    assert ours == theirs


def test_quantizing(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", **MIXTRAL)
    convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf", quantize="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.0.attn_q.weight"] == "Q8_0"
    ids = random_ids(30)
    exact, quantized = (logits_of(network_of(tmp_path / name), ids) for name in ("a", "m.gguf"))
    assert 0 < float((quantized - exact).abs().mean()) < 0.05


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PUBLISHED, PUBLISHED_PARAMS], ids=["config.json", "params.json"])
def test_a_token_uses_a_quarter_of_the_experts(tmp_path: Path, config: dict[str, Any]) -> None:
    facts = show(tmp_path, config)
    assert facts["family"] == "mixtral"
    assert facts["parameters"] == 46_702_792_704
    assert facts["active_parameters"] == 12_879_925_248


# --- what is wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"num_experts_per_tok": 5}, "top_k is 5 with 4 experts"),
        ({"num_local_experts": 3}, "not used: model.layers.0.block_sparse_moe.experts.3.w1.weight"),
        ({"num_local_experts": 5}, "missing: model.layers.0.block_sparse_moe.experts.4.w1.weight"),
        ({"num_local_experts": 10**7}, "10000000 experts of"),
        ({"num_local_experts": 4096, "hidden_size": 2**26, "intermediate_size": 2**26}, "4096 experts of"),
        ({"num_local_experts": 0}, "num_local_experts is 0, which is not a possible size"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok is 'two', not of type int"),
        ({"intermediate_size": 98}, "experts.0.w1.weight is [96, 64], the config asks for [98, 64]"),
    ],
    ids=str,
)
def test_configs_that_are_wrong(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    tiny_checkpoint(tmp_path, **MIXTRAL)
    edit_json(tmp_path / "config.json", **edit)
    assert message in refused(tmp_path)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 6}, "top_k is 6 with 4 experts"),
        (["num_experts", 4], "params.json: moe is \"['num_experts', 4]\""),
        ({"num_experts": "4"}, "num_local_experts is '4', not of type int"),
    ],
    ids=str,
)
def test_params_that_are_wrong(tmp_path: Path, moe: object, message: str) -> None:
    tiny = tiny_checkpoint(tmp_path / "a", **MIXTRAL)
    assert message in refused(write_consolidated(tmp_path / "b", tiny, stacked=False, moe=moe))


def test_experts_that_are_missing_are_named(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, **MIXTRAL)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = [f"model.layers.1.block_sparse_moe.experts.2.w{i}.weight" for i in (1, 2, 3)]
    for name in gone:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path)
    assert "3 missing" in message
    assert all(name in message for name in gone)
    assert "not used" not in message


def test_a_layer_in_another_layout(tmp_path: Path) -> None:
    """Of two layouts in one file the one that has more is taken, and the other's tensors are named."""
    tiny = tiny_checkpoint(tmp_path, **MIXTRAL, num_hidden_layers=3)
    tensors = load_file(tmp_path / "model.safetensors")
    tiny.peer.save_pretrained(tmp_path, save_original_format=False)
    fused = load_file(tmp_path / "model.safetensors")
    mixed = {name: tensor for name, tensor in tensors.items() if "layers.0.block_sparse_moe" not in name}
    mixed |= {name: tensor for name, tensor in fused.items() if "layers.0.mlp" in name}
    save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refused(tmp_path)
    assert "13 missing: model.layers.0.block_sparse_moe.gate.weight" in message
    assert "3 not used: model.layers.0.mlp" in message


def test_other_mixtures_in_gguf_are_refused(tmp_path: Path) -> None:
    peer = tiny_peer(family="qwen2")
    write_file(
        tmp_path / "m.gguf",
        "qwen2",
        {"expert_count": 4, "block_count": 2},
        {"token_embd.weight": peer.get_input_embeddings().weight.detach().numpy()},
        "F32",
    )
    assert "mixtures in qwen2 files are not supported; expected llama (Mixtral)" in refused(tmp_path / "m.gguf")


def test_a_router_that_is_not_a_number_is_told(tmp_path: Path) -> None:
    tiny = talking_checkpoint(tmp_path, **MIXTRAL)
    tiny.peer.model.layers[1].mlp.gate.weight.data.fill_(torch.nan)
    tiny.peer.save_pretrained(tmp_path)
    model = pentad.load(tmp_path)
    for use in (model.complete, model.score):
        with pytest.raises(PentadError, match=r"logits are not numbers .*: its weights are damaged"):
            use("text")
