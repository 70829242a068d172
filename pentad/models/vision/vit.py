"""Vision Transformer (arXiv:2010.11929): an image's patches are a sequence for a pre-norm encoder.

The files are those of transformers (ViTForImageClassification, ViTModel), and timm's and MAE's, with the same names.

Legend: B images [C, H, W], P patches an image, N = B * (P + 1) rows, D width, V classes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family
from pentad.models.vision.config import ClassifierConfig, Preprocessing, count_layers, sizes, timm_labels
from pentad.nn.attention import Attention
from pentad.nn.batch import Batch
from pentad.nn.block import DropPathBlock, run_blocks
from pentad.nn.feedforward import GeluMLP
from pentad.nn.norm import LayerNorm
from pentad.nn.patches import Tokens, resized_positions
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import Concat, KeyTable, Rule

HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Width -> heads of published networks whose heads don't have 64 dimensions (H, g and G)."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ClassifierConfig):
    """The fields of a published ``config.json`` that the network reads, with their defaults.

    Attributes:
        global_pool: what the head sees, in timm's words: the class "token", or the "avg" of the patches (MAE's
            fine-tuning), with the norm after it.
        drop_path_rate: stochastic depth of the last block, in training; the rate grows linearly from 0.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    initializer_range: float = 0.02
    global_pool: str = "token"
    drop_path_rate: float = field(default=0.0, metadata={"least": 0})

    @property
    def patches(self) -> int:
        """The number of patches of an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def preprocessing(self) -> Preprocessing:
        half = (0.5,) * self.num_channels
        return Preprocessing(size=(self.image_size, self.image_size), mean=half, std=half)

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path = checkpoint.path
        check_encoder(self.hidden_size, self.num_attention_heads, path)
        if self.image_size % self.patch_size:
            raise BadInput(f"{path}: image_size is {self.image_size}; expected a multiple of {self.patch_size}")
        if self.hidden_act != "gelu":
            raise BadInput(f"{path}: hidden_act is {self.hidden_act!r}; expected gelu")
        if self.global_pool not in ("token", "avg"):
            raise BadInput(f"{path}: global_pool is {self.global_pool!r}; expected token or avg")
        return super().resolve(checkpoint)


def check_encoder(width: int, heads: int, path: object) -> None:
    """Raise BadInput if a width isn't a whole number of heads."""
    if width % heads:
        raise BadInput(f"{path}: a width of {width} can't be divided into {heads} heads")


class ViT(nn.Module):
    """The encoder, and a linear head."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size)
        self.cls_token = Tokens(1, c.hidden_size)
        self.positions = Tokens(c.patches + 1, c.hidden_size)
        rates = [c.drop_path_rate * i / max(1, c.num_hidden_layers - 1) for i in range(c.num_hidden_layers)]
        sizes = c.hidden_size, c.num_attention_heads, c.intermediate_size
        self.layers = nn.ModuleList(encoder_blocks(*sizes, c.layer_norm_eps, c.qkv_bias, rates))
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.num_labels) if c.num_labels else nn.Identity()

    def forward(self, images_BCHW: Tensor, *, checkpointing: str = "none") -> Tensor:
        """The logits [B, V] of images of equal size; without a head the pooled rows [B, D]."""
        logits_BV: Tensor = self.head(self.pooled(images_BCHW, checkpointing=checkpointing))
        return logits_BV

    def pooled(self, images_BCHW: Tensor, *, checkpointing: str = "none") -> Tensor:
        """What the head sees, [B, D]."""
        x_BND = self._embed(images_BCHW)
        if self.config.global_pool == "avg":
            pooled_BD = run_encoder(self.layers, x_BND, checkpointing)[:, 1:].mean(1)
        else:
            pooled_BD = run_first_rows(self.layers, x_BND, checkpointing)
        normed_BD: Tensor = self.norm(pooled_BD)
        return normed_BD

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The normed rows [B, 1 + P, D] of the class token and the patches."""
        features_BND: Tensor = self.norm(run_encoder(self.layers, self._embed(images_BCHW)))
        return features_BND

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        """Class token and patches with their positions, [B, 1 + P, D]."""
        grid_BDRC = self.patch_embed(images_BCHW)
        positions_1ND = resized_positions(self.positions.weight, *grid_BDRC.shape[2:])
        patches_BPD = grid_BDRC.flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.weight.expand(len(images_BCHW), -1, -1), patches_BPD], 1) + positions_1ND


