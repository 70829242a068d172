"""CLIP (arXiv:2103.00020): an encoder of images and one of texts, whose embeddings are alike if they belong together.

The files are those of transformers (CLIPModel; a text or an image encoder alone, with and without its projection) and
state dicts of OpenAI's code (clip/model.py) and OpenCLIP's, whose image encoder must be a ViT.

Legend: B images [C, H, W], T texts of N tokens together, P patches an image, D width, E width of the embeddings.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pentad.errors import BadInput
from pentad.models.family import ArchitectureNames, Family, ModelConfig
from pentad.models.vision.config import Preprocessing, count_layers, sizes
from pentad.models.vision.vit import HEADS, check_encoder, encoder_blocks, run_first_rows
from pentad.nn.batch import Batch
from pentad.nn.block import run_blocks
from pentad.nn.norm import LayerNorm
from pentad.nn.patches import resized_positions
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.config import read_config
from pentad.weights.files import read_json
from pentad.weights.keytable import Concat, KeyTable, Rule, Transposed

HEAD_DIM = 64  # but in the image encoders of OpenCLIP's largest networks
OPEN_CLIP = "open_clip_config.json"
GELUS = {"quick_gelu": "sigmoid", "gelu": "none"}
"""``hidden_act`` -> how `GeluMLP` approximates GELU."""
MODEL_TYPES = {"text_config": "clip_text_model", "vision_config": "clip_vision_model"}
"""The config of an encoder -> its ``model_type``."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the configs of both encoders share."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    def blocks(self, *, causal: bool) -> nn.ModuleList:
        """The encoder's blocks."""
        sizes, rates = (
            (self.hidden_size, self.num_attention_heads, self.intermediate_size),
            [0.0] * self.num_hidden_layers,
        )
        gelu = GELUS[self.hidden_act]
        return nn.ModuleList(encoder_blocks(*sizes, self.layer_norm_eps, True, rates, causal=causal, approximate=gelu))

    def check(self, path: object) -> None:
        """Raise BadInput if fields contradict each other, or aren't supported."""
        check_encoder(self.hidden_size, self.num_attention_heads, path)
        if self.hidden_act not in GELUS:
            raise BadInput(f"{path}: hidden_act is {self.hidden_act!r}; expected {' or '.join(GELUS)}")


