"""Xu et al. 2023 (arXiv 2011.14150): batch normalization, then one kernel per channel over the normalized map."""

import copy
import functools
import itertools

import pytest
import torch
import torchvision
from torch import nn

from lightning_norm import BNET, create, swap
from lightning_norm.testing import checks
from tests.normalizers.paper import F64, agrees, along, data, shaken

SHAPES = {1: (5, 6, 7), 2: (4, 6, 5, 3), 3: (3, 6, 4, 5, 3)}


def recovered(h, kernel, bias):
    """The sum over taps, one by one, of the map shifted among zeros."""
    sizes = kernel.shape[2:]
    y = torch.zeros_like(h)
    for tap in itertools.product(*(range(k) for k in sizes)):
        away = [u - k // 2 for u, k in zip(tap, sizes, strict=True)]
        term = kernel[(slice(None), 0, *tap)].reshape(1, -1, *(1,) * len(sizes)) * h
        for axis, (u, length) in enumerate(zip(away, h.shape[2:], strict=True), start=2):
            remaining = term.narrow(axis, max(u, 0), max(length - abs(u), 0))
            nothing = [0, 0] * (h.dim() - 1 - axis) + [min(max(-u, 0), length), min(max(u, 0), length)]
            term = nn.functional.pad(remaining, nothing)
        y = y + term
    return y if bias is None else y + along(bias, y)


def paper(running=None, eps=1e-5, fit=lambda kernel: kernel):
    def reference(x, p):
        b = [d for d in range(x.dim()) if d != 1]
        mean, var = running or (x.mean(b), x.var(b, unbiased=False))
        h = (x - along(mean, x)) / torch.sqrt(along(var, x) + eps)
        return recovered(h, fit(p["kernel"]), p.get("bias"))

    return reference


def stretched(kernel):
    """A kernel with distinct taps of the size of 1, so that a swapped or a mirrored axis shows."""
    nn.init.normal_(kernel, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5, 7])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equation(dims, k, affine):
    layer = shaken(BNET(6, kernel_size=k, spatial_dims=dims, affine=affine))
    stretched(layer.kernel)
    x = data(*SHAPES[dims])
    agrees(layer, paper(), x)
    agrees(layer.eval(), paper((layer.running_mean, layer.running_var)), x)


@pytest.mark.parametrize(
    ("dims", "shape", "fit"),
    [
        (2, (5, 6), lambda kernel: kernel[..., 1, 1]),
        (2, (5, 6, 7), lambda kernel: kernel[..., 1]),
        (2, (3, 6, 2, 5, 3), lambda kernel: kernel[:, :, None]),
        (1, (5, 6), lambda kernel: kernel[..., 1]),
        (1, (4, 6, 5, 3), lambda kernel: kernel[:, :, None]),
        (3, (5, 6), lambda kernel: kernel[..., 1, 1, 1]),
        (3, (4, 6, 5, 3), lambda kernel: kernel[..., 1]),
    ],
)
def test_other_numbers_of_axes(dims, shape, fit):
    """Missing axes are last ones of size 1; with axes to spare the first are separate maps."""
    layer = shaken(BNET(6, spatial_dims=dims))
    stretched(layer.kernel)
    x = data(*shape)
    if len(shape) == 2:
        agrees(layer, lambda x, p: paper(fit=lambda k: fit(k)[..., None])(x[..., None], p)[..., 0], x)
    else:
        agrees(layer, paper(fit=fit), x)
    wide = layer(x.reshape(*shape, *(1,) * (2 + dims - len(shape))))
    torch.testing.assert_close(layer(x), wide.reshape(shape), rtol=1e-12, atol=1e-12)


def test_borders_are_those_of_zeros_around_the_normalized_map():
    """A constant far from 0 around a small signal: padding x itself would show at every border."""
    torch.manual_seed(0)
    layer = shaken(BNET(4, kernel_size=3))
    x = data(3, 4, 6, 5) + 50
    bn, conv = nn.BatchNorm2d(4, affine=False).double(), nn.Conv2d(4, 4, 3, padding=1, groups=4).double()
    conv.weight, conv.bias = layer.kernel, layer.bias
    torch.testing.assert_close(layer(x), conv(bn(x)), rtol=1e-10, atol=1e-10)


