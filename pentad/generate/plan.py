"""The plan: a network's parts read off into a flat list of kernel operations, of which one call runs a whole step.

What can be read off is what `Planner` says: parts of exactly the known types, with their plain attributes. All else
(a hook, an adapter, a part of another type, weights off the CPU) is `UnsupportedByKernels`, and runs as plain torch.
`pentad.generate.plan_step` runs plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pentad import kernels
from pentad.generate.guards import Guards, UnsupportedByKernels, has_hooks
from pentad.kernels import Buffer, Norm, Program, Weight
from pentad.nn.attention import Attention
from pentad.nn.block import ExtraFeedforwardBlock, ParallelBlock, PreNormBlock
from pentad.nn.decoder import Decoder
from pentad.nn.feedforward import GatedSwiGLU, GeluMLP, SwiGLU
from pentad.nn.linear import QuantizedEmbedding, QuantizedLinear, RowwiseInt8Linear
from pentad.nn.moe.experts import GatedSwiGLUExperts, GroupedLinear, QuantizedGroupedLinear, SwiGLUExperts
from pentad.nn.moe.layer import MixtureOfExperts, Router
from pentad.nn.moe.routers import mixtral_top_k, softmax_top_k
from pentad.nn.norm import LayerNorm, RMSNorm
from pentad.nn.rope import Rope
from pentad.weights.quantized import QuantizedTensor

KNOWN: dict[type[nn.Module], set[str]] = {
    PreNormBlock: {"attention_norm", "attention", "feedforward_norm", "feedforward"},
    ExtraFeedforwardBlock: {
        *("attention_norm", "attention", "feedforward_norm", "feedforward", "extra_norm", "extra_feedforward"),
    },
    ParallelBlock: {"norm", "attention", "feedforward"},
    Attention: {
        *("heads", "kv_heads", "head_dim", "rope", "layer", "causal", "context_dim", "window", "log_scale_after"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "scale", "position_bias"),
    },
    SwiGLU: {"gate_proj", "up_proj", "down_proj"},
    GatedSwiGLU: {"gate_proj", "up_proj", "down_proj"},
    GeluMLP: {"up_proj", "down_proj"},
    MixtureOfExperts: {
        *("router", "experts", "route", "top_k", "capacity", "training_capacity"),
        *("group_size", "jitter", "generator"),
    },
    SwiGLUExperts: {"count", "gate_proj", "up_proj", "down_proj"},
    GatedSwiGLUExperts: {"count", "gate_proj", "up_proj", "down_proj"},
    RMSNorm: {"dim", "weight", "eps"},
    LayerNorm: {"dim", "weight", "bias", "eps"},
}
"""What the parts of the house have. One that has more computes something that is not known here."""

PLAIN = (nn.ModuleList, nn.Embedding, nn.Linear, Router, GroupedLinear)
QUANTIZED = (QuantizedLinear, QuantizedEmbedding, QuantizedGroupedLinear, RowwiseInt8Linear)
ROUTES = {mixtral_top_k: True, softmax_top_k: False}
"""Routers -> whether a row's weights are a softmax over its experts alone."""


