"""Tiny Segment Anything models of Meta's package and of transformers, with random weights."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SamConfig, SamModel

import tests.helpers.torchvision_stub  # noqa: F401

segment_anything: Any = import_module("segment_anything")
modeling: Any = import_module("segment_anything.modeling")

SIDE, PATCH, WIDTH = 8, 8, 128


def _noisy(peer: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in peer.state_dict().values():
            tensor += torch.empty(tensor.shape).normal_(0.0, 0.15, generator=generator)
    return peer.eval()


def meta_sam(path: Path | None = None) -> Any:
    """A Sam of Meta's code with 3 blocks, one of them global, and windows that don't fit the image; saved as a .pth."""
    torch.manual_seed(0)
    norm: Any = lambda width: nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    encoder = modeling.ImageEncoderViT(
        SIDE * PATCH, PATCH, 3, 32, 3, 2, norm_layer=norm, use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
        out_chans=WIDTH,
    )  # fmt: skip
    prompts = modeling.PromptEncoder(WIDTH, (SIDE, SIDE), (SIDE * PATCH, SIDE * PATCH), 16)
    transformer = modeling.TwoWayTransformer(2, WIDTH, 8, 48)
    decoder = modeling.MaskDecoder(transformer_dim=WIDTH, transformer=transformer, iou_head_hidden_dim=24)
    peer = _noisy(modeling.Sam(encoder, prompts, decoder))
    if path is not None:
        torch.save(peer.state_dict(), path)
    return peer


def hf_sam(folder: Path) -> Any:
    """A SamModel of the same sizes, saved in a folder."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE * PATCH,
        "patch_size": PATCH, "window_size": 3, "global_attn_indexes": [1], "output_channels": WIDTH,
        "num_pos_feats": WIDTH // 2,
    }  # fmt: skip
    prompt = {"hidden_size": WIDTH, "image_size": SIDE * PATCH, "patch_size": PATCH}
    decoder = {"hidden_size": WIDTH, "mlp_dim": 48, "iou_head_hidden_dim": 24}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    peer = _noisy(SamModel(config))
    peer.prompt_encoder.shared_embedding = peer.shared_image_embedding
    peer.save_pretrained(folder)
    return peer
