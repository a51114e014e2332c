"""Where a method comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Args:
        authors: first author "et al.".
        year: of publication.
        title: of the paper.
        where: arXiv id, or journal.
    """

    authors: str
    year: int
    title: str
    where: str

    def __str__(self) -> str:
        return f"{self.authors} {self.year}, {self.where}"
