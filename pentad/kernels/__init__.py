"""Kernels in C++ for the CPU, where they were built: a plan's operations, and the threads that run them.

They are optional: `isas()` is empty where there is no library (no compiler when pentad was installed), where this CPU
has none of its instruction sets, or with ``PENTAD_KERNELS=off`` in the environment.
"""

from pentad.kernels.arguments import CachePools, Tokens, pool_dim
from pentad.kernels.binding import isas, reason
from pentad.kernels.program import Norm, Program
from pentad.kernels.weight import Weight, packs

__all__ = ["CachePools", "Norm", "Program", "Tokens", "Weight", "isas", "packs", "pool_dim", "reason"]
