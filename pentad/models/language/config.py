"""Read and write the config of a language model in each checkpoint format.

pentad uses the field names of Hugging Face's ``config.json``. GGUF metadata
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and the ``params.json`` of Meta and Mistral are translated
into these names, and back.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.models.family import Family, ModelConfig
from pentad.models.language.decoder_only import DecoderConfig
from pentad.nn.rope_scaling import FrequencyFactors, Linear, Llama3, Yarn, inverse_frequencies
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.config import MAX_SIZE, read_config

_logger = logging.getLogger(__name__)

GGUF_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rotary_dim": "rope.dimension_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
"""Field -> key in GGUF metadata, after the architecture's name and a dot."""

PARAMS_FIELDS = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "max_position_embeddings": "max_seq_len",
    "sliding_window": "sliding_window",
}
"""Field -> key in params.json."""

UNSUPPORTED_PARAMS = ("yarn", "llama_4_scaling", "vision_encoder")
"""Keys in the params.json of Mistral's later models, which pentad does not support."""


def read_family_config(family: Family, checkpoint: Checkpoint) -> ModelConfig:
    """Read a family's config from a checkpoint's headers; no tensor data is read.

    Raises:
        BadInput: fields are missing, have the wrong type, contradict each other, or are not supported by the family.
    """
    if family.read_config is not None and "model_type" not in checkpoint.config:
        return family.read_config(checkpoint).resolve(checkpoint)
    cls = family.config
    match checkpoint.format:
        case "gguf":
            values = _from_gguf(checkpoint)
        case "consolidated":
            values = _from_params(checkpoint)
        case _:
            values = _from_hf(checkpoint, {**cls.HF_NAMES, **cls.OLD_HF_NAMES})
    config = read_config(cls, values, checkpoint.path).resolve(checkpoint)
    if checkpoint.format == "gguf" and isinstance(config, DecoderConfig):
        key = f"{checkpoint.config['general.architecture']}.{GGUF_FIELDS['rotary_dim']}"
        dims = checkpoint.config.get(key, config.rotary_dim)
        if dims != config.rotary_dim:
            raise BadInput(
                f"{checkpoint.path}: {key} is {str(dims)[:40]}; expected {config.rotary_dim}, as in llama.cpp"
            )
    return config


def write_family_config(family: Family, config: ModelConfig, format: str) -> dict[str, Any]:
    """The config in a checkpoint format, without fields that the format can't store."""
    if format == "hf":
        names = {field: name for name, field in family.config.HF_NAMES.items()}
        written: dict[str, Any] = {
            "architectures": [family.names.architecture],
            "model_type": family.names.model_type or family.names.family,
        }
        for field, value in config.to_hf().items():
            *groups, key = names.get(field, field).split(".")
            reduce(lambda group, name: group.setdefault(name, {}), groups, written)[key] = value
        return written
    assert isinstance(config, DecoderConfig)
    values = {name: getattr(config, name, None) for name in (*GGUF_FIELDS, *PARAMS_FIELDS)}
    if format == "consolidated":
        params = {key: values[field] for field, key in PARAMS_FIELDS.items() if values[field] is not None}
        if values["num_local_experts"]:
            experts = {"num_experts": values["num_local_experts"], "num_experts_per_tok": values["num_experts_per_tok"]}
            params["moe"] = experts
        return params
    metadata = {key: values[field] for field, key in GGUF_FIELDS.items() if values[field] is not None}
    metadata |= {"attention.value_length": config.head_dim, "vocab_size": config.vocab_size, **_gguf_rope(config)}
    prefix = family.names.gguf
    return {"general.architecture": prefix, **{f"{prefix}.{key}": value for key, value in metadata.items()}}


