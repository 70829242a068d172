"""The plan: a network's parts read off into a flat list of kernel operations, of which one call runs a whole step.

What can be read off is what `Derivation` says: parts of exactly the known types, with their plain attributes. All else
(a hook, an adapter, a part of another type, weights off the CPU) is `NotDerivable`, and runs as plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from pentad import kernels
from pentad.generate.step import PlainStep, Step, Work
from pentad.kernels import CachePools, Program, Tokens, Weight
from pentad.kernels.program import ATTENDED, GATES, LOGITS, NORMED, PROJECTED, RESIDUAL
from pentad.nn.attention import Attention
from pentad.nn.block import PreNormBlock
from pentad.nn.cache import PagedCache
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import SwiGLU
from pentad.nn.linear import QuantizedEmbedding, QuantizedLinear, RowwiseInt8Linear
from pentad.nn.norm import RMSNorm
from pentad.nn.rope import Rope
from pentad.weights.quantized import QuantizedTensor

KNOWN: dict[type[nn.Module], set[str]] = {
    PreNormBlock: {"attention_norm", "attention", "feedforward_norm", "feedforward"},
    Attention: {
        *("heads", "kv_heads", "head_dim", "rope", "layer", "window", "log_scale_after"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "scale", "query_rope"),
    },
    SwiGLU: {"gate_proj", "up_proj", "down_proj"},
    RMSNorm: {"dim", "weight", "eps"},
}
"""What the parts of the house have. One that has more computes something that is not known here."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MOST_TABLES = 64  # of RoPE's angles; only scalings that depend on length have more than one or two


class NotDerivable(Exception):
    """Why a network has no plan; it runs as plain torch."""


class Watch:
    """Whether a network still is what was read: the same parts, attributes and tensors, unchanged, and no hooks."""

    def __init__(self) -> None:
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[object] = []
        self._hooks: list[dict[Any, Any]] = [
            hooks
            for name, hooks in vars(torch_module).items()
            if name.startswith("_global_") and isinstance(hooks, dict)
        ]
        self._tensors: dict[int, Tensor] = {}
        self._versions: list[int] = []

    def read(self, part: nn.Module, *names: str) -> Any:
        """The attributes of a part, noted; one alone, or a tuple of several."""
        if "forward" in vars(part):
            raise NotDerivable(f"{type(part).__name__}.forward was replaced")
        self._hooks += [getattr(part, hooks) for hooks in HOOKS]
        values = [self._read(part, name) for name in names]
        return values[0] if len(values) == 1 else tuple(values)

    def _read(self, part: nn.Module, name: str) -> object:
        for place in (part._modules, part._parameters, vars(part)):
            if name in place:
                break
        else:
            raise NotDerivable(f"{type(part).__name__} has no {name}")
        value = place[name]
        self._places.append(place)
        self._names.append(name)
        self._values.append(value)
        tensor = value.blocks if isinstance(value, QuantizedTensor) else value
        if isinstance(tensor, Tensor) and not tensor.is_inference():
            base = tensor if tensor._base is None else tensor._base  # views count changes together
            if id(base) not in self._tensors:
                self._tensors[id(base)] = base
                self._versions.append(base._version)
        return value

    def unchanged(self) -> bool:
        try:
            return (
                not any(self._hooks)
                and all(map(is_, map(getitem, self._places, self._names), self._values))
                and [tensor._version for tensor in self._tensors.values()] == self._versions
            )
        except KeyError:
            return False


