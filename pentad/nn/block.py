"""The residual blocks; each family's file supplies the parts.

Legend: N rows, D width of the residual stream.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pentad.nn.batch import Batch, SequenceLayout
from pentad.nn.moe.layer import MixtureOfExperts
from pentad.nn.moe.routers import Routing, mixtral_top_k, softmax_top_k

CHECKPOINTING = ("none", "blocks")


def run_blocks(
    blocks: Iterable[nn.Module], x_ND: Tensor, *arguments: object, checkpointing: str = "none"
) -> tuple[Tensor, tuple[Routing | None, ...]]:
    """Run a stack of blocks, ``block(x_ND, *arguments)``.

    Args:
        blocks: a dense block returns a tensor; a block with a mixture of experts also returns its routing.
        x_ND: the residual stream; its dtype doesn't change.
        arguments: passed to every block: the batch and, for cross-attention, the context rows.
        checkpointing: "blocks" saves only each block's input for backward and recomputes the rest (arXiv:1604.06174),
            with the same router noise; "none" saves all activations.

    Returns:
        The residual stream, and each block's routing (None for a dense block).

    Raises:
        ValueError: unknown `checkpointing`.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing is {checkpointing!r}; expected one of {', '.join(CHECKPOINTING)}")
    dtype = x_ND.dtype
    routings: list[Routing | None] = []
    for block in blocks:
        out = _checkpointed(block, x_ND, *arguments) if checkpointing == "blocks" else block(x_ND, *arguments)
        x_ND, routing = out if isinstance(out, tuple) else (out, None)
        x_ND = x_ND.to(dtype)
        routings.append(routing)
    return x_ND, tuple(routings)


def _checkpointed(block: nn.Module, *arguments: object) -> Tensor | tuple[Tensor, Routing]:
    generators = [part.generator for part in block.modules() if isinstance(part, MixtureOfExperts)]
    states = [(generator, generator.get_state()) for generator in generators if generator is not None]
    # torch.compile doesn't accept context_fn, so it is passed only if there is a generator.
    contexts: dict[str, Any] = {"context_fn": lambda: (nullcontext(), _rewound(states))} if states else {}
    out: Tensor | tuple[Tensor, Routing] = checkpoint(block, *arguments, use_reentrant=False, **contexts)
    return out


@contextmanager
def _rewound(states: Sequence[tuple[torch.Generator, Tensor]]) -> Iterator[None]:
    """Set generators to these states, and restore their current states afterwards."""
    current = [(generator, generator.get_state()) for generator, _ in states]
    try:
        for generator, state in states:
            generator.set_state(state)
        yield
    finally:
        for generator, state in current:
            generator.set_state(state)


def rows_are_independent(block: nn.Module) -> bool:
    """True if a row's experts don't depend on other rows, as they do with a capacity or where experts choose rows."""
    mixtures = [part for part in block.modules() if isinstance(part, MixtureOfExperts)]
    return all(
        part.capacity is None
        and not (part.training and part.training_capacity)
        and part.route in (mixtral_top_k, softmax_top_k)
        for part in mixtures
    )


