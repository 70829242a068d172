"""The plan: a flat list of kernel operations for a network, so that one call runs a whole step.

`Planner` reads the network's parts. It knows exactly the types and attributes listed here. Anything else (a hook, an
adapter, a part of another type, weights on a GPU) raises `UnsupportedByKernels`, and the network runs in plain torch.
`pentad.generate.plan_step` runs plans.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pentad import kernels
from pentad.generate.guards import Guards, UnsupportedByKernels, has_hooks
from pentad.kernels import Buffer, Norm, Program, Weight
from pentad.nn.attention import Attention
from pentad.nn.block import ExtraFeedforwardBlock, ParallelBlock, PreNormBlock, rows_are_independent
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import GatedSwiGLU, GeluMLP, SwiGLU
from pentad.nn.linear import HeadLinear, QuantizedEmbedding, QuantizedHead, QuantizedLinear
from pentad.nn.moe.experts import GatedSwiGLUExperts, GroupedLinear, QuantizedGroupedLinear, SwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import mixtral_top_k, softmax_top_k
from pentad.nn.norm import LayerNorm, RMSNorm
from pentad.nn.rope import Rope
from pentad.weights.quantized import QuantizedTensor

KNOWN_ATTRIBUTES: dict[type[nn.Module], set[str]] = {
    PreNormBlock: {"attention_norm", "attention", "feedforward_norm", "feedforward"},
    ExtraFeedforwardBlock: {
        *("attention_norm", "attention", "feedforward_norm", "feedforward", "extra_norm", "extra_feedforward")
    },
    ParallelBlock: {"norm", "attention", "feedforward"},
    Attention: {
        *("heads", "kv_heads", "head_dim", "rope", "layer", "causal", "context_dim", "window", "log_scale_after"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "scale", "position_bias"),
    },
    SwiGLU: {"gate_proj", "up_proj", "down_proj"},
    GatedSwiGLU: {"gate_proj", "up_proj", "down_proj"},
    GeluMLP: {"up_proj", "down_proj", "approximate"},
    MixtureOfExperts: {
        *("router", "experts", "route", "top_k", "capacity", "training_capacity"),
        *("group_size", "jitter", "generator"),
    },
    SwiGLUExperts: {"count", "gate_proj", "up_proj", "down_proj"},
    GatedSwiGLUExperts: {"count", "gate_proj", "up_proj", "down_proj"},
    RMSNorm: {"dim", "weight", "eps"},
    LayerNorm: {"dim", "weight", "bias", "eps"},
}
"""A part with another attribute may compute something that the plan doesn't know."""

PLAIN = (nn.ModuleList, nn.Embedding, nn.Linear, HeadLinear, Router, GroupedLinear)
QUANTIZED = (QuantizedLinear, QuantizedHead, QuantizedEmbedding, QuantizedGroupedLinear)
NORMALIZED = {mixtral_top_k: True, softmax_top_k: False}
"""Routing function -> whether the weights of a row's experts add up to 1."""


