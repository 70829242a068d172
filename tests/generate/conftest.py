"""A tiny network, and the steps that an engine runs with it."""

import pytest
from torch import nn

from tests.helpers.engines import Counting
from tests.helpers.tiny import network_of, tiny_checkpoint


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return network_of(tiny_checkpoint(tmp_path_factory.mktemp("tiny")).folder)


@pytest.fixture
def step(network: nn.Module) -> Counting:
    return Counting(network, page_size=16)
