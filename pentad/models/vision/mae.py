"""Masked autoencoders (arXiv:2111.06377): an encoder of a quarter of the patches, and a small decoder.

The files are those of transformers (ViTMAEForPreTraining) and of the published code (models_mae.py).

Legend: B images [C, H, W] of P patches, of which K are kept and M masked; Q numbers a patch; D width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family
from pentad.models.vision.config import count_layers, sizes
from pentad.models.vision.vit import (
    ViTConfig,
    block_rules,
    check_encoder,
    embedding_rules,
    encoder_blocks,
    run_encoder,
    timm_block_rules,
    timm_embedding_rules,
    timm_sizes,
)
from pentad.nn.norm import LayerNorm
from pentad.nn.patches import Tokens, embed_patches, patchify, sin_cos_positions
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import KeyTable, Operation, Rule, Value


@dataclass(frozen=True, kw_only=True)
class MAEConfig(ViTConfig):
    """The fields of a published ``config.json`` that the network reads, with their defaults."""

    decoder_num_attention_heads: int = 16
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_intermediate_size: int = 2048
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False

    @property
    def kept(self) -> int:
        """The number of patches that the encoder sees."""
        return int(self.patches * (1 - self.mask_ratio))

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path = checkpoint.path
        check_encoder(self.decoder_hidden_size, self.decoder_num_attention_heads, path)
        config = super().resolve(checkpoint)
        if not 0 < config.kept < config.patches:
            raise BadInput(f"{path}: mask_ratio {self.mask_ratio} keeps {config.kept} of {config.patches} patches")
        return config

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        return {name: value for name, value in values.items() if name not in ("id2label", "label2id", "num_labels")}


class Masking(NamedTuple):
    """The patches that the encoder sees, and the others: their numbers [B, K] and [B, M], in random order."""

    kept_BK: Tensor
    masked_BM: Tensor

    @classmethod
    def random(cls, noise_BP: Tensor, kept: int) -> "Masking":
        """Keep the `kept` patches of an image with the least noise."""
        order_BP = noise_BP.argsort(1)
        return cls(order_BP[:, :kept], order_BP[:, kept:])


class MAE(nn.Module):
    """ViT's encoder on visible patches, and the decoder on all."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size)
        self.cls_token = Tokens(1, c.hidden_size)
        self.positions = Tokens(c.patches + 1, c.hidden_size, learned=False)
        shape, rates = (c.hidden_size, c.num_attention_heads, c.intermediate_size), [0.0] * c.num_hidden_layers
        self.layers = nn.ModuleList(encoder_blocks(*shape, c.layer_norm_eps, c.qkv_bias, rates))
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.decoder = Decoder(config)

    def forward(self, images_BCHW: Tensor, masking: Masking, *, checkpointing: str = "none") -> Tensor:
        """The decoder's pixels of the masked patches, [B, M, Q] in the order of `patchify`."""
        hidden_BKD = self.encode(images_BCHW, masking, checkpointing=checkpointing)
        decoded_BPD = self.decoder(hidden_BKD, masking, checkpointing=checkpointing)
        masked_BMD = _take(decoded_BPD[:, 1:], masking.masked_BM)
        pixels_BMQ: Tensor = self.decoder.pred(self.decoder.norm(masked_BMD))
        return pixels_BMQ

    def encode(self, images_BCHW: Tensor, masking: Masking, *, checkpointing: str = "none") -> Tensor:
        """The normed rows [B, 1 + K, D] of the class token and the kept patches."""
        patches_BPQ = patchify(images_BCHW, self.config.patch_size)
        x_BKD = embed_patches(_take(patches_BPQ, masking.kept_BK), self.patch_embed)
        positions_ND = self.positions.weight[0]
        x_BKD = x_BKD + positions_ND[1:][masking.kept_BK]
        cls_BD = (self.cls_token.weight + positions_ND[:1]).expand(len(x_BKD), -1, -1)
        hidden_BKD: Tensor = self.norm(run_encoder(self.layers, torch.cat([cls_BD, x_BKD], 1), checkpointing))
        return hidden_BKD

    def reconstruct(self, images_BCHW: Tensor, masking: Masking) -> Tensor:
        """The decoder's pixels of all patches, [B, P, Q]."""
        decoded_BPD = self.decoder(self.encode(images_BCHW, masking), masking)
        pixels_BPQ: Tensor = self.decoder.pred(self.decoder.norm(decoded_BPD[:, 1:]))
        return pixels_BPQ