@dataclass(frozen=True, kw_only=True)
class TextConfig(EncoderConfig):
    """The fields of ``text_config`` that the network reads, with their defaults."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    bos_token_id: int = field(default=49406, metadata={"least": 0})
    eos_token_id: int = 49407


@dataclass(frozen=True, kw_only=True)
class VisionConfig(EncoderConfig):
    """The fields of ``vision_config`` that the network reads, with their defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3

    @property
    def patches(self) -> int:
        """The number of patches of an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2

    def check(self, path: object) -> None:
        super().check(path)
        if self.image_size % self.patch_size:
            raise BadInput(f"{path}: image_size is {self.image_size}; expected a multiple of {self.patch_size}")


@dataclass(frozen=True, kw_only=True)
class CLIPConfig(ModelConfig):
    """The fields of a published ``config.json`` that the network reads, with their defaults.

    Attributes:
        text_config, vision_config: of the encoders; None if the network has no such encoder.
        projection_dim: E; None if the embeddings are the encoders' own.
    """

    text_config: TextConfig | None = None
    vision_config: VisionConfig | None = None
    projection_dim: int | None = 512
    logit_scale_init_value: float = 2.6592

    OLD_HF_NAMES: ClassVar = {"text_config_dict": "text_config", "vision_config_dict": "vision_config"}

    @property
    def preprocessing(self) -> Preprocessing:
        """How the published networks expect their images."""
        side = 224 if self.vision_config is None else self.vision_config.image_size
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        return Preprocessing(size=side, crop=side, resample="bicubic", mean=mean, std=std)

    def resolve(self, checkpoint: Checkpoint) -> Self:
        values, path = checkpoint.config, checkpoint.path
        text, vision, width = self.text_config, self.vision_config, self.projection_dim
        match values.get("model_type"):
            case "clip_text_model":
                text = read_config(TextConfig, values, path)
                width = text.projection_dim if _projects(checkpoint, "text_projection") else None
            case "clip_vision_model":
                vision = read_config(VisionConfig, values, path)
                width = vision.projection_dim if _projects(checkpoint, "visual_projection") else None
            case "clip":
                text, vision = text or TextConfig(), vision or VisionConfig()
        for encoder in (text, vision):
            if encoder is not None:
                encoder.check(path)
        return replace(self, text_config=text, vision_config=vision, projection_dim=width)

    def to_hf(self) -> dict[str, Any]:
        encoders = {"text_config": self.text_config, "vision_config": self.vision_config}
        given = {name: {"model_type": MODEL_TYPES[name], **asdict(one)} for name, one in encoders.items() if one}
        if len(given) == 1:
            [values] = given.values()
            architecture = "CLIPVisionModel" if self.text_config is None else "CLIPTextModel"
            return {**values, "architectures": [architecture + ("WithProjection" if self.projection_dim else "")]}
        return {**given, "projection_dim": self.projection_dim, "logit_scale_init_value": self.logit_scale_init_value}


def _projects(checkpoint: Checkpoint, projection: str) -> bool:
    """True if a file of one encoder has its projection; of a config alone the name of its class decides."""
    if checkpoint.tensors:
        return f"{projection}.weight" in checkpoint.tensors
    return "WithProjection" in str(checkpoint.config.get("architectures"))


class Learned(nn.Module):
    """A vector or a number of the network itself, under the name ``weight``."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class TextEncoder(nn.Module):
    """A causal transformer, so a text's last row has seen all of it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = c.blocks(causal=True)
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, ids_N: Tensor, batch: Batch) -> Tensor:
        """The normed rows [N, D] of all tokens."""
        x_ND = self.embed(ids_N) + self.positions(batch.positions)
        hidden_ND: Tensor = self.norm(run_blocks(self.layers, x_ND, batch)[0])
        return hidden_ND


class ImageEncoder(nn.Module):
    """A ViT with one more norm, before the blocks, and without a bias in the patches' projection."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = config
        self.patch_embed = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.cls_token = Learned(c.hidden_size)
        self.positions = nn.Embedding(c.patches + 1, c.hidden_size)
        self.pre_norm = LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.layers = c.blocks(causal=False)
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, images_BCHW: Tensor, masks_BHW: Tensor | None = None) -> Tensor:
        """The normed row of the class token, [B, D]; for the masks see `CLIP.embed_images`."""
        grid_BDRC = self.patch_embed(images_BCHW)
        cls_BD = self.cls_token.weight.expand(len(images_BCHW), 1, -1)
        x_BPD = torch.cat([cls_BD, grid_BDRC.flatten(2).transpose(1, 2)], 1)
        x_BPD = x_BPD + resized_positions(self.positions.weight[None], *grid_BDRC.shape[2:])
        seen_BP = None
        if masks_BHW is not None:
            patches_BRC = F.adaptive_max_pool2d(masks_BHW.float(), grid_BDRC.shape[2:]) > 0
            seen_BP = F.pad(patches_BRC.flatten(1), (1, 0), value=True)
        pooled_BD: Tensor = self.norm(run_first_rows(self.layers, self.pre_norm(x_BPD), seen_BN=seen_BP))
        return pooled_BD


