"""Adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

An adapter adds ``scale * B A`` to weights of a published model. Its tensors are named after the weight's module:
``base_model.model.MODULE.lora_A.weight`` [R, I] and ``….lora_B.weight`` [O, R]. A stack of experts is a parameter of
its module (``experts.gate_up_proj``); its tensors are [E * R, I] and [O, R * E]. Several such parameters of one module
are nested: the last one's tensors are named MODULE, those of the one before MODULE.base_layer.

Legend: E experts, R rank, I input features, O output features.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pentad.weights.checkpoint import TensorEntry
from pentad.weights.files import read_json, refuse
from pentad.weights.keytable import LAYER, Concat, Group, Identity, KeyTable, Operation, Shape, Stacked, check_fit
from pentad.weights.pickled import read_pickled
from pentad.weights.safetensors import read_safetensors
from pentad.weights.safetensors_writer import write_safetensors
from pentad.weights.writing import PendingTensor

CONFIG = "adapter_config.json"
_READERS = {"adapter_model.safetensors": read_safetensors, "adapter_model.bin": read_pickled}
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_NAMES = re.compile(r"\^?(?:\.\*\\?\.)?([\w.]+)\$?")  # a pattern that is a module's name, or the end of one
_USED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
}
_NO_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "task_type"),
    *("peft_version", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "loftq_config"),
}
_INITIAL = (True, False, "gaussian", "eva", "orthogonal", "mica")  # the others change the base model's weights


class LowRank(NamedTuple):
    """The factors of a change of a weight, which is ``up @ down``.

    Attributes:
        down: [R, I], or [E, R, I].
        up: [O, R], or [E, O, R].
    """

    down: Tensor
    up: Tensor

    def widened(self, rank: int) -> "LowRank":
        """The same change with factors of a rank that is not smaller."""
        more = rank - self.down.shape[-2]
        return LowRank(F.pad(self.down, (0, 0, 0, more)), F.pad(self.up, (0, more)))


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says of the tensors.

    Attributes:
        rank, alpha, rslora: the rank, and the scale's numerator and kind.
        ranks, alphas: names of modules -> other ranks and numerators.
        modules: the modules that must have tensors, by the ends of their names; empty if the config has a regular
            expression for them.
        parameters: the parameters that have tensors, by the ends of their names.
        excluded: the modules that have none.
        layers: the numbers of the layers whose modules must have tensors; empty for all.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    excluded: tuple[str, ...]
    layers: tuple[int, ...]

    def rank_of(self, name: str) -> int:
        """R of a weight, by its published name."""
        return next((self.ranks[end] for end in self.ranks if is_named(name, [end])), self.rank)

    def scale_of(self, name: str) -> float:
        """The factor of B A, by the weight's published name."""
        alpha, rank = next((self.alphas[e] for e in self.alphas if is_named(name, [e])), self.alpha), self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def asks_for(self, name: str) -> bool:
        """True if a weight must have tensors, by its published name."""
        module, _, leaf = name.rpartition(".")
        if _ends_in(name, self.parameters):
            return True
        if leaf != "weight" or not _ends_in(module, self.modules) or _ends_in(module, self.excluded):
            return False
        number = LAYER.search(name)
        return module in self.modules or not self.layers or (number is not None and int(number[0]) in self.layers)


@dataclass(frozen=True)
class Adapter:
    """An adapter's files, opened.

    Attributes:
        path: the folder.
        settings: its config.
        pairs: name in the file -> "A" and "B" -> tensor.
    """

    path: Path
    settings: Settings
    pairs: Mapping[str, Mapping[str, TensorEntry]]

    def changes(self, tables: Iterable[KeyTable], shapes: Mapping[str, Shape]) -> dict[str, LowRank]:
        """Read the changes of a network's weights, by our names; the scale is multiplied into `up`.

        Args:
            tables: the published layouts of the network.
            shapes: the weights of its linear layers, by our names.

        Raises:
            BadInput: tensors are missing, not used or of the wrong shape; the message names them.
        """
        layouts = [(groups, self._keys(groups)) for groups in _layouts(tables, shapes)]
        groups, keys = max(layouts, key=lambda layout: sum(key in self.pairs for key in layout[1].values()))
        problems: dict[str, list[str]] = {"missing": [], "of the wrong shape": [], "not used": []}
        changes: dict[str, LowRank] = {}
        for ours, theirs, operation in groups:
            expected = operation.shapes([shapes[name] for name in ours])
            parts = [
                self._read(name, keys.get(name, ""), shape, problems)
                for name, shape in zip(theirs, expected, strict=True)
            ]
            changes |= zip(ours, _load(operation, parts, len(ours)), strict=False)
        known = set(keys.values())
        problems["not used"] = [name for name in self.pairs if name not in known]
        check_fit(self.path, "the model", problems)
        return changes

    def _keys(self, groups: Sequence[Group]) -> dict[str, str]:
        names = [name for group in groups for name in group.theirs]
        return _keys(name for name in names if name.endswith(".weight") or _ends_in(name, self.settings.parameters))

    def _read(self, name: str, key: str, shape: Shape, problems: Mapping[str, list[str]]) -> LowRank | None:
        pair, rank = self.pairs.get(key, {}), self.settings.rank_of(name)
        if not pair and not self.settings.asks_for(name):
            return None
        experts = shape[0] if len(shape) == 3 else 1
        expected = {"A": (experts * rank, shape[-1]), "B": (shape[-2], rank * experts)}
        for letter, sizes in expected.items():
            if letter not in pair:
                problems["missing"].append(f"{key or name}.lora_{letter}.weight")
            elif pair[letter].shape != sizes:
                found = f"{pair[letter].name} is {list(pair[letter].shape)}"
                problems["of the wrong shape"].append(f"{found}, the model asks for {list(sizes)}")
        if any(problems.values()):
            return None
        down, up = (cast("Tensor", pair[letter].read()).float() for letter in "AB")
        if len(shape) == 3:
            down, up = down.view(experts, rank, -1), up.view(-1, rank, experts).permute(2, 0, 1)
        return LowRank(down, up * self.settings.scale_of(name))