class Derivation:
    """What is read off a network while its program is written."""

    def __init__(self, network: Decoder, *, fast: bool, threads: int, isa: str | None) -> None:
        if not kernels.isas():
            raise NotDerivable(f"there are no kernels: {kernels.reason()}")
        _exactly_decoder(network)
        self.watch = Watch()
        self.threads = threads
        self.quantized = False
        self._packed: dict[int, Weight] = {}
        embed, layers, norm, head = self.watch.read(network, "embed", "layers", "norm", "head")
        blocks = [self.watch.read(layers, name) for name in layers._modules]
        attentions = [
            _exactly(self.watch.read(_exactly(block, PreNormBlock), "attention"), Attention) for block in blocks
        ]
        if not attentions:
            raise NotDerivable("there are no layers")
        first = _exactly(attentions[0], Attention)
        self.rope = _rope(first)
        self.windows = [attention.window for attention in attentions]
        self.program = Program(
            head_dim=first.head_dim,
            kv_heads=first.kv_heads,
            layers=len(blocks),
            threads=threads,
            fast=fast,
            isa=isa,
        )
        self.program.embed(self.table(embed))
        for block, attention in zip(blocks, attentions, strict=True):
            self._block(block, attention, first)
        weight = self.linear(head)
        self._norm(norm, [weight], wanted=True)
        self.program.matmul([weight], NORMED, LOGITS, wanted=True)
        if not self.watch.unchanged():
            raise NotDerivable("a part has a hook")

    def _block(self, block: PreNormBlock, attention: Attention, first: Attention) -> None:
        read, program = self.watch.read, self.program
        attention_norm, feedforward_norm, feedforward = read(block, "attention_norm", "feedforward_norm", "feedforward")
        shape = read(_exactly(attention, Attention), "kv_heads", "head_dim", "rope")
        if shape != (first.kv_heads, first.head_dim, first.rope):
            raise NotDerivable("layers differ in their key/value heads or their RoPE")
        heads, layer, window, q_norm, k_norm = read(attention, "heads", "layer", "window", "q_norm", "k_norm")
        if read(attention, "log_scale_after") is not None:
            raise NotDerivable("queries are scaled by their place")
        if read(attention, "scale", "query_rope") != (None, None):
            raise NotDerivable("scores are scaled, or queries rotated, in a way of their own")
        q, k, v, o = (self.linear(part) for part in read(attention, "q_proj", "k_proj", "v_proj", "o_proj"))
        self._norm(attention_norm, [q, k, v])
        program.matmul([q, k, v], NORMED, PROJECTED)
        norms: dict[str, Any] = {}
        if q_norm is not None and k_norm is not None:
            norms["q_norm"], norms["eps"] = read(_exactly(q_norm, RMSNorm), "weight", "eps")
            norms["k_norm"], eps = read(_exactly(k_norm, RMSNorm), "weight", "eps")
            if eps != norms["eps"]:
                raise NotDerivable("the norms of queries and keys differ in eps")
        program.attention(layer, heads, window=window, **norms)
        self._product(o, ATTENDED)
        gate, up, down = (
            self.linear(part) for part in read(_exactly(feedforward, SwiGLU), "gate_proj", "up_proj", "down_proj")
        )
        self._norm(feedforward_norm, [gate, up])
        program.gated(gate, up)
        self._product(down, GATES)

    def _norm(self, norm: nn.Module, readers: Sequence[Weight], *, wanted: bool = False) -> None:
        weight, eps = self.watch.read(_exactly(norm, RMSNorm), "weight", "eps")
        self.program.norm(weight, eps, quantize=any(weight.is_quantized for weight in readers), wanted=wanted)

    def _product(self, weight: Weight, source: int) -> None:
        """Added to the residual stream."""
        if weight.is_quantized:
            self.program.quantize(source)
        self.program.matmul([weight], source, RESIDUAL, add=True)

    def linear(self, part: nn.Module) -> Weight:
        weight, bias = self.watch.read(part, "weight", "bias")
        if type(part) is QuantizedLinear:
            return self._pack(weight, bias)
        return self._floats(part if type(part) is RowwiseInt8Linear else _exactly(part, nn.Linear), bias)

    def table(self, part: nn.Module) -> Weight:
        weight = self.watch.read(part, "weight")
        if type(part) is QuantizedEmbedding:
            return self._pack(weight, None)
        if _exactly(part, nn.Embedding).max_norm is not None:
            raise NotDerivable("the embedding renormalizes its rows")
        return self._floats(part, None)

    def _floats(self, part: Any, bias: Tensor | None) -> Weight:
        try:
            return Weight.floats(part.weight, bias)
        except ValueError as error:
            raise NotDerivable(str(error)) from None

    def _pack(self, weight: QuantizedTensor, bias: Tensor | None) -> Weight:
        """A weight in tiles; one that is used twice (embedding and head) is packed once."""
        rows, columns = weight.shape
        packed = self._packed.get(id(weight))
        if packed is None:
            try:
                packed = Weight.packed(weight.blocks, weight.type, (rows, columns), bias, self.threads)
            except ValueError as error:
                raise NotDerivable(str(error)) from None
            self._packed[id(weight)] = packed
        self.quantized = True
        return packed


def _exactly(part: nn.Module, kind: type[Any]) -> Any:
    if type(part) is not kind:
        raise NotDerivable(f"there is a {type(part).__name__} where the plan knows {kind.__name__}")
    attributes = {name for place in (part._modules, part._parameters, vars(part)) for name in place if name[0] != "_"}
    if kind in KNOWN and (unknown := attributes - KNOWN[kind] - {"training"}):
        raise NotDerivable(f"{kind.__name__}.{min(unknown)} is not known to the plan")
    return part


