"""Switch Transformers against transformers: logits, dropped tokens, files, sizes and errors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    PreTrainedModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import pentad.weights
from pentad.build import build
from pentad.convert import convert
from pentad.errors import BadInput
from pentad.models.language.config import read_family_config, write_family_config
from pentad.models.language.switch_transformers import FAMILY, sparse_layers
from pentad.nn.batch import pack
from pentad.nn.moe.layer import MixtureOfExperts
from pentad.nn.moe.losses import mixtral_balance_loss, router_z_loss
from tests.helpers.commands import show
from tests.helpers.tiny import assert_equal_logits, contains, edit_json, network_of, random_ids, refused, rms
from tests.helpers.tiny_switch import DENSE, SIZES, run, stepped, switch_checkpoint, switch_peer

CONFIGS: dict[str, dict[str, Any]] = {
    "published": {},
    "untied": {"tie_word_embeddings": False},
    "dropping": {"expert_capacity": 3},
    "all sparse": {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 3},
    "dense": DENSE,
    "other buckets": {"relative_attention_num_buckets": 10, "relative_attention_max_distance": 20},
    "few experts": {"num_experts": 2, "layer_norm_epsilon": 0.1, "d_kv": 8},
}
BASE = {  # google/switch-base-8's config.json
    "model_type": "switch_transformers",
    "d_ff": 3072,
    "d_kv": 64,
    "d_model": 768,
    "expert_capacity": 64,
    "feed_forward_proj": "relu",
    "is_gated_act": False,
    "layer_norm_epsilon": 1e-06,
    "num_decoder_layers": 12,
    "num_experts": 8,
    "num_heads": 12,
    "num_layers": 12,
    "num_sparse_decoder_layers": 6,
    "num_sparse_encoder_layers": 6,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "vocab_size": 32128,
}
SOURCE, WRITTEN = random_ids(150), [0, *random_ids(40, seed=1)]


@torch.inference_mode()
def peer_run(peer: PreTrainedModel, source: list[int], text: list[int], **options: Any) -> Any:
    return peer(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([text]), use_cache=False, **options)


# --- logits and routers ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_forward_and_routers(tmp_path: Path, config: dict[str, Any]) -> None:
    peer = switch_checkpoint(tmp_path, **config).peer
    read, logits, encoder, decoder = run(network_of(tmp_path), (SOURCE, WRITTEN))
    theirs = peer_run(peer, SOURCE, WRITTEN, output_router_logits=config not in (DENSE, CONFIGS["all sparse"]))
    assert_equal_logits(read, theirs.encoder_last_hidden_state[0])
    assert_equal_logits(logits, theirs.logits[0])
    if theirs.encoder_router_logits is None:  # transformers has no losses if every layer or no layer is sparse
        return
    for side, ours in (("encoder", encoder), ("decoder", decoder)):
        for routing, router_logits in zip(ours, theirs[f"{side}_router_logits"], strict=True):
            assert_equal_logits(routing.logits, router_logits[0])
        torch.testing.assert_close(mixtral_balance_loss(ours), theirs[f"{side}_aux_loss"])
        all_layers = ours[0]._replace(logits=torch.cat([routing.logits for routing in ours]))
        torch.testing.assert_close(router_z_loss(all_layers), theirs[f"{side}_z_loss"])


@torch.inference_mode()
@pytest.mark.parametrize("config", ["published", "untied", "dense"])
def test_twenty_cached_steps(tmp_path: Path, config: str) -> None:
    peer = switch_checkpoint(tmp_path, **CONFIGS[config]).peer
    network = network_of(tmp_path)
    ours = stepped(network, SOURCE, WRITTEN[:20])
    assert_equal_logits(ours, run(network, (SOURCE, WRITTEN[:20]))[1])
    cache, theirs = None, []
    encoded = peer.get_encoder()(input_ids=torch.tensor([SOURCE]))
    for token in WRITTEN[:20]:
        given = {"encoder_outputs": encoded, "decoder_input_ids": torch.tensor([[token]])}
        out = peer(**given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        theirs.append(out.logits[0])
    assert_equal_logits(ours, torch.cat(theirs))


@torch.inference_mode()
def test_bfloat16_is_as_accurate_as_transformers(tmp_path: Path) -> None:
    peer = switch_checkpoint(tmp_path).peer
    exact = run(network_of(tmp_path), (SOURCE, WRITTEN))[1]
    ours = run(network_of(tmp_path, torch.bfloat16), (SOURCE, WRITTEN))[1]
    theirs = peer_run(peer.bfloat16(), SOURCE, WRITTEN).logits[0].float()
    assert 0 < rms(ours - exact) <= 1.2 * rms(theirs - exact)


def test_without_sparse_layers_it_is_t5(tmp_path: Path) -> None:
    """T5's files have another name for the feed-forward layer."""
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
    config = T5Config(**{name: SIZES[name] for name in names}, decoder_start_token_id=0)
    peer = T5ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    switch_checkpoint(tmp_path, **DENSE)
    file = tmp_path / "model.safetensors"
    tensors = {name: t.contiguous() for name, t in peer.state_dict().items() if "embed_tokens" not in name}
    del tensors["lm_head.weight"]
    renamed = {name.replace("DenseReluDense", "mlp"): tensor for name, tensor in tensors.items()}
    assert renamed.keys() == load_file(file).keys()
    save_file(renamed, file, metadata={"format": "pt"})
    read, logits, *routers = run(network_of(tmp_path), (SOURCE, WRITTEN))
    theirs = peer_run(peer, SOURCE, WRITTEN)
    assert routers == [[], []]
    assert_equal_logits(read, theirs.encoder_last_hidden_state[0])
    assert_equal_logits(logits, theirs.logits[0])


