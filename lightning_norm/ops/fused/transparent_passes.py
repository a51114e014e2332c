"""The passes in a graph of torch.compile that fuses: what sums over positions is an operator, the rest is pointwise.

An operator is a wall for the compiler: an activation or a residual behind the layer takes a pass of its own. Here y and
dx are plain PyTorch, which it writes together with what follows. The signatures are those of ``ops/eager.py``.
"""

from __future__ import annotations

from lightning_norm.ops.eager import apply, combine
from lightning_norm.ops.fused.triton_passes import moments, reduce

__all__ = ["apply", "combine", "moments", "reduce"]