class CLIP(nn.Module):
    """Both encoders, or one of them, their projections to embeddings, and the scale of the embeddings' cosines."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        text, vision, width = config.text_config, config.vision_config, config.projection_dim
        if text is not None:
            self.text = TextEncoder(text)
            self.text_projection = nn.Linear(text.hidden_size, width, bias=False) if width else nn.Identity()
        if vision is not None:
            self.image = ImageEncoder(vision)
            self.image_projection = nn.Linear(vision.hidden_size, width, bias=False) if width else nn.Identity()
        if text is not None and vision is not None:
            self.logit_scale = Learned()

    def embed_text(self, ids_N: Tensor, batch: Batch) -> Tensor:
        """The embeddings [T, E] of texts that end with their end token."""
        ends_T = batch.layout.cu_seqlens_on(ids_N.device)[1:] - 1
        embeddings_TE: Tensor = self.text_projection(self.text(ids_N, batch)[ends_T])
        return embeddings_TE

    def embed_images(self, images_BCHW: Tensor, masks_BHW: Tensor | None = None) -> Tensor:
        """The embeddings [B, E] of images of equal size.

        With masks the class token attends, in the last layer, to itself and to patches in the mask only
        (arXiv:2304.02643, appendix D.5), so that an embedding is that of an object.
        """
        embeddings_BE: Tensor = self.image_projection(self.image(images_BCHW, masks_BHW))
        return embeddings_BE

    def forward(self, images_BCHW: Tensor, ids_N: Tensor, batch: Batch) -> Tensor:
        """The scaled cosines [B, T] of images and texts."""
        return self.logits(self.embed_images(images_BCHW), self.embed_text(ids_N, batch))

    def logits(self, images_BE: Tensor, texts_TE: Tensor) -> Tensor:
        """The scaled cosines [B, T] of embeddings."""
        return self.logit_scale.weight.exp() * F.normalize(images_BE, dim=-1) @ F.normalize(texts_TE, dim=-1).T


def _block_rules(ours: str, theirs: str) -> list[Rule]:
    names = {f"attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"}
    names |= {"attention.o_proj": "self_attn.out_proj", "feedforward.up_proj": "mlp.fc1"}
    names |= {"feedforward.down_proj": "mlp.fc2", "attention_norm": "layer_norm1", "feedforward_norm": "layer_norm2"}
    return [Rule(f"{ours}.*.{name}", f"{theirs}.*.{published}") for name, published in names.items()]


def _hf(config: CLIPConfig) -> list[KeyTable]:
    """The tables of transformers; an encoder alone may have its names without the encoder's. OpenCLIP's folders have
    OpenAI's names beside a config.json of transformers."""
    return [_hf_table("text_model.", "vision_model."), _hf_table("", ""), *_openai(config)]


def _hf_table(text: str, vision: str) -> KeyTable:
    rules = [
        Rule("text.embed", f"{text}embeddings.token_embedding"),
        Rule("text.positions", f"{text}embeddings.position_embedding"),
        *_block_rules("text.layers", f"{text}encoder.layers"),
        Rule("text.norm", f"{text}final_layer_norm"),
        Rule("text_projection", "text_projection"),
        Rule("image.patch_embed", f"{vision}embeddings.patch_embedding"),
        Rule("image.cls_token", f"{vision}embeddings.class_embedding", bare=True),
        Rule("image.positions", f"{vision}embeddings.position_embedding"),
        Rule("image.pre_norm", f"{vision}pre_layrnorm"),
        *_block_rules("image.layers", f"{vision}encoder.layers"),
        Rule("image.norm", f"{vision}post_layernorm"),
        Rule("image_projection", "visual_projection"),
        Rule("logit_scale", "logit_scale", bare=True),
    ]
    return KeyTable(rules, ignored=[r".*position_ids"])


def _openai_block_rules(ours: str, theirs: str, width: int) -> list[Rule]:
    qkv = tuple(f"{ours}.*.attention.{part}_proj" for part in "qkv")
    names = {"attention.o_proj": "attn.out_proj", "feedforward.up_proj": "mlp.c_fc"}
    names |= {"feedforward.down_proj": "mlp.c_proj", "attention_norm": "ln_1", "feedforward_norm": "ln_2"}
    return [
        Rule(qkv, f"{theirs}.*.attn.in_proj", Concat((width,) * 3), separator="_"),
        *(Rule(f"{ours}.*.{name}", f"{theirs}.*.{published}") for name, published in names.items()),
    ]