@pytest.mark.parametrize("layers", range(1, 7))
def test_sparse_layers_match_transformers(layers: int) -> None:
    for sparse in range(9):
        counts = {"num_layers": layers, "num_sparse_encoder_layers": sparse}
        with torch.device("meta"):
            peer = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**{**SIZES, **counts}))
        theirs = [hasattr(block.layer[-1].mlp, "router") for block in peer.encoder.block]
        assert sparse_layers(layers, sparse) == theirs, sparse


# --- dropped tokens -------------------------------------------------------------------------------


def test_an_expert_accepts_the_first_tokens_of_each_sequence(tmp_path: Path) -> None:
    """transformers accepts the same tokens. The layer's output is zero for dropped tokens."""
    capacity = 3
    peer = switch_checkpoint(tmp_path, expert_capacity=capacity).peer
    network = network_of(tmp_path)
    outputs: list[Tensor] = []
    for part in network.encoder.modules():
        if isinstance(part, MixtureOfExperts):
            part.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    second = random_ids(31, seed=2)
    _, _, encoder, _ = run(network, (SOURCE, WRITTEN), (second, WRITTEN))
    layers = [block.layer[-1].mlp for block in peer.encoder.block if hasattr(block.layer[-1].mlp, "router")]
    masks: list[Tensor] = []
    for mlp in layers:
        mlp.router.register_forward_hook(lambda _, __, out: masks.append(out[0][0]))
    for start, ids in ((0, SOURCE), (len(SOURCE), second)):
        masks.clear()
        peer_run(peer, ids, WRITTEN)
        for routing, output, accepted in zip(encoder, outputs, masks, strict=True):
            rows = slice(start, start + len(ids))
            assert torch.equal(routing.kept[rows, 0], accepted.any(-1))
            assert torch.equal(routing.kept[rows, 0], output[rows].abs().sum(-1) > 0)
            assert 0 < int(routing.kept[rows].sum()) < len(ids)
            chosen = routing.experts[rows][routing.kept[rows]]
            assert int(chosen.bincount(minlength=4).max()) == capacity


def test_a_capacity_changes_logits_from_the_first_dropped_token(tmp_path: Path) -> None:
    """Cached steps of one token drop none."""
    switch_checkpoint(tmp_path / "all")
    switch_checkpoint(tmp_path / "some", expert_capacity=4)
    every, some = network_of(tmp_path / "all"), network_of(tmp_path / "some")
    source = SOURCE[:4]  # as many tokens as the capacity: none is dropped
    _, logits, *_ = run(every, (source, WRITTEN))
    _, bounded, _, decoder = run(some, (source, WRITTEN))
    first = min(int(routing.kept[:, 0].int().argmin()) for routing in decoder)
    assert 3 < first < len(WRITTEN)
    assert_equal_logits(bounded[:first], logits[:first])
    assert float((bounded[first] - logits[first]).abs().max()) > 1e-3
    assert_equal_logits(stepped(some, source, WRITTEN), logits)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["published", "dense"])
