"""Map a file's tensors to a network's and back, with one table for both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.weights.quantized import BLOCKS, QuantizedTensor

if TYPE_CHECKING:
    from pentad.weights.checkpoint import TensorEntry

Value = Tensor | QuantizedTensor
Shape = tuple[int, ...]

LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""A layer's number in a module's name."""


class Operation:
    """Converts the tensors of a rule when they are loaded; `store` is the exact inverse of `load`."""

    def shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        """The shapes of the file's tensors, from the network's: the same, unless a subclass changes them."""
        return ours

    def load(self, theirs: Sequence[Value], /) -> Sequence[Value]:
        """The network's tensors, from the file's."""
        raise NotImplementedError

    def store(self, ours: Sequence[Value], /) -> Sequence[Value]:
        """The file's tensors, from the network's."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Operation):
    """The unchanged tensor, without a copy."""

    def load(self, theirs: Sequence[Value]) -> Sequence[Value]:
        return theirs

    store = load


@dataclass(frozen=True)
class UnpermuteRope(Operation):
    """Rows of a projection to `heads` heads, from the interleaved form of RoPE to the half-split form.

    Within a head of D rows the file has the pairs (0, 1), (2, 3), …; here the pairs are (i, i + D/2). Rows of quantized
    blocks are whole, so permuting them is exact.
    """

    heads: int

    def load(self, theirs: Sequence[Value]) -> Sequence[Value]:
        return [_take_rows(value, self._order(value.shape[0])) for value in theirs]

    def store(self, ours: Sequence[Value]) -> Sequence[Value]:
        return [_take_rows(value, self._order(value.shape[0]).argsort()) for value in ours]

    def _order(self, rows: int) -> Tensor:
        return torch.arange(rows).view(self.heads, -1, 2).transpose(1, 2).flatten()


@dataclass(frozen=True)
class Concat(Operation):
    """Several projections of one input, stored as one tensor with their rows one after the other.

    Args:
        rows: the number of rows of each.
        axis: the dimension of the rows; 1 in stacks of matrices, which are concatenated one by one.
    """

    rows: tuple[int, ...]
    axis: int = 0

    def shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        before, after = ours[0][: self.axis], ours[0][self.axis + 1 :]
        return [(*before, sum(shape[self.axis] for shape in ours), *after)]

    def load(self, theirs: Sequence[Value]) -> Sequence[Value]:
        (value,) = theirs
        if isinstance(value, Tensor) or self.axis:
            return torch.split(_numbers(value), list(self.rows), self.axis)
        return [value.rows(stop - count, stop) for stop, count in zip(accumulate(self.rows), self.rows, strict=True)]

    def store(self, ours: Sequence[Value]) -> Sequence[Value]:
        blocks = None if self.axis else _concat_blocks(ours)
        return [torch.cat([_numbers(value) for value in ours], self.axis) if blocks is None else blocks]


@dataclass(frozen=True)
class Stacked(Operation):
    """A stack of matrices, one for each expert, stored one by one."""

    def shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        (shape,) = ours
        return [shape[1:]] * shape[0]

    def load(self, theirs: Sequence[Value]) -> Sequence[Value]:
        blocks = _concat_blocks(theirs)
        if blocks is None:
            return [torch.stack([_numbers(value) for value in theirs])]
        return [QuantizedTensor(blocks.blocks, blocks.type, (len(theirs), *theirs[0].shape))]

    def store(self, ours: Sequence[Value]) -> Sequence[Value]:
        (value,) = ours
        if isinstance(value, Tensor):
            return value.unbind()
        count = value.shape[1]
        return [value.rows(start, start + count) for start in range(0, value.shape[0] * count, count)]


@dataclass(frozen=True)
class Flattened(Operation):
    """A stack of matrices, stored as one matrix: all of them, or their transposes, one below the other.

    Args:
        count: the number of matrices.
        transposed: whether the file has the transposes.
    """

    count: int
    transposed: bool = False

    def shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        ((count, rows, columns),) = ours
        return [(count * columns, rows) if self.transposed else (count * rows, columns)]

    def load(self, theirs: Sequence[Value]) -> Sequence[Value]:
        stack = _numbers(theirs[0]).unflatten(0, (self.count, -1))  # type: ignore[no-untyped-call]
        return [stack.transpose(1, 2) if self.transposed else stack]

    def store(self, ours: Sequence[Value]) -> Sequence[Value]:
        stack = _numbers(ours[0])
        return [(stack.transpose(1, 2) if self.transposed else stack).flatten(0, 1)]


@dataclass(frozen=True)
class Transposed(Operation):
    """A stack of matrices, stored as a stack of their transposes."""

    def shapes(self, ours: Sequence[Shape]) -> Sequence[Shape]:
        return [(*shape[:-2], shape[-1], shape[-2]) for shape in ours]

    def load(self, theirs: Sequence[Value]) -> Sequence[Value]:
        return [_numbers(value).transpose(-1, -2) for value in theirs]

    store = load


def _numbers(value: Value) -> Tensor:
    return value.dequantize() if isinstance(value, QuantizedTensor) else value


def _concat_blocks(values: Sequence[Value]) -> QuantizedTensor | None:
    """The rows of quantized matrices as one matrix; None if they aren't all quantized in one type."""
    quantized = [value for value in values if isinstance(value, QuantizedTensor)]
    if len(quantized) < len(values) or len({value.type for value in quantized}) > 1:
        return None
    blocks = torch.cat([value.blocks for value in quantized])
    return QuantizedTensor(blocks, quantized[0].type, (len(blocks), quantized[0].shape[1]))


