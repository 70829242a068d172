"""Tiny random Switch Transformers made by transformers, and a vocabulary like T5's."""

import io
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from pentad.generate.encoder_decoder_step import EncoderDecoderStep
from pentad.nn.batch import SequenceLayout, pack
from pentad.nn.moe.routers import Routing
from tests.helpers.tiny import Tiny
from tests.helpers.vocabularies import SHORT

SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "num_heads": 4,
    "num_experts": 4,
    "expert_capacity": 1000,
    "decoder_start_token_id": 0,
}
DENSE = {"num_sparse_encoder_layers": 9, "num_sparse_decoder_layers": 9}
"""More sparse layers than layers: transformers then makes none of them sparse."""


def switch_peer(**config: Any) -> PreTrainedModel:
    """Make a random transformers model with eager attention.

    The scales let every weight change the logits: attention is not uniform, and relative biases and routers are not
    near zero.
    """
    generator = torch.Generator().manual_seed(0)
    settings = SwitchTransformersConfig(**{**SIZES, **config})
    peer = SwitchTransformersForConditionalGeneration._from_config(settings, attn_implementation="eager")
    for name, parameter in peer.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            noise = 1 + 0.2 * noise
        elif not name.endswith(("relative_attention_bias.weight", "shared.weight", "embed_tokens.weight")):
            noise = noise / parameter.shape[1] ** 0.5
        parameter.data.copy_(0.5 * noise if ".q." in name else noise)
    return peer.eval()


def switch_checkpoint(folder: Path, **config: Any) -> Tiny:
    """Save a `switch_peer` with transformers."""
    peer = switch_peer(**config)
    peer.save_pretrained(folder)
    return Tiny(folder, peer)


def reading_checkpoint(folder: Path, **config: Any) -> Tiny:
    """Save a tiny checkpoint and a vocabulary."""
    tiny = switch_checkpoint(folder, **{"vocab_size": 512, **config})
    (folder / "spiece.model").write_bytes(unigram_model())
    return tiny


@cache
def unigram_model(rule: str = "nmt_nfkc") -> bytes:
    """Train a Unigram vocabulary whose first ids are T5's: <pad>, </s>, <unk>."""
    lines = [line for text in SHORT for line in text.splitlines() if line.isprintable()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 4),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        character_coverage=0.99,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def routings(aux: tuple[Routing | None, ...]) -> list[Routing]:
    """The routings of the sparse layers."""
    return [routing for routing in aux if routing is not None]


@torch.inference_mode()
def run(network: nn.Module, *pairs: tuple[list[int], list[int]]) -> tuple[Tensor, Tensor, list[Routing], list[Routing]]:
    """Run (source, target) pairs without a cache.

    Returns:
        The encoder's output, the decoder's logits, and the routings of both.
    """
    sources, texts = zip(*pairs, strict=True)
    read_MD, read = network.encode(*pack(*sources))
    ids, batch = pack(*texts)
    batch = replace(batch, context=SequenceLayout.of([len(ids) for ids in sources]))
    hidden_ND, wrote = network.forward_with_routing(ids, batch, read_MD)
    return read_MD, network.head(hidden_ND).float(), routings(read), routings(wrote)


def stepped(network: nn.Module, source: list[int], text: list[int], sizes: int = 1, **options: Any) -> Tensor:
    """Logits of `text`, run through a cache with `sizes` tokens a step."""
    step = EncoderDecoderStep(network, **options)
    sequence = step.cache.open_with(source)
    chunks = [text[i : i + sizes] for i in range(0, len(text), sizes)]
    return torch.cat([step([(sequence, chunk)], range(len(chunk))) for chunk in chunks])
