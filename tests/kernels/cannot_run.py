"""Run by test_cannot_run.py in a process of its own, over the stubbed driver: a step where no kernel runs.

The compiler, ptxas and the launcher are Triton's. Prints the report's backend, the warnings and whether the values are
right, as JSON.
"""

import json
import os
import sys
import warnings

import torch
from torch import nn

import lightning_norm
from benchmarks import stub
from lightning_norm.kernels import launcher, trial

NORMS = ("sn", "rbn", "afn", "bnet", "ubn")
SHAPE = (4, 8, 6, 6)


def step(model, x):
    """Two training steps and an evaluation: everything that they change or return."""
    x = x.clone().requires_grad_()
    outputs = [model(x), model(x)]
    torch.autograd.backward(outputs, [y.detach().flip(0) for y in outputs])
    gradients = [p.grad for p in model.parameters()]
    return [t.detach() for t in (*outputs, model.eval()(x), x.grad, *gradients, *model.state_dict().values())]


def model_of(norm, backend):
    torch.manual_seed(0)
    # Large enough for the parameters of afn, of whose number a warning tells otherwise.
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3))
    # Dropout draws other numbers on the kernels than in plain PyTorch, and none of them runs here.
    arguments = {"afn": {"dropout": 0.0}, "frn": {"learn_eps": True}}.get(norm, {})
    report = lightning_norm.swap(model, norm, backend=backend, norm_args=arguments)
    return model, report.layers[0].backend


def without_kernels(case):
    """Make one kind of machine on which no kernel runs, or not every one."""
    if case == "no C compiler":
        stub.install()
        os.environ["CC"] = "/nowhere/cc"
    elif case.startswith("capability"):
        stub.install(capability=int(case.split()[1]))
    elif case == "ROCm":
        stub.install(backend="hip")
        torch.version.hip = "6.4"
    else:
        stub.install()
    stub.take_for_device()
    if case == "driver too old":
        stub.refuse_loads(222)
    elif case == "capture":
        torch.cuda.is_current_stream_capturing = lambda: True
    elif case.startswith("later"):
        # The stub's kernels write nothing, so the values of the trial cannot be right.
        trial.launch = lambda device: None
    if case == "later shared memory":
        stub.shared_memory(0)
    elif case == "later passes":
        stub.refuse_loads(222)
    elif case == "later backward":
        # The forward pass's kernels load, the first of the backward pass does not.
        record = launcher.record

        def recorded(inputs, call):
            stub.refuse_loads(0 if len(inputs) and "need_dx" not in call.__code__.co_freevars else 222)
            return record(inputs, call)

        launcher.record = recorded


def refused_by_others(x):
    """What else meets a kernel that does not load: what is wrong with it."""
    # The state of a device's generator, which the stub has not.
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = lambda *_: torch.empty(0), lambda *_: None
    wrong = []
    layer, features = lightning_norm.create("afn", 8, dropout=0.5), torch.randn(3, 8, 5, 5)
    with stub.tensors_on_device():
        # The first call tries the kernels and the second does not: activation checkpointing wants equal dropout.
        if not torch.equal(*(drawn(layer, features) for _ in range(2))):
            wrong.append("dropout")
        for backend, batch in ("triton", x[:2]), ("auto", x[:3]):
            model, before, plans = model_of("sn", backend)[0], torch.get_rng_state(), len(launcher._plans)
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    lightning_norm.warm_up(model, batch, progress=False)
                ended = [w for w in told if "warm_up ended early" in str(w.message)]
                wrong += [] if backend == "auto" and len(ended) == 1 else ["warm_up says nothing"]
            except lightning_norm.KernelError:
                wrong += ["warm_up raises"] if backend == "auto" else []
            if not torch.equal(before, torch.get_rng_state()) or len(launcher._plans) > plans:
                wrong.append("what warm_up leaves")
    return wrong


def drawn(layer, x):
    torch.manual_seed(0)
    return layer(x)


def main(case):
    torch.set_num_threads(1)
    x = torch.randn(SHAPE[0], 3, *SHAPE[2:])
    # With a learned eps frn has no description for the kernels: passes on them lie around its equations.
    norms = ("frn",) if case == "later passes" else NORMS
    right = {norm: step(model_of(norm, "eager")[0].double(), x.double()) for norm in norms}
    without_kernels(case)
    seen = {"reports": [], "wrong": []}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for norm in norms:
            model, backend = model_of(norm, "auto")
            seen["reports"].append(backend)
            with stub.tensors_on_device():
                got = step(model, x)
            # The largest is of the size of 10; what a kernel that did not run leaves behind is anything.
            largest = max(float(t.abs().max()) for t in right[norm])
            gap = max(float((a - b).abs().nan_to_num(nan=1e9).max()) for a, b in zip(got, right[norm], strict=True))
            if gap > 1e-5 * largest:
                seen["wrong"].append((norm, gap / largest))
        if case == "later shared memory":
            seen["wrong"] += refused_by_others(x)
    seen["warnings"] = [str(w.message) for w in told if w.category is lightning_norm.BackendWarning]
    seen["others"] = [str(w.message) for w in told if w.category is not lightning_norm.BackendWarning]
    seen["launches"] = stub.launches()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