def _take_rows(value: Value, index: Tensor) -> Value:
    return value.take_rows(index) if isinstance(value, QuantizedTensor) else value[index]


@dataclass(frozen=True)
class Rule:
    """One row of a table: module names in the network and in the file, for ``weight`` and ``bias``.

    Args:
        ours: ``*`` stands for a layer's number; a name with a number is for that layer only.
        theirs: as `ours`.
        operation: how the tensors are converted.
        bare: True if the file's tensors have the modules' names, without ``.weight``.
        separator: what stands before ``weight`` and ``bias`` in the file's names.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    operation: Operation = Identity()
    bare: bool = False
    separator: str = "."


class Group(NamedTuple):
    """Tensors that one rule converts together, by their full names in the network and in the file."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    operation: Operation


class Pairing(NamedTuple):
    """Tensors of the network, by our names, with the file's tensors that they are made of."""

    ours: tuple[str, ...]
    entries: tuple[TensorEntry, ...]
    operation: Operation


class KeyTable:
    """All rules of a family for one layout of file.

    Args:
        rules: a later rule for a module overrides an earlier one.
        ignored: regular expressions for names of the file's tensors that the network doesn't need.
        prefix: if given, modules without a rule have this before their name in the file, which is otherwise the same.
    """

    def __init__(self, rules: Iterable[Rule], ignored: Sequence[str] = (), prefix: str | None = None) -> None:
        self.rules = list(rules)
        self.prefix = prefix
        self.ignored = [re.compile(pattern) for pattern in ignored]
        self._rule_of = {module: rule for rule in self.rules for module in _names(rule.ours)}

    def groups(self, names: Iterable[str]) -> list[Group]:
        """Group the network's tensors `names` by rule, with the file's tensors of each group.

        Raises:
            LookupError: there is no rule for a name.
        """
        groups = dict[str, Group]()
        for name in names:
            module, _, leaf = name.rpartition(".")
            numbers = LAYER.findall(module)
            rule = self._rule_of.get(module) or self._rule_of.get(LAYER.sub("*", module))
            if rule is None and self.prefix is not None:
                rule = Rule(module, self.prefix + module)
            if rule is None:
                raise LookupError(f"the family's key table has no rule for its own tensor {name}")
            ours, theirs = (
                tuple(f"{_numbered(pattern, numbers)}{ending}" for pattern in _names(patterns))
                for patterns, ending in (
                    (rule.ours, f".{leaf}"),
                    (rule.theirs, "" if rule.bare else rule.separator + leaf),
                )
            )
            groups.setdefault(ours[0], Group(ours, theirs, rule.operation))
        return list(groups.values())

    def pair(
        self, tensors: Mapping[str, TensorEntry], shapes: Mapping[str, Sequence[int]], source: object
    ) -> list[Pairing]:
        """Pair each tensor of the network with the file's tensors that it is made of.

        Args:
            tensors: the file's.
            shapes: of the network's tensors, by our names.
            source: names the file in errors.

        Raises:
            BadInput: tensors are missing, not used or of the wrong shape; the message names them.
        """
        pairs: list[Pairing] = []
        used: set[str] = set()
        problems: dict[str, list[str]] = {"missing": [], "of the wrong shape": [], "not used": []}
        for ours, theirs, operation in self.groups(shapes):
            expected = operation.shapes([tuple(shapes[name]) for name in ours])
            for name, shape in zip(theirs, expected, strict=True):
                if name not in tensors:
                    problems["missing"].append(name)
                elif tensors[name].shape != tuple(shape):
                    mismatch = f"{name} is {list(tensors[name].shape)}, the config asks for {list(shape)}"
                    problems["of the wrong shape"].append(mismatch)
            used.update(theirs)
            if all(name in tensors for name in theirs):
                pairs.append(Pairing(ours, tuple(tensors[name] for name in theirs), operation))
        unused = (name for name in tensors if name not in used)
        problems["not used"] = [name for name in unused if not any(p.fullmatch(name) for p in self.ignored)]
        check_fit(source, "the config", problems)
        return pairs

    def largest_bytes(self, values: Mapping[str, Callable[[], Value]], mapped: Iterable[Value]) -> int:
        """Bytes of new memory that the largest rule takes to convert the network's tensors to a file's.

        Args:
            values: our names -> functions that make the tensors on the meta device.
            mapped: tensors on the meta device that stand for views of mapped files.
        """
        free, largest = {_storage(value)._cdata for value in mapped}, 0
        for ours, _, operation in self.groups(values):
            inputs = [values[name]() for name in ours]
            storages = {storage._cdata: storage for storage in map(_storage, [*inputs, *operation.store(inputs)])}
            largest = max(largest, sum(storage.nbytes() for key, storage in storages.items() if key not in free))
        return largest

    def found(self, tensors: Mapping[str, TensorEntry], names: Iterable[str]) -> int:
        """Count the tensors in a file that this layout expects for the network's `names`."""
        return sum(name in tensors for group in self.groups(names) for name in group.theirs)


