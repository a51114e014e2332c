"""Every registered normalizer on the kernels: values, precision, determinism, launches."""

import copy
import re
from pathlib import Path

import pytest
import torch

from benchmarks.counters import launches
from tests.gpu.layers import DTYPES, FORMS, LAYERS, NAMES, TOLERANCE, close, equal, inputs, layer_of, results, twin

each = pytest.mark.parametrize(("key", "arguments"), LAYERS, ids=NAMES)
DOCS = (Path(__file__).parents[2] / "docs/kernels.md").read_text()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@each
def test_training(key, arguments, form, dtype, device):
    x, dy, _ = inputs(device, form, DTYPES[dtype])
    layer = layer_of(key, arguments, device, form, x.shape[0])
    exact = twin(layer)
    for _ in range(2):  # the second batch meets moved statistics
        got, want = results(layer, x, dy), results(exact, x.double(), dy.double())
        assert (got["y"].dtype, got["dx"].dtype) == (x.dtype, x.dtype)
        close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
@each
def test_evaluation(key, arguments, form, dtype, device):
    x, dy, _ = inputs(device, form, DTYPES[dtype])
    layer = layer_of(key, arguments, device, form, x.shape[0]).eval()
    close(results(layer, x, dy), results(twin(layer), x.double(), dy.double()), TOLERANCE[dtype])


SHAPES = [(2, 24, 96, 90), (700, 24, 3, 3), (5, 3, 33, 31), (2, 1030, 7, 7), (3, 96, 56, 56)]


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("key", ["bn", "sn", "rbn", "bnet"])
def test_shapes(key, shape, form, cuda):
    """Pieces of large rows, many small rows, few and many channels, tails."""
    x, dy, _ = inputs(cuda, form, shape=shape)
    layer = layer_of(key, {}, cuda, form, shape[0], shape[1])
    close(results(layer, x, dy), results(twin(layer), x.double(), dy.double()), 3e-5)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each
def test_activation_and_residual(key, arguments, dtype, activation, device):
    x, dy, residual = inputs(device, "channels_last", DTYPES[dtype])
    layer = layer_of(key, arguments, device, n=x.shape[0])
    exact = twin(layer)
    z = copy.deepcopy(exact)(x.double()) + residual.double()
    residual += (0.1 * z.sign()).to(x.dtype)  # nothing so close to 0 that rounding would change its sign
    got = results(layer, x, dy, activation=activation, residual=residual)
    want = results(exact, x.double(), dy.double(), activation=activation, residual=residual.double())
    close(got, want, 4 * TOLERANCE[dtype])  # where nothing is fused the result is rounded three times


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@each
def test_two_runs_are_the_same_bits(key, arguments, form, dtype, device):
    """Races would show here, and an order left to chance; on a GPU at a size that fills it."""
    shape = (32, 24, 56, 56) if device == "cuda" else None
    x, dy, _ = inputs(device, form, DTYPES[dtype], shape)
    layer = layer_of(key, arguments, device, form, x.shape[0])
    want = results(copy.deepcopy(layer), x, dy)
    for _ in range(8 if device == "cuda" else 1):
        equal(results(copy.deepcopy(layer), x, dy), want)


@pytest.mark.parametrize("offset", [0, 100, 1000])
@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("key", ["bn", "sn", "bcn"])
def test_as_precise_as_torch(key, form, offset, device):
    """In float32; where the mean is 0 errors are a few roundings, and chance."""
    x, dy, _ = inputs(device, form, shape=(16, 24, 23, 21) if device == "cuda" else (4, 24, 7, 5))
    x = x + offset
    ours = layer_of(key, {}, device)
    ours.reset_parameters()
    theirs = torch.nn.BatchNorm2d(x.shape[1]).to(device)
    errors = []
    for layer, exact in ((ours, twin(ours)), (theirs, copy.deepcopy(theirs).double())):
        y, dx = both(layer, x, dy)
        y64, dx64 = both(exact, x.double(), dy.double())
        errors.append(((y - y64).norm() / y64.norm(), (dx - dx64).norm() / dx64.norm()))
    for our_error, torchs in zip(*errors, strict=True):
        assert our_error <= (1.0 if offset else 1.5) * torch.clamp(torchs, min=1.2e-7), (our_error, torchs)


def both(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def documented():
    """The table of launches in docs/kernels.md: name -> forward, backward."""
    table = DOCS[DOCS.index("Launches in training, counted") :].split("\n\n")[1]
    launches = {}
    for names, forward, backward in re.findall(r"^\| (\w[^|]*) \| (\d+)[^|]* \| (\d+)[^|]* \|$", table, re.M):
        for name in re.split(r",| and ", names):
            words = name.split()
            condensed = " condensed" if words[1:3] == ["with", "a"] else ""
            launches.setdefault(words[0] + condensed, (int(forward), int(backward)))
    return launches


def test_the_documentation_counts_launches():
    assert documented()["sn"] == (4, 4)
    assert documented()["ubn"] == (4, 3)
    assert documented()["ubn condensed"] == (5, 3)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@each
def test_launches(key, arguments, form, device, plain_memory, monkeypatch):
    """As many as the documentation says, all kernels of all operators counted; interpreted, only ours are seen."""
    name = key + (" condensed" if "threshold" in arguments else "")
    if name not in documented():
        pytest.skip(f"docs/kernels.md states no number for {name}")
    x, dy, _ = inputs(device, form)
    layer = layer_of(key, arguments, device, form, x.shape[0])
    x.requires_grad_()

    def forward():
        return layer(x)

    def backward_too():
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    if device == "cuda":
        counts = [launches(run, device) for run in (forward, backward_too)]
    else:
        counts = [interpreted(run, monkeypatch) for run in (forward, backward_too)]
    assert 0 < counts[0] <= documented()[name][0]
    assert counts[1] - counts[0] <= documented()[name][1]


def interpreted(run, monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    launched, real = [], InterpretedFunction.run
    with monkeypatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", lambda self, *a, **k: launched.append(self) or real(self, *a, **k))
        run()
    return len(launched)


def test_mixed_precision_and_other_gradients(device):
    """Under autocast, and with gradients that are expanded, transposed or in another memory format."""
    layer = layer_of("sn", {}, device)
    x, dy, _ = inputs(device)
    exact = twin(layer)
    want = results(copy.deepcopy(exact), x.double(), dy.double())
    with torch.autocast(device, dtype=torch.bfloat16):
        close(results(copy.deepcopy(layer), x, dy), want, 1e-5)
    other = dy.contiguous(memory_format=torch.channels_last)
    close(results(copy.deepcopy(layer), x, other), want, 1e-5)
    one = torch.ones((), device=device).expand(x.shape)
    want = results(copy.deepcopy(exact), x.double(), one.double())
    close(results(copy.deepcopy(layer), x, one), want, 1e-5)


def test_nan_reaches_the_output_and_not_the_statistics(device):
    for key in ("bn", "sn", "rbn", "dbn", "bnet"):
        layer = layer_of(key, {}, device)
        x, _, _ = inputs(device)
        layer(x)
        before = {name: t.clone() for name, t in layer.named_buffers()}
        x[1, 2, 3, 1] = float("nan")
        assert layer(x).isnan().any()
        for name in layer.running_names:
            assert torch.equal(before[name], layer.get_buffer(name)), f"{key}: {name}"
