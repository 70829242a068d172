"""Rotary position embedding (RoFormer, arXiv:2104.09864), in its half-split form.

Key tables permute files that store the interleaved form (Meta's consolidated files, llama-type GGUF).
"""

import torch
from torch import Tensor, nn

from pentad.nn.batch import Batch
from pentad.nn.rope_scaling import DefaultRope


class Rope:
    """Rotates each pair of dimensions (i, i + D/2) of a head by position * frequency_i.

    Dimensions after the first D are not rotated (GPT-J's and phi's partial rotary embedding).

    `Rope` is not a module: it has no weights, and its frequencies stay on the CPU, whatever the network's device.

    Args:
        dim: D, the number of rotated dimensions of a head.
        theta: the base of the frequencies.
        scaling: the scaling of the frequencies for long contexts.
    """

    def __init__(self, dim: int, theta: float = 10000.0, scaling: DefaultRope | None = None) -> None:
        self.dim = dim
        self.theta = theta
        self.scaling = scaling or DefaultRope()
        self._frequencies: Tensor | None = None
        if not self.scaling.by_length:
            with torch.device("cpu"):  # also while the network is built on the meta device
                frequencies = self.scaling.frequencies(theta, dim, 0)
            # A parameter, because torch.compile(dynamic=True) treats only the shapes of parameters as constants.
            self._frequencies = nn.Parameter(frequencies, requires_grad=False)

    def __call__(self, x_NHD: Tensor, batch: Batch) -> Tensor:
        """Rotate the heads of the batch's rows: [N, heads, D or more] -> the same shape and dtype."""
        if x_NHD.shape[-1] > self.dim:
            return torch.cat((self(x_NHD[..., : self.dim], batch), x_NHD[..., self.dim :]), -1)
        cos_N1D, sin_N1D = batch.memo((self, x_NHD.dtype), lambda: self._cos_sin(batch, x_NHD.dtype))
        return torch.addcmul(x_NHD * cos_N1D, x_NHD.roll(self.dim // 2, -1), sin_N1D)

    def _cos_sin(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines, and sines with the signs of rotate-half, both [N, 1, D]."""
        inv = self._frequencies  # [D/2], for all sequences
        if inv is None:
            lengths = batch.rope_lengths or batch.layout.lengths
            each = torch.stack([self.scaling.frequencies(self.theta, self.dim, length) for length in lengths])
            inv = each.repeat_interleave(torch.tensor(batch.layout.lengths), dim=0)  # [N, D/2]
        angles = batch.positions[:, None].float() * inv.to(batch.positions.device)
        cos, sin = angles.cos() * self.scaling.attention_scaling(), angles.sin() * self.scaling.attention_scaling()
        return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)
