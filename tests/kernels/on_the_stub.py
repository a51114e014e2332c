"""Run by test_launcher.py in a process of its own, where a stub is Triton's driver; prints what it saw as JSON."""

import json
import sys

import torch

from benchmarks import stub
from benchmarks.host_cost import SHAPE, layer_of


def main(key):
    stub.install()
    from lightning_norm.kernels import launcher

    seen = {"launcher": launcher.LAUNCHER}
    layer = layer_of(key)
    x, dy = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)

    def step():
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy, allow_unused=True)

    step()
    loads, launches = stub.loads(), stub.launches()
    step()
    seen["loaded by a second step"] = stub.loads() - loads
    seen["launches"] = stub.launches() - launches

    # The same launches by Triton's usual way and by the recorded one, on the same tensors.
    plan = next(iter(launcher._plans.values()))
    weights = [t.detach() for t in layer.parameters()]
    names = ("running_mean", "running_var", "num_batches_tracked", "skipped_updates", "_momentum")
    inputs = [x.detach(), None, *weights, *(None,) * (4 - len(weights)), *(layer._buffers.get(n) for n in names)]
    assert len(inputs) == plan.inputs
    outputs = [torch.empty(SHAPE)]
    tensors = [*inputs, *outputs, *(torch.empty(n) if n else None for n in plan.sizes)]
    plan._launch_as_usual(tensors)
    usual = stub.asked(len(plan.launches))
    seen["replayed"] = plan._replay([0 if t is None else t.data_ptr() for t in tensors], -1)
    seen["asked for the same"] = stub.asked(len(plan.launches)) == usual and len({a[6:] for a in usual}) > 1

    # While a hook is set, as Triton's profiler sets them, Triton launches by itself and calls it.
    from triton import knobs

    called = []
    knobs.runtime.launch_enter_hook.add(called.append)
    before = stub.launches()
    step()
    seen["hooks called"] = len(called) == stub.launches() - before
    knobs.runtime.launch_enter_hook.remove(called.append)
    print(json.dumps(seen))


main(*sys.argv[1:])
