"""Loading Hugging Face folders and GGUF files, valid and invalid."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pentad
import pentad.weights
from pentad.build import build, default_dtype
from pentad.errors import BadInput, PentadError
from pentad.models import families, family_of
from pentad.models.language.config import read_family_config
from pentad.weights.checkpoint import Checkpoint
from tests.helpers.gguf_llama import write_gguf
from tests.helpers.tiny import (
    SIZES,
    add_tokenizer,
    assert_equal_logits,
    contains,
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

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole blocks of 32


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply `edit` to the dict of the folder's tensors, and save it."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


# --- tensors that don't fit ---------------------------------------------------------------------


def test_missing_unused_and_misshapen_tensors_are_named_in_one_line(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    q = "model.layers.1.self_attn.q_proj.weight"
    up = "model.layers.0.mlp.up_proj.weight"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors[q] = torch.zeros(32, 31)
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(8)
        tensors[up] = torch.zeros(32, 48)

    edit_tensors(tmp_path, edit)
    message = refused(tmp_path)
    assert "2 missing: lm_head.weight, model.norm.weight" in message or (
        "2 missing: model.norm.weight, lm_head.weight" in message
    )
    assert "2 of the wrong shape" in message
    assert contains(message, f"{q} is [32, 31]…[32, 32]")
    assert contains(message, f"{up} is [32, 48]…[48, 32]")
    assert "1 not used: model.layers.0.self_attn.q_norm.weight" in message


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"num_hidden_layers": 3}, "9 missing: model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "9 not used: model.layers.1."),
        ({"vocab_size": 97}, "model.embed_tokens.weight is [96, 32]…[97, 32]"),
        ({"attention_bias": True}, "8 missing: model.layers.0.self_attn.q_proj.bias"),
        ({"num_key_value_heads": 4}, "k_proj.weight is [16, 32]…[32, 32]"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_its_weights(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    tiny_checkpoint(tmp_path, edit=edit)
    assert contains(refused(tmp_path), message)


def test_biases_that_the_config_does_not_mention_are_not_dropped(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, attention_bias=True, edit={"attention_bias": False})
    assert "8 not used: model.layers.0.self_attn." in refused(tmp_path)


def test_a_file_may_contain_inv_freq_and_a_tied_head(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path, tie_word_embeddings=True)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_tensors(tmp_path, edit)
    ids = random_ids(20)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


def test_a_config_without_weights(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no weights" in refused(tmp_path)


# --- configs that are wrong -----------------------------------------------------------------------


def config(**values: Any) -> Checkpoint:
    sizes = {"model_type": "llama", **SIZES, **values}
    kept = {key: value for key, value in sizes.items() if value is not None}
    return Checkpoint(Path("somewhere"), "hf", kept, {}, {})


@pytest.mark.parametrize("name", ["qwen2_moe", "gemma2", "mistral3", "phi3"])
def test_an_architecture_with_a_similar_name_is_refused(name: str) -> None:
    with pytest.raises(BadInput) as raised:
        family_of(config(model_type=name))
    message = str(raised.value)
    assert message.startswith(f"somewhere: architecture '{name}' ")
    assert all(family.names.family in message for family in families() if "hf" in family.key_tables)


def test_the_error_for_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match=r"'whisper' .*supported: .*llama"):
        family_of(config(model_type="whisper"))
    with pytest.raises(BadInput, match="no 'model_type'"):
        family_of(config(model_type=None))
    with pytest.raises(BadInput, match="no 'model_type'"):
        family_of(config(model_type=7))


FIELDS = [*SIZES, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias"]
ODD = [0, -1, 1.5, True, "x", [1], {}, {"a": 1}, {"rope_type": [1]}, math.nan, math.inf, 2**70, 10**400]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ODD, ids=lambda value: str(value)[:20])
def test_an_odd_value_is_accepted_or_bad_input(field: str, value: object) -> None:
    """Reading the config never raises another error. Python's JSON allows NaN and numbers of any length."""
    checkpoint = config(**{field: value})
    family = family_of(checkpoint)
    message = "somewhere: "
    try:
        made = read_family_config(family, checkpoint)
        with torch.device("meta"):
            family.network(made)
    except BadInput as error:
        message = str(error)
    assert message.startswith("somewhere: ")
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": None, "head_dim": 8}, "the config lacks hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776, which is not a possible size"),
        ({"num_key_value_heads": 3}, "4 heads of 8 dimensions and 3 key"),
        ({"head_dim": 7}, "4 heads of 7 dimensions"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "unknown RoPE scaling 'spiral'"),
    ],
    ids=str,
)
def test_an_invalid_config_is_refused(values: dict[str, Any], message: str) -> None:
    checkpoint = config(**values)
    family = family_of(checkpoint)
    with pytest.raises(BadInput) as raised:
        family.network(read_family_config(family, checkpoint))
    assert str(raised.value).startswith("somewhere: ")
    assert message in str(raised.value)


