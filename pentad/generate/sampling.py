"""Choosing the next tokens: pure functions of logits.

Legend: M rows, R rows with similar options, V vocabulary size, C candidates of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pentad.errors import BadInput

TINY = 1e-5  # a lower temperature would overflow, and means the same as 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the filters apply in the order of the fields, as in transformers.

    Attributes:
        temperature: the divisor of the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach p (arXiv:1904.09751).
        min_p: drop tokens less probable than this fraction of the likeliest one's probability (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred, in the prompt too
            (CTRL, arXiv:1909.05858).
        presence_penalty, frequency_penalty: are subtracted from the logits of generated tokens, the first once, the
            second once for each occurrence.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0, 100),
            "top_k": (0, 2**31),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repetition_penalty": (0.01, 100),
            "presence_penalty": (-100, 100),
            "frequency_penalty": (-100, 100),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            kind = int if name == "top_k" else (int, float)
            if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:  # NaN neither
                number = "a whole number" if kind is int else "a number"
                raise BadInput(f"{name} is {str(value)[:40]}; expected {number} from {low} to {high}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token of the unchanged logits is taken."""
        return self.temperature < TINY and not self.penalizes

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    def replace(self, **options: Any) -> Sampling:
        """A copy with the options that are not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    @classmethod
    def recommended(cls, generation: Mapping[str, Any]) -> Sampling:
        """The recommendation of a checkpoint's ``generation_config.json``; the defaults if it has none."""
        if generation.get("do_sample") is False:
            return cls(temperature=0)
        named = {field.name: generation.get(field.name) for field in fields(cls)}
        if not generation.get("do_sample") and all(
            v is None for v in (named["temperature"], named["top_p"], named["top_k"])
        ):
            return cls().replace(repetition_penalty=named["repetition_penalty"])
        # the recommendation is complete: a filter that it doesn't name is off
        return cls(temperature=1.0, top_p=1.0).replace(**named)


class Choice(NamedTuple):
    """How one row's token is chosen.

    Attributes:
        sampling: the options.
        generator: the request's own.
        prompt, generated: the tokens so far, which penalties look at.
    """

    sampling: Sampling
    generator: torch.Generator
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()


