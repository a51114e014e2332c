"""Ranks that differ are told before the first step, all of them, by one message."""

import torch

from lightning_norm import NormScheduler, NormSwap, NormSync
from lightning_norm.callbacks.rank_checks import check_same_on_ranks
from lightning_norm.testing.ranks import run_ranks
from tests.distributed.inside import STEPS, Uneven, batches, trainer


def said(rank, fit):
    torch.manual_seed(0)
    try:
        fit()
    except RuntimeError as error:
        return str(error)
    return ""


def everything(rank):
    def fit(*callbacks, model=None, **kwargs):
        run = trainer(rank, 2, callbacks=list(callbacks), max_epochs=1, **kwargs)
        return lambda: run.fit(model or Uneven(), batches(rank, 2, (4, 2)))

    group, momentum, start = (("world", "node")[rank], (0.1, 0.2)[rank], rank + 1)
    unlike = Uneven()
    if rank == 1:
        unlike.late = torch.nn.Identity()
    return {
        "nothing": said(rank, fit(NormSwap("sn"), NormScheduler({"momentum": 0.1}), plugins=[NormSync()])),
        "layers": said(rank, fit(NormSwap("sn"), model=unlike)),
        "groups": said(rank, fit(NormSwap("sn", sync_group=group))),
        "arguments": said(rank, fit(NormSwap("sn", norm_args={"momentum": momentum}))),
        "schedules": said(rank, fit(NormSwap("sn"), NormScheduler({"momentum": momentum}))),
        "plugins": said(rank, fit(plugins=[NormSync(start_epoch=start)])),
        "batches": said(rank, fit(NormSwap("sn"), limit_train_batches=STEPS - rank)),
        "off": said(rank, fit(NormSwap("sn", sync=False))),
        "order": said(rank, lambda: check_same_on_ranks("order", "lines", ["a", "b"][:: 1 - 2 * rank], "Sort.")),
    }


def test_ranks_that_differ_are_told():
    first, second = run_ranks(everything, 2)
    assert first == second
    assert first["nothing"] == first["off"] == ""
    for name, words in {
        "layers": ["disagree on the swap: rank 0 has 3 layers", "rank 1 has 2", "missing there: late"],
        "groups": ["the swap", "'sync_group': 'node'", "'sync_group': 'world'", "use the same NormSwap"],
        "arguments": ["the swap", "'momentum': 0.2", "'momentum': 0.1"],
        "schedules": ["the schedules: rank 0 has 3 values", "value=0.2", "use the same NormScheduler"],
        "plugins": ["what NormSync converts", "start_epoch=2", "start_epoch=1"],
        "batches": [f"{STEPS - 1} batches' there, '{STEPS} batches' on rank 0", "distributed sampler"],
        "order": ["in another order). Sort."],
    }.items():
        for word in words:
            assert word in first[name], f"{name}: {word!r} is not in {first[name]!r}"


def test_one_process_agrees_with_itself():
    check_same_on_ranks("anything", "lines", ["a"], "")