class Planner:
    """What is read off a network while its program is written."""

    def __init__(self, network: Decoder, *, fast: bool, threads: int, isa: str | None) -> None:
        if not kernels.isas():
            raise UnsupportedByKernels(f"there are no kernels: {kernels.reason()}")
        _exactly_decoder(network)
        self.guards = Guards()
        self.threads = threads
        self.reduced = network.dtype != torch.float32  # whether weights have fewer than 32 bits
        self._packed: dict[QuantizedTensor, Weight] = {}
        embed, layers, norm, head = self.guards.read(network, "embed", "layers", "norm", "head")
        if self.guards.read(network, "residual_dtype") != torch.float32:
            raise UnsupportedByKernels("the residual stream is not float32")
        blocks = [self.guards.read(layers, name) for name in layers._modules]
        kinds = PreNormBlock, ExtraFeedforwardBlock, ParallelBlock
        attentions = [_exactly(self.guards.read(_exactly(block, *kinds), "attention"), Attention) for block in blocks]
        if not attentions:
            raise UnsupportedByKernels("there are no layers")
        self.first = first = attentions[0]
        self.rope = _rope(first)
        self.windows = [attention.window for attention in attentions]
        self.program = Program(
            head_dim=first.head_dim,
            kv_heads=first.kv_heads,
            layers=len(blocks),
            rotary_dim=self.rope.dim,
            threads=threads,
            fast=fast,
            isa=isa,
        )
        self.program.embed(self.table(embed))
        for block in blocks:
            self._block(block)
        weight = self.linear(head)
        self._norm(norm, [weight], wanted=True)
        self.program.matmul([weight], Buffer.NORMED, Buffer.LOGITS, wanted=True)
        if not self.guards.unchanged():
            raise UnsupportedByKernels("a part has a hook")

    def _block(self, block: nn.Module) -> None:
        if type(block) is ParallelBlock:
            return self._parallel_block(block)
        read = self.guards.read
        attention_norm, attention = read(block, "attention_norm", "attention")
        qkv = self._linears(attention, "q_proj", "k_proj", "v_proj")
        self._norm(attention_norm, qkv)
        self.program.matmul(qkv, Buffer.NORMED, Buffer.PROJECTED)
        self._attend(attention)
        self._feedforward(*read(block, "feedforward_norm", "feedforward"))
        if type(block) is ExtraFeedforwardBlock:
            self._feedforward(*read(block, "extra_norm", "extra_feedforward"))

    def _parallel_block(self, block: ParallelBlock) -> None:
        norm, attention, feedforward = self.guards.read(block, "norm", "attention", "feedforward")
        qkv = self._linears(attention, "q_proj", "k_proj", "v_proj")
        up, down = self._linears(_exactly(feedforward, GeluMLP), "up_proj", "down_proj")
        self._norm(norm, [*qkv, up])
        self.program.matmul(qkv, Buffer.NORMED, Buffer.PROJECTED)
        self.program.matmul([up], Buffer.NORMED, Buffer.GATES, gelu=True)
        self._attend(attention)
        self._product(down, Buffer.GATES)

    def _attend(self, attention: Attention) -> None:
        """From queries, keys and values to what is added to the residual stream."""
        read, first = self.guards.read, self.first
        if read(attention, "kv_heads", "head_dim", "rope") != (first.kv_heads, first.head_dim, first.rope):
            raise UnsupportedByKernels("layers differ in their key/value heads or their RoPE")
        heads, layer, window, scale, log_scale_after = read(
            attention, "heads", "layer", "window", "scale", "log_scale_after"
        )
        q_norm, k_norm = read(attention, "q_norm", "k_norm")
        if read(attention, "causal", "context_dim", "position_bias") != (True, None, None):
            raise UnsupportedByKernels("attention is not causal self-attention, or has a bias by position")
        norms: dict[str, Any] = {}
        if q_norm is not None and k_norm is not None:
            norms = {"q_norm": self._numbers(q_norm), "k_norm": self._numbers(k_norm)}
        try:
            self.program.attention(
                layer,
                heads,
                scale=scale,
                window=window,
                log_scale_after=log_scale_after or 0,
                **norms,
            )
        except ValueError as error:
            raise UnsupportedByKernels(str(error)) from None
        self._product(self.linear(read(attention, "o_proj")), Buffer.ATTENDED)

    def _feedforward(self, norm: nn.Module, part: nn.Module) -> None:
        if type(part) is MixtureOfExperts:
            return self._mixture(norm, part)
        if type(part) is GeluMLP:
            up, down = self._linears(part, "up_proj", "down_proj")
            self._norm(norm, [up])
            self.program.matmul([up], Buffer.NORMED, Buffer.GATES, gelu=True)
        else:
            gates, down = self._gates(part)
            self._norm(norm, gates)
            self.program.gated(gates)
        self._product(down, Buffer.GATES)

    def _gates(self, part: nn.Module) -> tuple[list[Weight], Weight]:
        """What is multiplied in a SwiGLU or its like, and what comes after; of experts, stacks."""
        if type(part) in (GatedSwiGLU, GatedSwiGLUExperts):
            gate, up, down = self.guards.read(part, "gate_proj", "up_proj", "down_proj")
            a, b = self._halves(gate)
            return [b, self.linear(up), a], self.linear(down)
        known = SwiGLUExperts if type(part) is SwiGLUExperts else SwiGLU
        gate, up, down = self._linears(_exactly(part, known), "gate_proj", "up_proj", "down_proj")
        return [gate, up], down

    def _mixture(self, norm: nn.Module, part: MixtureOfExperts) -> None:
        read, program = self.guards.read, self.program
        router, experts, route, top_k = read(_exactly(part, MixtureOfExperts), "router", "experts", "route", "top_k")
        capacity, group_size, training = read(part, "capacity", "group_size", "training")
        if route not in ROUTES or group_size is not None or training:
            raise UnsupportedByKernels("a mixture routes in a way that is not known to the plan, or is being trained")
        scores = self.linear(router)
        gates, down = self._gates(experts)
        self._norm(norm, [scores])
        program.matmul([scores], Buffer.NORMED, Buffer.SCORES)
        program.route(top_k, normalized=ROUTES[route], capacity=capacity)
        program.gather(quantize=any(weight.is_quantized for weight in gates))
        program.gated(gates, Buffer.PAIRED)
        if down.is_quantized:
            program.quantize(Buffer.GATES)
        program.matmul([down], Buffer.GATES, Buffer.PAIRED)
        program.combine()

    def _norm(self, norm: nn.Module, readers: Sequence[Weight], *, wanted: bool = False) -> None:
        quantize = any(weight.is_quantized for weight in readers)
        self.program.norm(self._numbers(norm), quantize=quantize, wanted=wanted)

    def _numbers(self, norm: nn.Module) -> Norm:
        if type(norm) is LayerNorm:
            return Norm(*self.guards.read(_exactly(norm, LayerNorm), "weight", "eps", "bias"))
        return Norm(*self.guards.read(_exactly(norm, RMSNorm), "weight", "eps"))

    def _product(self, weight: Weight, source: int) -> None:
        """Added to the residual stream."""
        if weight.is_quantized:
            self.program.quantize(source)
        self.program.matmul([weight], source, Buffer.RESIDUAL, add=True)

    def _linears(self, part: nn.Module, *names: str) -> list[Weight]:
        return [self.linear(linear) for linear in self.guards.read(part, *names)]

    def linear(self, part: nn.Module) -> Weight:
        if type(part) in (GroupedLinear, QuantizedGroupedLinear):
            return self._weight(self.guards.read(part, "weight"))
        weight, bias = self.guards.read(part, "weight", "bias")
        if type(part) not in (QuantizedLinear, RowwiseInt8Linear):
            _exactly(part, nn.Linear, Router)
        return self._weight(weight, bias)

    def table(self, part: nn.Module) -> Weight:
        weight = self.guards.read(part, "weight")
        if type(part) is not QuantizedEmbedding and _exactly(part, nn.Embedding).max_norm is not None:
            raise UnsupportedByKernels("the embedding renormalizes its rows")
        return self._weight(weight)

    def _halves(self, part: nn.Module) -> tuple[Weight, Weight]:
        """The first and the last half of a linear layer's rows, or of each expert's."""
        if type(part) in (GroupedLinear, QuantizedGroupedLinear):
            weight, bias = self.guards.read(part, "weight"), None
        else:
            weight, bias = self.guards.read(part, "weight", "bias")
            if bias is not None:
                raise UnsupportedByKernels("gates have a bias")
        first, last = weight.chunk(2, -2)
        return self._weight(first), self._weight(last)

    def _weight(self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None) -> Weight:
        """Floats where they lie; blocks in tiles, of which those used twice (embedding and head) are packed once."""
        try:
            if isinstance(weight, Tensor):
                return Weight.floats(weight, bias)
            packed = self._packed.get(weight)
            if packed is None:
                packed = Weight.packed(weight.blocks, weight.type, weight.shape, threads=self.threads)
                weight.release()
                self._packed[weight] = packed
            self.reduced = True
            return packed.with_bias(bias)
        except ValueError as error:
            raise UnsupportedByKernels(str(error)) from None


