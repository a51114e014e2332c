"""Tables of text, of Markdown, and of HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn


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


def markdown(rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Return a table in Markdown, its first row the heading; with ``numbers``, all columns but the first to the right.

    >>> print(markdown([["layer", "iota"], ["a", "0.9"]], numbers=True))
    | layer | iota |
    |---|--:|
    | a | 0.9 |
    """
    head, *body = (list(row) for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in (head, *body)]
    right = "--:|" if numbers else "---|"
    return "\n".join([lines[0], "|---|" + right * (len(head) - 1), *lines[1:]])


NOT_THE_MODEL = (
    ". It is a report and no model: the model that was passed was changed in place. Type `report = ...` in place of "
    "`model = ...`, and go on with the model."
)


class TableReport:
    """A report that prints as a table with a line below, and that a notebook shows as one.

    A subclass defines :meth:`table`, and :meth:`summary` where there is a line below.
    """

    def table(self) -> list[tuple[str, ...]]:
        """Return the heading and the rows."""
        raise NotImplementedError(f"{type(self).__name__} must define table(self) -> list[tuple[str, ...]].")

    def summary(self) -> str:
        """Return what stands below the table."""
        return ""

    def __str__(self) -> str:
        return "\n\n".join(filter(None, (aligned(self.table()), self.summary())))

    # For somebody who wrote ``model = swap(model, ...)``, as is right for torch's convert_sync_batchnorm. Type checkers
    # complain of a missing attribute by themselves.
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{NOT_THE_MODEL}")

        def __call__(self, *_: Any, **__: Any) -> NoReturn:
            """Refuse: a report is no model."""
            raise TypeError(f"{type(self).__name__!r} object is not callable{NOT_THE_MODEL}")

    def _repr_html_(self) -> str:
        head, *rows = self.table()
        lines = [_html_row("th", head), *(_html_row("td", row) for row in rows)]
        below = f"<pre>{html.escape(self.summary())}</pre>" if self.summary() else ""
        return f"<table>{''.join(lines)}</table>{below}"


def outputs_moved(moved: float | None, largest: float | None) -> str:
    """Return what a report says of how far the outputs of a model moved; ``None`` was not measured."""
    if moved is None:
        return "how far outputs moved was not measured: pass example_input to a model that returns tensors"
    return f"outputs moved by {moved:.2g} of {largest:.2g}"


def _html_row(tag: str, cells: Iterable[str]) -> str:
    """Return a row, aligned to the left as the text is."""
    return f"<tr>{''.join(f'<{tag} style=text-align:left>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