def read_adapter(folder: Path) -> Adapter:
    """Open an adapter: read its config and the header of its tensors.

    Raises:
        BadInput: a file is absent or broken, or the adapter isn't a plain LoRA; the message names the feature.
    """
    if not folder.is_dir():
        refuse(folder, "no such folder; expected an adapter's, in PEFT's format")
    if not (folder / CONFIG).is_file():
        inner = folder / "adapter"
        hint = f"; {inner} has one" if (inner / CONFIG).is_file() else "; expected an adapter's folder in PEFT's format"
        refuse(folder, f"no {CONFIG} there{hint}")
    settings = _read_settings(folder / CONFIG)
    path = next((folder / name for name in _READERS if (folder / name).is_file()), None)
    if path is None:
        refuse(folder, f"no {next(iter(_READERS))} there")
    pairs: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in _READERS[path.name](path).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            refuse(
                path, f"tensor {name!r} is not part of a plain LoRA; expected only ….lora_A.weight and ….lora_B.weight"
            )
        if entry.dtype is None or not entry.dtype.is_floating_point:
            refuse(path, f"{name} is {entry.dtype}; expected floating-point numbers")
        pairs.setdefault(match[1], {})[match[2]] = entry
    return Adapter(folder, settings, pairs)


def _read_settings(path: Path) -> Settings:
    config = read_json(path)

    def read(key: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
        value = default if config.get(key) is None else config[key]
        if not is_valid(value):
            refuse(path, f"{key} is {str(value)[:80]!r}; expected {expected}")
        return value

    def names(key: str) -> tuple[str, ...]:
        value = read(key, [], _is_text, "names")
        return () if isinstance(value, str) else tuple(value)

    def patterns(key: str, is_valid: Callable[[Any], bool], expected: str) -> dict[str, Any]:
        values = read(key, {}, lambda v: isinstance(v, dict) and all(map(is_valid, v.values())), expected)
        ends = {name: _NAMES.fullmatch(name.replace(r"\.", ".")) for name in values}
        if unknown := [name for name, end in ends.items() if end is None]:
            refuse(path, f"{key} has the regular expression {unknown[0][:80]!r}; expected names of modules")
        return {end[1]: values[name] for name, end in ends.items() if end}

    read("peft_type", "", lambda value: value == "LORA", "LORA")
    for key, value in config.items():
        if key not in _USED | _NO_EFFECT and value not in (None, False, "none", [], {}):
            refuse(path, f"{key} is {str(value)[:80]!r}; expected a LoRA without it")
    read("init_lora_weights", True, lambda v: v in _INITIAL, f"one of {_INITIAL}: others change the base model")
    layers = read("layers_to_transform", [], _is_numbers, "the numbers of layers")
    regular = isinstance(config.get("exclude_modules"), str)
    excluded, modules = names("exclude_modules"), names("target_modules")
    return Settings(
        rank=read("r", 8, _is_whole, "a whole number of at least 1"),
        alpha=read("lora_alpha", 8, _is_number, "a number"),
        rslora=bool(config.get("use_rslora")),
        ranks=patterns("rank_pattern", _is_whole, "whole numbers of at least 1"),
        alphas=patterns("alpha_pattern", _is_number, "numbers"),
        modules=() if regular else modules,
        parameters=names("target_parameters"),
        excluded=excluded,
        layers=tuple(layers) if isinstance(layers, list) else (layers,),
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, list) and all(isinstance(number, int) for number in value))