def _exactly(part: nn.Module, *kinds: type[Any]) -> Any:
    if type(part) not in kinds:
        raise UnsupportedByKernels(f"there is a {type(part).__name__} where the plan knows {kinds[0].__name__}")
    attributes = {name for place in (part._modules, part._parameters, vars(part)) for name in place if name[0] != "_"}
    known = KNOWN.get(type(part))
    if known is not None and (unknown := attributes - known - {"training"}):
        raise UnsupportedByKernels(f"{type(part).__name__}.{min(unknown)} is not known to the plan")
    return part


def check_network(network: nn.Module) -> None:
    """Raise UnsupportedByKernels if a network, perhaps on the meta device, has hooks or unknown parts."""
    for part in _exactly_decoder(network).modules():
        if part is not network and type(part) not in (*KNOWN, *PLAIN, *QUANTIZED):
            raise UnsupportedByKernels(f"there is a {type(part).__name__}, which the plan does not know")
        if has_hooks(part):
            raise UnsupportedByKernels("a part has a hook")


def _exactly_decoder(network: nn.Module) -> Decoder:
    if not isinstance(network, Decoder) or type(network).forward is not Decoder.forward:
        raise UnsupportedByKernels(f"{type(network).__name__} has a forward of its own")
    return network


def _rope(attention: Attention) -> Rope:
    if type(attention.rope) is not Rope:
        raise UnsupportedByKernels(f"there is a {type(attention.rope).__name__} where the plan knows Rope")
    return attention.rope
