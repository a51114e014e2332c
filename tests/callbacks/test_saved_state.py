"""Callbacks that keep a state, and two that would share its place."""

import lightning.pytorch
import pytest
import pytorch_lightning

import lightning_norm as ln
from lightning_norm.errors import ConflictError
from tests.callbacks.test_both_names import net, trainer
from tests.callbacks.toy import loader


@pytest.mark.parametrize("pl", [lightning.pytorch, pytorch_lightning])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (ln.NormMonitor, r"2 NormMonitors log under the same names, with the prefix 'norm'.*prefix='norm2'"),
        (lambda: ln.NormScheduler({"momentum": 0.1}), "2 NormSchedulers would schedule the same values, momentum. Put"),
        (lambda: ln.NormSwap("sn"), r"2 NormSwaps would make the same swap, NormSwap\(norm='sn'\). Leave one out"),
    ],
    ids=["monitor", "scheduler", "swap"],
)
def test_two_that_would_share_a_place_are_told_what_to_type(pl, make, said):
    model = net(pl)
    runner = trainer(pl, make(), make())
    with pytest.raises(ConflictError, match=said):
        runner.fit(model, loader())
    assert type(model.net[1]).__name__ == "BatchNorm2d"