def has_known_parts(network: nn.Module) -> bool:
    """Whether a network (its weights may be on the meta device) is made of parts that a plan knows."""
    try:
        for block in _exactly_decoder(network).layers:
            known: PreNormBlock = _exactly(block, PreNormBlock)
            _exactly(known.attention, Attention)
            _exactly(known.feedforward, SwiGLU)
    except NotDerivable:
        return False
    return True


def _exactly_decoder(network: nn.Module) -> Decoder:
    if not isinstance(network, Decoder) or type(network).forward is not Decoder.forward:
        raise NotDerivable(f"{type(network).__name__} has a forward of its own")
    return network


def _rope(attention: Attention) -> Rope:
    rope = attention.rope
    if type(rope) is not Rope or rope.dim != attention.head_dim:
        raise NotDerivable("RoPE isn't over all of a head")
    return rope


class PlanStep:
    """Executes steps by the kernels, and owns the cache that they fill; takes the place of a `PlainStep`.

    Args:
        network: a decoder-only language model of `pentad.models`, its weights on the CPU. They are packed anew: what a
            part held before, mapped from its file, is read no more.
        cache_dtype: what keys and values are kept in: by default float16 where a weight is quantized, else float32.
        page_size: tokens a page, a multiple of 16.
        fast: activations in 8 bits instead of 16.
        threads: how many are used; by default as many as torch uses.
        isa: one of `pentad.kernels.isas()`; the fastest by default.

    Raises:
        NotDerivable: the network has no plan, or there are no kernels.
    """

    def __init__(
        self,
        network: Decoder,
        *,
        cache_dtype: torch.dtype | None = None,
        page_size: int = 256,
        fast: bool = False,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        if page_size % 16:
            raise ValueError(f"pages of {page_size} tokens; the kernels take multiples of 16")
        self.network = network
        self._options: dict[str, Any] = {
            "cache_dtype": cache_dtype,
            "page_size": page_size,
            "fast": fast,
            "threads": threads,
            "isa": isa,
        }
        self._plan = plan = Derivation(network, fast=fast, threads=threads or torch.get_num_threads(), isa=isa)
        self._tables: dict[int, Tensor] = {}
        windows = [window for window in plan.windows if window is not None]
        self.cache = PagedCache(
            plan.program.layers,
            plan.program.kv_heads,
            plan.program.padded_dim,
            dtype=cache_dtype or (torch.float16 if plan.quantized else torch.float32),
            page_size=page_size,
            window=max(windows) if len(windows) == len(plan.windows) else None,
        )

    def rope_regime(self, length: int) -> int:
        return self._plan.rope.scaling.regime(length)

    def renewed(self) -> Step:
        if self._plan.watch.unchanged():
            return self
        return step_for(self.network, **self._options)

    @contextmanager
    def choosing(self) -> Iterator[None]:
        """By one thread: torch's others would go on spinning for a while, on the cores that the next step needs."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def __call__(self, work: Work, wanted: Sequence[int]) -> Tensor:
        if len(self._tables) > MOST_TABLES:
            self._tables.clear()
        cache, tokens = self.cache, []
        for sequence, ids in work:
            cache.reserve(sequence, len(ids))
            rotation = self._rotation(sequence.rope_length, sequence.length + len(ids))
            tokens.append(Tokens(ids, sequence.length, sequence.dropped, sequence.pages, rotation))
        pools = CachePools(cache.keys, cache.values, cache.page_size)
        logits_MV = self._plan.program.run(tokens, wanted, pools)
        for sequence, ids in work:
            cache.advance(sequence, len(ids))
        return logits_MV

    def _rotation(self, rope_length: int, positions: int) -> Tensor:
        """Cosines and sines of a sequence's RoPE, float32 [at least `positions`, 2, D / 2]."""
        rope = self._plan.rope
        regime = rope.scaling.regime(rope_length)
        table = self._tables.get(regime)
        if table is None or len(table) < positions:
            at = torch.arange(max(512, 2 * positions), dtype=torch.float32)
            angles = at[:, None] * rope.scaling.frequencies(rope.theta, rope.dim, rope_length)
            table = torch.stack((angles.cos(), angles.sin()), 1) * rope.scaling.magnitude()
            self._tables[regime] = table
        return table


def step_for(
    network: Decoder,
    *,
    cache_dtype: torch.dtype | None = None,
    page_size: int = 256,
    **options: Any,
) -> Step:
    """A network's plan where it has one, else plain torch."""
    try:
        return PlanStep(network, cache_dtype=cache_dtype, page_size=page_size, **options)
    except NotDerivable:
        return PlainStep(network, cache_dtype=cache_dtype, page_size=page_size)
