"""Converted files are read by pentad, transformers and ggml's reader; converting back gives the same bits."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM

from pentad import text, weights
from pentad.convert import GGUF_TYPES, convert
from pentad.errors import BadInput
from pentad.weights.checkpoint import TensorEntry
from tests.helpers.conversions import LINEAR, LLAMA3, WIDE, YARN, assert_same_bits, tensors_of
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.tiny import (
    assert_equal_logits,
    edit_json,
    logits_of,
    network_of,
    peer_logits,
    random_ids,
    rms,
    talking_checkpoint,
    tiny_checkpoint,
    tiny_peer,
)
from tests.helpers.tiny_qwen import qwen_checkpoint
from tests.helpers.vocabularies import sentencepiece_model

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, wide heads": {"head_dim": 20},
    "llama, llama3": {"rope_parameters": LLAMA3},
    "llama, linear": {"rope_parameters": LINEAR},
    "mistral": {"family": "mistral"},
    "mistral, window": {"family": "mistral", "sliding_window": 12},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, yarn": {"family": "qwen2", "tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "phi": {"family": "phi", "num_key_value_heads": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_hf_to_hf_keeps_tensors_and_config(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path / "a", dtype=dtype, edit={"a_field_of_its_own": [1, {"b": None}]}, **CONFIGS[name])
    result = convert(tiny.folder, tmp_path / "b", to="hf", shard_bytes=20_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert all(path.is_file() for path in result.files)
    assert_same_bits(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    assert json.loads((tmp_path / "b/config.json").read_text()) == json.loads((tmp_path / "a/config.json").read_text())


@pytest.mark.parametrize("to", ["hf", "gguf", "mistral"])
@pytest.mark.parametrize("name", CONFIGS)
def test_converting_there_and_back(name: str, to: str, tmp_path: Path) -> None:
    """The converted file gives transformers' logits; converting back to hf restores the tensors bit by bit."""
    tiny = tiny_checkpoint(tmp_path / "a", **CONFIGS[name])
    family, known = name.split(",")[0], {"llama", "mistral"}
    there = tmp_path / ("there.gguf" if to == "gguf" else "there")
    if to == "mistral" and (family not in known or "biases" in name or "rope_parameters" in CONFIGS[name]):
        with pytest.raises(BadInput, match=r"consolidated files .*(don't exist|can't store)"):
            convert(tiny.folder, there, to=to)
        assert not there.exists()
        return
    convert(tiny.folder, there, to=to)
    ids = random_ids(40)
    full = "window" in name and to == "gguf"
    expected = peer_logits(tiny.peer, ids[:12] if full else ids)
    assert_equal_logits(logits_of(network_of(there), ids)[: len(expected)], expected)
    back = convert(there, tmp_path / "back", to="hf")
    ours, theirs = tensors_of(tmp_path / "a"), tensors_of(back.path)
    if "tied" in name and to == "mistral":
        del theirs["lm_head.weight"]
    assert_same_bits(ours, theirs)
    peer = AutoModelForCausalLM.from_pretrained(back.path, attn_implementation="eager")
    assert_equal_logits(peer_logits(peer, ids)[: len(expected)], expected)


