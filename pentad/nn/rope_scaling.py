"""Scalings of RoPE's frequencies for contexts longer than a model was trained on.

Names and parameters are those of published configs (``rope_scaling``, since transformers 5 ``rope_parameters``).
Legend: D rotated dimensions of a head; frequencies are float32 [D / 2], in radians per token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pentad.errors import BadInput
from pentad.weights.config import read_config


def inverse_frequencies(theta: float, dim: int) -> Tensor:
    """theta^(-2i / D), RoFormer (arXiv:2104.09864) section 3.2.2."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


@dataclass(frozen=True)
class DefaultRope:
    """RoPE without scaling, and the interface of all scalings.

    Attributes:
        by_length: whether frequencies depend on the sequence's length.
    """

    by_length: ClassVar[bool] = False

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        """The frequencies of a sequence that is scaled for `length` tokens."""
        return inverse_frequencies(theta, dim)

    def scaling_key(self, length: int) -> int:
        """A number that identifies the frequencies; sequences can share cached keys only if their numbers are equal."""
        return 0

    def attention_scaling(self) -> float:
        """The factor applied to cosines and sines (published as ``attention_factor``)."""
        return 1.0

    def context_length(self, trained: int) -> int:
        """The longest sequence of a model whose config gives `trained` as ``max_position_embeddings``."""
        return trained


@dataclass(frozen=True)
class Linear(DefaultRope):
    """Position interpolation (arXiv:2306.15595)."""

    factor: float

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        return inverse_frequencies(theta, dim) / self.factor

    def context_length(self, trained: int) -> int:
        return max(trained, int(trained * self.factor))


def _ntk_aware(theta: float, dim: int, stretch: float) -> Tensor:
    """Frequencies of a larger base: the slowest is divided by `stretch`, the fastest is kept."""
    return inverse_frequencies(theta * stretch ** (dim / max(dim - 2, 1)), dim)


@dataclass(frozen=True)
class Dynamic(DefaultRope):
    """Dynamic NTK: the base grows with the length once it exceeds the trained length."""

    by_length: ClassVar[bool] = True
    factor: float
    max_position_embeddings: int

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        stretch = self.factor * self.scaling_key(length) / self.max_position_embeddings - (self.factor - 1)
        return _ntk_aware(theta, dim, stretch)

    def scaling_key(self, length: int) -> int:
        return max(length, self.max_position_embeddings)

    def context_length(self, trained: int) -> int:
        return max(trained, int(trained * self.factor))


@dataclass(frozen=True)
class DynamicSteps(DefaultRope):
    """Dynamic NTK with a base that grows in steps, at each doubling of the trained length.

    From the code of Qwen's first generation (https://huggingface.co/Qwen/Qwen-7B/blob/main/modeling_qwen.py,
    `get_ntk_alpha`), described in arXiv:2309.16609, "Context Length Extension". Its config has no ``rope_type``.

    Args:
        trained_length: tokens, published as ``seq_length``.
    """

    by_length: ClassVar[bool] = True
    trained_length: int

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        return _ntk_aware(theta, dim, self.scaling_key(length))

    def scaling_key(self, length: int) -> int:
        """The base's factor: 1 up to the trained length, then 3 up to twice that length, 7 up to four times, …"""
        doublings = (-(-length // self.trained_length) - 1).bit_length() if length > self.trained_length else 0
        return (2 << doublings) - 1


@dataclass(frozen=True)
class Llama3(DefaultRope):
    """Llama 3.1: long wavelengths are interpolated, short ones are kept, and those in between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        inv = inverse_frequencies(theta, dim)
        turns = self.original_max_position_embeddings * inv / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(inv / self.factor, inv, kept.clamp(0, 1))


@dataclass(frozen=True)
class Yarn(DefaultRope):
    """YaRN (arXiv:2309.00071), section 3.2 (the ramp) and 3.4 (the attention factor)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:  # published only as a pair
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def context_length(self, trained: int) -> int:
        return max(trained, int(self.original_max_position_embeddings * self.factor))

    def _temperature(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        def dimension(turns: float) -> float:  # the dimension that rotates `turns` times within the original length
            return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
        inv = inverse_frequencies(theta, dim)
        return torch.lerp(inv, inv / self.factor, ramp.clamp(0, 1))


@dataclass(frozen=True)
class LongRope(DefaultRope):
    """LongRoPE (arXiv:2402.13753): divisors found by search, one set for short and one for long sequences."""

    by_length: ClassVar[bool] = True
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        factor = self.factor or self.max_position_embeddings / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        divisors = self.long_factor if self.scaling_key(length) else self.short_factor
        return _divide(inverse_frequencies(theta, dim), divisors)

    def scaling_key(self, length: int) -> int:
        return int(length > self.original_max_position_embeddings)


@dataclass(frozen=True)
class FrequencyFactors(DefaultRope):
    """A divisor for each frequency: the form of every fixed scaling in GGUF files (``rope_freqs.weight``)."""

    divisors: tuple[float, ...]

    def frequencies(self, theta: float, dim: int, length: int) -> Tensor:
        return _divide(inverse_frequencies(theta, dim), self.divisors)


def _divide(inv: Tensor, divisors: tuple[float, ...]) -> Tensor:
    if len(divisors) != len(inv):
        raise BadInput(
            f"the checkpoint has {len(divisors)} divisors for RoPE's {len(inv)} frequencies; expected {len(inv)}"
        )
    return inv / torch.tensor(divisors, dtype=torch.float32)


SCALINGS: dict[str, type[DefaultRope]] = {
    "default": DefaultRope,
    "linear": Linear,
    "dynamic": Dynamic,
    "llama3": Llama3,
    "yarn": Yarn,
    "longrope": LongRope,
    "divisors": FrequencyFactors,
}


def scaling(parameters: Mapping[str, Any], source: object = "config") -> DefaultRope:
    """The scaling of a config's ``rope_parameters`` (or the older ``rope_scaling``).

    Raises:
        BadInput: an unknown ``rope_type``, or one of its fields is missing or isn't a positive number.
    """
    name = parameters.get("rope_type") or parameters.get("type") or "default"
    if not isinstance(name, str) or name not in SCALINGS:
        raise BadInput(f"{source}: unknown RoPE scaling {str(name)[:40]!r}; known scalings: {', '.join(SCALINGS)}")
    return read_config(SCALINGS[name], parameters, f"{source}: RoPE scaling {name!r}")
