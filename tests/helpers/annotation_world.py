"""Tiny scenes, a tiny Segment Anything with random weights, and a recipe that trains it."""

from pathlib import Path

from pentad.build import build
from pentad.datasets.object_folders import write_objects
from pentad.datasets.scenes import Scenes
from pentad.models.vision.sam.sam import FAMILY, SamConfig
from pentad.vision.export import export

RECIPE = """
objective = "segment"
[run]
steps = 1
batch_size = 2
[optimizer]
lr = 1e-3
[segment]
clicks = 0
"""


def write_world(root: Path) -> Path:
    """Write scenes/, sam/ and recipe.toml into a folder."""
    write_objects(Scenes(4, size=64, objects=(1, 2)), root / "scenes")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    heads = {"decoder_num_attention_heads": 2, "decoder_mlp_dim": 16, "iou_head_hidden_dim": 16}
    config = SamConfig(**sizes, **heads, mlp_dim=32, output_channels=16, window_size=3, global_attn_indexes=(0,))
    export(build(config, seed=0), FAMILY, root / "sam")
    (root / "recipe.toml").write_text(RECIPE)
    return root
