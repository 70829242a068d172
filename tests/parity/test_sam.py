"""Segment Anything's ViT-B equals Meta's code at its full size, with random weights."""

from pathlib import Path

import torch

from pentad.models.vision.sam.prompt_encoder import Prompts
from tests.helpers.images import assert_close, images, network_of
from tests.helpers.sam import segment_anything
from tests.models.test_sam import meta_decode


@torch.no_grad()
def test_vit_b(tmp_path: Path) -> None:
    peer = segment_anything.sam_model_registry["vit_b"]().eval()
    for name, parameter in peer.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            parameter.normal_(0.0, 0.1)
    torch.save(peer.state_dict(), tmp_path / "sam_vit_b.pth")
    network = network_of(tmp_path / "sam_vit_b.pth")
    assert network.config.global_attn_indexes == (2, 5, 8, 11)
    assert sum(parameter.numel() for parameter in network.parameters()) == 93_735_472
    image = images(1, 3, 1024, 1024)
    expected, found = peer.image_encoder(image), network.image_encoder(image)
    assert_close(found, expected, 1e-4)
    prompts = Prompts(torch.tensor([[[320.0, 200]], [[700, 900]]]), torch.tensor([[1], [1]]))
    for ours, theirs in zip(network.decode(found[0], prompts), meta_decode(peer, found[0], prompts, True), strict=True):
        assert_close(ours, theirs, 1e-4)
