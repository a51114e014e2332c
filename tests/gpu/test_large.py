"""Tensors beyond 2^31 elements: both ends against float64. Up to 30 GB; the interpreter tests the same offsets."""

import pytest
import torch

import lightning_norm

FEW, MANY = (65, 8, 2048, 2064), (700_000, 64, 7, 7)
ENDS = (0, -1)


@pytest.fixture(autouse=True)
def _free(cuda, plain_memory):
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    yield
    torch.cuda.empty_cache()


def tensors(shape, form):
    """Random numbers whose mean differs from sample to sample, made in the order in which they lie."""
    n, c, h, w = shape
    made = []
    for _ in range(2):
        size = (n, h, w, c) if form == "channels_last" else shape
        t = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        made.append(t.movedim(-1, 1) if form == "channels_last" else t)
    x, dy = made
    x += torch.randn(n, c, 1, 1, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 1 << 31
    return x.requires_grad_(), dy


def apart(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [FEW, MANY], ids=["few large", "many small"])
def test_instance_norm(shape, form):
    """No sample depends on another."""
    x, dy = tensors(shape, form)
    layer = lightning_norm.create("in", shape[1]).cuda()
    layer.backend = "triton"
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    for i in ENDS:
        sample = x.detach()[i].unsqueeze(0).double().requires_grad_()
        want = torch.nn.functional.instance_norm(sample, eps=1e-5)
        (want_dx,) = torch.autograd.grad(want, sample, dy[i].unsqueeze(0).double())
        assert apart(y[i].unsqueeze(0), want.detach()) < 2.0**-7
        assert apart(dx[i].unsqueeze(0), want_dx) < 2.0**-7


def batch_statistics(x, dy):
    """Mean, standard deviation, and the means of dy and of dy * x^ per channel, in float64, sample by sample."""
    chunks = range(0, x.shape[0], max(1, x.shape[0] // 64))
    step = chunks.step
    count = x.numel() / x.shape[1]

    def total(f):
        parts = (f(x[i : i + step].double(), dy[i : i + step].double()).sum((0, 2, 3)) for i in chunks)
        return (sum(parts) / count).view(1, -1, 1, 1)

    mean = total(lambda a, _: a)
    std = (total(lambda a, _: (a - mean).square()) + 1e-5).sqrt()
    return mean, std, total(lambda _, g: g), total(lambda a, g: g * (a - mean) / std)


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [FEW, MANY], ids=["few large", "many small"])
def test_batch_norm(shape, form):
    x, dy = tensors(shape, form)
    layer = lightning_norm.create("bn", shape[1]).cuda()
    layer.backend = "triton"
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    x = x.detach()
    mean, std, of_dy, of_product = batch_statistics(x, dy)
    torch.testing.assert_close(layer.running_mean.double(), 0.1 * mean.flatten(), rtol=1e-3, atol=1e-5)
    for i in ENDS:
        u = (x[i].unsqueeze(0).double() - mean) / std
        assert apart(y[i].unsqueeze(0), u) < 2.0**-7
        assert apart(dx[i].unsqueeze(0), (dy[i].unsqueeze(0).double() - of_dy - u * of_product) / std) < 2.0**-7


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_bnet(form):
    x, dy = tensors(FEW, form)
    layer = lightning_norm.create("bnet", FEW[1]).cuda()
    layer.backend = "triton"
    with torch.no_grad():
        layer.kernel.normal_()
    y = layer(x)
    dx, dbias = torch.autograd.grad(y, (x, layer.bias), dy)
    x, kernel = x.detach(), layer.kernel.detach().double().view(FEW[1], 1, 3, 3)
    back = {"weight": kernel, "padding": 1, "groups": FEW[1]}
    mean, std, _, _ = batch_statistics(x, dy)
    turned = [torch.zeros_like(mean) for _ in range(2)]
    total = torch.zeros(FEW[1], device="cuda", dtype=torch.float64)
    for i in range(FEW[0]):  # the gradient of the normalized x, and what it sums to
        g = torch.nn.functional.conv_transpose2d(dy[i : i + 1].double(), **back)
        u = (x[i : i + 1].double() - mean) / std
        turned[0] += g.sum((0, 2, 3), keepdim=True)
        turned[1] += (g * u).sum((0, 2, 3), keepdim=True)
        total += dy[i].double().sum((1, 2))
    of_g, of_product = (t * FEW[1] / x.numel() for t in turned)
    assert apart(dbias, total) < 1e-4
    for i in ENDS:
        u = (x[i].unsqueeze(0).double() - mean) / std
        want = torch.nn.functional.conv2d(u, **back) + layer.bias.detach().double().view(1, -1, 1, 1)
        assert apart(y[i].unsqueeze(0), want) < 2.0**-7
        g = torch.nn.functional.conv_transpose2d(dy[i].unsqueeze(0).double(), **back)
        assert apart(dx[i].unsqueeze(0), (g - of_g - u * of_product) / std) < 2.0**-7


@pytest.mark.parametrize("form", ["contiguous", "channels_last"])
def test_condensation(form):
    """ubn's extra read of x: every sample close to one direction."""
    x, _ = tensors(FEW, form)
    x = x.detach()
    x += 3.0
    layer = lightning_norm.create("ubn", FEW[1], threshold=0.0, min_updates=0).cuda()
    layer.backend = "triton"
    layer(x)
    unit = torch.zeros(x[0].shape, device="cuda", dtype=torch.float64)
    for sample in x:
        unit += sample.double() / sample.double().norm()
    n = FEW[0]
    want = (unit.square().sum() - n) / (n * (n - 1))
    torch.testing.assert_close(layer.condensation.double(), want, rtol=1e-3, atol=1e-4)
