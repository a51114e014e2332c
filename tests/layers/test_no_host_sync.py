"""A training step takes no value off the device, where each would wait for all that was queued on it.

On the path of an accelerator: on the CPU, where nothing waits, ``may_read_back`` lets one value per layer be read.
"""

import pytest
import torch
from torch import Tensor

from lightning_norm import create, normalizers
from lightning_norm.ops import eager

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
CASES = {
    **{key: cls.test_arguments for key, cls in normalizers().items() if cls.__module__.startswith("lightning_norm.")},
    "ubn, switch": {"threshold": 0.2, "min_updates": 0},
    "ubn, gate": {"threshold": 0.2, "min_updates": 0, "mode": "gate"},
    "dbn, power": {"power": 2.001},
    "dbn, averaged": {"stat_grad": "renorm", "eval_momentum": 0.1},
    "dbn, var": {"average": "var", "stat_grad": "none"},
    "sn, sparse": {"sparse": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_reads_nothing(case, monkeypatch):
    layer = create(case.partition(",")[0], 6, **CASES[case])
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(5, 6, 4, 4)
    monkeypatch.setattr(eager, "may_read_back", lambda x: False)
    batches = [x, x[:1] + 0.01 * x]  # the second is condensed
    for name in READS:

        def refuse(*args, _name=name, **kwargs):
            raise AssertionError(f"Tensor.{_name} in a training step")

        monkeypatch.setattr(Tensor, name, refuse)
    for batch in batches:
        layer(batch.requires_grad_()).square().sum().backward()
        optimizer.step()
    layer.monitor()
    monkeypatch.undo()
    if "threshold" in CASES[case]:
        assert (layer.measured, layer.skipped) == (2, 1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
