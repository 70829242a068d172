"""The config of a decoder-only language model, as each kind of file spells it.

Hugging Face's ``config.json`` has the names that the house uses. GGUF metadata
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and the ``params.json`` of Meta and Mistral say the same in
other words; here they are put into those names, and back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.nn.rope_scaling import FrequencyFactors, Linear, Llama3, Yarn, inverse_frequencies, scaling
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.config import MAX_SIZE, read_config

MAX_EXPERTS = 4096  # twice those of the largest published model; a larger number is a broken file


@dataclass(frozen=True)
class DecoderConfig:
    """The fields that every decoder-only family reads, with Hugging Face's names and defaults."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # as many as num_attention_heads
    head_dim: int = 0  # hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_parameters: Mapping[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"

    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("silu", "swish")
    """What `hidden_act` may be."""

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that RoPE rotates."""
        return self.head_dim


C = TypeVar("C", bound=DecoderConfig)

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
"""A field's name in config.json -> its key in GGUF metadata, behind the architecture's name and a dot."""

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
"""A field's name in config.json -> its name in params.json."""

BEYOND = ("yarn", "llama_4_scaling", "vision_encoder")
"""What later models of Mistral's have in their params.json, and the networks here have not."""


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with `names` of its ``config.json`` put into today's; other kinds of file stay as they are."""
    if checkpoint.format != "hf":
        return checkpoint
    said = {new: checkpoint.config[old] for old, new in names.items() if checkpoint.config.get(old) is not None}
    return replace(checkpoint, config={**checkpoint.config, **said})


