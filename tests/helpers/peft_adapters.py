"""Adapters made by PEFT and by pentad, and models with adapters run by PEFT."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from pentad import adapters, build, weights
from pentad.nn.decoder import Decoder
from pentad.nn.lora import add_lora, lora_layers


def save_peft_adapter(base: Path, folder: Path, **config: Any) -> nn.Module:
    """Save a random adapter for a checkpoint; returns the model with the adapter."""
    with warnings.catch_warnings(action="ignore"):  # PEFT reads deprecated attributes of transformers
        peer = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        settings = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
        model = get_peft_model(peer, LoraConfig(**settings | config))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
    return model.eval()


def load_in_peft(base: Path, adapter: Path) -> PeftModel:
    """The base model with an adapter, as PEFT loads it; an adapter that doesn't fit the model is an error."""
    with warnings.catch_warnings(action="ignore"):
        warnings.filterwarnings("error", message=".*(missing|unexpected|mismatched).*")
        peer = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
        return PeftModel.from_pretrained(peer, adapter).eval()


def merged_by_peft(base: Path, adapter: Path) -> nn.Module:
    """The base model with an adapter merged into its weights."""
    model = load_in_peft(base, adapter)
    with warnings.catch_warnings(action="ignore"):
        return model.merge_and_unload()


def adapted(folder: Path, targets: str | list[str] = "all-linear", *, rslora: bool = False) -> Decoder:
    """A network with random adapters of rank 4 and alpha 8, and its adapter, saved in folder/adapter."""
    source = weights.open(folder)
    network = build.build(source)
    add_lora(network, adapters.target_layers(source, targets), rank=4, scale=8 / (2 if rslora else 4))
    for layer in lora_layers(network).values():
        layer.lora_B.data.normal_(0, 0.3)
    adapters.save(network, source, folder / "adapter", alpha=8, rslora=rslora, dropout=0.1, base=str(folder))
    return network
