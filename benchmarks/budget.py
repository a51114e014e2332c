"""What ``python -m benchmarks.roofline`` measures, in which order, and in how much time.

What the bars need comes first. On one H200 a case is 13 normalizers, torch's layer, three to four peers, four passes:
three captures, two profiles and 20 rounds of about 3 ms for each contender, so 6 to 10 s, and 16 cases in all. Triton
compiles about 200 kernels on the way, 0.3 s each; torch.compile takes 5 to 10 s for a layer and about a minute for a
resnet50. Eight minutes hold the cases, the steps with sn in all four modes, and some of the rest; ``--minutes 40``
holds everything. These are counts times guesses: the run itself says what it left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SHAPES = ((64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LARGE = 50.0
"""MB of x from which on the bars of bandwidth hold."""

SMALL = 49
"""Positions of a map up to which launches take longer than the memory, so that torch.compile's layer is timed too."""


@dataclass(frozen=True)
class Case:
    """One table of the report.

    Args:
        shape: of x.
        dtype: "fp32", "bf16" or "fp16".
        channels_last: memory format.
        compiled: also under torch.compile.
        naive: also the formulas written naively.
    """

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool
    compiled: bool = False
    naive: bool = False

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), self.dtype, self.format]
        return " ".join([*words, *["compiled"] * self.compiled])

    @property
    def format(self) -> str:
        """Return the name of the memory format."""
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def bytes(self) -> int:
        """Return the size of x."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @property
    def small(self) -> bool:
        """Tell whether the map is small."""
        return len(self.shape) == 4 and math.prod(self.shape[2:]) <= SMALL

    @property
    def needed(self) -> bool:
        """Tell whether a bar asks for it."""
        return self.bytes >= LARGE * 1e6 or self.small

    @property
    def facts(self) -> dict[str, Any]:
        """Return what every row of the case repeats."""
        size = {"mb": self.bytes / 1e6, "small": self.small}
        return {"case": str(self), "dtype": self.dtype, "format": self.format, **size}


def cases(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], compiled: bool) -> list[Case]:
    """Return every case, those first that the bars need; with ``compiled``, which takes long, one dtype and format."""
    if compiled:
        return [Case(shape, dtypes[-1], False, True, True) for shape in shapes]
    plain = [
        Case(shape, dtype, last, naive=shape == shapes[0] and not last)
        for dtype in dtypes
        for shape in shapes
        for last in ((False, True) if len(shape) == 4 else (False,))
    ]
    return sorted(plain, key=lambda case: not case.needed)


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        cases: tables of layers.
        keys: normalizers whose training steps are timed, beside torch's.
        compiled: of the network as torch.compile makes it.
    """

    cases: tuple[Case, ...] = ()
    keys: tuple[str, ...] = ()
    compiled: bool = False


def stages(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], keys: Sequence[str], compiled: bool, network: bool
) -> Iterator[Stage]:
    """Yield the parts in the order in which they are worth their time.

    Args:
        shapes: of x.
        dtypes: names of dtypes.
        keys: normalizers.
        compiled: also under torch.compile.
        network: also training steps.
    """
    plain, graphs = cases(shapes, dtypes, False), cases(shapes, dtypes, True) if compiled else []
    first = tuple(key for key in keys if key == "sn") or tuple(keys[:1])
    rest = tuple(key for key in keys if key not in first)
    yield Stage(tuple(case for case in plain if case.needed))
    if network:
        yield Stage(keys=first)
        if compiled:
            yield Stage(keys=first, compiled=True)
    yield Stage(tuple(case for case in plain if not case.needed))
    yield Stage(tuple(graphs[:1]))
    if network and rest:
        yield Stage(keys=rest)
    yield Stage(tuple(graphs[1:]))
    if network and rest and compiled:
        yield Stage(keys=rest, compiled=True)


GUESS = {"case": 20.0, "compiled": 15.0, "naive": 3.0, "step": 10.0, "compiled step": 90.0}
"""Seconds that each kind of work takes, until one of it was seen."""


class Budget:
    """The time that is left, and what did not fit or failed.

    Args:
        minutes: in all.
    """

    def __init__(self, minutes: float) -> None:
        self.end, self.expected = time.monotonic() + 60 * minutes, dict(GUESS)
        self.left_out: list[str] = []
        self.failed: list[str] = []

    def allows(self, what: str, kind: str) -> bool:
        """Tell whether one more of its kind still fits; if not, note what is left out."""
        fits = time.monotonic() + self.expected[kind] < self.end
        if not fits:
            self.left_out.append(f"{what}: no time left, --minutes gives more")
        return fits

    def record_time(self, since: float, kind: str) -> None:
        """Note what something took, since a reading of the monotonic clock: the next may take half as much again."""
        self.expected[kind] = 1.5 * (time.monotonic() - since)

    def record_failure(self, what: str, error: Exception, ours: bool) -> None:
        """Note an error: of a normalizer of ours, for which the run ends with an error, or of a peer."""
        line = f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.left_out.append(line)
        if ours:
            self.failed.append(line)
