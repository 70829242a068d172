"""A Darknet network as a plan of convolutions for the CPU kernels: batch norm folded into weights, activations and sums
computed with the convolutions, and concatenations written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pentad.kernels.convolution import ACTIVATIONS, ConvolutionPlan, Image, max_size
from pentad.models.vision.darknet import Convolutional, Darknet, MaxPool
from pentad.weights.darknet_cfg import Layer

_WRITERS = {"convolutional", "maxpool", "shortcut", "upsample"}  # the others pass on what is there
PLANNED = {*_WRITERS, "route", "dropout", "yolo", "region"}


def _is_known(layer: Layer) -> bool:
    return (
        layer.kind in PLANNED
        and layer.options.get("size", 1) <= max_size()
        and layer.options.get("scale", 1.0) == 1.0
        and layer.options.get("activation", "linear") in ACTIVATIONS
    )


def folded(conv: Convolutional) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its batch norm."""
    norm = conv.norm
    if norm is None:
        assert conv.bias is not None
        return conv.weight, conv.bias
    assert norm.running_var is not None
    assert norm.running_mean is not None
    factor = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).float()
    return conv.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor


class DarknetPlan:
    """Runs a network's layers for batches of one size.

    Attributes:
        network: the network; its weights are copied.
        batch: the number of images.
    """

    def __init__(self, network: Darknet, batch: int, threads: int, isa: str | None = None) -> None:
        self.network, self.batch = network, batch
        self.layers = network.cfg.layers
        self.plan = ConvolutionPlan(threads, isa)
        self.images: dict[int, Image] = {}
        channels, height, width = network.cfg.shape
        self.images[-1] = self.plan.input(batch, height, width, channels)
        self._slots = self._concatenations()
        self._fused = self._sums()
        self.outputs: list[Image] = []
        with torch.no_grad():
            for number in range(len(self.layers)):
                self.images[number] = self._layer(number)
        for image in self.outputs:
            self.plan.keep(image)
        self._versions = self._current_versions()

    def _current_versions(self) -> list[tuple[int, int]]:
        tensors = self.network.state_dict(keep_vars=True).values()
        return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]

    def fits(self, images_BCHW: Tensor) -> bool:
        """True if the plan is for such a batch, torch's number of threads, and the network's present weights."""
        same = len(images_BCHW) == self.batch and self.plan.threads == torch.get_num_threads()
        return same and self._versions == self._current_versions()

    @staticmethod
    def supports(network: Darknet) -> bool:
        """True if the kernels have all layers of a network, which is on the CPU in float32 without hooks."""
        first = next(network.parameters())
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())
        known = bool(network.heads) and all(_is_known(layer) for layer in network.cfg.layers)
        on_cpu = first.device.type == "cpu" and first.dtype == torch.float32
        return known and on_cpu and not hooked and not network.training

    def run(self, images_BCHW: Tensor) -> list[Tensor]:
        """The inputs of the detection layers, [B, C, H, W] with channels last in memory."""
        self.plan.run(images_BCHW.permute(0, 2, 3, 1))
        return [self.plan.view(image).permute(0, 3, 1, 2) for image in self.outputs]

    def _concatenations(self) -> dict[int, tuple[int, int]]:
        """Layer -> the route that concatenates its output, and its first channel there."""
        slots: dict[int, tuple[int, int]] = {}
        for number, layer in enumerate(self.layers):
            if layer.kind == "route" and len(layer.inputs) > 1 and layer.groups == 1:
                offset = 0
                for source in layer.inputs:
                    if source >= 0 and source not in slots and self.layers[source].kind in _WRITERS:
                        slots[source] = number, offset
                    offset += self.layers[source].shape[0] if source >= 0 else self.network.cfg.shape[0]
        return slots

    def _sums(self) -> dict[int, int]:
        """Convolution -> the shortcut after it whose sum it computes."""
        users: dict[int, list[int]] = {}
        for number, layer in enumerate(self.layers):
            for source in layer.inputs:
                users.setdefault(source, []).append(number)
        fused = {}
        for number, layer in enumerate(self.layers):
            chain = number
            while len(users.get(chain, ())) == 1 and self.layers[users[chain][0]].kind == "dropout":
                chain = users[chain][0]
            after = users.get(chain, ())
            if layer.kind == "convolutional" and len(after) == 1 and self.layers[after[0]].kind == "shortcut":
                shortcut = self.layers[after[0]]
                other = shortcut.inputs[1]
                same = self.layers[other].shape == shortcut.shape if other >= 0 else False
                if shortcut.inputs[0] == chain and same and other != chain and shortcut.activation == "linear":
                    fused[number] = after[0]
        return fused

    def _new(self, number: int) -> Image:
        """The place for a layer's output: of its own, or in a concatenation."""
        channels, height, width = self.layers[number].shape
        if number not in self._slots:
            return self.plan.image(self.batch, height, width, channels)
        route, offset = self._slots[number]
        if route not in self.images:
            self.images[route] = self.plan.image(self.batch, height, width, self.layers[route].shape[0])
        return self.images[route].part(offset, channels)

    def _layer(self, number: int) -> Image:
        layer, module = self.layers[number], self.network.layers[number]
        sources = [self.images[source] for source in layer.inputs]
        source = sources[0]
        match layer.kind:
            case "convolutional":
                return self._convolution(number, module, source)
            case "dropout":
                return source
            case "yolo" | "region":
                self.outputs.append(source)
                return source
            case "maxpool":
                assert isinstance(module, MaxPool)
                out = self._new(number)
                self.plan.maxpool(source, out, module.size, module.stride, module.padding[0])
            case "upsample":
                out = self._new(number)
                self.plan.repeat(source, out, times=layer.stride)
            case "shortcut":
                if number in self._fused.values():
                    return source
                out = self._new(number)
                self._sum(sources, out, layer.activation)
            case _:
                out = self._route(number, sources)
        return out

    def _convolution(self, number: int, module: nn.Module, source: Image) -> Image:
        assert isinstance(module, Convolutional)
        layer, shortcut = self.layers[number], self._fused.get(number)
        out = self._new(number if shortcut is None else shortcut)
        add = None if shortcut is None else self.images[self.layers[shortcut].inputs[1]]
        weight, bias = folded(module)
        options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        self.plan.convolve(source, out, weight, bias, **options, activation=layer.activation, add=add)
        return out

    def _sum(self, sources: Sequence[Image], out: Image, activation: str) -> None:
        one, other = sources
        common = min(one.channels, other.channels)
        self.plan.repeat(one.part(0, common), out.part(0, common), add=other.part(0, common), activation=activation)
        if one.channels > common:
            rest = common, one.channels - common
            self.plan.repeat(one.part(*rest), out.part(*rest), activation=activation)

    def _route(self, number: int, sources: Sequence[Image]) -> Image:
        layer = self.layers[number]
        parts = [
            one.part(layer.group_id * (one.channels // layer.groups), one.channels // layer.groups) for one in sources
        ]
        if len(parts) == 1:
            return parts[0]
        channels, height, width = layer.shape
        out = self.images.get(number) or self.plan.image(self.batch, height, width, channels)
        offset = 0
        for source, part in zip(layer.inputs, parts, strict=True):
            if self._slots.get(source) != (number, offset):
                self.plan.repeat(part, out.part(offset, part.channels))
            offset += part.channels
        return out