def encoder_blocks(
    width: int,
    heads: int,
    hidden: int,
    eps: float,
    bias: bool,
    rates: list[float],
    *,
    causal: bool = False,
    approximate: str = "none",
) -> Iterator[DropPathBlock]:
    """ViT's blocks, one for each rate of stochastic depth; for `causal` and `approximate` see their parts."""
    for rate in rates:
        attention = Attention(width, heads=heads, head_dim=width // heads, causal=causal, bias=bias, output_bias=True)
        feedforward = GeluMLP(width, hidden, approximate=approximate)
        yield DropPathBlock(LayerNorm(width, eps), attention, LayerNorm(width, eps), feedforward, rate)


def run_encoder(blocks: Iterable[nn.Module], x_BND: Tensor, checkpointing: str = "none") -> Tensor:
    """Run blocks over sequences of equal length, [B, N, D]."""
    batch = Batch.of(*[x_BND.shape[1]] * len(x_BND), device=x_BND.device)
    return run_blocks(blocks, x_BND.flatten(0, 1), batch, checkpointing=checkpointing)[0].view_as(x_BND)


def run_first_rows(
    blocks: nn.ModuleList, x_BND: Tensor, checkpointing: str = "none", seen_BN: Tensor | None = None
) -> Tensor:
    """The first rows [B, D] of what `run_encoder` gives; the last block computes no others.

    In the last block they attend to the rows of `seen_BN` only, if it is given.
    """
    last = blocks[-1]
    assert isinstance(last, DropPathBlock)
    return last.first_rows(run_encoder(blocks[:-1], x_BND, checkpointing), seen_BN)


def block_rules(theirs: str) -> list[Rule]:
    """The rules of transformers for blocks; `theirs` is the blocks' name."""
    rules = [
        Rule(f"layers.*.attention.{part}_proj", f"{theirs}.*.attention.attention.{name}")
        for part, name in (("q", "query"), ("k", "key"), ("v", "value"))
    ]
    return [
        *rules,
        Rule("layers.*.attention.o_proj", f"{theirs}.*.attention.output.dense"),
        Rule("layers.*.feedforward.up_proj", f"{theirs}.*.intermediate.dense"),
        Rule("layers.*.feedforward.down_proj", f"{theirs}.*.output.dense"),
        Rule("layers.*.attention_norm", f"{theirs}.*.layernorm_before"),
        Rule("layers.*.feedforward_norm", f"{theirs}.*.layernorm_after"),
    ]


def timm_block_rules(theirs: str, width: int) -> list[Rule]:
    """The rules of timm and MAE for blocks; `theirs` is the blocks' name."""
    return [
        Rule(tuple(f"layers.*.attention.{p}_proj" for p in "qkv"), f"{theirs}.*.attn.qkv", Concat((width,) * 3)),
        Rule("layers.*.attention.o_proj", f"{theirs}.*.attn.proj"),
        Rule("layers.*.feedforward.up_proj", f"{theirs}.*.mlp.fc1"),
        Rule("layers.*.feedforward.down_proj", f"{theirs}.*.mlp.fc2"),
        Rule("layers.*.attention_norm", f"{theirs}.*.norm1"),
        Rule("layers.*.feedforward_norm", f"{theirs}.*.norm2"),
    ]


def embedding_rules(prefix: str) -> list[Rule]:
    """The rules of transformers for patches, class token, positions and the final norm."""
    embeddings = f"{prefix}embeddings"
    return [
        Rule("patch_embed", f"{embeddings}.patch_embeddings.projection"),
        Rule("cls_token", f"{embeddings}.cls_token", bare=True),
        Rule("positions", f"{embeddings}.position_embeddings", bare=True),
        Rule("norm", f"{prefix}layernorm"),
    ]


def timm_embedding_rules(norm: str) -> list[Rule]:
    """The rules of timm and MAE for patches, class token, positions and the final norm."""
    return [
        Rule("patch_embed", "patch_embed.proj"),
        Rule("cls_token", "cls_token", bare=True),
        Rule("positions", "pos_embed", bare=True),
        Rule("norm", norm),
    ]


def _hf(config: ViTConfig) -> list[KeyTable]:
    head = Rule("head", "classifier")
    tables = [
        KeyTable(
            [*embedding_rules(prefix), *block_rules(f"{prefix}encoder.layer"), head],
            ignored=[r"(vit\.)?pooler\..*", r".*mask_token"],
        )
        for prefix in ("vit.", "")
    ]
    return [*tables, *_timm(config)]


def _timm(config: ViTConfig) -> list[KeyTable]:
    norm = "fc_norm" if config.global_pool == "avg" else "norm"
    return [
        KeyTable([*timm_embedding_rules(norm), *timm_block_rules("blocks", config.hidden_size), Rule("head", "head")])
    ]


def recognizes(checkpoint: Checkpoint) -> bool:
    """timm's config.json has no model_type."""
    if "model_type" in checkpoint.config:
        return checkpoint.format == "hf" and checkpoint.config["model_type"] == "vit"
    return "blocks.0.attn.qkv.weight" in checkpoint.tensors and "decoder_pred.weight" not in checkpoint.tensors


def timm_sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields that are read off the tensors of timm or MAE."""
    width, channels, side, _ = sizes(checkpoint, "patch_embed.proj.weight")
    patches = sizes(checkpoint, "pos_embed")[1] - 1
    return {
        "hidden_size": width,
        "num_hidden_layers": count_layers(checkpoint, "blocks."),
        "num_attention_heads": HEADS.get(width, max(1, width // 64)),
        "intermediate_size": sizes(checkpoint, "blocks.0.mlp.fc1.weight")[0],
        "layer_norm_eps": 1e-6,
        "image_size": side * round(patches**0.5),
        "patch_size": side,
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in checkpoint.tensors,
    }


def from_timm(checkpoint: Checkpoint) -> ViTConfig:
    """The config of timm's and MAE's files, read off their tensors."""
    return ViTConfig(
        **timm_sizes(checkpoint),
        **timm_labels(checkpoint, "head.weight"),
        global_pool="avg" if "fc_norm.weight" in checkpoint.tensors else "token",
    )


FAMILY = Family(
    ViTConfig,
    ViT,
    key_tables={"hf": _hf, "state_dict": _timm},
    names=ArchitectureNames("vit", "ViTForImageClassification"),
    recognizes=recognizes,
    task="classify",
    read_config=from_timm,
)
