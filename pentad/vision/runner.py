"""The base class of the runners of vision models."""

from typing import ClassVar, NoReturn

import torch
from torch import nn

from pentad.errors import PentadError
from pentad.weights.checkpoint import Checkpoint


class VisionModel:
    """A network for images that is ready to run; `pentad.load` makes one. Several threads may call it.

    Args:
        name: the name or path that the model was loaded by.
        network: the network, in inference mode.
        checkpoint: the network's checkpoint, which has the settings of pre- and postprocessing.
        load_seconds: duration of loading.
    """

    task: ClassVar[str]
    """A key of `pentad.models.family.TASKS`."""

    def __init__(self, name: str, network: nn.Module, checkpoint: Checkpoint, *, load_seconds: float = 0.0) -> None:
        self.name = name
        self.network = network
        self.checkpoint = checkpoint
        self.load_seconds = load_seconds
        first = next(network.parameters())
        self.device: torch.device = first.device
        self.dtype: torch.dtype = first.dtype

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}: {type(self.network).__name__}>"

    def __reduce__(self) -> NoReturn:
        raise PentadError(f"a loaded model can't be pickled or copied; call pentad.load({self.name!r}) again")
