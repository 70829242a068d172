"""Tiny random models made by transformers, and functions that compare their logits."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import pentad.weights
from pentad.build import build
from pentad.errors import BadInput
from pentad.generate import LanguageModel
from pentad.nn.batch import pack

if TYPE_CHECKING:
    from tokenizers import Tokenizer

disable_progress_bar()  # save_pretrained's bar would appear in the standard error that tests compare

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
    """A saved checkpoint, and the transformers model that was saved."""

    folder: Path
    peer: PreTrainedModel


def tiny_peer(dtype: torch.dtype = torch.float32, family: str = "llama", **config: Any) -> PreTrainedModel:
    """Make a random transformers model with eager attention.

    The scales let every weight change the logits: attention is not uniform, and norms and biases differ from their
    initial values.
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
    """Save a `tiny_peer` with transformers; `edit` then changes keys of config.json, where None deletes a key."""
    peer = tiny_peer(dtype, family, **config)
    peer.save_pretrained(folder, max_shard_size=shard_size)
    if edit:
        edit_json(folder / "config.json", **edit)
    return Tiny(folder, peer)


def edit_json(file: Path, **values: Any) -> None:
    """Change keys of a JSON object; None deletes a key."""
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def byte_pipeline(*control: str) -> "Tokenizer":
    """Make a pipeline whose tokens are bytes: ids 0 to 255, then control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer


def add_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes and a chat template: ids 0 to 255, then `END`, which ends a reply."""
    byte_pipeline(END).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def talking_checkpoint(folder: Path, **config: Any) -> Tiny:
    """Save a tiny checkpoint with `add_tokenizer`'s files."""
    tiny = tiny_checkpoint(folder, **{"vocab_size": 264, **config})
    (folder / "generation_config.json").unlink()  # its end token is another vocabulary's
    add_tokenizer(folder)
    return tiny


def network_of(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Load the checkpoint's network."""
    return build(pentad.weights.open(folder), dtype=dtype, **options)


@torch.inference_mode()
def logits_of(network: nn.Module, ids: list[int]) -> Tensor:
    """Run one sequence without a cache: float32 [tokens, vocab]."""
    hidden_ND = network(*pack(ids))
    return network.head(hidden_ND).float()


@torch.inference_mode()
def peer_logits(peer: nn.Module, ids: list[int]) -> Tensor:
    """Run one sequence with transformers: float32 [tokens, vocab]."""
    return peer(torch.tensor([ids]), use_cache=False).logits[0].float()


def pages_of_requests(model: LanguageModel) -> int:
    """The number of pages that unfinished requests use."""
    model.clear_cache()
    return model.step.cache.pages_in_use


def random_ids(count: int, seed: int = 0, vocab: int = 96) -> list[int]:
    """Draw token ids, the same in every run."""
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_equal_logits(ours: Tensor, theirs: Tensor, bound: float = 1e-4) -> None:
    """Check that logits differ by at most `bound`, or by `bound` times the largest logit if it exceeds 1."""
    assert ours.shape == theirs.shape
    assert torch.isfinite(ours).all()
    assert torch.isfinite(theirs).all()
    largest = max(1.0, float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) <= bound * largest


def refused(source: Path) -> str:
    """Check that loading fails with a one-line BadInput that names the source; returns the message."""
    with pytest.raises(BadInput) as raised:
        network_of(source)
    message = str(raised.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def contains(message: str, facts: str) -> bool:
    """Return whether a message contains the facts, which are separated by "…", in this order."""
    return re.search(".*".join(map(re.escape, facts.split("…"))), message) is not None


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())
