"""Ranks with uneven and empty shares train as one process on the whole batch: every normalizer, several steps."""

import pytest
import torch

from lightning_norm import normalizers
from lightning_norm.testing.ranks import run_ranks
from tests.distributed.exact import joined, train, train_all

F64 = torch.float64
KEYS = list(normalizers())
MORE = {"ubn": {"threshold": 0.0}, "sn": {"momentum": None}, "dbn": {"stat_grad": "none"}, "bnet": {"kernel_size": 1}}


def every(**job):
    """One job per normalizer."""
    return [{"key": key, "case": "plain", **job} for key in KEYS]


def arguments():
    return [{"key": key, "case": "plain", "arguments": arguments} for key, arguments in MORE.items()]


TWO = {
    "a layer called twice in a step": every(case="twice"),
    "a branch that is used every other step": every(case="branch", find_unused_parameters=True),
    "gradient accumulation and no_sync": every(accumulate=2),
    "activation checkpointing": every(case="checkpoint"),
    "activation checkpointing, reentrant, in a static graph": every(case="reentrant", static_graph=True),
    "static graph": every(static_graph=True, gradient_as_bucket_view=True),
    "float32": every(dtype=torch.float32),
    "the network compiled as one graph": [
        {"key": key, "case": "plain", "compiled": "network"} for key in ("bn", "sn", "cn")
    ],
    "layers compiled, with activation checkpointing": [{"key": "sn", "case": "checkpoint", "compiled": "layers"}],
}
SAME = ("key", "case", "arguments", "accumulate")


def compare(world, jobs):
    """Train each job on ``world`` ranks and on one, and compare all there is."""
    wrong = []
    for job, results in zip(
        jobs, zip(*run_ranks(train_all, world, world, jobs, timeout=3600), strict=True), strict=True
    ):
        reference = {name: value for name, value in job.items() if name in SAME}
        expected, stored = train(**reference)
        parts, states = joined(results)
        single, narrow = ({}, {}) if job.get("dtype", F64) == F64 else train(**reference, dtype=torch.float32)
        wrong += [(job, e) for n, v in expected.items() if (e := apart(parts[n], v, single.get(n), n))]
        for rank, state in enumerate(states):
            wrong += [
                (job, e) for n, v in stored.items() if (e := apart(state[n], v, narrow.get(n), f"{n} of rank {rank}"))
            ]
            wrong += [
                (job, f"{n} of rank {rank} is not rank 0's") for n in stored if not torch.equal(state[n], states[0][n])
            ]
    assert not wrong, f"{len(wrong)} differences, the first: {wrong[0]}"


def apart(got, expected, single, what):
    """Return what differs by too much, and by how much."""
    scale = max(float(expected.double().norm()), 1e-3)
    far = float((got.double() - expected.double()).norm()) / scale
    if single is None:  # float64: some hundred roundings of 1e-16, and few steps of training to amplify them
        return "" if far <= 1e-10 else f"{what}: {far:.1e} apart"
    alone = float((single.double() - expected.double()).norm()) / scale
    # as far from float64 as one process in float32 is, whose sums have another order; 2^-24 is one rounding
    return "" if far <= 4 * alone + 32 * 2**-24 else f"{what}: {far:.1e} from float64, one process {alone:.1e}"


def test_three_ranks():
    compare(3, every() + arguments())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", TWO)
def test_two_ranks(case):
    compare(2, TWO[case])
