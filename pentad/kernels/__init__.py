"""C++ kernels for the CPU: the operations of a plan, and the threads that run them.

They are optional: `isas()` is empty if there is no library (no compiler when pentad was installed), if this CPU has
none of its instruction sets, or with ``PENTAD_KERNELS=off`` in the environment. `reason()` says why.
"""

from pentad.kernels.arguments import CachePools, Tokens, pool_dim
from pentad.kernels.binding import Buffer, isas, reason
from pentad.kernels.program import Norm, Program
from pentad.kernels.weight import Weight, packs

__all__ = ["Buffer", "CachePools", "Norm", "Program", "Tokens", "Weight", "isas", "packs", "pool_dim", "reason"]
