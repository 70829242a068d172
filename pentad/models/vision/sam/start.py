"""Segment Anything's image encoder begins as a masked autoencoder (arXiv:2304.02643, section 3)."""

import torch
from torch import nn
from torch.nn import functional as F

from pentad.errors import BadInput
from pentad.models.vision.mae import MAE
from pentad.models.vision.sam.sam import Sam
from pentad.models.vision.vit import ViT

SHARED = "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels", "qkv_bias"


@torch.no_grad()
def start_from_vit(network: Sam, vit: nn.Module) -> None:
    """Copy the patches, positions and blocks of a ViT or a masked autoencoder.

    The positions of its patches are interpolated to the image's side; those of pairs of patches stay as they are.

    Raises:
        BadInput: it is another network, or its sizes are others.
    """
    encoder, config = network.image_encoder, network.config
    if not isinstance(vit, ViT | MAE):
        raise BadInput(f"the backbone is a {type(vit).__name__}; expected a ViT or a masked autoencoder")
    for name in SHARED:
        if getattr(config, name) != getattr(vit.config, name):
            raise BadInput(f"the backbone's {name} is {getattr(vit.config, name)}; expected {getattr(config, name)}")
    copied = {name: tensor for name, tensor in vit.state_dict().items() if name.startswith(("patch_embed.", "layers."))}
    encoder.load_state_dict({**encoder.state_dict(), **copied})
    patches_1ND = vit.positions.weight[:, 1:]  # without the class token
    side = round(patches_1ND.shape[1] ** 0.5)
    grid_1DSS = patches_1ND.transpose(1, 2).reshape(1, -1, side, side)
    resized_1DSS = F.interpolate(grid_1DSS, (config.side, config.side), mode="bicubic", align_corners=False)
    encoder.pos_embed.copy_(resized_1DSS.permute(0, 2, 3, 1))
