"""Run by test_launcher.py in a process of its own, where a stub is Triton's driver; prints what it saw as JSON.

With several keys, each is also called with channels-last, misaligned and small inputs; that takes half an hour.
Behind ``--OWNER`` or ``--COOPERATIVE`` this switch of the grid is on, and small maps take one launch per direction.
"""

import json
import sys

import torch

from benchmarks import stub
from benchmarks.host_cost import SHAPE, layer_of
from lightning_norm.kernels import grid, launcher

CALLS = {}
"""The inputs of the last call of each plan."""


def remember_calls():
    call = launcher.Plan.__call__

    def remembered(plan, inputs, pointers):
        CALLS[plan] = inputs
        return call(plan, inputs, pointers)

    launcher.Plan.__call__ = remembered


def cases(key, several):
    """A layer with inputs, gradients and residuals."""
    layer = layer_of(key)
    x, dy, residual = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    yield layer, x, dy, None
    if several:
        nhwc = torch.channels_last
        yield layer, x.bfloat16().contiguous(memory_format=nhwc), dy.bfloat16().contiguous(memory_format=nhwc), None
        yield layer, torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x), dy, residual
        yield layer, x[:, :, :7, :1].contiguous(), dy[:, :, :7, :1].contiguous(), None


def step(layer, x, dy, residual):
    x = x.detach().requires_grad_()
    y = layer(x, "none" if residual is None else "relu", residual)
    torch.autograd.grad(y, [x, *layer.parameters()], dy, allow_unused=True)


def is_asked_for_the_same(plan, inputs):
    """Whether Triton's usual way and the recorded one launch the same kernels with the same arguments, all of them."""
    tensors = [*inputs, *plan._allocate(inputs[0])]
    kernels = [step.compiled for step in plan.launches]
    stub.expect(kernels)
    plan._launch_as_usual(tensors)
    usual = stub.asked(kernels)
    pointers = [t if isinstance(t, int) else t.data_ptr() for t in tensors]
    stub.expect(kernels)
    plan.replayed(pointers, 0)
    at_once = [step.kernel.__name__.startswith("cooperative") for step in plan.launches]
    return stub.asked(kernels) == usual and all(a[8] for a in usual) and [a[7] for a in usual] == at_once


def hooks_are_called(case):
    """Whether Triton launches by itself while a hook is set, as its profiler sets them."""
    from triton import knobs

    called = []
    knobs.runtime.launch_enter_hook.add(called.append)
    before = stub.launches()
    step(*case)
    knobs.runtime.launch_enter_hook.remove(called.append)
    return len(called) == stub.launches() - before > 0


def main(*keys):
    stub.install()
    if keys[0].startswith("--"):
        setattr(grid, keys[0][2:], True)
        keys = keys[1:]
    remember_calls()
    seen = {"launcher": launcher.LAUNCHER, "launches": {}, "loaded by a second step": 0}
    for key in keys:
        for case in cases(key, len(keys) > 1):
            step(*case)
            loads, launches = stub.loads(), stub.launches()
            step(*case)
            seen["loaded by a second step"] += stub.loads() - loads
            seen["launches"].setdefault(key, stub.launches() - launches)
    loads = stub.loads()
    seen["asked for the same"] = [is_asked_for_the_same(*call) for call in list(CALLS.items())]
    seen["loaded by Triton"] = stub.loads() - loads
    seen["hooks called"] = hooks_are_called(case)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
