"""The family that docs/adding-a-family.md adds loads, runs, converts and checks its tensors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pentad
from pentad import kernels, models
from pentad.build import build
from pentad.convert import convert
from pentad.models.language.config import write_family_config
from tests.helpers.tiny import add_tokenizer, assert_equal_logits, logits_of, network_of, random_ids

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"
SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the page's first code block defines. The family is registered only during the test."""
    source = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert source is not None
    assert source[1].count("\n") < 60
    names: dict[str, Any] = {"__name__": "para", "register": lambda family: None}
    exec(source[1].replace("from pentad.models import register\n", ""), names)
    known = list(models.families())
    monkeypatch.setattr(models, "families", lambda: iter([names["FAMILY"], *known]))
    monkeypatch.setattr("pentad.build.families", models.families)
    return names


def save(folder: Path, names: dict[str, Any]) -> torch.nn.Module:
    """Write a Hugging Face folder with the family's own table, and a tokenizer; returns the network."""
    config = names["ParaConfig"](**SIZES)
    network = build(config, seed=1)
    [table] = names["FAMILY"].layouts(config, "hf")
    tensors = dict(network.named_parameters())
    stored: dict[str, torch.Tensor] = {}
    for ours, theirs, operation in table.groups(tensors):
        values = operation.store([tensors[name].detach() for name in ours])
        stored |= dict(zip(theirs, values, strict=True))
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(write_family_config(names["FAMILY"], config, "hf")))
    add_tokenizer(folder)
    return network


def test_the_added_family_loads_runs_and_converts(tmp_path: Path, added: dict[str, Any]) -> None:
    network, ids = save(tmp_path / "a", added), random_ids(40)
    expected = logits_of(network, ids)
    assert_equal_logits(logits_of(network_of(tmp_path / "a"), ids), expected)
    model = pentad.load(tmp_path / "a")
    assert model.step.backend.startswith("by the kernels" if kernels.isas() else "as plain torch")
    assert_equal_logits(model.logits(ids), expected)
    assert model.complete("hello", max_tokens=5, temperature=0).token_ids
    assert convert(tmp_path / "a", tmp_path / "b", to="hf").family == "para"
    assert_equal_logits(logits_of(network_of(tmp_path / "b"), ids), expected)


def test_unused_tensors_of_the_added_family_are_refused(tmp_path: Path, added: dict[str, Any]) -> None:
    save(tmp_path / "a", added)
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1}))
    with pytest.raises(pentad.BadInput, match=r"not used: .*model\.layers\.1\.input_layernorm\.weight"):
        network_of(tmp_path / "a")
