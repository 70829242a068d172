"""Writing a vision model as a folder: config.json, model.safetensors and preprocessor_config.json."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pentad.build import named_tensors
from pentad.models.family import Family
from pentad.models.language.config import write_family_config
from pentad.models.vision.config import Preprocessing
from pentad.weights.atomic import new_folder
from pentad.weights.keytable import LastResult, Value
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import SHARD_BYTES, PendingTensor


def export(network: nn.Module, family: Family, folder: Path, preprocessing: Preprocessing | None = None) -> None:
    """Write a network in float32, in the layout of its family's published folders.

    Args:
        network: the network, with its config.
        family: its family.
        folder: is made.
        preprocessing: how the network expects its images; None for a family with its own way.

    Raises:
        BadInput, PentadError: see `new_folder`.
    """
    config: Any = network.config
    [table, *_] = family.layouts(config, "hf")
    tensors, last, pending = named_tensors(network), LastResult(), list[PendingTensor]()
    for ours, theirs, operation in table.groups(tensors):
        values: list[Value] = [tensors[name].detach().float().cpu() for name in ours]
        shapes = operation.shapes([tuple(tensors[name].shape) for name in ours])
        store = partial(operation.store, values)
        for i, (name, shape) in enumerate(zip(theirs, shapes, strict=True)):
            pending.append(PendingTensor(name, tuple(shape), torch.float32, partial(last.get, store, i)))
    with new_folder(folder) as partial_folder:
        settings = {"config.json": write_family_config(family, config, "hf") | {"dtype": "float32"}}
        if preprocessing is not None:
            settings["preprocessor_config.json"] = _processor(preprocessing)
        for name, content in settings.items():
            (partial_folder / name).write_text(json.dumps(content, indent=2) + "\n")
        write_safetensors(partial_folder, "model", pending, shard_bytes=SHARD_BYTES)


def _processor(how: Preprocessing) -> dict[str, Any]:
    """The settings of transformers' ViTImageProcessor."""
    size: dict[str, int] = {"shortest_edge": how.size} if isinstance(how.size, int) else {}
    if not isinstance(how.size, int):
        size = {"height": how.size[0], "width": how.size[1]}
    crop = {"do_center_crop": True, "crop_size": {"height": how.crop, "width": how.crop}} if how.crop else {}
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": size,
        **crop,
        "resample": 3 if how.resample == "bicubic" else 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
    }
