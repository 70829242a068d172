"""Tiny random models, made by transformers, and how their logits are compared."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import pentad.weights
from pentad.build import build
from pentad.errors import BadInput
from pentad.nn.batch import pack

disable_progress_bar()  # of saving, which would get into what is expected on standard error

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
END = "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """A saved checkpoint, and the model that transformers saved it from."""

    folder: Path
    peer: PreTrainedModel


def tiny_peer(dtype: torch.dtype = torch.float32, family: str = "llama", **config: Any) -> PreTrainedModel:
    """A random model of transformers' with eager attention. Every weight counts: attention is not
    flat, and norms and biases are not what they are initialized to.
    """
    generator = torch.Generator().manual_seed(0)
    settings = AutoConfig.for_model(family, **{**SIZES, **config})
    peer = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    for name, parameter in peer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            scaled = 0.2 * noise if name.endswith("bias") else 1 + 0.2 * noise
        else:
            scaled = noise if "embed" in name else 1.5 * noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(scaled)
    return peer.to(dtype).eval()


def tiny_checkpoint(
    folder: Path,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard_size: str = "50GB",
    edit: dict[str, Any] | None = None,
    **config: Any,
) -> Tiny:
    """Lets transformers save a `tiny_peer`; `edit` then changes keys of config.json, or deletes
    those that it gives as None.
    """
    peer = tiny_peer(dtype, family, **config)
    peer.save_pretrained(folder, max_shard_size=shard_size)
    if edit:
        edit_json(folder / "config.json", **edit)
    return Tiny(folder, peer)


def edit_json(file: Path, **values: Any) -> None:
    """Changes keys of a JSON object; None deletes one."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes: ids 0 to 255, then `END`, which ends a reply; and a template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def talking_checkpoint(folder: Path, **config: Any) -> Tiny:
    """A tiny checkpoint with `add_tokenizer`'s files beside it."""
    tiny = tiny_checkpoint(folder, **{"vocab_size": 264, **config})
    (folder / "generation_config.json").unlink()  # which has an end token of another vocabulary
    add_tokenizer(folder)
    return tiny


def network_of(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The checkpoint's network, loaded."""
    return build(pentad.weights.open(folder), dtype=dtype, **options)


@torch.inference_mode()
def logits_of(network: nn.Module, ids: list[int]) -> Tensor:
    """Float32 [tokens, vocab], of one sequence run whole and without a cache."""
    hidden_ND = network(*pack(ids))
    return network.head(hidden_ND).float()


@torch.inference_mode()
def peer_logits(peer: nn.Module, ids: list[int]) -> Tensor:
    """The same by transformers."""
    return peer(torch.tensor([ids]), use_cache=False).logits[0].float()


def random_ids(count: int, seed: int = 0, vocab: int = 96) -> list[int]:
    """Token ids that repeat from run to run."""
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_equal_logits(ours: Tensor, theirs: Tensor, bound: float = 1e-4) -> None:
    """Within `bound`, relative to the largest logit where that exceeds 1."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    assert torch.isfinite(theirs).all()
    largest = max(1.0, float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) <= bound * largest


def refused(source: Path) -> str:
    """The one line of BadInput that loading fails with; it names the source."""
    with pytest.raises(BadInput) as raised:
        network_of(source)
    message = str(raised.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())
