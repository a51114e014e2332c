"""Each schedule against its formula, its ends, its arguments, and the times at which it is extreme."""

import ast
import fractions
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

import lightning_norm
import lightning_norm.schedules
from lightning_norm import (
    Chain,
    Constant,
    Cosine,
    Exponential,
    InversePower,
    Linear,
    Schedule,
    Staircase,
    Steps,
    Warmup,
)

TIMES = [0, 1, 2, 3, 4, 5, 6, 50]


VALUES = [
    (Constant(0.3), [0.3] * 8),
    (Linear(0.2, 1.0, epochs=4), [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0]),
    (Linear(1.0, 0.0, epochs=2.5), [1.0, 0.6, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]),
    (Cosine(1.0, 0.0, epochs=4), [1.0, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5, 0.0, 0.0, 0.0, 0.0]),
    (Cosine(0.0, 1.0, steps=2), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    (Steps({0: 0.5, 2: 0.1, 5: 0.7}), [0.5, 0.5, 0.1, 0.1, 0.1, 0.7, 0.7, 0.7]),
    (Staircase(0.8, 0.5, 2, 0.15), [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.15, 0.15]),
    (Staircase(0.8, 0.5, 2, epochs=4), [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2]),
    (Staircase(0.1, 2, 3), [0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.4, 0.1 * 2**16]),
    (Exponential(0.8, 0.5), [0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.8 / 2**50]),
    (Exponential(0.8, 0.5, epochs=2), [0.8, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]),
    (InversePower(1), [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6, 1 / 7, 1 / 51]),
    (InversePower(2.001, scale=0.5), [0.5 / m**2.001 for m in (1, 2, 3, 4, 5, 6, 7, 51)]),
    (InversePower(0.5, epochs=3), [1, 2**-0.5, 3**-0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    (
        Chain([Linear(0, 1, epochs=2), Constant(0.5, epochs=2), Exponential(1, 0.5)]),
        [0, 0.5, 0.5, 0.5, 1, 0.5, 0.25, 2**-46],
    ),
    (
        Warmup(schedule=Steps({0: 0.4, 2: 0.1}), start=0.8, epochs=2),
        [0.8, 0.6, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1],
    ),
    (Warmup(schedule=0.4, epochs=4), [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4]),
]
"""Each schedule, and its values at TIMES."""

EXPORTED = {
    name: value
    for name, value in vars(lightning_norm).items()
    if isinstance(value, type) and issubclass(value, Schedule) and value is not Schedule
}


@pytest.mark.parametrize(("schedule", "expected"), VALUES, ids=lambda x: type(x).__name__)
def test_values(schedule, expected):
    assert [schedule(t) for t in TIMES] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert schedule(-1) == schedule(0)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_every_schedule_has_values_here_and_a_row_in_the_docs():
    assert {type(schedule) for schedule, _ in VALUES} == set(EXPORTED.values())
    page = Path(__file__).parents[2] / "docs" / "schedules.md"
    rows = re.findall(r"^\| (?:.*, )?`(\w+)\(", page.read_text(), re.MULTILINE)
    assert set(rows) == set(EXPORTED)
    assert len(rows) == len(EXPORTED)


def test_the_ends_are_exact():
    for start, end in ((0.1, 0.7), (0.9, 0.3), (0.1 + 0.2, 1.0)):
        for kind in (Linear, Cosine):
            schedule = kind(start, end, epochs=7)
            assert (schedule(0), schedule(7), schedule(1000)) == (start, end, end)
            values = [schedule(t / 100) for t in range(701)]
            assert min(start, end) == min(values)
            assert max(start, end) == max(values)
            assert values == sorted(values, reverse=end < start)


def test_epochs_follow_the_steps_of_an_epoch():
    assert Linear(0.0, 1.0, epochs=2)(5, 10) == 0.25
    assert Linear(0.0, 1.0, steps=20)(5, 10) == 0.25
    chain = Chain([Linear(0.0, 1.0, epochs=0.5), Constant(0.3, steps=3), Constant(0.9)])
    assert [chain(t, 5) for t in (0, 2, 3, 5, 6)] == [0.0, 0.8, 0.3, 0.3, 0.9]
    assert chain.length(5) == math.inf
    assert chain.units() == {"epochs", "steps"}
    assert Warmup(schedule=Cosine(1, 0, steps=3), epochs=1).length(5) == 8


@pytest.mark.parametrize("epoch", [1, 3, 2.5, 7])
@pytest.mark.parametrize(
    "schedule",
    [
        Constant(0.3),
        Linear(0.2, 1.0, epochs=4),
        Cosine(1.0, 0.0, steps=4),
        Steps({0: 0.5, 2: 0.1, 5: 0.7}),
        Exponential(0.8, 1.5, epochs=3),
        InversePower(1),
        Chain([Linear(0, 1.5, epochs=2.3), Constant(0.5)]),
        Chain(
            [Linear(0, 1, epochs=0.7), Linear(1, -1, steps=3), Chain([Steps({0: 0, 1: 7}, epochs=1.1), Constant(0)])]
        ),
        Warmup(schedule=Linear(0.5, 0.1, epochs=1.7), start=2, epochs=1.4),
    ],
    ids=lambda s: type(s).__name__,
)
def test_turns_hold_the_extremes(schedule, epoch):
    for last in range(25):
        values = [schedule(t, epoch) for t in range(last + 1)]
        turns = [t for t in schedule.turns(last, epoch) if t <= last]
        assert turns
        at_turns = [schedule(t, epoch) for t in turns]
        assert min(at_turns) <= min(values)
        assert max(at_turns) >= max(values)
        if all(t == int(t) for t in turns):
            assert (min(at_turns), max(at_turns)) == (min(values), max(values))


def test_the_long_run():
    ends = [(Exponential(1, 0.9), 0.0), (Exponential(1, 1.1), math.inf), (InversePower(0.5), 0.0)]
    ends += [(Linear(0, 0.4, epochs=3), 0.4), (Chain([Constant(1, epochs=2), Exponential(1, 0.5)]), 0.0)]
    for schedule, end in ends:
        assert math.inf in schedule.turns(math.inf)
        assert schedule(math.inf) == end


def test_ones_own_is_looked_at_everywhere():
    class Wave(Schedule):
        def __call__(self, time, epoch=1.0):
            return math.sin(time)

    assert list(Wave().turns(3)) == [0, 1, 2, 3]
    assert Wave().length() == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0, 1), "Linear needs its duration"),
        (lambda: Linear(0, 1, epochs=1, steps=2), "not both"),
        (lambda: Cosine(0, 1, epochs=0), "epochs must be a number > 0, got 0"),
        (lambda: Linear(0, "1", epochs=1), "end must be a number, got '1'"),
        (lambda: Linear(0, math.nan, epochs=1), "end must be a number, got nan"),
        (lambda: Steps({5: 0.1}), r"Steps needs the value at the start: Steps\(\{0: ..., 5: 0.1\}\)"),
        (lambda: Steps({0: 0.1, 1.5: 0.2}), "each key is an epoch .* got 1.5"),
        (lambda: Staircase(0.5, 0, 2), "gamma must be > 0, got 0"),
        (lambda: Staircase(0.5, 0.5, 0), "every must be a number of epochs .* got 0"),
        (lambda: Staircase(0.5, 0.5, 2.5), "every must be a number of epochs .* got 2.5"),
        (lambda: Staircase(0.5, 0.5, 2, "low"), "floor must be a number, got 'low'"),
        (lambda: Staircase(0.5, 0.5, 2, 0.6), "floor=0.6 is above start=0.5"),
        (lambda: Warmup(schedule={5: 0.1}, epochs=2), r"Warmup: schedule: Steps needs the value at the start"),
        (lambda: Steps({0: "a"}), "value from 0 on must be a number, got 'a'"),
        (lambda: Exponential(1, 0), "gamma must be > 0"),
        (lambda: InversePower(-1), "power must be >= 0"),
        (lambda: Chain([]), "Chain needs schedules"),
        (lambda: Chain([Constant(1), Constant(2)]), "never ends, but others follow"),
        (lambda: Chain([0.5]), r"expected schedules, got 0.5. Type Constant\(0.5, epochs=5\)"),
        (lambda: Warmup(schedule="x", epochs=1), "must be a number or a schedule"),
        (lambda: Warmup(schedule=0.5), "Warmup needs its duration"),
        (lambda: Steps({0: 0.1, True: 0.2}), "each key is an epoch .* got True"),
        (lambda: Steps([0.1, 0.2]), r"expected a mapping such as \{0: 0.5, 10: 0.1\}, got \[0.1, 0.2\]"),
        (lambda: Steps({}), r"Steps needs the value at the start: Steps\(\{0: ...\}\)"),
        (lambda: Chain(s for s in [Constant(1)]), "Chain: expected a list of schedules, got <generator"),
        (lambda: Chain({0: Constant(1)}), "Chain: expected a list of schedules, got {0"),
        (lambda: Linear(0, np.bool_(True), epochs=1), "end must be a number"),
    ],
)
def test_bad_arguments_are_told(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_numbers_of_other_libraries():
    assert Linear(np.float32(0), np.float64(1), epochs=np.int64(4))(1) == 0.25
    assert Steps({np.int64(0): np.float32(0.5), np.int32(3): 0.25})(3) == 0.25
    assert Staircase(fractions.Fraction(1, 2), 0.5, every=np.int64(2))(2) == 0.25


def test_no_torch_is_imported():
    for file in Path(lightning_norm.schedules.__file__).parent.glob("*.py"):
        names = {
            name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert names <= {"__future__", "abc", "collections.abc", "dataclasses", "math", "numbers", "typing"} | {
            n for n in names if n.startswith("lightning_norm.schedules")
        }
