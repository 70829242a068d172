"""Adapters of PEFT load here with PEFT's logits, and the reverse; merging keeps the logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pentad
from pentad import adapters, build, weights
from pentad.convert import convert
from pentad.errors import BadInput
from pentad.nn.lora import lora_layers
from tests.helpers.peft_adapters import adapted, load_in_peft, merged_by_peft, save_peft_adapter
from tests.helpers.tiny import (
    assert_equal_logits,
    edit_json,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    rms,
    tiny_checkpoint,
)
from tests.helpers.tiny_openmoe import openmoe_checkpoint
from tests.helpers.tiny_qwen import qwen_checkpoint
from tests.helpers.tiny_switch import switch_checkpoint

BOUND = 1e-5
IDS = random_ids(12)
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "phi": {"num_key_value_heads": 4},
    "mixtral": MIXTURE,
}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"target_modules": ["q_proj", "mlp.up_proj"], "use_rslora": True, "lora_alpha": 16}),
        ("llama", {"target_modules": r".*layers\.1.*(q|v)_proj", "lora_alpha": 3}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
        (
            "qwen3",
            {
                "target_modules": ["q_proj", "down_proj"],
                "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.down_proj": 6},
                "alpha_pattern": {"layers.1.mlp.down_proj": 3, "^model.layers.0.self_attn.q_proj": 5},
            },
        ),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}),
        ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj", "gate.weight"]}),
        ("mixtral", {"target_modules": ["w1", "w2", "w3", "v_proj"]}),
    ],
)
def test_an_adapter_of_peft_gives_pefts_logits(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    tiny_checkpoint(tmp_path / "base", family=family, **FAMILIES[family])
    model = save_peft_adapter(tmp_path / "base", tmp_path / "adapter", **config)
    expected = peer_logits(model, IDS)
    assert rms(expected - pentad.load(tmp_path / "base").logits(IDS)) > 0.1
    assert_equal_logits(pentad.load(tmp_path / "base", adapter=tmp_path / "adapter").logits(IDS), expected, BOUND)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        *((family, "all-linear") for family in FAMILIES),
        ("llama", ["q_proj", "layers.1.mlp.down_proj"]),
        ("mixtral", ["gate_up_proj"]),
        ("mixtral", ["w1", "w2"]),
        ("mixtral", ["gate", "w3", "o_proj"]),
    ],
)
def test_peft_gives_our_logits(tmp_path: Path, family: str, targets: str | list[str], rslora: bool) -> None:
    tiny_checkpoint(tmp_path, family=family, **FAMILIES[family])
    expected = logits_of(adapted(tmp_path, targets, rslora=rslora), IDS)
    model = load_in_peft(tmp_path, tmp_path / "adapter")
    assert_equal_logits(peer_logits(model, IDS), expected, BOUND)
    assert_equal_logits(pentad.load(tmp_path, adapter=tmp_path / "adapter").logits(IDS), expected, BOUND)
    convert(tmp_path, tmp_path / "merged", to="hf", adapter=tmp_path / "adapter")
    assert_equal_logits(pentad.load(tmp_path / "merged").logits(IDS), expected, BOUND)
    assert_equal_logits(peer_logits(merged_by_peft(tmp_path, tmp_path / "adapter"), IDS), expected, BOUND)


def test_names_and_shapes_are_those_of_peft(tmp_path: Path) -> None:
    for family in ("llama", "mixtral"):
        folder = tmp_path / family
        tiny_checkpoint(folder / "base", family=family, **FAMILIES[family])
        save_peft_adapter(folder / "base", folder / "theirs")
        adapted(folder / "base")
        ours, theirs = (
            load_file(path / "adapter_model.safetensors") for path in (folder / "base/adapter", folder / "theirs")
        )
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    config = json.loads((tmp_path / "llama/base/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_separate_experts_of_older_adapters(tmp_path: Path) -> None:
    """The tensors of Mixtral's adapters made with transformers 4: a module for each expert."""
    tiny_checkpoint(tmp_path / "base", family="mixtral", **MIXTURE)
    save_peft_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "w1", "w2", "w3"])
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, rows, columns in (("w1", 48, 32), ("w2", 32, 48), ("w3", 48, 32)):
                module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(4, columns)
                tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4)
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{module}.lora_A.weight": torch.randn(4, 32), f"{module}.lora_B.weight": torch.randn(32, 4)}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    targets = {"target_modules": ["q_proj", "w1", "w2", "w3"], "target_parameters": None}
    edit_json(tmp_path / "adapter/adapter_config.json", **targets, rank_pattern={}, alpha_pattern={})
    expected = peer_logits(load_in_peft(tmp_path / "base", tmp_path / "adapter"), IDS)
    assert_equal_logits(pentad.load(tmp_path / "base", adapter=tmp_path / "adapter").logits(IDS), expected, BOUND)


