"""From a file's tensors to a network's and back, as a table that reads in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.weights.quantized import QuantizedTensor

if TYPE_CHECKING:
    from pentad.weights.checkpoint import TensorEntry

Value = Tensor | QuantizedTensor

LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""A layer's number in a module's name."""


class Operation(Protocol):
    """What is done to a tensor on its way in; `store` undoes what `load` did, without loss."""

    def load(self, value: Value) -> Value: ...
    def store(self, value: Value) -> Value: ...


class Same:
    """The tensor as it is: used in place, where it lies in the file."""

    def load(self, value: Value) -> Value:
        return value

    store = load


@dataclass(frozen=True)
class HalfSplit:
    """Rows of a projection to `heads` heads, stored for interleaved RoPE, put in half-split order.

    Within a head the file has the pairs (0, 1), (2, 3), … side by side; here a pair is (i, i + D/2). Rows of quantized
    blocks are whole, so they permute without loss.
    """

    heads: int

    def _order(self, rows: int) -> Tensor:
        return torch.arange(rows).view(self.heads, -1, 2).transpose(1, 2).flatten()

    def load(self, value: Value) -> Value:
        return _take_rows(value, self._order(value.shape[0]))

    def store(self, value: Value) -> Value:
        return _take_rows(value, self._order(value.shape[0]).argsort())


def _take_rows(value: Value, index: Tensor) -> Value:
    return value.take_rows(index) if isinstance(value, QuantizedTensor) else value[index]


@dataclass(frozen=True)
class Rule:
    """One row: the same module's name here and in the file, ``*`` standing for a layer's number.

    The rule is for the module's ``weight`` and ``bias`` alike.
    """

    ours: str
    theirs: str
    operation: Operation = Same()  # noqa: RUF009 - it has no state


class KeyTable:
    """All rows of a family for one kind of file, and what in such files has no counterpart and is ignored.

    Args:
        rules: names of modules.
        ignored: regular expressions for names of tensors that carry no weight of the network.
    """

    def __init__(self, rules: Sequence[Rule], ignored: Sequence[str] = ()) -> None:
        self.rules = list(rules)
        self.ignored = [re.compile(pattern) for pattern in ignored]
        self._rule_of = {rule.ours: rule for rule in self.rules}

    def _match(self, ours: str) -> tuple[str, Operation] | None:
        """The file's name of one of our tensors, and what is done to it."""
        module, _, kind = ours.rpartition(".")
        numbers = LAYER.findall(module)
        rule = self._rule_of.get(LAYER.sub("*", module))
        if rule is None:
            return None
        theirs = rule.theirs
        for number in numbers:
            theirs = theirs.replace("*", number, 1)
        return f"{theirs}.{kind}", rule.operation

    def pair(
        self, tensors: Mapping[str, TensorEntry], shapes: Mapping[str, Sequence[int]], source: object
    ) -> list[tuple[str, TensorEntry, Operation]]:
        """Each tensor of the network, by our name, with the file's and what is done to it.

        Args:
            tensors: the file's.
            shapes: the network's tensors, by our names.
            source: names the file in errors.

        Raises:
            BadInput: one that names every tensor that is missing, not used or of the wrong shape.
        """
        pairs: list[tuple[str, TensorEntry, Operation]] = []
        missing, misshapen = [], []
        for ours, shape in shapes.items():
            match = self._match(ours)
            if match is None:
                raise LookupError(f"the family's table has no rule for its own tensor {ours}")
            theirs, operation = match
            entry = tensors.get(theirs)
            if entry is None:
                missing.append(theirs)
                continue
            if entry.shape != tuple(shape):
                misshapen.append(f"{theirs} is {list(entry.shape)}, the config asks for {list(shape)}")
            pairs.append((ours, entry, operation))
        used = {entry.name for _, entry, _ in pairs}
        unused = [n for n in tensors if n not in used and not any(p.fullmatch(n) for p in self.ignored)]
        problems = [
            f"{len(names)} {what}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
            for what, names in (("missing", missing), ("of the wrong shape", misshapen), ("not used", unused))
            if names
        ]
        if problems:
            raise BadInput(f"{source}: tensors don't fit the config: {'; '.join(problems)}")
        return pairs

    def store(self, values: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
        """The way back: yield each tensor by the file's name and in the file's order of rows."""
        for ours, value in values.items():
            match = self._match(ours)
            if match is None:
                raise BadInput(f"this kind of file has no place for the tensor {ours}")
            yield match[0], match[1].store(value)
