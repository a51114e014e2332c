"""Tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Align columns to the left or, with ``numbers``, all but the first to the right.

    >>> print(aligned([("a", "long"), ("bb", "c")]))
    a   long
    bb  c
    >>> print(aligned([("a", "long"), ("bb", "7")], numbers=True))
    a   long
    bb     7
    """
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        [c.rjust(w) if numbers and i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