def corrected_by_tensors(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Correct a config by two facts that are known only from tensor data.

    An HF head that differs from the embedding is not tied, whatever ``config.json`` says (as in transformers). GGUF
    files store RoPE's frequency factors in ``rope_freqs.weight``.

    Raises:
        BadInput: the number of frequency factors differs from the number of RoPE's frequencies.
    """
    tensors = checkpoint.tensors
    if not isinstance(config, DecoderConfig):
        return config
    if checkpoint.format == "gguf" and "rope_freqs.weight" in tensors:
        factors = tensors["rope_freqs.weight"].read()
        rope: dict[str, Any] = {"rope_type": "divisors", "divisors": getattr(factors, "tolist", list)()}
        return replace(config, rope_parameters=rope).resolve(checkpoint)
    if checkpoint.format == "hf" and config.tie_word_embeddings:
        entries = [tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
        embedding, head = (None if entry is None else entry.read() for entry in entries)
        if isinstance(embedding, Tensor) and isinstance(head, Tensor):
            tied = embedding.dtype == head.dtype and torch.equal(embedding, head)
            return replace(config, tie_word_embeddings=tied)
    return config


def _from_hf(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, Any]:
    config = dict(checkpoint.config)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise BadInput(
            f"{checkpoint.path}: quantization_config has the quant_method {str(method)[:40]!r}, which is not supported;"
            " use the model's unquantized weights or a GGUF file"
        )
    if "auto_map" in config:
        _logger.info("%s: the code that auto_map names is not run; pentad has its own", checkpoint.path)
    for name, field in names.items():
        found: Any = checkpoint.config
        for key in name.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            config[field] = found
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(rope) if isinstance(rope, Mapping) else {"rope_type": rope}  # not a mapping: `scaling` reports it
    length = config.get("max_position_embeddings", 2048)
    trained = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or length
    is_yarn = "yarn" in (rope.get("rope_type"), rope.get("type"))
    if is_yarn and rope.get("factor") is None and all(isinstance(n, int) and n > 0 for n in (length, trained)):
        rope["factor"] = length / trained  # as in transformers
    return {
        **config,
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor") or config.get("partial_rotary_factor"),
        "rope_parameters": {**rope, "max_position_embeddings": length, "original_max_position_embeddings": trained},
    }


def _from_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors, arch = checkpoint.tensors, checkpoint.config["general.architecture"]
    metadata = {key.removeprefix(f"{arch}."): value for key, value in checkpoint.config.items()}
    if metadata.get("expert_count") and arch != "llama":
        raise BadInput(f"{checkpoint.path}: mixtures in {arch} files are not supported; expected llama (Mixtral)")
    if metadata.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise BadInput(f"{checkpoint.path}: {arch}.rope.scaling.attn_factor is not supported; expected 1")
    rope: dict[str, Any] = {}  # see `corrected_by_tensors` for rope_freqs.weight
    if "rope_freqs.weight" not in tensors:
        name = metadata.get("rope.scaling.type")
        rope = {
            "rope_type": "default" if name == "none" else name,
            "factor": metadata.get("rope.scaling.factor"),
            "original_max_position_embeddings": metadata.get("rope.scaling.original_context_length"),
        }
        if "rope.scale_linear" in metadata:  # in files of 2023
            rope = {"rope_type": "linear", "factor": metadata["rope.scale_linear"]}
    return {
        **{field: metadata.get(key) for field, key in GGUF_FIELDS.items()},
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None,
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _from_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields from Meta's or Mistral's params.json. Only Mistral's stores the feed-forward width itself."""
    params, path = checkpoint.config, checkpoint.path
    if unsupported := [name for name in UNSUPPORTED_PARAMS if params.get(name)]:
        raise BadInput(f"{path}: params.json has {', '.join(unsupported)}, which is not supported")
    required = ["dim", "n_layers", "n_heads", "norm_eps"]
    if "hidden_dim" in params:
        required += ["vocab_size", "head_dim", "n_kv_heads"]
    if absent := [name for name in required if name not in params]:
        raise BadInput(f"{path}: params.json lacks {', '.join(absent)}")
    values = {field: params.get(name) for field, name in PARAMS_FIELDS.items()}
    window = values["sliding_window"]
    if isinstance(window, str) and window.isdecimal():  # some copies of Mistral 7B v0.1 have a string
        values["sliding_window"] = int(window)
    moe = params.get("moe") or params
    if not isinstance(moe, Mapping):
        raise BadInput(f"{path}: params.json: moe is {str(moe)[:40]!r}; expected an object with num_experts")
    values |= {"num_local_experts": moe.get("num_experts"), "num_experts_per_tok": moe.get("num_experts_per_tok")}
    if "hidden_dim" not in params and params.get("vocab_size", -1) == -1:  # -1 means the tokenizer's size
        embedding = checkpoint.tensors.get("tok_embeddings.weight")
        # Without weights: Llama 1 and 2 have -1. Code Llama has no vocab_size, and two different vocabularies.
        values["vocab_size"] = embedding.shape[0] if embedding else 32000 if "vocab_size" in params else None
    values["rope_parameters"] = {}
    if "hidden_dim" in params:
        values["max_position_embeddings"] = values["max_position_embeddings"] or 32768
        # Defaults of Mistral's code before v0.2.
        values["rope_theta"] = values["rope_theta"] or (1e4 if values["sliding_window"] else 1e6)
        return values
    values["intermediate_size"] = _meta_width(params, path)
    values["max_position_embeddings"] = values["max_position_embeddings"] or 4096
    if params.get("use_scaled_rope"):  # Llama 3.1
        values["max_position_embeddings"] = 131072
        values["rope_parameters"] = {
            "rope_type": "llama3",
            "factor": params.get("rope_scaling_factor", 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": params.get("high_freq_factor", 4.0),
            "original_max_position_embeddings": 8192,
        }
    return values


def _meta_width(params: Mapping[str, Any], path: object) -> int:
    """The feed-forward width by the formula in Llama's model.py (FeedForward)."""
    dim, multiple, factor = params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier") or 1.0
    if not isinstance(dim, int) or not isinstance(multiple, int) or not isinstance(factor, int | float):
        raise BadInput(f"{path}: params.json: dim, multiple_of or ffn_dim_multiplier is not a number")
    if not 0 < dim < MAX_SIZE or not 0 < multiple < MAX_SIZE or not 0 < factor < 100:
        raise BadInput(
            f"{path}: params.json: dim {dim}, multiple_of {multiple} or ffn_dim_multiplier {factor} is out of range"
        )
    return multiple * math.ceil(int(factor * int(2 * 4 * dim / 3)) / multiple)


def _gguf_rope(config: DecoderConfig) -> dict[str, Any]:
    """The metadata of a linear or YaRN scaling. Other scalings are stored as a tensor: see `frequency_factors`."""
    scaling = config.rope_scaling
    if not isinstance(scaling, Linear | Yarn):
        return {}
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, Linear):
        return linear
    length = scaling.original_max_position_embeddings
    return {**linear, "rope.scaling.type": "yarn", "rope.scaling.original_context_length": length}


def frequency_factors(config: DecoderConfig) -> Tensor | None:
    """GGUF's ``rope_freqs.weight``, float32 [rotary_dim / 2]; None if the scaling doesn't need it."""
    scaling = config.rope_scaling
    if not isinstance(scaling, Llama3 | FrequencyFactors):
        return None
    default = inverse_frequencies(config.rope_theta, config.rotary_dim)
    return default / scaling.frequencies(config.rope_theta, config.rotary_dim, 1)
