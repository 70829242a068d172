"""The base class of the runners of vision models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from pentad.errors import BadInput, PentadError
from pentad.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    Image = str | Path | bytes | Tensor | Picture
    """A path, a file's content, uint8 [3, H, W] (red, green, blue), or a picture of Pillow's."""


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


def pixels_of(image: Image) -> Tensor:
    """An image as uint8 [3, H, W].

    Raises:
        BadInput: it is no image, or damaged.
    """
    from pentad.media.images import from_pil, read_image

    if isinstance(image, str | Path | bytes):
        return read_image(image)
    if not isinstance(image, Tensor):
        return from_pil(image)
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3 or not image.numel():
        raise BadInput(f"the image is {image.dtype} {list(image.shape)}; expected uint8 [3, height, width]")
    return image