class Decoder(nn.Module):
    """Blocks over all patches, of which the masked ones are one learned row; then the pixels of each."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        c = config
        width = c.decoder_hidden_size
        self.embed = nn.Linear(c.hidden_size, width)
        self.mask_token = Tokens(1, width)
        self.positions = Tokens(c.patches + 1, width, learned=False)
        shape = width, c.decoder_num_attention_heads, c.decoder_intermediate_size
        rates = [0.0] * c.decoder_num_hidden_layers
        self.layers = nn.ModuleList(encoder_blocks(*shape, c.layer_norm_eps, c.qkv_bias, rates))
        self.norm = LayerNorm(width, c.layer_norm_eps)
        self.pred = nn.Linear(width, c.num_channels * c.patch_size**2)

    def forward(self, hidden_BKD: Tensor, masking: Masking, *, checkpointing: str = "none") -> Tensor:
        """[B, 1 + K, D of the encoder] -> [B, 1 + P, D of the decoder], before the norm."""
        x_BKD = self.embed(hidden_BKD)
        patches = self.positions.weight.shape[1] - 1
        all_BPD = self.mask_token.weight.to(x_BKD.dtype).expand(len(x_BKD), patches, -1)
        all_BPD = all_BPD.scatter(1, masking.kept_BK[..., None].expand(-1, -1, x_BKD.shape[2]), x_BKD[:, 1:])
        x_BPD = torch.cat([x_BKD[:, :1], all_BPD], 1) + self.positions.weight
        return run_encoder(self.layers, x_BPD, checkpointing)


def _take(rows_BPD: Tensor, numbers_BK: Tensor) -> Tensor:
    return rows_BPD.gather(1, numbers_BK[..., None].expand(-1, -1, rows_BPD.shape[2]))


def mae_loss(pixels_BMQ: Tensor, images_BCHW: Tensor, masking: Masking, side: int, *, norm_pix: bool) -> Tensor:
    """The mean squared error of the masked patches' pixels; with `norm_pix` those are normalized within a patch."""
    target_BMQ = _take(patchify(images_BCHW, side), masking.masked_BM).float()
    if norm_pix:
        variance, mean = torch.var_mean(target_BMQ, -1, keepdim=True)
        target_BMQ = (target_BMQ - mean) / (variance + 1e-6).sqrt()
    return (pixels_BMQ.float() - target_BMQ).square().mean()


@dataclass(frozen=True)
class PixelRows(Operation):
    """Rows of the last layer, from the file's order of a patch's numbers (row, column, channel) to `patchify`'s.

    Args:
        channels: C.
    """

    channels: int

    def load(self, theirs: list[Value]) -> list[Value]:  # type: ignore[override]
        return [self._reordered(value, (-1, self.channels)) for value in theirs]

    def store(self, ours: list[Value]) -> list[Value]:  # type: ignore[override]
        return [self._reordered(value, (self.channels, -1)) for value in ours]

    def _reordered(self, value: Value, shape: tuple[int, int]) -> Tensor:
        assert isinstance(value, Tensor)
        return value.view(*shape, *value.shape[1:]).transpose(0, 1).flatten(0, 1)


def _decoder_rules(blocks: list[Rule], prefix: str, config: MAEConfig) -> list[Rule]:
    inner = [
        Rule(
            f"decoder.{rule.ours}" if isinstance(rule.ours, str) else tuple(f"decoder.{o}" for o in rule.ours),
            rule.theirs,
            rule.operation,
        )
        for rule in blocks
    ]
    return [
        *inner,
        Rule("decoder.embed", f"{prefix}decoder_embed"),
        Rule("decoder.mask_token", f"{prefix}mask_token", bare=True),
        Rule("decoder.positions", f"{prefix}decoder_pos_embed", bare=True),
        Rule("decoder.norm", f"{prefix}decoder_norm"),
        Rule("decoder.pred", f"{prefix}decoder_pred", PixelRows(config.num_channels)),
    ]


def _hf(config: MAEConfig) -> list[KeyTable]:
    """The published layout, and the one that transformers 5 writes."""
    encoder = [*embedding_rules("vit."), *block_rules("vit.encoder.layer")]
    layouts = ("decoder.decoder_layers", "decoder.decoder_encoder.layer")
    return [KeyTable([*encoder, *_decoder_rules(block_rules(layout), "decoder.", config)]) for layout in layouts]


def _published(config: MAEConfig) -> list[KeyTable]:
    encoder = [*timm_embedding_rules("norm"), *timm_block_rules("blocks", config.hidden_size)]
    decoder = timm_block_rules("decoder_blocks", config.decoder_hidden_size)
    return [KeyTable([*encoder, *_decoder_rules(decoder, "", config)])]


def recognizes(checkpoint: Checkpoint) -> bool:
    """The published .pth with a decoder has no config."""
    if "model_type" in checkpoint.config:
        return checkpoint.format == "hf" and checkpoint.config["model_type"] == "vit_mae"
    return {"decoder_pred.weight", "blocks.0.attn.qkv.weight"} <= checkpoint.tensors.keys()


def from_tensors(checkpoint: Checkpoint) -> MAEConfig:
    """The config of the published .pth, read off its tensors. All of them have 16 heads in the decoder."""
    return MAEConfig(
        **timm_sizes(checkpoint),
        decoder_hidden_size=sizes(checkpoint, "decoder_embed.weight")[0],
        decoder_num_hidden_layers=count_layers(checkpoint, "decoder_blocks."),
        decoder_intermediate_size=sizes(checkpoint, "decoder_blocks.0.mlp.fc1.weight")[0],
        norm_pix_loss=True,
    )


@torch.no_grad()
def initialize(network: MAE, config: MAEConfig, generator: torch.Generator) -> None:
    """As in models_mae.py: Xavier's uniform distribution, also for the patches' convolution seen as a linear layer."""
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        elif "token" in name:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, config.initializer_range, generator=generator))
        else:
            matrix = torch.empty(parameter.shape).flatten(1)
            parameter.copy_(nn.init.xavier_uniform_(matrix, generator=generator).view_as(parameter))
    side = config.image_size // config.patch_size
    network.positions.weight.copy_(sin_cos_positions(side, config.hidden_size))
    network.decoder.positions.weight.copy_(sin_cos_positions(side, config.decoder_hidden_size))


FAMILY = Family(
    MAEConfig,
    MAE,
    key_tables={"hf": _hf, "state_dict": _published},
    names=ArchitectureNames("vit_mae", "ViTMAEForPreTraining"),
    recognizes=recognizes,
    task="pretrain",
    read_config=from_tensors,
    initialize=initialize,
)