def on_meta(entry: TensorEntry) -> Value:
    """A tensor as `entry.read` returns it, without memory."""
    if entry.quantization is None:
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    size, nbytes = BLOCKS[entry.quantization]
    rows, columns = math.prod(entry.shape[:-1]), entry.shape[-1] // size * nbytes
    stored = torch.empty(rows, columns, dtype=torch.uint8, device="meta")
    return QuantizedTensor(stored, entry.quantization, entry.shape)


def _storage(value: Value) -> torch.UntypedStorage:
    return (value.stored if isinstance(value, QuantizedTensor) else value).untyped_storage()


def apply(
    convert: Callable[[Sequence[Value]], Sequence[Value]], inputs: Sequence[Callable[[], Value]]
) -> Sequence[Value]:
    """What `Operation.load` or `Operation.store` makes of tensors that are read only now."""
    return convert([read() for read in inputs])


class LastResult:
    """Caches the tensors of the last rule, so that a stack of experts is converted once, not once per expert."""

    def __init__(self) -> None:
        self._make: object = None
        self._values: Sequence[Value] = ()

    def get(self, make: Callable[[], Sequence[Value]], index: int) -> Value:
        if make is not self._make:
            self._make, self._values = None, ()  # free the last values first
            self._make, self._values = make, make()
        return self._values[index]


def best_table(tables: Sequence[KeyTable], tensors: Mapping[str, TensorEntry], names: Iterable[str]) -> KeyTable:
    """Choose the table that finds the most tensors in a file, among a family's published layouts."""
    names = list(names)
    return max(tables, key=lambda table: table.found(tensors, names))


def check_fit(source: object, expected: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise BadInput if there are problems: for each kind of problem, the tensors' names."""
    lists = [
        f"{len(names)} {problem}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if lists:
        raise BadInput(f"{source}: tensors don't fit {expected}: {'; '.join(lists)}")


def _names(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _numbered(pattern: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern
