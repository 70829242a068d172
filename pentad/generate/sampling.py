"""Sampling: pure functions from logits to the next tokens.

Legend: M rows, R rows with similar options, V vocabulary size, C candidates per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pentad import kernels
from pentad.errors import BadInput

MIN_TEMPERATURE = 1e-5  # a lower temperature is treated as 0; it would overflow
BLOCK = 16  # a large vocabulary is searched in blocks of so many tokens


@dataclass(frozen=True)
class Sampling:
    """Sampling options. The filters apply in the order of the fields, as in transformers.

    Attributes:
        temperature: divides the logits; 0 chooses the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probabilities sum to p (arXiv:1904.09751).
        min_p: drop tokens whose probability is below this fraction of the highest one (arXiv:2407.01082).
        repetition_penalty: divides positive logits and multiplies negative logits of all tokens in the prompt and the
            text (CTRL, arXiv:1909.05858).
        presence_penalty: is subtracted once from the logit of each generated token.
        frequency_penalty: is subtracted for each occurrence of a generated token.
        logit_bias: token id -> a number from -100 to 100 that is added to the token's logit, before the penalties.
            Keys may be strings, as in JSON.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

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
            types, number = (int, "a whole number") if name == "top_k" else ((int, float), "a number")
            if not isinstance(value, types) or isinstance(value, bool) or not low <= value <= high:  # also refuses NaN
                raise BadInput(f"{name} is {str(value)[:40]}; expected {number} from {low} to {high}")
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """True if the token is simply the argmax of the logits."""
        return self.temperature < MIN_TEMPERATURE and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """True if there is a penalty or a bias."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.logit_bias)

    def replace(self, **options: Any) -> Sampling:
        """A copy with changed options; None leaves an option unchanged."""
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    @classmethod
    def recommended(cls, generation: Mapping[str, Any], source: object = "generation_config.json") -> Sampling:
        """The options that a checkpoint's settings of generation recommend; the defaults if they recommend none.

        Raises:
            BadInput: an option is not a number, or out of range; the message names `source`.
        """
        names = [one.name for one in fields(cls) if one.name != "logit_bias"]
        named = {name: _number(generation, name, source) for name in names}
        if generation.get("do_sample") is False:
            return cls(temperature=0).replace(repetition_penalty=named["repetition_penalty"])
        samples = any(named[name] is not None for name in ("temperature", "top_p", "top_k"))
        if not generation.get("do_sample") and not samples:
            return cls().replace(repetition_penalty=named["repetition_penalty"])
        # a recommendation is complete: filters that it doesn't name are off
        return cls(temperature=1.0, top_p=1.0).replace(**named)


def _checked_bias(bias: Mapping[Any, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise BadInput(f"logit_bias is {str(bias)[:40]}; expected a mapping of token ids to numbers")
    found = {}
    for key, value in bias.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
        if type(token) is not int or not 0 <= token < 2**31:
            raise BadInput(f"logit_bias has the key {str(key)[:40]!r}; expected token ids")
        if not isinstance(value, int | float) or isinstance(value, bool) or not -100 <= value <= 100:
            raise BadInput(f"logit_bias of token {token} is {str(value)[:40]}; expected a number from -100 to 100")
        found[token] = float(value)
    return found


def _number(generation: Mapping[str, Any], name: str, source: object) -> Any:
    """An option: a number may be written as a string, and a top_k of -1 turns it off."""
    value = generation.get(name)
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if name == "top_k" and value == -1:
        value = 0
    try:
        Sampling().replace(**{name: value})
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None
    return value


class Choice(NamedTuple):
    """The inputs for choosing one row's token.

    Attributes:
        sampling: the options.
        generator: the request's random number generator.
        prompt, generated: the tokens so far, for the penalties.
    """

    sampling: Sampling
    generator: torch.Generator
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()


def penalize(logits_MV: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Apply each row's bias, then its penalties, to a copy of the logits; float32 [M, V]."""
    logits_MV = logits_MV.clone()
    flat = logits_MV.view(-1)
    biased = [(row, choice.sampling.logit_bias) for row, choice in enumerate(choices)]
    _add(logits_MV, [(row, token, value) for row, bias in biased for token, value in bias.items()])
    repeated = [(row, c) for row, c in enumerate(choices) if c.sampling.repetition_penalty != 1.0]
    if repeated:
        seen = [(row, sorted({*c.prompt, *c.generated}), c.sampling.repetition_penalty) for row, c in repeated]
        at = _flat_indices(logits_MV, [(row, token) for row, tokens, _ in seen for token in tokens])
        penalties = torch.tensor([penalty for _, tokens, penalty in seen for _ in tokens], device=flat.device)
        values = flat[at]
        flat[at] = torch.where(values > 0, values / penalties, values * penalties)
    changes = []
    for row, (sampling, _, _, generated) in enumerate(choices):
        if sampling.presence_penalty or sampling.frequency_penalty:
            once, each = sampling.presence_penalty, sampling.frequency_penalty
            changes += [(row, token, -once - each * count) for token, count in Counter(generated).items()]
    _add(logits_MV, changes)
    return logits_MV


def _add(logits_MV: Tensor, changes: Sequence[tuple[int, int, float]]) -> None:
    """Add to the logits: (row, token, number) each."""
    if changes:
        at = _flat_indices(logits_MV, [(row, token) for row, token, _ in changes])
        logits_MV.view(-1)[at] += torch.tensor([number for _, _, number in changes], device=logits_MV.device)


def _flat_indices(logits_MV: Tensor, at: Sequence[tuple[int, int]]) -> Tensor:
    size = logits_MV.shape[1]
    return torch.tensor([row * size + token for row, token in at], dtype=torch.int64, device=logits_MV.device)


def argmax(logits_MV: Tensor) -> tuple[list[int], list[float]]:
    """Each row's most likely token and its logit; NaN counts as the largest logit."""
    if logits_MV.device.type != "cpu":
        values_M, ids_M = logits_MV.max(1)
        return ids_M.tolist(), values_M.tolist()
    values_MV = logits_MV.numpy(force=True)  # 20 times faster than torch on a CPU
    ids = values_MV.argmax(1)
    return ids.tolist(), values_MV[np.arange(len(ids)), ids].tolist()


def sample(logits_MV: Tensor, choices: Sequence[Choice]) -> tuple[list[int], list[float]]:
    """Choose one token per row, independently of the other rows.

    Args:
        logits_MV: float32 [M, V].
        choices: one per row. One uniform number is drawn from its generator, unless the temperature is 0.

    Returns:
        M token ids, and each row's largest logit (NaN if the row has a NaN).
    """
    if any(choice.sampling.changes_logits for choice in choices):
        logits_MV = penalize(logits_MV, choices)
    if kernels.isas() and logits_MV.device.type == "cpu":
        return kernels.sample(logits_MV, [_draw(choice) for choice in choices])
    tokens, largest = argmax(logits_MV)
    sampled = [row for row, choice in enumerate(choices) if choice.sampling.temperature >= MIN_TEMPERATURE]
    if sampled:
        samplings = [choices[row].sampling for row in sampled]
        logits_RV = logits_MV if len(sampled) == len(tokens) else logits_MV[sampled]
        for rows, weights_RC, ids_RC in candidates(logits_RV, samplings):
            generators = [choices[sampled[row]].generator for row in rows]
            uniform_R = torch.tensor([_uniform(one) for one in generators], dtype=torch.float64)
            at_R = _pick(weights_RC, uniform_R.to(weights_RC.device))
            for row, token in zip(rows, ids_RC.gather(1, at_R[:, None])[:, 0].tolist(), strict=True):
                tokens[sampled[row]] = token
    return tokens, largest


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator))


def _draw(choice: Choice) -> kernels.Draw:
    options, generator = choice.sampling, choice.generator
    if options.temperature < MIN_TEMPERATURE:
        return kernels.Draw()
    return kernels.Draw(options.temperature, options.top_k, options.top_p, options.min_p, _uniform(generator))


def candidates(logits_MV: Tensor, samplings: Sequence[Sampling]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Apply temperature, top-k, top-p and min-p.

    Args:
        logits_MV: float32 [M, V].
        samplings: one per row, with temperatures above 0.

    Yields:
        Row numbers, weights [R, C] in proportion to the probabilities (0 for a token that is filtered out), and token
        ids int64 [R, C]. A row's weights don't depend on other rows.
    """
    groups: dict[tuple[int, bool], list[int]] = {}  # (top_k, unsorted) -> rows that share operations
    for row, one in enumerate(samplings):
        groups.setdefault((one.top_k, one.top_p >= 1 and not one.top_k), []).append(row)
    for (top_k, unsorted), rows in groups.items():
        logits_RV = logits_MV if len(rows) == len(samplings) else logits_MV[rows]
        options = [samplings[row] for row in rows]
        if unsorted:
            weights_RV = _exponentials(logits_RV, logits_RV.amax(1, keepdim=True), options)
            least_R1 = _column(options, "min_p", logits_RV)  # the largest weight is 1
            ids_RV = torch.arange(weights_RV.shape[1], device=weights_RV.device).expand_as(weights_RV)
            yield rows, weights_RV.where(weights_RV >= least_R1, 0), ids_RV
        else:
            yield from _sorted_candidates(rows, logits_RV, options, top_k)


def _sorted_candidates(
    rows: list[int], logits_RV: Tensor, samplings: list[Sampling], top_k: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """`candidates` for rows with one top-k, or with top-p, most likely first.

    Sorting a vocabulary takes longer than a small model's step, and 64 tokens are almost always enough for top-p. Rows
    that need more tokens are sorted again.
    """
    size = logits_RV.shape[1]
    for count in [min(top_k, size)] if top_k else sorted({min(64, size), min(1024, size), size}):
        values_RC, ids_RC = logits_RV.topk(count)
        temperature_R1, largest_R1 = _column(samplings, "temperature", logits_RV), values_RC[:, :1]
        weights_RC = ((values_RC - largest_R1).double() / temperature_R1).exp()
        if top_k:
            total_R1 = weights_RC.sum(1, keepdim=True)
        else:  # row by row, so that the float64 values fit the CPU caches
            inputs = zip(logits_RV, largest_R1.double(), temperature_R1, strict=True)
            sums = [row_V.double().sub_(largest).div_(t).exp_().sum(0, keepdim=True) for row_V, largest, t in inputs]
            total_R1 = torch.stack(sums)
        weights_RC /= total_R1
        keep_RC = weights_RC.cumsum(1) - weights_RC < _column(samplings, "top_p", logits_RV)
        keep_RC &= weights_RC >= _column(samplings, "min_p", logits_RV) * weights_RC[:, :1]
        keep_RC[:, 0] = True
        weights_RC = weights_RC.where(keep_RC, 0)
        cut_off = [] if top_k or count == size else keep_RC[:, -1].nonzero()[:, 0].tolist()
        if not cut_off:
            yield rows, weights_RC, ids_RC
            return
        if done := [i for i in range(len(rows)) if i not in cut_off]:
            yield [rows[i] for i in done], weights_RC[done], ids_RC[done]
        rows, samplings, logits_RV = [rows[i] for i in cut_off], [samplings[i] for i in cut_off], logits_RV[cut_off]


def _column(samplings: Sequence[Sampling], name: str, like: Tensor) -> Tensor:
    """One option of each row: float64 [R, 1]."""
    return torch.tensor([getattr(one, name) for one in samplings], dtype=torch.float64, device=like.device)[:, None]


def _in_blocks(x_RV: Tensor, fill: float) -> Tensor:
    """[R, V] -> [R, BLOCK, B]. Block b has every B-th column from b on, so that blocks are reduced side by side."""
    padded = F.pad(x_RV, (0, -x_RV.shape[1] % BLOCK), value=fill)
    return padded.view(len(x_RV), BLOCK, padded.shape[1] // BLOCK)


def _block_sums(weights_RV: Tensor) -> Tensor:
    """The sums of the blocks: float64 [R, B]. Unlike sums of rows they are the same beside any other rows."""
    return _in_blocks(weights_RV, 0).sum(1).double()


def _exponentials(logits_RV: Tensor, largest_R1: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Weights in proportion to the probabilities, 1 for the most likely token: float32 [R, V]."""
    return (logits_RV - largest_R1).div_(_column(samplings, "temperature", logits_RV).float()).exp_()


def _pick(weights_RC: Tensor, uniform_R: Tensor) -> Tensor:
    """Invert each row's cumulative distribution at a uniform number: int64 [R], never an index of weight 0."""
    if weights_RC.shape[1] <= 1024:
        return _pick_within(weights_RC.double(), uniform_R * weights_RC.double().sum(1))
    sums_RB = _block_sums(weights_RC)
    target_R = uniform_R * sums_RB.sum(1)
    block_R = _pick_within(sums_RB, target_R)
    before_R = target_R - (sums_RB.cumsum(1) - sums_RB).gather(1, block_R[:, None])[:, 0]
    rows_R = torch.arange(len(block_R), device=block_R.device)
    within_R = _pick_within(_in_blocks(weights_RC, 0)[rows_R, :, block_R].double(), before_R)
    return within_R * sums_RB.shape[1] + block_R


def _pick_within(weights_RC: Tensor, target_R: Tensor) -> Tensor:
    """The first index at which the sum of the weights exceeds the target; the last of a weight above 0 at most."""
    at_R = torch.searchsorted(weights_RC.cumsum(1), target_R[:, None], right=True)[:, 0]
    last_R = weights_RC.shape[1] - 1 - (weights_RC > 0).flip(1).int().argmax(1)  # if rounding leaves the sum below it
    return torch.minimum(at_R, last_R)