class Planner:
    """Reads a network and writes its program."""

    def __init__(self, network: Decoder, *, fast: bool, threads: int, isa: str | None) -> None:
        if not kernels.isas():
            raise UnsupportedByKernels(f"there are no kernels: {kernels.reason()}")
        _check_decoder(network)
        self.guards = Guards()
        self.threads = threads
        self.reduced_precision = network.dtype != torch.float32  # or, see below, weights are quantized
        self._packed: dict[QuantizedTensor, Weight] = {}
        embed, layers, norm, head = self.guards.read(network, "embed", "layers", "norm", "head")
        if self.guards.read(network, "residual_dtype") != torch.float32:
            raise UnsupportedByKernels("the residual stream is not float32")
        blocks = [self.guards.read(layers, name) for name in layers._modules]
        for block in blocks:
            _check_type(block, PreNormBlock, ExtraFeedforwardBlock, ParallelBlock)
        attentions = [_check_type(self.guards.read(block, "attention"), Attention) for block in blocks]
        if not attentions:
            raise UnsupportedByKernels("the network has no layers")
        self.first: Attention = attentions[0]
        self.rope: Rope = _check_type(self.first.rope, Rope)
        self.windows = [attention.window for attention in attentions]
        self.program = Program(
            head_dim=self.first.head_dim,
            kv_heads=self.first.kv_heads,
            layers=len(blocks),
            rotary_dim=self.rope.dim,
            threads=threads,
            fast=fast,
            isa=isa,
        )
        self.program.embed(self.table(embed))
        for block in blocks:
            self._block(block, last=block is blocks[-1])
        weight = self.linear(head)
        self._norm(norm, [weight], wanted=True)
        self.program.matmul([weight], Buffer.NORMED, Buffer.LOGITS, wanted=True)
        if not self.guards.unchanged():
            raise UnsupportedByKernels("a part has a hook")

    def _block(self, block: nn.Module, *, last: bool) -> None:
        read, matmul = self.guards.read, self.program.matmul
        attention = read(block, "attention")
        norm = read(block, "norm" if type(block) is ParallelBlock else "attention_norm")
        qkv = self._linears(attention, "q_proj", "k_proj", "v_proj")
        if last and rows_are_independent(block):
            qkv = self._keys_and_values(norm, qkv, attention)
        if type(block) is ParallelBlock:
            up, down = self._gelu(read(block, "feedforward"))
            self._norm(norm, [*qkv, up])
            matmul(qkv, Buffer.NORMED, Buffer.PROJECTED)
            matmul([up], Buffer.NORMED, Buffer.GATES, gelu=True)
            self._attend(attention)
            self._add_to_residual(down, Buffer.GATES)
            return
        self._norm(norm, qkv)
        matmul(qkv, Buffer.NORMED, Buffer.PROJECTED)
        self._attend(attention)
        self._feedforward(*read(block, "feedforward_norm", "feedforward"))
        if type(block) is ExtraFeedforwardBlock:
            self._feedforward(*read(block, "extra_norm", "extra_feedforward"))

    def _keys_and_values(self, norm: nn.Module, qkv: list[Weight], attention: Attention) -> list[Weight]:
        """Write all rows' keys and values to the cache; only the wanted rows need what follows, from queries on."""
        queries, *others = qkv
        self._norm(norm, others)
        self.program.matmul(others, Buffer.NORMED, Buffer.PROJECTED)
        self._attention(attention, queries=False)
        self.program.narrow()
        return [queries]

    def _attend(self, attention: Attention) -> None:
        """Attention from the projected queries, keys and values, and the output projection."""
        self._attention(attention)
        self._add_to_residual(self.linear(self.guards.read(attention, "o_proj")), Buffer.ATTENDED)

    def _attention(self, attention: Attention, *, queries: bool = True) -> None:
        read, first = self.guards.read, self.first
        if read(attention, "kv_heads", "head_dim", "rope") != (first.kv_heads, first.head_dim, first.rope):
            raise UnsupportedByKernels("layers differ in their key/value heads or their RoPE")
        if read(attention, "causal", "context_dim", "position_bias") != (True, None, None):
            raise UnsupportedByKernels("attention is not causal self-attention, or has a position bias")
        heads, layer, window, scale = read(attention, "heads", "layer", "window", "scale")
        q_norm, k_norm, log_scale_after = read(attention, "q_norm", "k_norm", "log_scale_after")
        options: dict[str, Any] = {"scale": scale, "window": window, "log_scale_after": log_scale_after or 0}
        if q_norm is not None and k_norm is not None:
            options |= {"q_norm": self._norm_weights(q_norm), "k_norm": self._norm_weights(k_norm)}
        try:
            self.program.attention(layer, heads if queries else 0, **options)
        except ValueError as error:
            raise UnsupportedByKernels(str(error)) from None

    def _feedforward(self, norm: nn.Module, part: nn.Module) -> None:
        if type(part) is MixtureOfExperts:
            return self._mixture(norm, part)
        if type(part) is GeluMLP:
            up, down = self._gelu(part)
            self._norm(norm, [up])
            self.program.matmul([up], Buffer.NORMED, Buffer.GATES, gelu=True)
        else:
            gates, down = self._gates(part)
            self._norm(norm, gates)
            self.program.gated(gates)
        self._add_to_residual(down, Buffer.GATES)

    def _gates(self, part: nn.Module) -> tuple[list[Weight], Weight]:
        """The gate and up projections of a SwiGLU, and its down projection; for experts, stacks of them."""
        if type(part) in (GatedSwiGLU, GatedSwiGLUExperts):
            gate, up, down = self.guards.read(part, "gate_proj", "up_proj", "down_proj")
            value, gate = self._halves(gate)
            return [gate, self.linear(up), value], self.linear(down)
        known = SwiGLUExperts if type(part) is SwiGLUExperts else SwiGLU
        gate, up, down = self._linears(_check_type(part, known), "gate_proj", "up_proj", "down_proj")
        return [gate, up], down

    def _gelu(self, part: nn.Module) -> list[Weight]:
        if self.guards.read(_check_type(part, GeluMLP), "approximate") != "tanh":
            raise UnsupportedByKernels("GELU is exact, not approximated by tanh")
        return self._linears(part, "up_proj", "down_proj")

    def _mixture(self, norm: nn.Module, part: MixtureOfExperts) -> None:
        read, program = self.guards.read, self.program
        router, experts, route, top_k = read(_check_type(part, MixtureOfExperts), "router", "experts", "route", "top_k")
        capacity, group_size, training = read(part, "capacity", "group_size", "training")
        if route not in NORMALIZED or group_size is not None or training:
            raise UnsupportedByKernels("a mixture has unknown routing or groups, or is in training mode")
        scores = self.linear(router)
        gates, down = self._gates(experts)
        self._norm(norm, [scores])
        program.matmul([scores], Buffer.NORMED, Buffer.SCORES)
        program.route(top_k, normalized=NORMALIZED[route], capacity=capacity)
        program.gather(quantize=any(weight.is_quantized for weight in gates))
        program.gated(gates, Buffer.PAIRED)
        if down.is_quantized:
            program.quantize(Buffer.GATES)
        program.matmul([down], Buffer.GATES, Buffer.PAIRED)
        program.combine()

    def _norm(self, norm: nn.Module, readers: Sequence[Weight], *, wanted: bool = False) -> None:
        quantize = any(weight.is_quantized for weight in readers)
        self.program.norm(self._norm_weights(norm), quantize=quantize, wanted=wanted)

    def _norm_weights(self, norm: nn.Module) -> Norm:
        if type(norm) is LayerNorm:
            return Norm(*self.guards.read(_check_type(norm, LayerNorm), "weight", "eps", "bias"))
        return Norm(*self.guards.read(_check_type(norm, RMSNorm), "weight", "eps"))

    def _add_to_residual(self, weight: Weight, source: int) -> None:
        if weight.is_quantized:
            self.program.quantize(source)
        self.program.matmul([weight], source, Buffer.RESIDUAL, add=True)

    def _linears(self, part: nn.Module, *names: str) -> list[Weight]:
        return [self.linear(linear) for linear in self.guards.read(part, *names)]

    def linear(self, part: nn.Module) -> Weight:
        return self._weight(*self._parameters(part))

    def table(self, part: nn.Module) -> Weight:
        weight = self.guards.read(part, "weight")
        if type(part) is not QuantizedEmbedding and _check_type(part, nn.Embedding).max_norm is not None:
            raise UnsupportedByKernels("the embedding renormalizes its rows")
        return self._weight(weight)

    def _halves(self, part: nn.Module) -> tuple[Weight, Weight]:
        """The first and the last half of the rows of a linear layer, or of each expert."""
        weight, bias = self._parameters(part)
        if bias is not None:
            raise UnsupportedByKernels("gates have a bias")
        first, last = weight.chunk(2, -2)
        return self._weight(first), self._weight(last)

    def _parameters(self, part: nn.Module) -> Any:
        """The weight and the bias of a linear layer."""
        if type(part) in (GroupedLinear, QuantizedGroupedLinear):
            return self.guards.read(part, "weight"), None
        if type(part) not in (QuantizedLinear, QuantizedHead):
            _check_type(part, nn.Linear, HeadLinear, Router)
        return self.guards.read(part, "weight", "bias")

    def _weight(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> Weight:
        """Floating-point weights in place, or packed quantized blocks; weights used twice are packed once."""
        try:
            if isinstance(weight, Tensor):
                return Weight.floats(weight, bias)
            packed = self._packed.get(weight)
            if packed is None:
                packed = Weight.packed(weight.blocks, weight.type, weight.shape, threads=self.threads)
                weight.release()
                self._packed[weight] = packed
            self.reduced_precision = True
            return packed.with_bias(bias)
        except ValueError as error:
            raise UnsupportedByKernels(str(error)) from None


def _check_type(part: Any, *expected: type[Any]) -> Any:
    if type(part) not in expected:
        raise UnsupportedByKernels(f"a part is a {type(part).__name__}; the plan expected a {expected[0].__name__}")
    if (known := KNOWN_ATTRIBUTES.get(type(part))) is not None:
        attributes = {name for names in (part._modules, part._parameters, vars(part)) for name in names}
        if unknown := {name for name in attributes if name[0] != "_"} - known - {"training"}:
            raise UnsupportedByKernels(f"the plan does not know {type(part).__name__}.{min(unknown)}")
    return part


def check_network(network: nn.Module) -> None:
    """Raise UnsupportedByKernels if a network has hooks or unknown parts; it may be on the meta device."""
    _check_decoder(network)
    for part in network.modules():
        if part is not network and type(part) not in (*KNOWN_ATTRIBUTES, *PLAIN, *QUANTIZED):
            raise UnsupportedByKernels(f"the plan does not know the part {type(part).__name__}")
        if has_hooks(part):
            raise UnsupportedByKernels("a part has a hook")


def _check_decoder(network: nn.Module) -> None:
    if not isinstance(network, Decoder) or type(network).forward is not Decoder.forward:
        raise UnsupportedByKernels(f"{type(network).__name__} doesn't have Decoder's forward")
