"""Darknet networks written as .cfg, .weights and .names files, which OpenCV and Darknet read."""

from pathlib import Path

from torch import Tensor

from pentad.errors import BadInput
from pentad.models.vision.darknet import Darknet
from pentad.weights.cache import Progress
from pentad.weights.checkpoint import Checkpoint
from pentad.weights.darknet import CFG, Header, write_darknet


def rewrite(checkpoint: Checkpoint, cfg: Path, progress: Progress | None = None) -> list[Path]:
    """Write a Darknet checkpoint again, in the newest version; returns the files, the .cfg first.

    Raises:
        BadInput: the checkpoint is of another format or has no weights, or one of the files exists.
        PentadError: the disk is full or can't be written.
    """
    _check_name(cfg)
    if checkpoint.format != "darknet" or not checkpoint.tensors:
        what = "no Darknet network" if checkpoint.format != "darknet" else "a .cfg file without .weights"
        raise BadInput(f"{checkpoint.path} is {what}; expected a .cfg file with its .weights beside it")
    config, tensors = checkpoint.config, dict[str, Tensor]()
    for name, entry in checkpoint.tensors.items():
        value = entry.read()
        assert isinstance(value, Tensor)
        tensors[name] = value
    header = Header(seen=config["header"].seen)
    return write_darknet(cfg, config["cfg"], config["names"], tensors, header=header, progress=progress)


def export_darknet(network: Darknet, cfg: Path, *, seen: int = 0, progress: Progress | None = None) -> list[Path]:
    """Write a trained Darknet network; for the result and errors see `rewrite`.

    Args:
        network: the network.
        cfg: the .cfg file; the others go beside it. None of them may exist.
        seen: the number of images that the network has been trained with.
        progress: reports the bytes written.
    """
    _check_name(cfg)
    config, tensors = network.config, network.state_dict()
    return write_darknet(cfg, config.cfg, config.names, tensors, header=Header(seen=seen), progress=progress)


def _check_name(cfg: Path) -> None:
    if cfg.suffix != CFG:
        raise BadInput(f"{cfg}: Darknet's files lie beside each other; expected a name that ends in {CFG}")