def _openai(config: CLIPConfig) -> list[KeyTable]:
    if config.text_config is None or config.vision_config is None:
        return []
    widths = config.text_config.hidden_size, config.vision_config.hidden_size
    rules = [
        Rule("text.embed", "token_embedding"),
        Rule("text.positions", "positional_embedding", bare=True),
        *_openai_block_rules("text.layers", "transformer.resblocks", widths[0]),
        Rule("text.norm", "ln_final"),
        Rule("text_projection", "text_projection", Transposed(), bare=True),
        Rule("image.patch_embed", "visual.conv1"),
        Rule("image.cls_token", "visual.class_embedding", bare=True),
        Rule("image.positions", "visual.positional_embedding", bare=True),
        Rule("image.pre_norm", "visual.ln_pre"),
        *_openai_block_rules("image.layers", "visual.transformer.resblocks", widths[1]),
        Rule("image.norm", "visual.ln_post"),
        Rule("image_projection", "visual.proj", Transposed(), bare=True),
        Rule("logit_scale", "logit_scale", bare=True),
    ]
    return [KeyTable(rules, ignored=["input_resolution", "context_length", "vocab_size", "attn_mask"])]


def recognizes(checkpoint: Checkpoint) -> bool:
    """OpenAI's state dicts have no config."""
    if "model_type" in checkpoint.config:
        return checkpoint.format == "hf" and checkpoint.config["model_type"] in ("clip", *MODEL_TYPES.values())
    return checkpoint.tensors.keys() >= {"visual.conv1.weight", "token_embedding.weight", "text_projection"}


def from_openai(checkpoint: Checkpoint) -> CLIPConfig:
    """The config of OpenAI's state dicts, read off their tensors; of OpenCLIP's the activation stands in a file beside
    them."""
    if "visual.proj" not in checkpoint.tensors:
        raise BadInput(
            f"{checkpoint.path}: the image encoder of this CLIP is no ViT; expected a ViT-B, ViT-L or larger"
        )
    vocabulary, text_width = sizes(checkpoint, "token_embedding.weight")
    vision_width, channels, _, side = sizes(checkpoint, "visual.conv1.weight")
    rows = sizes(checkpoint, "visual.positional_embedding")[0]
    return CLIPConfig(
        text_config=TextConfig(
            **_openai_sizes(checkpoint, "transformer.resblocks.", text_width),
            vocab_size=vocabulary,
            max_position_embeddings=sizes(checkpoint, "positional_embedding")[0],
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        ),
        vision_config=VisionConfig(
            **_openai_sizes(checkpoint, "visual.transformer.resblocks.", vision_width)
            | {"num_attention_heads": HEADS.get(vision_width, max(1, vision_width // HEAD_DIM))},
            image_size=side * math.isqrt(rows - 1),
            patch_size=side,
            num_channels=channels,
        ),
        projection_dim=sizes(checkpoint, "text_projection")[1],
    )


def _openai_sizes(checkpoint: Checkpoint, blocks: str, width: int) -> dict[str, Any]:
    beside = checkpoint.path.with_name(OPEN_CLIP)
    open_clip = read_json(beside).get("model_cfg") if beside.is_file() else None
    quick = not isinstance(open_clip, dict) or bool(open_clip.get("quick_gelu"))
    return {
        "hidden_act": "quick_gelu" if quick else "gelu",
        "hidden_size": width,
        "intermediate_size": sizes(checkpoint, f"{blocks}0.mlp.c_fc.weight")[0],
        "num_hidden_layers": count_layers(checkpoint, blocks),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "projection_dim": sizes(checkpoint, "text_projection")[1],
    }


def _initialize(network: CLIP, config: CLIPConfig, generator: torch.Generator) -> None:
    """As clip/model.py, for both encoders alike: matrices by width, and those that end a branch by depth, too."""
    for name, parameter in network.named_parameters():
        encoder = config.text_config if name.startswith("text") else config.vision_config
        if name == "logit_scale.weight":
            parameter.fill_(config.logit_scale_init_value)
        elif name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            assert encoder is not None
            std = encoder.hidden_size**-0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= (2 * encoder.num_hidden_layers) ** -0.5
            elif name.endswith("up_proj.weight"):
                std *= 2**-0.5
            elif name in ("text.embed.weight", "text.positions.weight"):
                std = 0.02 if name == "text.embed.weight" else 0.01
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


FAMILY = Family(
    CLIPConfig,
    CLIP,
    key_tables={"hf": _hf, "state_dict": _openai},
    names=ArchitectureNames("clip", "CLIPModel"),
    recognizes=recognizes,
    task="embed",
    read_config=from_openai,
    initialize=_initialize,
)
