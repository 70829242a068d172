"""Choosing the next token: pure functions of logits.

Legend: V vocabulary size, C candidates that the filters leave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pentad.errors import BadInput

TINY = 1e-5  # a temperature that would overflow, and means the same as 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the filters apply in the order of the fields, as transformers has them.

    Attributes:
        temperature: what logits are divided by; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach p (arXiv:1904.09751).
        min_p: drop tokens less probable than this fraction of the likeliest one's probability (arXiv:2407.01082).
        repetition_penalty: divides positive and multiplies negative logits of tokens that occurred, in the prompt too
            (CTRL, arXiv:1909.05858).
        presence_penalty, frequency_penalty: subtracted from the logits of generated tokens, once and once for each
            time that they occurred.
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
                raise BadInput(f"{name} is {str(value)[:40]}; it takes {low} to {high}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, of the logits as they are."""
        return self.temperature < TINY and not self.penalizes

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    def replace(self, **options: Any) -> Sampling:
        """The same with those options that are not None."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    @classmethod
    def recommended(cls, generation: Mapping[str, Any]) -> Sampling:
        """What a checkpoint's ``generation_config.json`` recommends; the defaults where it recommends nothing."""
        if generation.get("do_sample") is False:
            return cls(temperature=0)
        named = {field.name: generation.get(field.name) for field in fields(cls)}
        if not generation.get("do_sample") and all(
            v is None for v in (named["temperature"], named["top_p"], named["top_k"])
        ):
            return cls().replace(repetition_penalty=named["repetition_penalty"])
        # what it recommends is complete: a filter that it doesn't name is off
        return cls(temperature=1.0, top_p=1.0).replace(**named)


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


def candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that temperature, top-k, top-p and min-p leave.

    Returns:
        probabilities float64 [C] that sum to 1, ids int64 [C].
    """
    scaled_V = logits_V.double() / sampling.temperature
    size = len(scaled_V)
    if sampling.top_p >= 1 and not sampling.top_k:  # in any order
        probabilities_V = scaled_V.softmax(0)
        ids_C = torch.nonzero(probabilities_V >= sampling.min_p * probabilities_V.max())[:, 0]
        probabilities_C = probabilities_V[ids_C]
        return probabilities_C / probabilities_C.sum(), ids_C
    # A few of the likeliest almost always do; sorting the whole vocabulary takes longer than a small model's step.
    for count in [min(sampling.top_k, size)] if sampling.top_k else [min(64, size), min(1024, size), size]:
        values, ids = scaled_V.topk(count)
        probabilities = (values - (values if sampling.top_k else scaled_V).logsumexp(0)).exp()
        if probabilities.sum() >= sampling.top_p:
            break
    keep = probabilities.cumsum(0) - probabilities < sampling.top_p
    if sampling.min_p:
        keep &= probabilities >= sampling.min_p * probabilities[0]
    keep[0] = True
    probabilities = probabilities[keep]
    return probabilities / probabilities.sum(), ids[keep]


def argmax(logits_V: Tensor) -> tuple[int, float]:
    """The id and the logit of the likeliest token; a NaN counts as the largest."""
    if logits_V.device.type != "cpu":
        token = int(logits_V.argmax())
        return token, float(logits_V[token])
    values_V = logits_V.numpy(force=True)  # numpy finds it twenty times as fast as torch does on a CPU
    token = int(values_V.argmax())
    return token, float(values_V[token])


def sample(
    logits_V: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
) -> int:
    """The next token's id, from float32 logits [V]; `generator` gives one uniform number unless temperature is 0."""
    if sampling.penalizes:
        logits_V = penalize(logits_V, sampling, prompt, generated)
    if sampling.temperature < TINY:
        return argmax(logits_V)[0]
    probabilities_C, ids_C = candidates(logits_V, sampling)
    at = torch.rand((), dtype=torch.float64, generator=generator).item()
    index = int(torch.searchsorted(probabilities_C.cumsum(0), at, right=True))
    return int(ids_C[min(index, len(ids_C) - 1)])
