"""Which backend runs: decided from the input, and said in the swap report."""

import subprocess
import sys

import pytest
import torch

import lightning_norm
from lightning_norm.ops import backend
from lightning_norm.ops.layout import layout_of

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, lightning_norm
from lightning_norm.ops import backend
assert not any(name.startswith("triton") for name, module in sys.modules.items() if module is not None)
assert not backend.INSTALLED, "a missing Triton was found"
model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
print(lightning_norm.swap(model, "sn").layers[0].backend)
model(torch.randn(2, 3, 4, 4)).sum().backward()
"""


def test_works_with_triton_missing():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip() == "eager: Triton is not installed"


def test_auto_is_eager_on_the_cpu():
    x = torch.randn(2, 3, 4, 4)
    assert not backend.on_kernels(x, layout_of(x, 3), "auto")


@pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_on_the_cpu_is_refused():
    layer = lightning_norm.SwitchableNorm(3)
    layer.backend = "triton"
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot take this input: it is on cpu.*backend='auto'"):
        layer(torch.randn(2, 3, 4, 4))


def test_reasons(monkeypatch):
    monkeypatch.setattr(backend, "INSTALLED", True)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backend, "launch_obstacle", lambda index: None)
    assert backend.explain("eager") == "eager: asked for"
    assert backend.explain("triton") == "triton: asked for"
    assert backend.explain("auto").startswith("triton: ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.explain("auto") == "eager: no CUDA device"
    with pytest.raises(ValueError, match="no CUDA device. Type backend='auto'"):
        backend.explain("triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        backend.explain("cuda")


def test_a_residual_of_another_shape_is_refused():
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="residual has shape"):
        lightning_norm.normalize(x, lambda m: lightning_norm.Affine(m.mean, m.var), residual=torch.randn(3, 4))


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_activation_and_residual_in_plain_pytorch(activation):
    x, r = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def algebra(m):
        return lightning_norm.Affine(m.mean, (m.var + 1e-5).rsqrt())

    y = lightning_norm.normalize(x, algebra, activation=activation, residual=r)
    z = torch.nn.functional.instance_norm(x) + r
    want = {"none": z, "relu": z.relu(), "silu": torch.nn.functional.silu(z)}[activation]
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def asked_anew():
    backend.launch_obstacle.cache_clear(), backend._told.clear()
    yield
    backend.launch_obstacle.cache_clear(), backend._told.clear()


def test_rocm_runs_in_plain_pytorch(monkeypatch, asked_anew):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backend, "INSTALLED", True)
    with pytest.warns(lightning_norm.BackendWarning, match="plain PyTorch: .* this is ROCm"):
        assert backend.explain("auto") == "eager: the kernels are written for CUDA, and this is ROCm"
    with pytest.raises(ValueError, match="backend='triton': .* this is ROCm. Type backend='auto'"):
        backend.explain("triton")


@pytest.mark.skipif(torch.cuda.is_available() or not backend.INSTALLED, reason="a launch is to fail")
def test_a_launch_that_fails_is_told_once(monkeypatch, asked_anew):
    """The real launch, on a device that is not there: the reason is in the report, and the warning comes once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(lightning_norm.BackendWarning, match="plain PyTorch: a kernel launched for trial failed") as told:
        reports = [lightning_norm.swap(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), "sn") for _ in range(2)]
    assert len(told) == 1
    assert all(r.layers[0].backend.startswith("eager: a kernel launched for trial failed (") for r in reports)


def test_the_first_launch_is_not_made_in_a_capture(asked_anew):
    key = object()
    with pytest.warns(lightning_norm.BackendWarning, match="Run a step, or lightning_norm.warm_up, before the capture"):
        assert "no such step ran before the capture" in backend._first_in_capture(key, capturing=True)
    assert backend._first_in_capture(key, capturing=False) is None
    assert backend._first_in_capture(key, capturing=True) is None