def test_second_derivatives_of_every_tap():
    layer = shaken(BNET(2))
    stretched(layer.kernel)
    x, dy = data(2, 2, 3, 3).requires_grad_(), data(2, 2, 3, 3, seed=1).requires_grad_()

    def call(x, kernel, bias):
        return torch.func.functional_call(copy.deepcopy(layer), {"kernel": kernel, "bias": bias}, (x,))

    passed = [x, *(p.detach().clone().requires_grad_() for p in (layer.kernel, layer.bias))]
    assert torch.autograd.gradgradcheck(call, passed, dy)


def test_running_statistics_are_batch_norms():
    ours, theirs = BNET(6, momentum=0.3).double(), nn.BatchNorm2d(6, momentum=0.3).double()
    for seed in range(3):
        ours(data(5, 6, 7, 3, seed=seed)), theirs(data(5, 6, 7, 3, seed=seed))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("training", [True, False])
def test_a_dirac_is_batch_norm_and_a_zero_is_nothing(training):
    x = data(5, 6, 7, 3)
    theirs = nn.BatchNorm2d(6).double().train(training)
    torch.testing.assert_close(BNET(6).double().train(training)(x), theirs(x), rtol=1e-12, atol=1e-12)
    layer = BNET(6, init="zero").double().train(training)
    assert not layer(x).any()
    layer.kernel.data.fill_(2.0)
    layer.reset_parameters()
    assert not layer.kernel.any()
    assert not layer.preserves_eval


def test_half_maps_are_convolved_in_float32():
    layer = BNET(6, kernel_size=5)
    stretched(layer.kernel)
    wide = copy.deepcopy(layer).double()
    for dtype in (torch.float16, torch.bfloat16):
        x = data(4, 6, 9, 8).to(dtype)
        error = (layer(x).double() - wide(x.double())).abs().max()
        assert error <= wide(x.double()).abs().max() * torch.finfo(dtype).eps / 2  # one rounding of y


class TestAPlainBatchNorm:
    def source(self, norm=nn.BatchNorm2d, **arguments):
        layer = shaken(norm(6, **arguments))
        return layer.float()

    def test_its_weight_becomes_the_centre_tap(self):
        source, layer = self.source(), BNET(6, kernel_size=5)
        layer.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(layer.kernel[:, 0, 2, 2], source.weight)
        assert layer.kernel.count_nonzero() == 6
        assert torch.equal(layer.bias, source.bias)
        x = data(3, 6, 7, 5).float()
        torch.testing.assert_close(layer.eval()(x), source.eval()(x))

    def test_without_affine(self):
        source = nn.BatchNorm2d(6, affine=False)
        plain = BNET(6, affine=False)
        plain.load_state_dict(source.state_dict(), strict=True)
        assert plain.bias is None
        assert next(iter(plain.state_dict())) == "kernel"
        with pytest.raises(RuntimeError, match="Missing key.*bias"):
            BNET(6).load_state_dict(source.state_dict(), strict=True)

    @pytest.mark.parametrize(
        ("norm", "dims"), [(nn.BatchNorm1d, 1), (nn.BatchNorm2d, 2), (nn.BatchNorm3d, 3), (nn.SyncBatchNorm, 2)]
    )
    def test_a_swap_chooses_the_axes(self, norm, dims):
        model = nn.Sequential(norm(6))
        swap(model, "bnet")
        assert (model[0].spatial_dims, model[0].kernel.dim()) == (dims, 2 + dims)
        model = nn.Sequential(norm(6))
        swap(model, "bnet", norm_args={"spatial_dims": 1, "kernel_size": 5})
        assert model[0].kernel.shape == (6, 1, 5)

    def test_undo_gives_the_centre_tap_back(self):
        model = nn.Sequential(self.source())
        old, weight = model[0], model[0].weight
        report = swap(model, "bnet")
        row = report.layers[0]
        assert (row.preserves_eval, row.converted, row.dropped, row.added) == (True, ["weight"], [], {"kernel": 54})
        assert "parameters  +54 -6 (12 -> 60)" in report.summary()
        assert report.total_after == sum(p.numel() for p in model.parameters())
        with torch.no_grad():
            model[0].kernel.add_(torch.arange(54.0).view(6, 1, 3, 3))
            model[0].bias.add_(1)
        centre = model[0].kernel[:, 0, 1, 1].clone()
        model.double()
        report.undo()
        assert model[0] is old
        assert model[0].weight is weight
        assert torch.equal(weight, centre.double())

    def test_undo_after_a_move_to_the_meta_device(self):
        model = nn.Sequential(self.source())
        report = swap(model, "bnet")
        model.to("meta")
        report.undo()
        assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))

    def test_a_zero_start_leaves_the_weight_behind_and_says_so(self):
        model = nn.Sequential(self.source())
        state = copy.deepcopy(model.state_dict())
        report = swap(model, "bnet", norm_args={"init": "zero"})
        row = report.layers[0]
        assert (row.preserves_eval, row.reason) == (False, "does not start as BatchNorm")
        assert (row.converted, row.dropped) == ([], ["weight"])
        assert not model[0].kernel.any()
        report.undo()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    def test_a_frozen_weight_stays_frozen(self):
        model = nn.Sequential(self.source())
        model[0].weight.requires_grad_(False)
        swap(model, "bnet")
        assert (model[0].kernel.requires_grad, model[0].bias.requires_grad) == (False, True)
        model[0](data(3, 6, 4, 4).float()).square().sum().backward()
        assert model[0].kernel.grad is None
        assert model[0].bias.grad is not None


