"""Which plain normalizer the learned weights of a layer have chosen, if they have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choice:
    """What the weights of a layer say.

    Args:
        norm: key of the plain normalizer; "" while the weights have not decided.
        weight: the least weight among those that chose it, or the greatest that is not enough.
        why: what there is to say about it.
        arguments: of the plain normalizer.
    """

    norm: str
    weight: float
    why: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