def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config may claim far more layers than the weights have."""
    tiny_checkpoint(tmp_path, edit={"num_hidden_layers": 10**8})
    built = 0
    register = nn.Module.__init__

    def count(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        nonlocal built
        built += 1
        assert built < 1000, "builds layers for which the file has no weights"
        register(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__init__", count)
    refused(tmp_path)


def test_sizes_whose_product_overflows_are_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, edit={"hidden_size": 2**31 - 2, "intermediate_size": 2**31 - 2})
    refused(tmp_path)
    edit_json(tmp_path / "config.json", vocab_size=2**31 - 1, head_dim=2**31 - 2)
    refused(tmp_path)


def test_an_older_yarn_config_scales_from_max_position_embeddings(tmp_path: Path) -> None:
    """Without an original length, transformers uses max_position_embeddings."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    tiny = tiny_checkpoint(tmp_path, rope_parameters=rope)
    old = {"type": "yarn", "factor": 4.0}
    edit_json(tmp_path / "config.json", rope_parameters=None, rope_scaling=old, rope_theta=10000.0)
    ids = random_ids(60)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


def test_a_null_factor_of_yarn_is_derived_as_in_transformers(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    tiny = tiny_checkpoint(tmp_path, rope_parameters=rope, max_position_embeddings=256)
    edit_json(tmp_path / "config.json", rope_parameters={**rope, "factor": None})
    ids = random_ids(60)
    assert_equal_logits(logits_of(network_of(tmp_path), ids), peer_logits(tiny.peer, ids))


# --- what is loaded -------------------------------------------------------------------------------


def test_weights_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    """A tied weight is one parameter."""
    tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    checkpoint = pentad.weights.open(tmp_path)
    network = build(checkpoint)
    mapped = mapped_ranges(tmp_path / "model.safetensors")
    for name, parameter in network.named_parameters():
        assert any(parameter.data_ptr() in addresses for addresses in mapped), name
        assert not parameter.requires_grad
    assert network.head.weight is network.embed.weight
    assert not network.training


def mapped_ranges(file: Path) -> list[range]:
    """The addresses at which this process has mapped the file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system has no /proc/self/maps")
    mappings = [line.split() for line in maps.read_text().splitlines()]
    spans = [line[0].split("-") for line in mappings if line[-1] == str(file.resolve())]
    return [range(int(start, 16), int(stop, 16)) for start, stop in spans]


def test_gguf_weights_are_views_of_the_mapped_file_unless_permuted(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, tiny_peer(), "F32")
    network = network_of(file)
    mapped = mapped_ranges(file)
    permuted = ("q_proj", "k_proj")
    for name, parameter in network.named_parameters():
        inside = any(parameter.data_ptr() in addresses for addresses in mapped)
        assert inside != any(part in name for part in permuted), name


@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_loading_twice_gives_the_same_bits(tmp_path: Path, source: str) -> None:
    tiny = tiny_checkpoint(tmp_path / "hf", **WIDE)
    if source == "gguf":
        write_gguf(tmp_path / "gguf", tiny.peer, "Q4_0")
    ids = random_ids(20)
    for dtype in (torch.float32, torch.bfloat16):
        one, two = (logits_of(network_of(tmp_path / source, dtype), ids) for _ in range(2))
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_dtype_of_a_folder_is_its_weights_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_checkpoint(tmp_path, dtype=dtype)
    assert default_dtype(pentad.weights.open(tmp_path)) == dtype
    model = pentad.load(tmp_path)
    assert {p.dtype for p in model.network.parameters()} == {dtype}
    assert model.logits([1, 2]).dtype == torch.float32


@pytest.mark.parametrize(
    ("type_name", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
    + [(name, torch.bfloat16) for name in ("Q8_0", "Q4_0", "Q4_1")],
)
def test_the_default_dtype_of_a_gguf(tmp_path: Path, type_name: str, dtype: torch.dtype) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_peer(**WIDE), type_name)
    assert default_dtype(pentad.weights.open(tmp_path / "m.gguf")) == dtype


@pytest.mark.parametrize("name", ["float16", "torch.float16", torch.float16])
def test_a_dtype_may_be_a_name(tmp_path: Path, name: object) -> None:
    tiny_checkpoint(tmp_path)
    model = pentad.load(tmp_path, dtype=name, cache_dtype="float32")
    assert model.network.norm.weight.dtype == torch.float16
    assert model.logits([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "dtype is float8"),
        ({"cache_dtype": "int4"}, "dtype is int4"),
        ({"quantize": "q3"}, "quantize is 'q3'; expected one of q4_0, q4_1, q4_k, q5_0, q5_1, q8_0, or none"),
        ({"device": "abacus"}, "device is abacus; expected one of cpu, cuda, mps"),
        ({"threads": 0}, "threads is 0"),
        ({"context": 0}, "context is 0;"),
        ({"context": 257}, "expected 1 to 256 tokens"),
    ],
    ids=str,
)
def test_an_invalid_option_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(BadInput) as raised:
        pentad.load(tmp_path, **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sampling_defaults_come_from_generation_config(tmp_path: Path) -> None:
    talking_checkpoint(tmp_path)
    recommended = {"do_sample": True, "temperature": 0.4, "top_k": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    sampling = pentad.load(tmp_path).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.4, 7, 1.0)


# --- NaN ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_nan_or_infinite_weights_are_reported_when_generating(tmp_path: Path, name: str, value: float) -> None:
    talking_checkpoint(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors[name][..., 3].fill_(value))
    model = pentad.load(tmp_path)
    for use in (
        lambda: model.chat("hello"),
        lambda: model.complete("hello", temperature=0),
        lambda: model.complete(["hello", "you"]),
        lambda: list(model.stream("hello")),
        lambda: model.score("hello"),
    ):
        with pytest.raises(PentadError, match=r"not numbers .*damaged"):
            use()


# --- no tokenizer --------------------------------------------------------------------------------


def test_without_a_tokenizer_only_logits_work(tmp_path: Path) -> None:
    tiny = tiny_checkpoint(tmp_path)
    model = pentad.load(tmp_path)
    ids = random_ids(12)
    assert_equal_logits(model.logits(ids), peer_logits(tiny.peer, ids))
    for use in (lambda: model.chat("hi"), lambda: model.complete("hi"), lambda: model.score("hi")):
        with pytest.raises(BadInput, match="has no tokenizer"):
            use()
    add_tokenizer(tmp_path)
    model = pentad.load(tmp_path)
    assert_equal_logits(model.logits(ids), peer_logits(tiny.peer, ids))
    with pytest.raises(BadInput, match=r"tokenizer has 257 ids.*embedding.* 96 rows"):
        model.complete("hi")


def test_a_quantization_that_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quant_method 'gptq'" in refused(tmp_path)


def test_a_size_is_a_whole_number(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", hidden_size=64.0)
    assert "hidden_size is '64.0'" in refused(tmp_path)


def test_an_unknown_dtype_in_the_config_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", dtype="int3")
    pentad.load(tmp_path)
    assert "'int3'" in caplog.text