def _wanted(x_ND: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
    """The wanted rows, and their batch."""
    return (x_ND, batch) if batch.wanted is None else (x_ND[batch.wanted[0]], batch.wanted[1])


def _add_feedforward(x_ND: Tensor, part: nn.Module, y_ND: Tensor, batch: Batch) -> Tensor | tuple[Tensor, Routing]:
    """x + part(y), and the routing if the part is a mixture of experts."""
    if isinstance(part, MixtureOfExperts):
        out_ND, routing = part(y_ND, batch)
        return x_ND + out_ND, routing
    dense_ND: Tensor = part(y_ND)
    return x_ND + dense_ND


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): GPT-2's and Llama's block."""

    def __init__(
        self, attention_norm: nn.Module, attention: nn.Module, feedforward_norm: nn.Module, feedforward: nn.Module
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feedforward_norm = feedforward_norm
        self.feedforward = feedforward

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor | tuple[Tensor, Routing]:
        """[N, D] -> [N, D] (of a batch with wanted rows, only these), and the routing if the feed-forward layer is a
        mixture of experts."""
        attended_ND = self.attention(self.attention_norm(x_ND), batch)
        x_ND, batch = _wanted(x_ND, batch)
        x_ND = x_ND + attended_ND
        return _add_feedforward(x_ND, self.feedforward, self.feedforward_norm(x_ND), batch)


class DropPathBlock(PreNormBlock):
    """`PreNormBlock` with stochastic depth (arXiv:1603.09382): in training, each branch is left out of a whole sequence
    with probability `drop_path`, and is otherwise scaled up."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
        drop_path: float,
    ) -> None:
        super().__init__(attention_norm, attention, feedforward_norm, feedforward)
        self.drop_path = drop_path

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor:
        """[N, D] -> [N, D]."""
        x_ND = x_ND + self._dropped(self.attention(self.attention_norm(x_ND), batch), batch)
        return x_ND + self._dropped(self.feedforward(self.feedforward_norm(x_ND)), batch)

    def first_rows(self, x_BND: Tensor, seen_BN: Tensor | None = None) -> Tensor:
        """What `forward` gives for the first row of each of B sequences of equal length: [B, D].

        A last block whose other rows nobody reads saves most of its work.

        Args:
            x_BND: the rows.
            seen_BN: the rows that the first row attends to; None for all.
        """
        count, length = x_BND.shape[:2]
        y_ND, first = self.attention_norm(x_BND.flatten(0, 1)), Batch.of(*[1] * count, device=x_BND.device)
        rows_MD, lengths = y_ND, [length] * count
        if seen_BN is not None:
            rows_MD, lengths = y_ND[seen_BN.flatten()], seen_BN.sum(1).tolist()
        context = replace(first, context=SequenceLayout.of(lengths))
        attended_BD = self.attention(y_ND[::length], context, rows_MD)
        x_BD = x_BND[:, 0] + self._dropped(attended_BD, first)
        return x_BD + self._dropped(self.feedforward(self.feedforward_norm(x_BD)), first)

    def _dropped(self, y_ND: Tensor, batch: Batch) -> Tensor:
        if not self.training or not self.drop_path:
            return y_ND
        keep_B = y_ND.new_empty(len(batch.layout), 1).bernoulli_(1 - self.drop_path).div_(1 - self.drop_path)
        lengths = batch.layout.cu_seqlens_on(y_ND.device).diff()
        return y_ND * keep_B.repeat_interleave(lengths, 0, output_size=len(y_ND))


class ExtraFeedforwardBlock(PreNormBlock):
    """`PreNormBlock`, then x + extra_feedforward(extra_norm(x)): OpenMoE's block with a mixture.

    A token dropped by all its experts still passes through the extra layer. The two layers run one after the other,
    each with its own norm, as in the published code (ColossalAI's modeling_openmoe.py, `OpenMoeDecoderLayer`); in the
    paper they run in parallel (arXiv:2402.01739, equation 4).
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
        extra_norm: nn.Module,
        extra_feedforward: nn.Module,
    ) -> None:
        super().__init__(attention_norm, attention, feedforward_norm, feedforward)
        self.extra_norm = extra_norm
        self.extra_feedforward = extra_feedforward

    def forward(self, x_ND: Tensor, batch: Batch) -> tuple[Tensor, Routing]:
        """[N, D] -> [N, D], and the routing."""
        out = super().forward(x_ND, batch)
        assert isinstance(out, tuple), "the feed-forward layer is a mixture"
        return out[0] + self.extra_feedforward(self.extra_norm(out[0])), out[1]


class ParallelBlock(nn.Module):
    """x + attention(y) + feedforward(y), both of the same y = norm(x): GPT-J's and phi's block."""

    def __init__(self, norm: nn.Module, attention: nn.Module, feedforward: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention
        self.feedforward = feedforward

    def forward(self, x_ND: Tensor, batch: Batch) -> Tensor | tuple[Tensor, Routing]:
        """[N, D] -> [N, D] (of a batch with wanted rows, only these), and the routing if the feed-forward layer is a
        mixture of experts."""
        y_ND = self.norm(x_ND)
        attended_ND = self.attention(y_ND, batch)
        (x_ND, _), (y_ND, batch) = _wanted(x_ND, batch), _wanted(y_ND, batch)
        return _add_feedforward(x_ND + attended_ND, self.feedforward, y_ND, batch)


class CrossAttentionBlock(PreNormBlock):
    """`PreNormBlock` with x + cross_attention(cross_attention_norm(x)) between its two parts: the decoder block of the
    Transformer (arXiv:1706.03762, section 3.1), pre-norm as in T5."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        cross_attention_norm: nn.Module,
        cross_attention: nn.Module,
        feedforward_norm: nn.Module,
        feedforward: nn.Module,
    ) -> None:
        super().__init__(attention_norm, attention, feedforward_norm, feedforward)
        self.cross_attention_norm = cross_attention_norm
        self.cross_attention = cross_attention

    def forward(self, x_ND: Tensor, batch: Batch, context_MD: Tensor | None = None) -> Tensor | tuple[Tensor, Routing]:
        """[N, D] -> [N, D], and the routing of a mixture of experts; for `context_MD` see `Attention`."""
        x_ND = x_ND + self.attention(self.attention_norm(x_ND), batch)
        x_ND = x_ND + self.cross_attention(self.cross_attention_norm(x_ND), batch, context_MD)
        return _add_feedforward(x_ND, self.feedforward, self.feedforward_norm(x_ND), batch)
