"""Segment Anything: its three parts, its config, and the files of Meta (.pth) and transformers (SamModel).

Legend: B images, P prompts, M masks, D width, S patches a side of an image, U = 4 * S.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family, ModelConfig
from pentad.models.vision.config import count_layers, sizes
from pentad.models.vision.sam.image_encoder import ImageEncoder
from pentad.models.vision.sam.mask_decoder import ImageRows, MaskDecoder
from pentad.models.vision.sam.prompt_encoder import FourierPositions, PromptEncoder, Prompts
from pentad.models.vision.vit import check_encoder
from pentad.nn.linear import Derived
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.keytable import Concat, KeyTable, Rule

MASK_THRESHOLD = 0.0
"""A pixel belongs to a mask if its logit is above this."""


@dataclass(frozen=True, kw_only=True)
class SamConfig(ModelConfig):
    """The fields of transformers' ``config.json`` that the network reads, with their defaults: those of ViT-B.

    Attributes:
        text_embed_dim: width of the CLIP embeddings that stand for words; None for a network without words, as all
            published ones.
        drop_path_rate: stochastic depth of the image encoder's last block, in training.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_dim: int | None = None
    mlp_ratio: float = 4.0
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int = 1024
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    use_abs_pos: bool = True
    use_rel_pos: bool = True
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = field(default=(2, 5, 8, 11), metadata={"least": 0})
    output_channels: int = 256
    mask_input_channels: int = 16
    decoder_hidden_act: str = "relu"
    decoder_mlp_dim: int = 2048
    decoder_num_hidden_layers: int = 2
    decoder_num_attention_heads: int = 8
    decoder_layer_norm_eps: float = 1e-6
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    text_embed_dim: int | None = None
    drop_path_rate: float = field(default=0.0, metadata={"least": 0})

    HF_NAMES: ClassVar = {
        **{
            f"vision_config.{name}": name
            for name in (
                *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_dim", "mlp_ratio", "hidden_act"),
                *(
                    "layer_norm_eps",
                    "image_size",
                    "patch_size",
                    "num_channels",
                    "qkv_bias",
                    "use_abs_pos",
                    "use_rel_pos",
                ),
                *("window_size", "global_attn_indexes", "output_channels"),
            )
        },
        "prompt_encoder_config.mask_input_channels": "mask_input_channels",
        "prompt_encoder_config.text_embed_dim": "text_embed_dim",
        **{
            f"mask_decoder_config.{name}": f"decoder_{name}"
            for name in ("hidden_act", "mlp_dim", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
        },
        **{
            f"mask_decoder_config.{name}": name
            for name in ("attention_downsample_rate", "num_multimask_outputs", "iou_head_depth", "iou_head_hidden_dim")
        },
    }

    @property
    def side(self) -> int:
        """S."""
        return self.image_size // self.patch_size

    def resolve(self, checkpoint: Checkpoint) -> Self:
        path = checkpoint.path
        check_encoder(self.hidden_size, self.num_attention_heads, path)
        check_encoder(self.output_channels // self.attention_downsample_rate, self.decoder_num_attention_heads, path)
        for name, expected in (("hidden_act", "gelu"), ("decoder_hidden_act", "relu")):
            if getattr(self, name) != expected:
                raise BadInput(f"{path}: {name} is {getattr(self, name)!r}; expected {expected}")
        for name in ("use_abs_pos", "use_rel_pos"):
            if not getattr(self, name):
                raise BadInput(f"{path}: {name} is false; expected true, as in all published models")
        if self.image_size % self.patch_size:
            raise BadInput(f"{path}: image_size is {self.image_size}; expected a multiple of {self.patch_size}")
        return self if self.mlp_dim else replace(self, mlp_dim=int(self.hidden_size * self.mlp_ratio))

    def to_hf(self) -> dict[str, Any]:
        values = super().to_hf()
        del values["drop_path_rate"]
        if self.text_embed_dim is None:
            del values["text_embed_dim"]
        prompts = {"hidden_size": self.output_channels, "image_size": self.image_size, "patch_size": self.patch_size}
        return {
            **values,
            "vision_config.num_pos_feats": self.output_channels // 2,
            **{f"prompt_encoder_config.{name}": value for name, value in prompts.items()},
            "prompt_encoder_config.image_embedding_size": self.side,
            "mask_decoder_config.hidden_size": self.output_channels,
        }


class Sam(nn.Module):
    """An image becomes a map once; then any number of prompts become masks."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        c = self.config = config
        assert c.mlp_dim is not None
        self.image_encoder = ImageEncoder(
            side=c.side,
            patch=c.patch_size,
            channels=c.num_channels,
            width=c.hidden_size,
            depth=c.num_hidden_layers,
            heads=c.num_attention_heads,
            hidden=c.mlp_dim,
            eps=c.layer_norm_eps,
            qkv_bias=c.qkv_bias,
            window=c.window_size,
            global_layers=c.global_attn_indexes,
            out=c.output_channels,
            drop_path=c.drop_path_rate,
        )
        self.prompt_encoder = PromptEncoder(
            c.output_channels, c.side, c.image_size, c.mask_input_channels, c.text_embed_dim
        )
        self.mask_decoder = MaskDecoder(
            width=c.output_channels,
            depth=c.decoder_num_hidden_layers,
            heads=c.decoder_num_attention_heads,
            hidden=c.decoder_mlp_dim,
            downsample=c.attention_downsample_rate,
            eps=c.decoder_layer_norm_eps,
            masks=c.num_multimask_outputs,
            iou_depth=c.iou_head_depth,
            iou_hidden=c.iou_head_hidden_dim,
        )
        self._image = Derived()

    def forward(self, image_3HW: Tensor, prompts: Prompts, *, multimask: bool = True) -> tuple[Tensor, Tensor]:
        """The masks' logits [P, M, U, U] and predicted IoU [P, M] for prompts in one normalized, padded image."""
        return self.decode(self.image_encoder(image_3HW[None])[0], prompts, multimask=multimask)

    def decode(self, map_DSS: Tensor, prompts: Prompts, *, multimask: bool = True) -> tuple[Tensor, Tensor]:
        """`forward` from the image encoder's map of an image.

        What doesn't depend on the prompts is kept until another image is asked.
        """
        sparse_PTD, dense = self.prompt_encoder(prompts)
        positions_ND = self.prompt_encoder.grid()

        def read() -> ImageRows:
            rows_ND = map_DSS.flatten(1).T.contiguous()  # no copy of what the image encoder returns
            return ImageRows.of(rows_ND + dense, positions_ND)

        if prompts.masks_P1MM is not None or torch.is_grad_enabled():
            image = read()
        else:
            first = self.mask_decoder.first_attention
            sources = map_DSS, self.prompt_encoder.no_mask_embed.weight, positions_ND, *first.parameters()
            image = self._image.get(sources, lambda: self.mask_decoder.project(read()))
        found: tuple[Tensor, Tensor] = self.mask_decoder(image, positions_ND, sparse_PTD, multimask=multimask)
        return found


def _encoder_rules(theirs: str, norms: str, width: int) -> Iterator[Rule]:
    """The rules for the image encoder's blocks.

    Args:
        theirs: the blocks' name.
        norms: the name of their norms, before the number.
        width: of the blocks.
    """
    ours = "image_encoder.layers.*"
    qkv = tuple(f"{ours}.attention.{part}_proj" for part in "qkv")
    yield Rule(qkv, f"{theirs}.*.attn.qkv", Concat((width,) * 3))
    yield Rule(f"{ours}.attention.o_proj", f"{theirs}.*.attn.proj")
    yield Rule(f"{ours}.attention.position_bias", f"{theirs}.*.attn")
    yield Rule(f"{ours}.attention_norm", f"{theirs}.*.{norms}1")
    yield Rule(f"{ours}.feedforward_norm", f"{theirs}.*.{norms}2")
    yield Rule(f"{ours}.feedforward.up_proj", f"{theirs}.*.mlp.lin1")
    yield Rule(f"{ours}.feedforward.down_proj", f"{theirs}.*.mlp.lin2")


def _meta(config: SamConfig) -> list[KeyTable]:
    rules = [
        *_encoder_rules("image_encoder.blocks", "norm", config.hidden_size),
        Rule("image_encoder.patch_embed", "image_encoder.patch_embed.proj"),
        Rule("prompt_encoder.pe_layer", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", bare=True),
    ]
    return [KeyTable(rules, prefix="")]


def _hf(config: SamConfig) -> list[KeyTable]:
    rules = [
        *_encoder_rules("vision_encoder.layers", "layer_norm", config.hidden_size),
        Rule("image_encoder.patch_embed", "vision_encoder.patch_embed.projection"),
        Rule("image_encoder", "vision_encoder"),
        Rule("prompt_encoder.pe_layer", "shared_image_embedding.positional_embedding", bare=True),
        Rule("mask_decoder.transformer.norm_final_attn", "mask_decoder.transformer.layer_norm_final_attn"),
    ]
    numbered = {
        "image_encoder.neck": ("vision_encoder.neck", ("conv1", "layer_norm1", "conv2", "layer_norm2")),
        "prompt_encoder.mask_downscaling": (
            "prompt_encoder.mask_embed",
            ("conv1", "layer_norm1", "", "conv2", "layer_norm2", "", "conv3"),
        ),
        "mask_decoder.output_upscaling": ("mask_decoder", ("upscale_conv1", "upscale_layer_norm", "", "upscale_conv2")),
    }
    for ours, (theirs, names) in numbered.items():
        rules += [Rule(f"{ours}.{index}", f"{theirs}.{name}") for index, name in enumerate(names) if name]
    rules += [Rule(f"prompt_encoder.point_embeddings.{i}", f"prompt_encoder.point_embed.{i}") for i in range(4)]
    for layer, norm in product(range(config.decoder_num_hidden_layers), range(1, 5)):
        block = f"mask_decoder.transformer.layers.{layer}"
        rules.append(Rule(f"{block}.norm{norm}", f"{block}.layer_norm{norm}"))
    networks = {f"output_hypernetworks_mlps.{i}": 3 for i in range(config.num_multimask_outputs + 1)}
    for name, depth in {**networks, "iou_prediction_head": config.iou_head_depth}.items():
        layers = ["proj_in", *(f"layers.{i}" for i in range(depth - 2)), "proj_out"]
        rules += [Rule(f"mask_decoder.{name}.layers.{i}", f"mask_decoder.{name}.{one}") for i, one in enumerate(layers)]
    return [KeyTable(rules, [r"prompt_encoder\.shared_embedding\.positional_embedding"], prefix="")]


def recognizes(checkpoint: Checkpoint) -> bool:
    """Meta's files have no config."""
    if "model_type" in checkpoint.config:
        return checkpoint.format == "hf" and checkpoint.config["model_type"] == "sam"
    return {"image_encoder.pos_embed", "mask_decoder.iou_token.weight"} <= checkpoint.tensors.keys()


def from_tensors(checkpoint: Checkpoint) -> SamConfig:
    """The config of Meta's files, read off their tensors. All of them have 8 heads in the decoder."""
    _, side, _, width = sizes(checkpoint, "image_encoder.pos_embed")
    _, channels, patch, _ = sizes(checkpoint, "image_encoder.patch_embed.proj.weight")
    depth = count_layers(checkpoint, "image_encoder.blocks.")
    spans, head_dim = [], width
    for layer in range(depth):
        distances, head_dim = sizes(checkpoint, f"image_encoder.blocks.{layer}.attn.rel_pos_h")
        spans.append((distances + 1) // 2)
    if width % head_dim:
        raise BadInput(f"{checkpoint.path}: a width of {width} can't be divided into heads of {head_dim}")
    out = sizes(checkpoint, "image_encoder.neck.0.weight")[0]
    words = "prompt_encoder.text_projection.weight"
    decoder, block = "mask_decoder", "mask_decoder.transformer.layers"
    return SamConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // head_dim,
        mlp_dim=sizes(checkpoint, "image_encoder.blocks.0.mlp.lin1.weight")[0],
        image_size=side * patch,
        patch_size=patch,
        num_channels=channels,
        qkv_bias="image_encoder.blocks.0.attn.qkv.bias" in checkpoint.tensors,
        window_size=min(spans),
        global_attn_indexes=tuple(layer for layer, span in enumerate(spans) if span == side),
        output_channels=out,
        mask_input_channels=sizes(checkpoint, "prompt_encoder.mask_downscaling.3.weight")[0],
        decoder_mlp_dim=sizes(checkpoint, f"{block}.0.mlp.lin1.weight")[0],
        decoder_num_hidden_layers=count_layers(checkpoint, f"{block}."),
        decoder_layer_norm_eps=1e-5,
        attention_downsample_rate=out // sizes(checkpoint, f"{block}.0.cross_attn_token_to_image.q_proj.weight")[0],
        num_multimask_outputs=sizes(checkpoint, f"{decoder}.mask_tokens.weight")[0] - 1,
        iou_head_depth=count_layers(checkpoint, f"{decoder}.iou_prediction_head.layers."),
        iou_head_hidden_dim=sizes(checkpoint, f"{decoder}.iou_prediction_head.layers.0.weight")[0],
        text_embed_dim=sizes(checkpoint, words)[1] if words in checkpoint.tensors else None,
    )


@torch.no_grad()
def initialize(network: nn.Module, config: SamConfig, generator: torch.Generator) -> None:
    """As in the published code: PyTorch's defaults, and zeros for positions."""
    for part in network.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            fan_in = part.weight[0].numel() if not isinstance(part, nn.ConvTranspose2d) else part.weight[:, 0].numel()
            for tensor in (part.weight, part.bias):
                if tensor is not None:
                    tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        elif isinstance(part, nn.Embedding | FourierPositions):
            part.weight.normal_(generator=generator)


FAMILY = Family(
    SamConfig,
    Sam,
    key_tables={"state_dict": _meta, "hf": _hf},
    names=ArchitectureNames("sam", "SamModel"),
    recognizes=recognizes,
    task="segment",
    read_config=from_tensors,
    initialize=initialize,
)
