"""Unusual configs against transformers, and layer types that no family supports."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import (
    assert_equal_logits,
    edit_json,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    refused,
    tiny_checkpoint,
)

SILU = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
WINDOW = {"use_sliding_window": True, "sliding_window": 6}


@pytest.mark.parametrize("same", [True, False])
def test_a_head_is_tied_only_if_it_equals_the_embedding(tmp_path: Path, same: bool) -> None:
    """The config says tied but the file has a head. transformers 5 has the same rule."""
    tiny = tiny_checkpoint(tmp_path)
    if same:
        tiny.peer.lm_head.weight.data.copy_(tiny.peer.model.embed_tokens.weight.data)
        tiny.peer.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    network, ids = network_of(tmp_path), random_ids(20)
    assert (network.head.weight is network.embed.weight) == same
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_equal_logits(logits_of(network, ids), peer_logits(theirs, ids))
    assert_equal_logits(logits_of(network, ids), peer_logits(tiny.peer, ids))


@pytest.mark.parametrize(
    "config",
    [
        {"max_window_layers": 0},
        {"max_window_layers": 1},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention", "sliding_attention"], "max_window_layers": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windowed_layers_match_transformers(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path, family=family, **WINDOW, **config)
    if "layer_types" not in config:
        edit_json(tmp_path / "config.json", layer_types=None)  # transformers before 4.54 wrote none
    ids = random_ids(30)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention", "linear_attention"]], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_unsupported_layer_types_are_refused(family: str, types: list[str], tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family=family, edit={"layer_types": types})
    message = refused(tmp_path)
    assert "layer_types" in message
    assert "full_attention or sliding_attention" in message
    assert "2 layers" in message


@pytest.mark.parametrize("edit", [{}, {"model_type": "ministral"}], ids=str)
def test_a_mistral_with_layer_types_is_a_ministral(edit: dict[str, Any], tmp_path: Path) -> None:
    """As in transformers' Auto classes; without layer_types every layer has the window."""
    types = ["sliding_attention", "full_attention"]
    tiny_checkpoint(tmp_path, family="mistral", sliding_window=8, edit={"layer_types": types, **edit})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    network, ids = network_of(tmp_path), random_ids(30)
    assert [layer.attention.window for layer in network.layers] == [8, None]
    assert_equal_logits(logits_of(network, ids), peer_logits(theirs, ids))
    assert network.config.to_hf()["layer_types"] == tuple(types)
    edit_json(tmp_path / "config.json", layer_types=None)
    network = network_of(tmp_path)
    assert [layer.attention.window for layer in network.layers] == [8, 8]
    assert "layer_types" not in network.config.to_hf()  # the key alone makes transformers load a Ministral


@pytest.mark.parametrize(
    ("config", "edit", "message"),
    [
        *(({"family": f}, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected silu or swish") for f in SILU),
        ({"family": "phi"}, {"hidden_act": "silu"}, "hidden_act is 'silu'; expected gelu_new"),
        ({}, {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.5}}, "'proportional'"),
        ({"family": "mistral"}, {"sliding_window": 0}, "sliding_window is 0"),
    ],
    ids=str,
)
def test_the_settings_that_docs_list_are_refused(
    config: dict[str, Any], edit: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """See "What is refused" in docs/language-models.md."""
    tiny_checkpoint(tmp_path, edit=edit, **config)
    assert message in refused(tmp_path)