@pytest.mark.parametrize("to", ["gguf", "mistral"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_base_in_another_format_takes_the_same_adapter(tmp_path: Path, family: str, to: str) -> None:
    tiny_checkpoint(tmp_path / "base", family=family, **FAMILIES[family])
    expected = logits_of(adapted(tmp_path / "base"), IDS)
    other = convert(tmp_path / "base", tmp_path / ("base.gguf" if to == "gguf" else to), to=to).path
    assert_equal_logits(pentad.load(other, adapter=tmp_path / "base/adapter").logits(IDS), expected, BOUND)


def test_families_with_fused_or_numbered_modules(tmp_path: Path) -> None:
    """They have no peer in PEFT: merging is compared with the network that has the low-rank layers."""
    for name, make in (("qwen", qwen_checkpoint), ("openmoe", openmoe_checkpoint)):
        make(tmp_path / name)
        network = adapted(tmp_path / name)
        merged = build.build(adapters.merged(weights.open(tmp_path / name), tmp_path / name / "adapter"))
        assert_equal_logits(logits_of(merged, IDS), logits_of(network, IDS), BOUND)
    names = load_file(tmp_path / "qwen/adapter/adapter_model.safetensors")
    assert names["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (12, 32)
    switch_checkpoint(tmp_path / "switch")
    source = weights.open(tmp_path / "switch")
    network = adapted(tmp_path / "switch")
    merged = build.build(adapters.merged(source, tmp_path / "switch/adapter"))
    layer = lora_layers(network)["encoder.layers.1.feedforward.experts.up_proj"]
    assert torch.allclose(merged.encoder.layers[1].feedforward.experts.up_proj.weight, layer.merged(), atol=1e-6)


def test_quantized_matrices_with_an_adapter_become_float32(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_checkpoint(tmp_path / "base", hidden_size=64, intermediate_size=64)
    convert(tmp_path / "base", tmp_path / "q.gguf", to="gguf", quantize="q4_0")
    adapted(tmp_path / "base", ["q_proj", "down_proj"])
    base = weights.open(tmp_path / "q.gguf")
    merged = adapters.merged(base, tmp_path / "base/adapter")
    assert "dequantized to float32" in caplog.text
    changed = {name for name, entry in merged.tensors.items() if entry != base.tensors[name]}
    assert changed == {f"blk.{i}.{part}.weight" for i in range(2) for part in ("attn_q", "ffn_down")}
    expected = pentad.load(
        tmp_path / "q.gguf", adapter=tmp_path / "base/adapter", quantize="none", dtype="float32"
    ).logits(IDS)
    convert(tmp_path / "q.gguf", tmp_path / "merged", to="hf", adapter=tmp_path / "base/adapter")
    assert_equal_logits(pentad.load(tmp_path / "merged", dtype="float32").logits(IDS), expected, BOUND)
    by_kernels = pentad.load(tmp_path / "q.gguf", adapter=tmp_path / "base/adapter").logits(IDS)
    assert rms(by_kernels - expected) < 0.02


def test_a_merge_keeps_the_dtype_of_the_base(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    adapted(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "merged", to="hf", adapter=tmp_path / "base/adapter")
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    model = merged_by_peft(tmp_path / "base", tmp_path / "base/adapter")
    for name, tensor in model.state_dict().items():
        assert torch.allclose(merged[name].float(), tensor.float(), rtol=2**-7, atol=1e-3), name


REFUSED = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected LORA"),
    ({"use_dora": True}, "use_dora is 'True'"),
    ({"bias": "all"}, "bias is 'all'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
    ({"lora_bias": True}, "lora_bias is 'True'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is 'True'"),
    ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is"),
    ({"invented_later": {"x": 1}}, "invented_later is"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ({"r": 0}, "r is '0'; expected a whole number"),
    ({"r": 6}, "lora_A.weight is [4, 32], the model asks for [6, 32]"),
    ({"lora_alpha": "big"}, "lora_alpha is 'big'; expected a number"),
    ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern has the regular expression '(a+)+$'"),
    ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern is"),
    ({"target_modules": [1]}, "target_modules is"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "4 missing: model.layers.0.self_attn.o_proj.lora_A.weight"),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_checkpoint(folder)
    adapted(folder, ["q_proj", "v_proj"])
    return folder


@pytest.mark.parametrize(("edit", "expected"), REFUSED, ids=lambda value: str(value)[:30])
def test_unsupported_adapters_are_refused_by_name(
    tmp_path: Path, llama: Path, edit: dict[str, Any], expected: str
) -> None:
    adapter = copied(llama / "adapter", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", **edit)
    message = refusal(llama, adapter)
    assert expected in message


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(BadInput) as caught:
        pentad.load(base, adapter=adapter)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t, q, v: t.pop(f"{q}.lora_B.weight"), "1 missing: model.layers.0.self_attn.q_proj.lora_B.weight"),
        (lambda t, q, v: t.update({f"{q}.lora_A.weight": torch.zeros(4, 31)}), "1 of the wrong shape: "),
        (
            lambda t, q, v: t.update({f"{q}s.lora_A.weight": torch.zeros(4, 32)}),
            "1 not used: model.layers.0.self_attn.q_projs",
        ),
        (
            lambda t, q, v: t.update({f"{q}.lora_magnitude_vector": torch.zeros(4)}),
            "lora_magnitude_vector' is not part",
        ),
        (
            lambda t, q, v: t.update({f"{q}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int64)}),
            "expected floating-point",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, llama: Path, change: Any, expected: str) -> None:
    adapter = copied(llama / "adapter", tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors, *(f"base_model.model.model.layers.0.self_attn.{p}_proj" for p in "qv"))
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert expected in refusal(llama, adapter)


def test_an_adapter_of_another_base_and_missing_files(tmp_path: Path, llama: Path) -> None:
    tiny_checkpoint(tmp_path / "wider", hidden_size=64)
    assert "8 of the wrong shape" in refusal(tmp_path / "wider", llama / "adapter")
    tiny_checkpoint(tmp_path / "phi", family="phi", num_key_value_heads=4, num_hidden_layers=1)
    assert "not used: model.layers.1.self_attn.q_proj" in refusal(tmp_path / "phi", llama / "adapter")
    assert "no such folder" in refusal(llama, tmp_path / "nowhere")
    assert f"{llama / 'adapter'} has one" in refusal_of_parent(llama)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "no adapter_model.safetensors" in refusal(llama, tmp_path / "empty")
    with pytest.raises(BadInput, match=f"load its base model with --adapter {llama}/adapter"):
        pentad.load(llama / "adapter")


def refusal_of_parent(folder: Path) -> str:
    with pytest.raises(BadInput) as caught:
        pentad.load(folder, adapter=folder)
    return str(caught.value)


def test_targets_are_named_as_published(llama: Path, tmp_path: Path) -> None:
    source = weights.open(llama)
    assert len(adapters.target_layers(source, "all-linear")) == 14
    assert adapters.target_layers(source, ["layers.0.self_attn.q_proj", "up_proj"]) == [
        "layers.0.attention.q_proj", "layers.0.feedforward.up_proj", "layers.1.feedforward.up_proj",
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"lora\.targets is 'lm_head'; expected 'all-linear', or of q_proj, k_proj"):
        adapters.target_layers(source, ["lm_head"])


def test_adapters_in_the_older_container_load(tmp_path: Path, llama: Path) -> None:
    adapter = copied(llama / "adapter", tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    expected = pentad.load(llama, adapter=llama / "adapter").logits(IDS)
    assert torch.equal(pentad.load(llama, adapter=adapter).logits(IDS), expected)


def test_a_config_without_weights_takes_no_adapter(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    with pytest.raises(BadInput, match="no weights"):
        adapters.merged(weights.open(tmp_path), llama / "adapter")


def test_weights_without_an_adapter_are_unchanged(llama: Path) -> None:
    merged = build.build(adapters.merged(weights.open(llama), llama / "adapter"))
    base = network_of(llama)
    changed = {n for n, p in merged.named_parameters() if not torch.equal(p, base.get_parameter(n))}
    assert changed == {f"layers.{i}.attention.{p}_proj.weight" for i in range(2) for p in "qv"}