def test_a_note_says_that_gguf_drops_the_window(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", family="mistral", sliding_window=12)
    (note,) = convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf").notes
    assert "gguf" in note
    assert "sliding window" in note
    assert not convert(tmp_path / "a", tmp_path / "b", to="mistral").notes
    assert json.loads((tmp_path / "b/params.json").read_text())["sliding_window"] == 12


@pytest.mark.parametrize("legacy", [True, False])
def test_a_note_says_that_llama_cpp_adds_a_space_after_control_tokens(legacy: bool, tmp_path: Path) -> None:
    """Orca 2's tokenizer_config.json has `"legacy": false`."""
    tiny = tiny_checkpoint(tmp_path / "a", vocab_size=700)
    (tiny.folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (tiny.folder / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    notes = convert(tiny.folder, tmp_path / "b.gguf", to="gguf").notes
    assert len(notes) == (0 if legacy else 1)
    assert all("space" in note and "control token" in note for note in notes)


def test_a_note_says_that_gguf_drops_dynamic_scaling(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    tiny = tiny_checkpoint(tmp_path / "a", rope_parameters=dynamic)
    (note,) = convert(tiny.folder, tmp_path / "m.gguf", to="gguf").notes
    assert "gguf" in note
    assert "RoPE" in note
    ids = random_ids(60)
    assert_equal_logits(logits_of(network_of(tmp_path / "m.gguf"), ids), peer_logits(tiny.peer, ids))
    qwen_checkpoint(tmp_path / "qwen", seq_length=24, use_dynamic_ntk=True, use_logn_attn=True)
    notes = convert(tmp_path / "qwen", tmp_path / "q.gguf", to="gguf").notes
    assert [("RoPE" in note, "attention" in note) for note in notes] == [(True, False), (False, True)]
    short = random_ids(20)
    before, after = network_of(tmp_path / "qwen"), network_of(tmp_path / "q.gguf")
    assert_equal_logits(logits_of(after, short), logits_of(before, short))


def test_converting_qwen_there_and_back(tmp_path: Path) -> None:
    tiny = qwen_checkpoint(tmp_path / "a")
    convert(tiny.folder, tmp_path / "m.gguf", to="gguf")
    convert(tmp_path / "m.gguf", tmp_path / "b", to="hf")
    assert_same_bits(tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b"))
    ids = random_ids(40)
    for path in ("m.gguf", "b"):
        assert_equal_logits(logits_of(network_of(tmp_path / path), ids), peer_logits(tiny.peer, ids))


@pytest.mark.parametrize("type_name", GGUF_TYPES)
def test_quantizing(type_name: str, tmp_path: Path) -> None:
    """ggml's reader and dequantizer agree with pentad's; embedding and head get 8 bits if other matrices get fewer."""
    tiny = tiny_checkpoint(tmp_path / "a", hidden_size=256, intermediate_size=96)
    convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf", quantize=type_name)
    reader = GGUFReader(tmp_path / "m.gguf")
    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    under_8_bits = type_name.startswith(("q4", "q5"))
    assert types["token_embd.weight"] == types["output.weight"] == ("q8_0" if under_8_bits else type_name)
    assert types["blk.0.ffn_up.weight"] == types["blk.1.attn_q.weight"] == type_name
    assert types["blk.0.ffn_down.weight"] == ("q5_0" if type_name == "q4_k" else type_name)  # rows of 96
    assert types["blk.0.attn_norm.weight"] == "f32"
    for tensor in reader.tensors:
        if tensor.name == "blk.1.ffn_up.weight":
            theirs = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
            assert torch.equal(network_of(tmp_path / "m.gguf").layers[1].feedforward.up_proj.weight, theirs)
    ids = random_ids(30)
    expected = peer_logits(tiny.peer, ids)
    error = rms(logits_of(network_of(tmp_path / "m.gguf"), ids) - expected) / rms(expected)
    assert error < (0.5 if under_8_bits else 0.05)


def test_quantized_blocks_are_copied_unchanged(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_peer(**WIDE), "Q4_1")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", to="gguf")
    ours, theirs = (
        {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}
        for path in (tmp_path / "a.gguf", tmp_path / "b.gguf")
    )
    assert ours == theirs


def test_a_quantized_file_is_dequantized_to_hf(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", peer := tiny_peer(**WIDE), "Q4_1")
    convert(tmp_path / "a.gguf", tmp_path / "half", to="hf")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.bfloat16}
    convert(tmp_path / "a.gguf", tmp_path / "whole", to="hf", dtype="float32")
    ids = random_ids(30)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", attn_implementation="eager")
    assert read.dtype == torch.float32
    assert_equal_logits(peer_logits(read, ids), peer_logits(peer, ids))


def test_a_split_gguf(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path / "a")
    result = convert(tmp_path / "a", tmp_path / "m.gguf", to="gguf", shard_bytes=20_000)
    assert len(result.files) > 1
    ids = random_ids(30)
    assert_equal_logits(logits_of(network_of(result.path), ids), peer_logits(tiny.peer, ids))


def test_the_tokenizer_and_generation_config_are_converted_too(tmp_path: Path) -> None:
    from pentad import load

    talking_checkpoint(tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text('{"temperature": 0.125}')
    one = load(tmp_path / "a")
    assert one.tokenizer is not None
    for to, name in {"hf": "b", "mistral": "c", "gguf": "d.gguf"}.items():
        convert(tmp_path / "a", tmp_path / name, to=to)
        if to != "gguf":
            assert json.loads((tmp_path / name / "generation_config.json").read_text()) == {"temperature": 0.125}
        other = load(tmp_path / name)
        assert other.tokenizer is not None
        text = "Grüße, <|im_end|> 世界 🙂\n"
        assert other.tokenizer.encode(text) == one.tokenizer.encode(text)
        messages = [{"role": "user", "content": "hi"}]
        assert other.tokenizer.chat(messages) == one.tokenizer.chat(messages)


def test_the_same_conversion_gives_the_same_bytes(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a")
    for to, name in {"hf": "b", "gguf": "c.gguf"}.items():
        one, two = (convert(tmp_path / "a", tmp_path / f"{i}{name}", to=to).files for i in "12")
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_experts_stored_one_by_one_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting between two layouts that store experts one by one reads each tensor once."""
    tiny_checkpoint(tmp_path / "a", family="mixtral", num_local_experts=4)
    checkpoint = weights.open(tmp_path / "a")
    reads = Counter[str]()

    def counted(entry: TensorEntry) -> TensorEntry:
        def read() -> Any:
            reads[entry.name] += 1
            return entry.read()

        return replace(entry, read=read)

    counting = replace(checkpoint, tensors={name: counted(entry) for name, entry in checkpoint.tensors.items()})
    monkeypatch.setattr("pentad.convert.weights.open", lambda _: counting)
    convert(tmp_path / "a", tmp_path / "b", to="mistral")
    assert reads.keys() == checkpoint.tensors.keys()
    assert set(reads.values()) == {1}


def test_routers_of_a_quantized_mixture_are_float32(tmp_path: Path) -> None:
    """llama.cpp doesn't quantize them either."""
    tiny_checkpoint(tmp_path / "a", family="mixtral", num_local_experts=4, dtype=torch.bfloat16, **WIDE)
    for type_name in ("q8_0", "f16", None):
        convert(tmp_path / "a", path := tmp_path / f"{type_name}.gguf", to="gguf", quantize=type_name)
        types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
        assert {types[f"blk.{layer}.ffn_gate_inp.weight"] for layer in range(2)} == {"F32"}
        assert types["blk.1.ffn_up_exps.weight"] == (type_name or "bf16").upper()


@pytest.mark.parametrize(
    ("destination", "options", "message"),
    [
        ("a", {"to": "hf"}, "is the source itself"),
        ("full", {"to": "hf"}, "exists already"),
        ("m.bin", {"to": "gguf"}, "ends in .gguf"),
        ("m.gguf", {"to": "hf"}, "hf writes a folder"),
        ("m-00001-of-00002.gguf", {"to": "gguf"}, "a part of a split GGUF"),
        ("there.gguf/b", {"to": "hf"}, "there.gguf is a file"),
        ("there.gguf/b.gguf", {"to": "gguf"}, "there.gguf is a file"),
        ("there.gguf", {"to": "gguf"}, "exists already"),
        ("b", {"to": "tflite"}, "--to is 'tflite'; expected one of hf, mistral, gguf"),
        ("b", {"to": "onnx"}, "--to onnx is for Segment Anything"),
        ("b", {"to": "hf", "quantize": "q4_0"}, "is only for gguf"),
        ("b.gguf", {"to": "gguf", "quantize": "q2_k"}, "quantize is 'q2_k'; expected one of q4_0"),
        ("b.gguf", {"to": "gguf", "dtype": "float32"}, "--dtype is not for gguf"),
        ("b", {"to": "hf", "dtype": "int8"}, "dtype is int8"),
    ],
)
def test_invalid_arguments_are_refused(destination: str, options: dict[str, str], message: str, tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("kept")
    (tmp_path / "there.gguf").write_text("kept")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(BadInput) as raised:
        convert(tmp_path / "a", tmp_path / destination, **options)  # type: ignore[arg-type]
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "full/mine").read_text() == (tmp_path / "there.gguf").read_text() == "kept"


@pytest.mark.parametrize(
    ("to", "rope"), [("gguf", {**YARN, "attention_factor": 0.5}), ("mistral", LINEAR), ("mistral", LLAMA3)], ids=str
)
def test_a_scaling_that_a_format_cannot_store_is_refused(to: str, rope: dict[str, Any], tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", rope_parameters={"rope_theta": 10000.0, **rope})
    there = tmp_path / ("b.gguf" if to == "gguf" else "b")
    with pytest.raises(BadInput, match="can't store rope_parameters"):
        convert(tmp_path / "a", there, to=to)
    assert not there.exists()


def test_a_model_without_a_tokenizer_stays_without(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a")
    (tmp_path / "a/generation_config.json").unlink()
    for source, name, to in (("a", "b.gguf", "gguf"), ("b.gguf", "c.gguf", "gguf"), ("c.gguf", "d", "hf")):
        convert(tmp_path / source, tmp_path / name, to=to)
        assert text.load(weights.open(tmp_path / name)) is None
    assert {path.name for path in (tmp_path / "d").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("to", ["hf", "mistral", "gguf"])
def test_a_tokenizer_larger_than_the_embedding_is_refused(to: str, tmp_path: Path) -> None:
    talking_checkpoint(tmp_path / "a", vocab_size=200)
    there = tmp_path / ("b.gguf" if to == "gguf" else "b")
    with pytest.raises(BadInput, match=r"257 ids.* 200 rows"):
        convert(tmp_path / "a", there, to=to)
    assert not (there).exists()


def test_an_untied_head_is_kept_if_the_config_says_tied(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path / "a", edit={"tie_word_embeddings": True})
    assert_same_bits(tensors_of(convert(tiny.folder, tmp_path / "b", to="hf").path), tensors_of(tiny.folder))
    file = convert(tiny.folder, tmp_path / "b.gguf", to="gguf").path
    assert_equal_logits(logits_of(network_of(file), random_ids(9)), peer_logits(tiny.peer, random_ids(9)))


def test_a_tied_head_with_a_bias_is_written_to_gguf(tmp_path: Path) -> None:
    """llama.cpp can't read a phi2 file without the head."""
    tiny = tiny_checkpoint(tmp_path / "a", family="phi", num_key_value_heads=4, tie_word_embeddings=True)
    file = convert(tiny.folder, tmp_path / "b.gguf", to="gguf").path
    assert {"output.weight", "output.bias"} <= {tensor.name for tensor in GGUFReader(file).tensors}
    assert_equal_logits(logits_of(network_of(file), random_ids(9)), peer_logits(tiny.peer, random_ids(9)))


def test_a_bias_that_gguf_lacks_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a", family="qwen3", attention_bias=True)
    with pytest.raises(BadInput, match=r"gguf.* qwen3"):
        convert(tmp_path / "a", tmp_path / "b.gguf", to="gguf")


def test_a_config_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "a")
    (tmp_path / "a/model.safetensors").unlink()
    with pytest.raises(BadInput, match="no weights"):
        convert(tmp_path / "a", tmp_path / "b", to="hf")


def test_values_outside_the_dtypes_range_are_refused(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path / "a")
    tiny.peer.model.norm.weight.data[0] = 1e30
    tiny.peer.save_pretrained(tiny.folder)
    edit_json(tiny.folder / "config.json")
    with pytest.raises(BadInput, match=r"model\.norm\.weight.*1e\+30"):
        convert(tmp_path / "a", tmp_path / "b", to="hf", dtype="float16")
    assert not (tmp_path / "b").exists()
    assert math.isinf(torch.tensor(1e30).half())


def test_windows_of_single_layers_are_kept_or_refused(tmp_path: Path) -> None:
    """A params.json has one window for all layers."""
    types = ["sliding_attention", "full_attention"]
    tiny_checkpoint(tmp_path / "a", family="mistral", sliding_window=8, edit={"layer_types": types})
    with pytest.raises(BadInput, match="consolidated files can't store layer_types"):
        convert(tmp_path / "a", tmp_path / "b", to="mistral")
    convert(tmp_path / "a", tmp_path / "c", to="hf")
    assert json.loads((tmp_path / "c/config.json").read_text())["layer_types"] == types
    tiny_checkpoint(tmp_path / "d", family="mistral", sliding_window=8, edit={"layer_types": types[:1] * 2})
    convert(tmp_path / "d", tmp_path / "e", to="mistral")
    assert json.loads((tmp_path / "e/params.json").read_text())["sliding_window"] == 8
