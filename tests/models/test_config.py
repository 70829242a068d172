"""What configs say in unusual ways, against transformers; and what none of the families computes."""

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

WINDOW = {"use_sliding_window": True, "sliding_window": 6}


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_the_config_wrongly_calls_tied(tmp_path: Path, same: bool) -> None:
    """transformers, since version 5: tied only where the file's head is the embedding."""
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
def test_which_layers_have_a_window(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path, family=family, **WINDOW, **config)
    if "layer_types" not in config:
        edit_json(tmp_path / "config.json", layer_types=None)  # as configs of before transformers 4.54
    ids = random_ids(30)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention", "linear_attention"]], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_of_another_kind(family: str, types: list[str], tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, family=family, edit={"layer_types": types})
    wanted = "layer_types is wrong; expected full_attention or sliding_attention for each of the 2 layers"
    assert wanted in refused(tmp_path)