def test_authors_checkpoint_loads():
    """Keys and shapes of the published files: running statistics, and the convolution as a child."""
    authors = nn.BatchNorm2d(6, affine=False)
    authors.bnconv = nn.Conv2d(6, 6, 5, padding=2, groups=6)
    nn.init.uniform_(authors.running_mean), nn.init.uniform_(authors.running_var, 0.5, 1.5)
    layer = BNET(6, kernel_size=5)
    passed = authors.state_dict()
    layer.load_state_dict(passed, strict=True)
    assert "bnconv.weight" in passed
    x = data(3, 6, 7, 5).float()
    torch.testing.assert_close(layer.eval()(x), authors.bnconv(authors.eval()(x)))


def test_a_kernel_of_another_size_is_named():
    with pytest.raises(RuntimeError, match=r"kernel \(6, 1, 5, 5\).*\(6, 1, 3, 3\).*kernel_size=5, spatial_dims=2"):
        BNET(6).load_state_dict(BNET(6, kernel_size=5).state_dict())


def test_a_missing_kernel_is_an_error():
    state = BNET(6).state_dict()
    del state["kernel"]
    with pytest.raises(RuntimeError, match='Missing key.*"kernel"'):
        BNET(6).load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kernel_size": 4}, "odd int, got 4.*Type kernel_size=3"),
        ({"kernel_size": 0}, "odd int, got 0"),
        ({"kernel_size": (3, 3)}, r"an int, got \(3, 3\). Type kernel_size=3"),
        ({"spatial_dims": 4}, r"spatial_dims must be one of \(1, 2, 3\), got 4.*spatial_dims=2"),
        ({"init": "ones"}, "got 'ones'.*init='dirac'"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        BNET(6, **arguments)


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_kernel(affine):
    layer = BNET(6, affine=affine)
    stretched(layer.kernel)
    layer.freeze_kernel()
    assert not any(p.requires_grad for p in layer.parameters())
    twin = BNET(6, affine=affine)
    twin.load_state_dict(layer.state_dict())
    grads = []
    for each in (layer, twin):
        x = data(4, 6, 5, 3).float().requires_grad_()
        grads.append(torch.autograd.grad(each(x), x, data(4, 6, 5, 3, seed=1).float())[0])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_what_is_watched():
    layer = BNET(2)
    assert {k: float(v) for k, v in layer.monitor().items()} == {"off_center": 0.0, "kernel_norm": 1.0}
    with torch.no_grad():
        layer.kernel[:, 0, 0, 0] = 1.0
    assert float(layer.monitor()["off_center"]) == 0.5
    torch.testing.assert_close(layer.monitor()["kernel_norm"], torch.tensor(2.0).sqrt())
    assert float(BNET(2, init="zero").monitor()["off_center"]) == 0.0


def test_the_authors_network():
    """A BNET at the end of each block of a ResNet-50 adds 15 104 * (9 - 1) parameters with k = 3."""
    model = torchvision.models.resnet50(num_classes=2)
    before = sum(p.numel() for p in model.parameters())
    report = swap(model, "bnet", include="last_of_block", norm_args={"init": "zero"})
    assert len(report) == 16
    assert sum(p.numel() for p in model.parameters()) - before == 15_104 * 8 == report.total_after - report.total_before
    assert create("bnet", 4).extra_parameters == {"kernel": "C*kernel_size**spatial_dims"}
    assert data(1, 1).dtype == F64


@pytest.mark.parametrize(
    ("shape", "size", "dims"),
    [
        ((2, 4, 5, 13), 3, 2),
        pytest.param((2, 4, 13), 3, 1, marks=pytest.mark.slow),
        pytest.param((2, 4, 9, 13), 5, 2, marks=pytest.mark.slow),
        pytest.param((2, 3, 4, 5, 12), 3, 3, marks=pytest.mark.slow),
        pytest.param((2, 4, 6, 13), 3, 1, marks=pytest.mark.slow),
    ],
)
def test_compiled_wide_maps(shape, size, dims):
    """Maps of which the compiler is given the taps written out, in both memory formats."""
    layer = BNET(shape[1], kernel_size=size, spatial_dims=dims)
    stretched(layer.kernel)
    compiled = copy.deepcopy(layer)
    compiled.compile()
    for channels_last in (False, True)[: 1 + (len(shape) == 4)]:
        x, dy = data(*shape).float(), data(*shape, seed=1).float()
        if channels_last:
            x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
        x.requires_grad_()
        results = []
        for each in (layer, compiled):
            y = each(x)
            assert y.stride() == x.stride()
            results.append((y, *torch.autograd.grad(y, [x, *each.parameters()], dy)))
        names = ("y", "x", *(name for name, _ in layer.named_parameters()))
        for name, actual, expected in zip(names, results[1], results[0], strict=True):
            # The kernel's gradient, a sum over all positions in float32, was off by 5e-5 once in five runs.
            tolerance = 1e-4 if name == "kernel" else 1e-5
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestOtherStatistics:
    """The recovery step behind the statistics of instances, or behind a mixture as in switchable normalization."""

    @staticmethod
    def paper(statistics, running=None, eps=1e-5):
        def reference(x, p):
            space, rest, batch = list(range(2, x.dim())), list(range(1, x.dim())), [0, *range(2, x.dim())]
            of_batch = running or (x.mean(batch), x.var(batch, unbiased=False))
            pairs = {
                "in": (x.mean(space, keepdim=True), x.var(space, keepdim=True, unbiased=False)),
                "ln": (x.mean(rest, keepdim=True), x.var(rest, keepdim=True, unbiased=False)),
                "bn": tuple(along(t, x) for t in of_batch),
            }
            mean, var = pairs["in"]
            if statistics == "sn":
                w, v = (p[name].exp() / p[name].exp().sum() for name in ("mean_weight", "var_weight"))
                mean = sum(w[i] * m for i, (m, _) in enumerate(pairs.values()))
                var = sum(v[i] * s for i, (_, s) in enumerate(pairs.values()))
            return recovered((x - mean) / (var + eps).sqrt(), p["kernel"], p.get("bias"))

        return reference

    @pytest.mark.parametrize("dims", [1, 2, 3])
    @pytest.mark.parametrize("statistics", ["sn", "in"])
    def test_equation(self, statistics, dims):
        layer = shaken(BNET(6, spatial_dims=dims, statistics=statistics))
        stretched(layer.kernel)
        x = data(*SHAPES[dims])
        agrees(layer, self.paper(statistics), x)
        running = (layer.running_mean, layer.running_var) if statistics == "sn" else None
        agrees(layer.eval(), self.paper(statistics, running), x)

    def test_maps_of_one_element_have_no_instances(self):
        layer, x = BNET(6, statistics="sn").double(), data(5, 6)
        y = layer(x)
        layer.mean_weight.data[0] = layer.var_weight.data[0] = 7.0
        torch.testing.assert_close(layer(x), y)
        with pytest.raises(ValueError, match="more than one value per statistic"):
            BNET(6, statistics="in")(x)

    @pytest.mark.parametrize("statistics", ["sn", "in"])
    def test_swap_files_and_deployment(self, statistics):
        model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        start = model.state_dict()
        report = swap(model, "bnet", norm_args={"statistics": statistics})
        assert not report.layers[0].preserves_eval
        loaded = nn.Sequential(nn.Conv2d(6, 6, 1), BNET(6, statistics=statistics))
        loaded.load_state_dict(start)
        loaded.load_state_dict(model.state_dict())
        x = data(4, 6, 5, 3).float()
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
        assert model[1].plain(4) is None
        assert "sample" in model[1].why_not_plain(4) or "running" in model[1].why_not_plain(4)
        assert ("mean_in" in model[1].monitor()) == (statistics == "sn")
        report.undo()
        assert isinstance(model[1], nn.BatchNorm2d)

    @pytest.mark.parametrize("name", ["compiled_equals_eager", "half_inputs", "deepcopy_and_pickle"])
    @pytest.mark.parametrize("statistics", ["sn", "in"])
    def test_conforms(self, statistics, name):
        checks()[name](functools.partial(BNET, statistics=statistics))
