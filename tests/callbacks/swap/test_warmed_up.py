import pytest
import torch

from lightning_norm import NormSwap
from lightning_norm.callbacks.swap import warmed_up
from tests.callbacks.toy import Net, loader, trainer


class WithExample(Net):
    def __init__(self):
        super().__init__()
        self.example_input_array = {"x": torch.randn(2, 3, 8, 8)}


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def warm_up(model, *args, progress, **kwargs):
        seen.append((model, *args, *kwargs.values()))

    monkeypatch.setattr(warmed_up, "warm_up", warm_up)
    return seen


@pytest.mark.parametrize(("net", "asked"), [(Net, [4, 3, 8, 8]), (WithExample, True), (Net, False)])
def test_kernels_are_compiled_before_the_first_batch(net, asked, calls):
    model = net()
    trainer(NormSwap("sn", warm_up=asked), fast_dev_run=True).fit(model, loader())
    shapes = [tuple(x.shape) for _, x in calls]
    assert shapes == ([] if asked is False else [(4, 3, 8, 8)] if net is Net else [(2, 3, 8, 8)])


def test_no_example_is_told():
    with pytest.raises(ValueError, match=r"example_input_array, which is None.*warm_up=\[64"):
        trainer(NormSwap("sn", warm_up=True), fast_dev_run=True).fit(Net(), loader())


def test_a_model_on_a_cpu_stays_as_it_is():
    """All of it, but for the kernels, which do not run there."""
    model = Net()
    trainer(NormSwap("sn", warm_up=[4, 3, 8, 8]), fast_dev_run=True).fit(model, loader())
