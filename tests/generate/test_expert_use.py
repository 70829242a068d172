"""Expert use of a text, against running one sequence after the other."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from pentad.errors import BadInput, PentadError
from pentad.generate.expert_use import expert_use
from pentad.nn.batch import pack
from tests.helpers.tiny import network_of, random_ids, tiny_checkpoint


def mixture(folder: Path) -> torch.nn.Module:
    tiny_checkpoint(folder, family="mixtral", num_local_experts=4)
    return network_of(folder)


@torch.inference_mode()
def test_windows_of_a_text_are_separate_sequences(tmp_path: Path) -> None:
    network, ids = mixture(tmp_path), random_ids(50)
    use = expert_use(network, ids, window=20, frequent=5)
    assert (use.tokens, list(use.layers)) == (50, [0, 1])
    assert use.frequent == Counter(ids).most_common(5)
    counts = torch.zeros(2, 4, dtype=torch.int64)
    by_token = torch.zeros(2, 5, 4, dtype=torch.int64)
    for piece in (ids[:20], ids[20:40], ids[40:]):
        for layer, routing in enumerate(network.forward_with_routing(*pack(piece))[1]):
            for token, experts in zip(piece, routing.experts, strict=True):
                counts[layer, experts] += 1
                for row, (frequent, _) in enumerate(use.frequent):
                    by_token[layer, row, experts] += token == frequent
    for layer in range(2):
        assert use.layers[layer].kept.tolist() == counts[layer].tolist()
        assert use.by_token[layer].tolist() == by_token[layer].tolist()


def test_an_encoder_decoder_counts_the_encoders_experts(tmp_path: Path) -> None:
    from tests.helpers.tiny_switch import switch_checkpoint

    switch_checkpoint(tmp_path)
    network, ids = network_of(tmp_path), random_ids(30)
    use = expert_use(network, ids)
    assert use.layers.keys() == {layer for layer, aux in enumerate(network.encode(*pack(ids))[1]) if aux is not None}
    assert all(usage.tokens == 30 for usage in use.layers.values())


def test_errors(tmp_path: Path) -> None:
    network = mixture(tmp_path / "a")
    with pytest.raises(BadInput, match="the text is empty"):
        expert_use(network, [])
    network.layers[1].feedforward.router.weight.data[0, 0] = float("nan")
    with pytest.raises(PentadError, match=r"layer 1 .*not numbers.*damaged"):
        expert_use(network, [1, 2, 3])
    tiny_checkpoint(tmp_path / "b")
    with pytest.raises(BadInput, match="no experts"):
        expert_use(network_of(tmp_path / "b"), [1, 2, 3])