def test_to_hugging_face_and_back(tmp_path: Path, config: str) -> None:
    peer = switch_checkpoint(tmp_path / "a", **CONFIGS[config]).peer
    there = convert(tmp_path / "a", tmp_path / "b", to="hf")
    assert (there.family, there.notes) == ("switch_transformers", [])
    original, written = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(tensor, written[name]), name
    again, info = type(peer).from_pretrained(tmp_path / "b", attn_implementation="eager", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(peer_run(again, SOURCE, WRITTEN).logits, peer_run(peer, SOURCE, WRITTEN).logits)


def test_a_state_dict_with_copies_of_the_embedding(tmp_path: Path) -> None:
    """The release of 2022 is a pickled file with every name of a tied tensor."""
    peer = switch_checkpoint(tmp_path).peer
    expected = run(network_of(tmp_path), (SOURCE, WRITTEN))[1]
    (tmp_path / "model.safetensors").unlink()
    torch.save(peer.state_dict(), tmp_path / "pytorch_model.bin")
    assert {"lm_head.weight", "encoder.embed_tokens.weight"} <= peer.state_dict().keys()
    assert torch.equal(run(network_of(tmp_path), (SOURCE, WRITTEN))[1], expected)


def test_a_written_config_reads_back(tmp_path: Path) -> None:
    switch_checkpoint(tmp_path, expert_capacity=7, router_jitter_noise=0.0)
    checkpoint = pentad.weights.open(tmp_path)
    config = read_family_config(FAMILY, checkpoint)
    assert (config.expert_capacity, config.router_jitter_noise) == (7, 0.0)
    written = write_family_config(FAMILY, config, "hf")
    assert read_family_config(FAMILY, replace(checkpoint, config=written)) == config


@pytest.mark.parametrize("to", ["gguf", "mistral"])
def test_formats_without_switch_transformers_are_refused(tmp_path: Path, to: str) -> None:
    switch_checkpoint(tmp_path / "a")
    with pytest.raises(BadInput, match="switch_transformers"):
        convert(tmp_path / "a", tmp_path / ("b.gguf" if to == "gguf" else "b"), to=to)


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [8, 16, 32, 64, 128, 256])
def test_parameters(tmp_path: Path, experts: int) -> None:
    config = {**BASE, "num_experts": experts}
    facts = show(tmp_path, config)
    with torch.device("meta"):
        peer = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**config))
    assert facts["parameters"] == sum(parameter.numel() for parameter in peer.parameters())
    idle = 12 * 2 * 768 * 3072 * (experts - 1)  # 12 sparse layers
    assert facts["active_parameters"] == facts["parameters"] - idle


def test_base_8(tmp_path: Path) -> None:
    facts = show(tmp_path, BASE)
    assert facts["parameters"] == 619_339_008
    assert facts["layers"] == 24
    assert facts["context_length"] == 512
    assert facts["kv_cache_bytes"] == 512 * 24 * 2 * 768 * 4  # self-attention and cross-attention


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"num_experts": 3}, "6 not used: decoder.block.1.layer.2.mlp.experts.expert_3.wi.weight"),
        ({"num_experts": 5}, "6 missing: decoder.block.1.layer.2.mlp.experts.expert_4.wi.weight"),
        ({"num_experts": 5000}, "5000 experts or 4 heads of"),
        ({"num_layers": 2000}, "2000 and 3 layers are too many"),
        ({"expert_capacity": 0}, "expert_capacity is 0"),
        ({"num_sparse_encoder_layers": -1}, "num_sparse_encoder_layers is -1"),
        ({"relative_attention_num_buckets": 7}, "7 buckets can't cover distances up to 128"),
        ({"relative_attention_max_distance": 16}, "32 buckets can't cover distances up to 16"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'"),
        ({"is_gated_act": True}, "expected relu, not gated"),
        ({"decoder_start_token_id": 96}, "decoder_start_token_id 96 is outside the vocabulary"),
        ({"d_ff": 50}, "mlp.wi.weight is [48, 32]…[50, 32]"),
        ({"d_model": "wide"}, "d_model is 'wide'…int"),
        ({"tie_word_embeddings": False}, "3 missing: decoder.embed_tokens.weight, lm_head.weight"),
    ],
    ids=str,
)
def test_invalid_configs_are_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    switch_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", **edit)
    assert contains(refused(tmp_path), message)


def test_a_router_bias_is_not_ignored(tmp_path: Path) -> None:
    switch_checkpoint(tmp_path, router_bias=True)
    assert "not used: decoder.block.1.layer.2.mlp.router.classifier.bias" in refused(tmp_path)


def test_t5_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(BadInput, match="architecture 't5'"):
        build(pentad.weights.open(tmp_path))


def test_a_decoder_without_a_source_is_refused(tmp_path: Path) -> None:
    switch_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no context"):
        network_of(tmp_path)(*pack([0, 1]))


def test_random_weights_use_all_experts() -> None:
    """The comparisons above would be weak if routers or attention were uniform."""
    peer = switch_peer()
    theirs = peer_run(peer, SOURCE, WRITTEN, output_router_logits=True)
    chosen = theirs.encoder_router_logits[0].argmax(-1)
    assert len(chosen.unique()) == 4
    assert float(theirs.logits.std()) > 0.1