def write_adapter(
    folder: Path,
    tables: Iterable[KeyTable],
    shapes: Mapping[str, Shape],
    factors: Mapping[str, LowRank],
    *,
    alpha: float,
    rslora: bool,
    dropout: float,
    base: str,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Args:
        folder: made if it is missing.
        tables, shapes: see `Adapter.changes`.
        factors: A and B by our names, of one rank, without the scale.
        alpha: the scale's numerator, at this rank.
        rslora: divide it by the rank's square root.
        dropout: told to whoever trains the adapter further. Parameters of experts support none in PEFT.
        base: the name or path of the base model.
    """
    layouts = _layouts(tables, shapes)
    fused = (groups for groups in layouts if any(not n.endswith(".weight") for g in groups for n in g.theirs))
    groups = next(fused, layouts[0])  # the layout in the memory of transformers, where PEFT adapts it
    tensors: dict[str, LowRank] = {}
    for ours, theirs, operation in groups:
        if any(name in factors for name in ours):
            parts = [factors.get(name) for name in ours]
            tensors |= zip(theirs, _store(operation, parts, [shapes[name] for name in ours]), strict=True)
    rank = next(iter(factors.values())).down.shape[-2]
    every = [name for group in groups for name in group.theirs]
    modules, parameters = (
        _targets([name for name in tensors if name.endswith(".weight") is whole], every) for whole in (True, False)
    )
    ranks = {_end(name): part.down.shape[-2] for name, part in tensors.items() if part.down.shape[-2] != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else dropout,
        "use_rslora": rslora,
        "rank_pattern": ranks,
        "alpha_pattern": {end: alpha * (math.sqrt(r / rank) if rslora else r / rank) for end, r in ranks.items()},
        "target_modules": modules,
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    pending = []
    for name, key in _keys(tensors).items():
        down, up = tensors[name]
        if down.dim() == 3:
            down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        for letter, tensor in (("A", down), ("B", up)):
            full = f"base_model.model.{key}.lora_{letter}.weight"
            pending.append(PendingTensor(full, tuple(tensor.shape), tensor.dtype, tensor.contiguous))
    write_safetensors(folder, "adapter_model", pending, shard_bytes=2**62)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _layouts(tables: Iterable[KeyTable], shapes: Mapping[str, Shape]) -> list[list[Group]]:
    """The groups of each layout that stores the rows of every weight as they are."""
    layouts = [table.groups(shapes) for table in tables]
    return [one for one in layouts if all(isinstance(g.operation, Identity | Concat | Stacked) for g in one)]


def _keys(names: Iterable[str]) -> dict[str, str]:
    """Published names of weights that have tensors -> the names of the tensors, without prefix and end."""
    keys: dict[str, str] = {}
    nested: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            keys[name] = module
        else:
            nested.setdefault(module, []).append(name)
    for module, parameters in nested.items():
        for depth, name in enumerate(reversed(parameters)):
            keys[name] = module + ".base_layer" * depth
    return keys


def _load(operation: Operation, parts: Sequence[LowRank | None], count: int) -> list[LowRank]:
    """The changes of a rule's `count` weights of the network, from those of the file; empty if there are none."""
    given = [part for part in parts if part is not None]
    if not given:
        return []
    rank = max(part.down.shape[-2] for part in given)
    if isinstance(operation, Stacked):
        none = LowRank(given[0].down.new_zeros(given[0].down.shape), given[0].up.new_zeros(given[0].up.shape))
        wide = [(part or none).widened(rank) for part in parts]
        downs, ups = operation.load([part.down for part in wide]), operation.load([part.up for part in wide])
    else:
        downs, ups = [given[0].down] * count, operation.load([given[0].up])
    return [LowRank(*pair) for pair in zip(cast("list[Tensor]", downs), cast("list[Tensor]", ups), strict=True)]


def _store(operation: Operation, parts: Sequence[LowRank | None], shapes: Sequence[Shape]) -> list[LowRank]:
    """The changes of a rule's weights in the file, from those of the network; concatenated weights add their ranks."""
    given = [part for part in parts if part is not None]
    if isinstance(operation, Stacked):
        return [LowRank(*pair) for pair in zip(given[0].down.unbind(), given[0].up.unbind(), strict=True)]
    ranks = [0 if part is None else part.down.shape[-2] for part in parts]
    ups = []
    for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        up = given[0].up.new_zeros(*shape[:-1], ranks[i]) if part is None else part.up
        ups.append(F.pad(up, (sum(ranks[:i]), sum(ranks[i + 1 :]))))
    return [LowRank(torch.cat([part.down for part in given], -2), cast("Tensor", operation.store(ups)[0]))]


def is_named(name: str, ends: Iterable[str]) -> bool:
    """True if the name of a weight, or of its module, is one of the given ones or ends in one of them."""
    return _ends_in(name, ends) or _ends_in(name.removesuffix(".weight"), ends)


def _ends_in(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _end(name: str) -> str:
    """The part of a weight's name after the number of its layer."""
    return LAYER.split(name.removesuffix(".weight"))[-1].strip(".")


def _targets(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """The shortest names that mean these weights, and no others."""
    leaves = {name: name.removesuffix(".weight").rpartition(".")[2] for name in names}
    whole = {leaf for leaf in leaves.values() if all(n in leaves for n in every if is_named(n, [leaf]))}
    return sorted({leaf if leaf in whole else name.removesuffix(".weight") for name, leaf in leaves.items()})