def published_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint's config says, under the names of ``config.json``; None where it is silent.

    Raises:
        BadInput: it asks for something that no family here computes.
    """
    match checkpoint.format:
        case "gguf":
            return _from_gguf(checkpoint)
        case "consolidated":
            return _from_params(checkpoint)
        case _:
            return _from_hf(checkpoint)


def _from_hf(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = dict(rope) if isinstance(rope, Mapping) else {"rope_type": rope}  # refused by name
    length = config.get("max_position_embeddings", 2048)
    trained = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or length
    values = dict(config)
    if config.get("tie_word_embeddings") is True and _has_a_head_of_its_own(checkpoint):
        values["tie_word_embeddings"] = False
    return {
        **values,
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor") or config.get("partial_rotary_factor"),
        "rope_parameters": {
            **rope,
            "max_position_embeddings": length,
            "original_max_position_embeddings": trained,
        },
    }


def _has_a_head_of_its_own(checkpoint: Checkpoint) -> bool:
    """Whether the file holds another head than the embedding: then its config is wrong, as transformers has it."""
    both = [checkpoint.tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    embedding, head = (None if entry is None else entry.read() for entry in both)
    if not isinstance(embedding, Tensor) or not isinstance(head, Tensor):
        return False
    return embedding.dtype != head.dtype or not torch.equal(embedding, head)


def _from_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors, arch = checkpoint.tensors, checkpoint.config["general.architecture"]
    meta = {key.removeprefix(f"{arch}."): value for key, value in checkpoint.config.items()}
    if meta.get("expert_count") and arch != "llama":
        raise BadInput(f"{checkpoint.path}: of mixtures of experts only Mixtral (llama) is supported, not {arch}")
    if meta.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise BadInput(f"{checkpoint.path}: {arch}.rope.scaling.attn_factor is not 1, which is not supported")
    rope: dict[str, Any]
    if "rope_freqs.weight" in tensors:
        divisors = tensors["rope_freqs.weight"].read()
        rope = {"rope_type": "divisors", "divisors": getattr(divisors, "tolist", list)()}
    elif "rope.scale_linear" in meta:  # how files of 2023 had it
        rope = {"rope_type": "linear", "factor": meta["rope.scale_linear"]}
    else:
        rope = {
            "rope_type": "default" if (kind := meta.get("rope.scaling.type")) == "none" else kind,
            "factor": meta.get("rope.scaling.factor"),
            "original_max_position_embeddings": meta.get("rope.scaling.original_context_length"),
        }
    return {
        **{field: meta.get(key) for field, key in GGUF_FIELDS.items()},
        "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None,
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _from_params(checkpoint: Checkpoint) -> dict[str, Any]:
    """Meta's params.json (Llama) gives the feed-forward width by a rule, Mistral's by its number."""
    params, path = checkpoint.config, checkpoint.path
    if asked := [name for name in BEYOND if params.get(name)]:
        raise BadInput(f"{path}: params.json asks for {', '.join(asked)}, which no family here computes")
    required = ["dim", "n_layers", "n_heads", "norm_eps"]
    if "hidden_dim" in params:
        required += ["vocab_size", "head_dim", "n_kv_heads"]
    if absent := [name for name in required if name not in params]:
        raise BadInput(f"{path}: params.json lacks {', '.join(absent)}")
    values = {field: params.get(name) for field, name in PARAMS_FIELDS.items()}
    window = values["sliding_window"]
    if isinstance(window, str) and window.isdecimal():  # as Mistral 7B v0.1 was also published
        values["sliding_window"] = int(window)
    moe = params.get("moe") or params
    if not isinstance(moe, Mapping):
        raise BadInput(f"{path}: params.json: moe is {str(moe)[:40]!r}, not what a mixture's numbers are in")
    values |= {"num_local_experts": moe.get("num_experts"), "num_experts_per_tok": moe.get("num_experts_per_tok")}
    if "hidden_dim" not in params and params.get("vocab_size", -1) == -1:  # as many as the tokenizer has
        embedding = checkpoint.tensors.get("tok_embeddings.weight")
        # Without weights: those that wrote -1 are Llama 1 and 2. Code Llama says nothing, and has two vocabularies.
        values["vocab_size"] = embedding.shape[0] if embedding else 32000 if "vocab_size" in params else None
    values["rope_parameters"] = {}
    if "hidden_dim" in params:
        values["max_position_embeddings"] = values["max_position_embeddings"] or 32768
        # Mistral's code of before v0.2 took a base of 1e4 where there was a window, and 1e6 where there was none.
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
    """Two thirds of four times the width, times a factor, up to a multiple (Llama's model.py, FeedForward)."""
    dim, multiple, factor = params["dim"], params.get("multiple_of", 256), params.get("ffn_dim_multiplier") or 1.0
    if not isinstance(dim, int) or not isinstance(multiple, int) or not isinstance(factor, int | float):
        raise BadInput(f"{path}: params.json: dim, multiple_of and ffn_dim_multiplier are numbers")
    if not 0 < dim < MAX_SIZE or not 0 < multiple < MAX_SIZE or not 0 < factor < 100:
        raise BadInput(
            f"{path}: params.json: dim {dim}, multiple_of {multiple} or ffn_dim_multiplier {factor} can't be"
        )
    return multiple * math.ceil(int(factor * int(2 * 4 * dim / 3)) / multiple)


def read_decoder_config(cls: type[C], checkpoint: Checkpoint, **values: Any) -> C:
    """A family's config, complete and checked; `values` go before what the checkpoint says.

    Raises:
        BadInput: fields are missing, of the wrong type, or contradict each other.
    """
    path = checkpoint.path
    config = read_config(cls, {**published_values(checkpoint), **values}, path)
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    head_dim = config.head_dim or config.hidden_size // heads
    if config.hidden_act not in config.ACTIVATIONS:
        raise BadInput(
            f"{path}: hidden_act is {config.hidden_act!r}; this family has {' or '.join(config.ACTIVATIONS)}"
        )
    if heads % kv_heads or head_dim % 2 or heads * head_dim > MAX_SIZE:
        raise BadInput(
            f"{path}: {heads} heads of {head_dim} numbers can't share {kv_heads} key/value heads and rotate in pairs"
        )
    config = replace(config, num_key_value_heads=kv_heads, head_dim=head_dim)
    if not 0 < config.rotary_dim <= head_dim or config.rotary_dim % 2:
        raise BadInput(f"{path}: RoPE can't rotate {config.rotary_dim} of a head's {head_dim} numbers, in pairs")
    # Refuses unknown scalings, and divisors of another number than there are frequencies.
    scaling(config.rope_parameters, path).frequencies(config.rope_theta, config.rotary_dim, 1)
    return config


def check_experts(config: DecoderConfig, experts: int, top_k: int, path: Path) -> None:
    """Raise BadInput where a mixture of so many experts, `top_k` of a token, is not possible."""
    if experts > MAX_EXPERTS or experts * config.hidden_size * config.intermediate_size > MAX_SIZE**2:
        raise BadInput(f"{path}: {experts} experts of that width are not possible")
    if top_k > experts:
        raise BadInput(f"{path}: a token can't go to {top_k} of {experts} experts")


class ArchitectureNames(NamedTuple):
    """What a family is called in each kind of file."""

    model_type: str
    architecture: str
    """Hugging Face's class."""
    gguf: str | None = None
    """GGUF's architecture; None where llama.cpp has none."""


def written_values(config: DecoderConfig, format: str, spelling: ArchitectureNames) -> dict[str, Any]:
    """The way back: a config as files of `format` spell it.

    What a format has no place for is left out: read it back to see.
    """
    values = {**asdict(config), "rotary_dim": config.rotary_dim}
    if format == "consolidated":
        return {name: values[field] for field, name in PARAMS_FIELDS.items() if values.get(field) is not None}
    if format == "gguf":
        fields = {key: values[field] for field, key in GGUF_FIELDS.items() if values.get(field) is not None}
        fields |= {"attention.value_length": config.head_dim, "vocab_size": config.vocab_size}
        fields |= _gguf_rope(config)
        return {
            "general.architecture": spelling.gguf,
            **{f"{spelling.gguf}.{key}": value for key, value in fields.items()},
        }
    rope = {key: value for key, value in values.pop("rope_parameters").items() if value is not None}
    values.pop("rotary_dim")
    return {
        "architectures": [spelling.architecture],
        "model_type": spelling.model_type,
        **values,
        "rope_scaling": _hf_rope(config, rope),
    }


def _hf_rope(config: DecoderConfig, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "divisors":  # GGUF's; here the one scaling that is given by divisors, its two sets alike
        divisors = list(rope["divisors"])
        return {
            "rope_type": "longrope",
            "short_factor": divisors,
            "long_factor": divisors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
        }
    return {**rope, "rope_type": kind}


def _gguf_rope(config: DecoderConfig) -> dict[str, Any]:
    """Of a scaling that is a divisor for each frequency, `rope_divisors` says the rest."""
    stretch = scaling(config.rope_parameters)
    match stretch:
        case Linear():
            return {"rope.scaling.type": "linear", "rope.scaling.factor": stretch.factor}
        case Yarn():
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": stretch.factor,
                "rope.scaling.original_context_length": stretch.original_max_position_embeddings,
            }
    return {}


def rope_divisors(config: DecoderConfig) -> Tensor | None:
    """What GGUF's ``rope_freqs.weight`` holds: float32 [D / 2]; None where no such tensor is needed."""
    stretch = scaling(config.rope_parameters)
    if not isinstance(stretch, Llama3 | FrequencyFactors):
        return None
    plain = inverse_frequencies(config.rope_theta, config.rotary_dim)
    return plain / stretch.frequencies(config.rope_theta, config.rotary_dim, 1)
