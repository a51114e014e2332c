"""Pan et al. 2018: the first channels by instance statistics, the rest by batch statistics."""

import pytest
import torch
from torch import nn

from lightning_norm import IBN, fold, swap, to_plain
from tests.normalizers.paper import agrees, along, data, shaken

SHAPES = [(5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]


def paper(half, running=None, eps=1e-5):
    def reference(x, p):
        positions, batch = list(range(2, x.dim())), [0, *range(2, x.dim())]
        first, rest = x[:, :half], x[:, half:]
        mean, var = running or (rest.mean(batch), rest.var(batch, unbiased=False))
        var_n = first.var(positions, unbiased=False, keepdim=True)
        parts = (
            (first - first.mean(positions, keepdim=True)) / torch.sqrt(var_n + eps),
            (rest - along(mean, x)) / torch.sqrt(along(var, x) + eps),
        )
        return along(p["weight"], x) * torch.cat(parts, 1) + along(p["bias"], x)

    return reference


# 0.6 of 6 channels is 3.6: rounded down, as in the published code.
@pytest.mark.parametrize(("ratio", "half"), [(0.5, 3), (0.6, 3), (0.2, 1), (0.99, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equation(shape, ratio, half):
    layer = shaken(IBN(6, ratio=ratio))
    assert layer.instance_channels == half
    agrees(layer, paper(half), data(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation(shape):
    layer = shaken(IBN(6)).eval()
    agrees(layer, paper(3, running=(layer.running_mean[3:], layer.running_var[3:])), data(*shape))


class Published(nn.Module):
    """The two layers side by side of the authors' code."""

    def __init__(self, planes, ratio):
        super().__init__()
        self.half = int(planes * ratio)
        self.IN = nn.InstanceNorm2d(self.half, affine=True)
        self.BN = nn.BatchNorm2d(planes - self.half)

    def forward(self, x):
        return torch.cat([self.IN(x[:, : self.half]), self.BN(x[:, self.half :])], 1)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_the_published_layers_over_several_steps(momentum):
    ours, theirs = shaken(IBN(7, ratio=0.4, momentum=momentum)), Published(7, 0.4).double()
    theirs.BN.momentum = momentum
    with torch.no_grad():
        for name in ("weight", "bias"):
            for part, values in ((theirs.IN, getattr(ours, name)[:2]), (theirs.BN, getattr(ours, name)[2:])):
                getattr(part, name).copy_(values)
        for name in ("running_mean", "running_var"):
            getattr(theirs.BN, name).copy_(getattr(ours, name)[2:])
    for seed in range(4):
        x = data(5, 7, 6, 3, seed=seed)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean[2:], theirs.BN.running_mean)
    torch.testing.assert_close(ours.running_var[2:], theirs.BN.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_ends(training):
    x = data(5, 6, 7, 3)
    for ratio, end in ((0, nn.BatchNorm2d(6)), (1, nn.InstanceNorm2d(6))):
        torch.testing.assert_close(IBN(6, ratio=ratio).double().train(training)(x), end.double().train(training)(x))


def test_a_batch_norms_checkpoint_loads_and_a_swap_moves_its_tensors():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).double()
    model(data(4, 3, 8, 8))
    saved, bn = model.state_dict(), model[1]
    layer = IBN(6).double()
    layer.load_state_dict(bn.state_dict())
    swap(model, "ibn")
    assert list(model.state_dict()) == list(saved)
    assert model[1].weight is bn.weight
    assert model[1].running_var is bn.running_var
    torch.testing.assert_close(dict(layer.state_dict()), dict(model[1].state_dict()))
    x = data(5, 6, 7, 3)
    torch.testing.assert_close(layer.eval()(x)[:, 3:], bn.eval()(x)[:, 3:])
    assert not layer.preserves_eval
    assert IBN(6, ratio=0.1).preserves_eval


@pytest.mark.parametrize("deploy", [to_plain, fold])
def test_only_without_instance_channels_it_is_a_fixed_map_per_channel(deploy):
    x = data(2, 3, 8, 8)
    for ratio, changed in ((0.5, 0), (0, 1)):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), shaken(IBN(6, ratio=ratio)), nn.ReLU()).double().eval()
        expected = model(x)
        report = deploy(model, x)
        assert len(report) == changed
        assert ("looks at the sample" in str(report)) == (changed == 0)
        torch.testing.assert_close(model(x), expected)


def test_monitor_shows_the_magnitude_of_each_share():
    layer = shaken(IBN(6))
    shown = {"gamma_in": layer.weight[:3].abs().mean(), "gamma_bn": layer.weight[3:].abs().mean()}
    torch.testing.assert_close(layer.monitor(), shown)
    assert list(IBN(6, ratio=0).monitor()) == ["gamma_bn"]
    assert IBN(6, affine=False).monitor() == {}


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan"), "half", True])
def test_other_ratios_are_refused(ratio):
    with pytest.raises(ValueError, match="ratio must be a number"):
        IBN(6, ratio=ratio)


def test_maps_of_one_element_are_refused_in_training():
    with pytest.raises(ValueError, match="larger feature maps"):
        IBN(6)(torch.randn(5, 6, 1, 1))
    assert IBN(6, ratio=0)(torch.randn(5, 6, 1, 1)).shape == (5, 6, 1, 1)
