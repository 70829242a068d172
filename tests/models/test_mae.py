"""MAE equals transformers' ViTMAEForPreTraining: the loss and the pixels, given the same noise."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

import pentad
import pentad.weights
from pentad.build import build
from pentad.models.vision.mae import MAEConfig, Masking, mae_loss
from pentad.nn.patches import patchify, unpatchify
from tests.helpers.images import assert_close, images, network_of, randomized
from tests.models.test_vit import SIZES, timm_state

DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 24,
}


def saved(folder: Path, **options: Any) -> Any:
    peer = randomized(ViTMAEForPreTraining(ViTMAEConfig(**{**SIZES, **DECODER, **options})))
    peer.save_pretrained(folder)
    return peer


@torch.no_grad()
@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_and_pixels_equal_those_of_transformers(tmp_path: Path, norm_pix: bool) -> None:
    peer, x = saved(tmp_path, norm_pix_loss=norm_pix), images(3, 3, 32, 32)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    expected = peer(x, noise=noise)
    network = network_of(tmp_path)
    masking = Masking.random(noise, network.config.kept)
    assert_close(masking.masked_BM.sort().values, torch.stack([row.nonzero()[:, 0] for row in expected.mask]), 0)
    pixels = network(x, masking)
    loss = mae_loss(pixels, x, masking, 8, norm_pix=network.config.norm_pix_loss)
    assert_close(loss, expected.loss)
    theirs = expected.logits.view(3, 16, 64, 3).transpose(2, 3).flatten(2)
    assert_close(network.reconstruct(x, masking), theirs)
    assert_close(pixels, theirs.gather(1, masking.masked_BM[..., None].expand(-1, -1, 192)))
    assert torch.equal(unpatchify(patchify(x, 8), 8, 4), x)


@torch.no_grad()
def test_the_published_names(tmp_path: Path) -> None:
    peer = saved(tmp_path / "hf", hidden_size=128, layer_norm_eps=1e-6)
    peer.classifier = torch.nn.Linear(1, 1)  # `timm_state` asks for one
    state = {name: t for name, t in timm_state(peer).items() if not name.startswith("head.")}
    torch.save({"model": state}, tmp_path / "mae_pretrain.pth")
    assert network_of(tmp_path / "mae_pretrain.pth").config.num_labels == 0  # an encoder alone is a ViT
    names = {"attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    names |= {"layernorm_before": "norm1", "layernorm_after": "norm2"}
    theirs = peer.decoder.state_dict()
    state |= {n: t for n, t in theirs.items() if "layers" not in n}
    for i in range(DECODER["decoder_num_hidden_layers"]):
        for leaf in ("weight", "bias"):
            layer, block = f"decoder_layers.{i}", f"decoder_blocks.{i}"
            state[f"{block}.attn.qkv.{leaf}"] = torch.cat([theirs[f"{layer}.attention.{p}_proj.{leaf}"] for p in "qkv"])
            state |= {f"{block}.{new}.{leaf}": theirs[f"{layer}.{old}.{leaf}"] for old, new in names.items()}
    torch.save({"model": state}, tmp_path / "mae_visualize.pth")
    network, x = network_of(tmp_path / "mae_visualize.pth"), images(2, 3, 32, 32)
    masking = Masking.random(torch.rand(2, 16), network.config.kept)
    assert_close(network(x, masking), network_of(tmp_path / "hf")(x, masking))


def test_a_new_network_has_the_fixed_positions_of_transformers() -> None:
    fields = {**SIZES, **DECODER}
    network: Any = build(MAEConfig(**fields), seed=1)
    rows, columns = build_2d_sinusoidal_position_embedding(4, 4, 32, cls_token=True).chunk(2, 1)
    assert_close(network.positions.weight[0], torch.cat([columns, rows], 1), 1e-6)  # swapped, as in the released code
    trained: Any = build(MAEConfig(**fields), seed=1, trainable=True)
    assert "positions.weight" not in dict(trained.named_parameters())
    weight = network.layers[0].feedforward.up_proj.weight
    assert float(weight.abs().max()) <= (6 / (32 + 48)) ** 0.5
    assert torch.equal(weight, trained.layers[0].feedforward.up_proj.weight)


def test_a_file_is_read_in_the_published_layout(tmp_path: Path) -> None:
    """transformers 5 writes decoder_encoder.layer; published files have decoder_layers."""
    peer = saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    published = {name.replace("decoder_encoder.layer", "decoder_layers"): t for name, t in state.items()}
    assert published.keys() != state.keys()
    torch.save(published, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    masking = Masking.random(torch.rand(2, 16), 4)
    with torch.no_grad():
        network_of(tmp_path)(images(2, 3, 32, 32), masking)
    assert peer.config.mask_ratio == 0.75


def test_pentad_load_names_the_command(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(pentad.BadInput, match="a pretrained encoder: pentad train fine-tunes it"):
        pentad.load(tmp_path)
