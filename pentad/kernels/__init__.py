"""C++ kernels for the CPU: the operations of a plan, and the threads that run them.

They are optional. `isas()` is empty if the library wasn't built (no compiler at install time), if this CPU has none of
its instruction sets, or if the environment has ``PENTAD_KERNELS=off``. `reason()` tells which.
"""

from pentad.kernels.arguments import CachePools, Tokens, pool_dim
from pentad.kernels.binding import Buffer, isas, reason
from pentad.kernels.program import Norm, Program
from pentad.kernels.sampling import Draw, sample
from pentad.kernels.weight import Weight, packs

__all__ = [
    "Buffer",
    "CachePools",
    "Draw",
    "Norm",
    "Program",
    "Tokens",
    "Weight",
    "isas",
    "packs",
    "pool_dim",
    "reason",
    "sample",
]
