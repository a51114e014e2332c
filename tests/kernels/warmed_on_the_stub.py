"""Run by test_launcher.py in a process of its own, where a stub is Triton's driver: warms up and prints JSON."""

import json

import torch
from torch import nn

import lightning_norm
from benchmarks import stub
from lightning_norm.kernels import launcher


def main():
    stub.install()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    lightning_norm.swap(model, "bn", backend="triton")
    x = torch.randn(2, 3, 12, 12)
    before = [t.clone() for t in (*model.parameters(), *model.buffers())], torch.get_rng_state()
    compiled = lightning_norm.warm_up(model, x, workers=2)
    after = [*model.parameters(), *model.buffers()], torch.get_rng_state()
    seen = {"compiled": compiled, "launched": stub.launches(), "again": lightning_norm.warm_up(model, x)}
    seen["unchanged"] = all(map(torch.equal, *(t[0] for t in (before, after)))) and torch.equal(before[1], after[1])
    plans, loads = len(launcher._plans), stub.loads()
    seen["loaded ahead"] = loads
    model(x).sum().backward()
    with torch.no_grad():  # with gradients the backward pass of evaluation would be compiled, too
        model.eval()(x)
    seen |= {"loaded by a step": stub.loads() - loads, "recorded by a step": len(launcher._plans) - plans}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
