"""Gao et al. 2021: centering and scaling calibration, with a pooling of its own for each."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lightning_norm import RepresentativeBatchNorm, swap
from tests.normalizers.paper import agrees, along, data, shaken

SHAPES = [(5, 6), (5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]
RECTIFY = [(), ("center",), ("scale",), ("center", "scale")]
SIGMOID_OF_1 = 0.7310585786300049


def pooled(x):
    """K: the mean over the positions, kept as ones."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x


def paper(rectify=("center", "scale"), gate_init="unit", running=None, eps=1e-5):
    def reference(x, p):
        weight, bias = along(p["weight"], x), along(p["bias"], x)
        if "center" in rectify:
            x = x + along(p["center_weight"], x) * pooled(x)
        b = [d for d in range(x.dim()) if d != 1]
        mean, var = running or (x.mean(b), x.var(b, unbiased=False))
        x = (x - along(mean, x)) / torch.sqrt(along(var, x) + eps)
        if "scale" in rectify:
            gate = torch.sigmoid(along(p["scale_weight"], x) * pooled(x) + along(p["scale_bias"], x))
            x = x * (gate / SIGMOID_OF_1 if gate_init == "unit" else gate)
        return weight * x + bias

    return reference


@pytest.mark.parametrize(("rectify", "gate_init"), list(itertools.product(RECTIFY, ["unit", "paper"])))
def test_equation(rectify, gate_init):
    for shape in SHAPES:
        layer = shaken(RepresentativeBatchNorm(6, rectify=rectify, gate_init=gate_init))
        agrees(layer, paper(rectify, gate_init), data(*shape))


@pytest.mark.parametrize("rectify", RECTIFY)
def test_evaluation_on_the_running_statistics_of_the_centered_input(rectify):
    layer = shaken(RepresentativeBatchNorm(6, rectify=rectify)).eval()
    for shape in SHAPES:
        agrees(layer, paper(rectify, running=(layer.running_mean, layer.running_var)), data(*shape))
    layer = shaken(RepresentativeBatchNorm(6, rectify=rectify, momentum=1.0))
    x = data(5, 6, 7, 3)
    layer(x)
    if "center" in rectify:
        x = x + along(layer.center_weight.detach(), x) * pooled(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, x.var((0, 2, 3)))


def test_parameters_are_those_of_what_is_rectified():
    names = [{n for n, _ in RepresentativeBatchNorm(6, rectify=r).named_parameters()} for r in RECTIFY]
    custom = [set(), {"center_weight"}, {"scale_weight", "scale_bias"}, {"center_weight", "scale_weight", "scale_bias"}]
    assert names == [{"weight", "bias"} | more for more in custom]
    layer = RepresentativeBatchNorm(6)
    assert layer.center_weight.abs().max() == layer.scale_weight.abs().max() == 0
    assert torch.equal(layer.scale_bias, torch.ones(6))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate_init", ["unit", "paper"])
def test_starts_as_batch_norm_times_the_gate(gate_init, training):
    ours, theirs = RepresentativeBatchNorm(6, gate_init=gate_init).double(), nn.BatchNorm2d(6).double()
    x = data(5, 6, 7, 3)
    size = 1.0 if gate_init == "unit" else SIGMOID_OF_1
    torch.testing.assert_close(ours.train(training)(x), size * theirs.train(training)(x), rtol=1e-12, atol=1e-12)
    assert ours.preserves_eval == (gate_init == "unit")
    model = nn.Sequential(theirs)
    assert swap(model, "rbn", norm_args={"gate_init": gate_init}).layers[0].preserves_eval == (gate_init == "unit")


def test_published_checkpoint_of_shape_1_c_1_1_loads():
    layer = shaken(RepresentativeBatchNorm(6, gate_init="paper"))
    state = {k: v.reshape(1, -1, 1, 1) if v.shape == (6,) else v for k, v in layer.state_dict().items()}
    for name in ("running_mean", "running_var"):
        state[name] = state[name].flatten()
    other = RepresentativeBatchNorm(6, gate_init="paper").double()
    other.load_state_dict(state)
    x = data(5, 6, 7, 3)
    assert torch.equal(other.eval()(x), layer.eval()(x))


def test_the_input_is_not_written_to():
    layer, x = shaken(RepresentativeBatchNorm(6)), data(5, 6, 7, 3)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before)  # published: x += w * K(x)
    leaf = x.requires_grad_()
    layer(torch.sigmoid(leaf)).sum().backward()


def test_large_means_cost_no_digits():
    """Centering at mean/std = 1000, with every parameter away from its start: float32 against float64."""
    layer = shaken(RepresentativeBatchNorm(6)).float()
    wide = copy.deepcopy(layer).double()
    x = (torch.randn(8, 6, 14, 13) + 1000).requires_grad_()
    y, exact = layer(x), wide(x.double())
    assert (y - exact).norm() < 1e-6 * exact.norm()


def test_monitor():
    layer = RepresentativeBatchNorm(6)
    shown = layer.monitor()
    assert set(shown) == {"weight_center", "weight_scale", "gate_scale"}
    torch.testing.assert_close(shown["gate_scale"], torch.tensor(1.0))
    nn.init.zeros_(layer.scale_bias)
    torch.testing.assert_close(layer.monitor()["gate_scale"], torch.tensor(0.5 / SIGMOID_OF_1))


@pytest.mark.parametrize("arguments", [{"rectify": ["affine"]}, {"rectify": "center"}, {"gate_init": "one"}])
def test_refuses(arguments):
    (value,) = arguments.values()
    with pytest.raises(ValueError, match=str(value).replace("[", r"\[")):
        RepresentativeBatchNorm(6, **arguments)