def penalize(logits_V: Tensor, sampling: Sampling, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """Apply the three penalties, to a copy."""
    logits_V = logits_V.clone()
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *generated}), device=logits_V.device)
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if generated and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = Counter(generated)
        ids = torch.tensor(list(counts), device=logits_V.device)
        times = torch.tensor(list(counts.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return logits_V


def argmax(logits_MV: Tensor) -> tuple[list[int], list[float]]:
    """Each row's likeliest token and its logit; a NaN counts as the largest."""
    if logits_MV.device.type != "cpu":
        values_M, ids_M = logits_MV.max(1)
        return ids_M.tolist(), values_M.tolist()
    values_MV = logits_MV.numpy(force=True)  # numpy is twenty times as fast as torch here
    ids = values_MV.argmax(1)
    return ids.tolist(), values_MV[np.arange(len(ids)), ids].tolist()


def sample(logits_MV: Tensor, choices: Sequence[Choice]) -> tuple[list[int], list[float]]:
    """Choose one token a row: the same whatever other rows there are.

    Args:
        logits_MV: float32 [M, V].
        choices: how each row's token is chosen. Its generator gives one uniform number, unless the temperature is 0.

    Returns:
        M token ids, and each row's largest logit, which is no number if the row has one that is none.
    """
    penalized = [row for row, choice in enumerate(choices) if choice.sampling.penalizes]
    if penalized:
        logits_MV = logits_MV.clone()
        for row in penalized:
            choice = choices[row]
            logits_MV[row] = penalize(logits_MV[row], choice.sampling, choice.prompt, choice.generated)
    tokens, largest = argmax(logits_MV)
    drawn = [row for row, choice in enumerate(choices) if choice.sampling.temperature >= TINY]
    if drawn:
        samplings = [choices[row].sampling for row in drawn]
        logits_RV = logits_MV if len(drawn) == len(tokens) else logits_MV[drawn]
        for rows, weights_RC, ids_RC in candidates(logits_RV, samplings):
            generators = [choices[drawn[row]].generator for row in rows]
            uniform_R = torch.stack([torch.rand((), dtype=torch.float64, generator=one) for one in generators])
            at_R = _pick(weights_RC, uniform_R.to(weights_RC.device))
            for row, token in zip(rows, ids_RC.gather(1, at_R[:, None])[:, 0].tolist(), strict=True):
                tokens[drawn[row]] = token
    return tokens, largest


def candidates(logits_MV: Tensor, samplings: Sequence[Sampling]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """The tokens that temperature, top-k, top-p and min-p leave.

    Args:
        logits_MV: float32 [M, V].
        samplings: each row's options, with temperatures above 0.

    Yields:
        Row numbers, weights float64 [R, C] in proportion to the probabilities (0 for a token that is filtered out), and
        token ids int64 [R, C]. A row's numbers don't depend on other rows.
    """
    groups: dict[tuple[int, bool], list[int]] = {}  # rows that the same operations serve
    for row, one in enumerate(samplings):
        groups.setdefault((one.top_k, one.top_p >= 1 and not one.top_k), []).append(row)
    for (top_k, unsorted), rows in groups.items():
        logits_RV = logits_MV if len(rows) == len(samplings) else logits_MV[rows]
        options = [samplings[row] for row in rows]
        if unsorted:
            weights_RV = (logits_RV.double() / _column(options, "temperature", logits_RV)).softmax(1)
            least_R1 = _column(options, "min_p", logits_RV) * weights_RV.amax(1, keepdim=True)
            ids_RV = torch.arange(weights_RV.shape[1], device=weights_RV.device).expand_as(weights_RV)
            yield rows, weights_RV.where(weights_RV >= least_R1, 0), ids_RV
        else:
            yield from _sorted_candidates(rows, logits_RV, options, top_k)


def _sorted_candidates(
    rows: list[int], logits_RV: Tensor, samplings: list[Sampling], top_k: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """`candidates` of rows with one top-k, or with top-p, likeliest first.

    The 64 likeliest tokens are almost always enough for top-p, and sorting a vocabulary takes longer than a small
    model's step. A row that needs more tokens gets more.
    """
    size = logits_RV.shape[1]
    for count in [min(top_k, size)] if top_k else sorted({min(64, size), min(1024, size), size}):
        values_RC, ids_RC = logits_RV.topk(count)
        temperature_R1, largest_R1 = _column(samplings, "temperature", logits_RV), values_RC[:, :1]
        weights_RC = ((values_RC - largest_R1).double() / temperature_R1).exp()
        if top_k:
            total_R1 = weights_RC.sum(1, keepdim=True)
        else:  # row by row, so that the float64 numbers stay in the caches
            each = zip(logits_RV, largest_R1.double(), temperature_R1, strict=True)
            total_R1 = torch.stack(
                [row_V.double().sub_(top).div_(t).exp_().sum(0, keepdim=True) for row_V, top, t in each]
            )
        weights_RC /= total_R1
        keep_RC = weights_RC.cumsum(1) - weights_RC < _column(samplings, "top_p", logits_RV)
        keep_RC &= weights_RC >= _column(samplings, "min_p", logits_RV) * weights_RC[:, :1]
        keep_RC[:, 0] = True
        weights_RC = weights_RC.where(keep_RC, 0)
        enough = [True] * len(rows)
        if not top_k and count < size:
            enough = (~keep_RC[:, -1]).tolist()
        done = [i for i, is_enough in enumerate(enough) if is_enough]
        if len(done) == len(rows):
            yield rows, weights_RC, ids_RC
            return
        if done:
            yield [rows[i] for i in done], weights_RC[done], ids_RC[done]
        left = [i for i, is_enough in enumerate(enough) if not is_enough]
        rows, samplings, logits_RV = [rows[i] for i in left], [samplings[i] for i in left], logits_RV[left]


def _column(samplings: Sequence[Sampling], name: str, like: Tensor) -> Tensor:
    """An option of each row: float64 [R, 1]."""
    return torch.tensor([getattr(one, name) for one in samplings], dtype=torch.float64, device=like.device)[:, None]


def _pick(weights_RC: Tensor, uniform_R: Tensor) -> Tensor:
    """Invert each row's cumulative distribution at a uniform number: int64 [R]; a weight of 0 is never picked."""
    cumulative_RC = (weights_RC / weights_RC.sum(1, keepdim=True)).cumsum(1)
    at_R = torch.searchsorted(cumulative_RC, uniform_R[:, None], right=True)[:, 0]
    last_R = weights_RC.shape[1] - 1 - (weights_RC > 0).flip(1).int().argmax(1)  # for sums that are rounded below 1
    return torch.minimum(at_R, last_R)
