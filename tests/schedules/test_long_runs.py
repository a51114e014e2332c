"""The check of a whole run: nothing is missed where pieces end between steps, and it costs the same for any length."""

import dataclasses
import itertools
import math
import random

import pytest

from lightning_norm import Chain, Constant, Cosine, Exponential, InversePower, Linear, Schedule, Steps, Warmup


def _random_schedule(rng, depth):
    kind = rng.choice(
        ["linear", "cosine", "exponential", "constant", "steps"] + ["chain", "warmup"] * (2 * (depth > 0))
    )
    epochs = round(rng.uniform(0.05, 2.5), rng.choice([1, 2, 3]))
    a, b = round(rng.uniform(0, 1), 2), round(rng.uniform(0, 1), 2)
    if kind == "chain":
        return Chain([_random_schedule(rng, depth - 1) for _ in range(rng.randint(1, 3))])
    if kind == "warmup":
        return Warmup(schedule=_random_schedule(rng, depth - 1), start=a, epochs=epochs)
    simple = {
        "linear": lambda: Linear(a, b, epochs=epochs),
        "cosine": lambda: Cosine(a, b, epochs=epochs),
        "exponential": lambda: Exponential(a + 0.1, 0.5, epochs=epochs),
        "constant": lambda: Constant(a, epochs=epochs),
        "steps": lambda: Steps({0: a, rng.randint(1, 9): b}, epochs=epochs),
    }
    return simple[kind]()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_no_extreme_of_nested_schedules_is_missed(depth):
    rng = random.Random(depth)
    for _ in range(1500):
        schedule, epoch = _random_schedule(rng, depth), rng.choice([1.0, 2.0, 3.0, 7.0, 10.0, 13.0])
        last = rng.choice([5, 20, 59])
        values = [schedule(t, epoch) for t in range(last + 1)]
        at_turns = [schedule(t, epoch) for t in schedule.turns(last, epoch)]
        assert min(at_turns) == min(values), (schedule, epoch, last)
        assert max(at_turns) == max(values), (schedule, epoch, last)


class Custom(Schedule):
    """A user's schedule, which counts its calls."""

    calls = 0

    def __call__(self, time, epoch=1.0):
        Custom.calls += 1
        return 0.5


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(0.5),
        Linear(0, 1, steps=10**9),
        Exponential(1, 0.9),
        Steps({0: 0.1, 10**9: 0.2}),
        Custom(),
        Warmup(schedule=Custom(), epochs=0.3),
    ],
    ids=["constant", "linear", "exponential", "steps", "own", "warm-up of its own"],
)
def test_a_run_of_a_billion_steps_is_checked_at_few(schedule):
    times = list(itertools.islice(schedule.turns(10**9, 1000.0), 50_000))
    assert len(times) < 50_000
    assert {0, 10**9} <= set(times) or isinstance(schedule, (Chain, Warmup))
    assert all(0 <= t <= 10**9 and t == int(t) for t in times)
    assert 0 <= schedule(10**9, 1000.0) <= 1


NUMBERS = [0, 1, -1, 0.5, 2, 1e-308, 1e308, -1e308, 10**400, 1e-5]


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine, Exponential, InversePower, Steps])
def test_numbers_beyond_a_float_are_refused_or_answered(kind):
    names = [f.name for f in dataclasses.fields(kind) if f.name not in ("epochs", "steps")]
    durations = ({}, {"epochs": 1e-300}, {"epochs": 1e308}, {"steps": 1}, {"steps": 10**400}, {"epochs": 10**400})
    built = 0
    for values, duration in itertools.product(itertools.product(NUMBERS, repeat=len(names)), durations):
        arguments = {"values": {0: values[0], 5: 1}} if kind is Steps else dict(zip(names, values, strict=True))
        try:
            schedule = kind(**arguments, **duration)
        except ValueError:
            continue
        built += 1
        for time, epoch in itertools.product((0, 1, 5.5, 1e9, 1e308, 10**400, math.inf), (1.0, 1e9, 10**400)):
            value = schedule(time, epoch)
            assert isinstance(value, (int, float))
            assert not math.isnan(value)
            assert list(schedule.turns(min(time, 100), epoch))
    assert built
    with pytest.raises(ValueError, match="must be a number"):
        Constant(10**400)
