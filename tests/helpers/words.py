"""A tiny Segment Anything that takes words, in a folder with its CLIP."""

from pathlib import Path
from typing import Any

from pentad.build import build
from pentad.models.vision.sam.sam import FAMILY, SamConfig
from pentad.vision.export import export
from tests.helpers.clip_files import write_clip

WIDTH = 24  # of the embeddings of the tiny CLIP


def write_words_sam(folder: Path) -> Any:
    """Write the model; its network."""
    config = SamConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, window_size=3,
        global_attn_indexes=(1,), output_channels=32, decoder_mlp_dim=48, text_embed_dim=WIDTH,
    )  # fmt: skip
    network = build(config, seed=3)
    export(network, FAMILY, folder)
    write_clip(folder / "clip")
    return network
