"""``swap`` without a Trainer: ranks that differ are told by a SyncError in the first forward pass."""

import pytest

from lightning_norm.testing.ranks import run_ranks
from tests.distributed.disagree import SCENARIOS, everything

AT_ONCE = {
    "normalizers": "1: BatchNorm(.* on rank 0, 1: SwitchableNorm(",
    "arguments": "1: SwitchableNorm(.*eps=1e-05.* on rank 0, 1: SwitchableNorm(.*eps=0.001",
    "own arguments": "'ln'",
    "channels": "1: SwitchableNorm(6,.* on rank 0, 1: SwitchableNorm(8,",
    "ghost batches": "virtual_batch_size=2.* on rank 0, .*virtual_batch_size=4",
    "ghost batches on one rank": "virtual_batch_size=2.* on rank 0, 1: SwitchableNorm(",
    "layers": "1: SwitchableNorm(.* on rank 0, 3: SwitchableNorm(",
    "order": "3: SwitchableNorm(.* on rank 0, 1: SwitchableNorm(",
    "affine": "'weight'",
    "groups": "sync_group='world' on rank 0, sync_group='node' on rank 1",
    "sizes of groups": "sync_group=2 on rank 0, sync_group=1 on rank 1",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return run_ranks(everything, 2, list(SCENARIOS), str(tmp_path_factory.mktemp("meet")))


@pytest.mark.parametrize("name", AT_ONCE)
def test_every_rank_says_what_differs(said, name):
    first, second = (each[name] for each in said)
    assert first == second
    assert first.startswith("SyncError: ranks are about to pool")
    assert "Timed out" not in first
    place = 0
    for part in AT_ONCE[name].split(".*"):
        assert part in first[place:], first
        place = first.index(part, place) + len(part)


def test_ranks_that_agree_and_evaluation_say_nothing(said):
    for name in ("agreed", "evaluation on one rank"):
        assert [each[name] for each in said] == ["", ""]


def test_a_forward_pass_on_one_rank_in_training_is_told(said):
    first, second = (each["one forward more"] for each in said)
    assert first.startswith("SyncError")
    assert second.startswith("SyncError")
    assert "a rank has run the network in training mode when the others did not" in first + second
    alone = said[0]["a forward on one rank"]
    assert alone.startswith("SyncError")
    assert "model.eval()" in alone
    assert "ranks [1] did not come" in alone
