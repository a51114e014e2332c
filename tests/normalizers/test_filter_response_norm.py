"""Singh and Krishnan 2020: equations 1 and 2, the learned eps, and the thresholded linear unit."""

import pytest
import torch
from torch import nn

from lightning_norm import FilterResponseNorm, swap
from tests.normalizers.paper import agrees, along, data, shaken


def paper(eps, tlu=True, learn_eps=False):
    def reference(x, p):
        square = x.square().mean(list(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x.square()
        y = x / (square + eps + (p["extra_eps"].abs() if learn_eps else 0)).sqrt()
        y = along(p["weight"], x) * y + along(p["bias"], x)
        return torch.where(y > along(p["tau"], x), y, along(p["tau"], x)) if tlu else y

    return reference


@pytest.mark.parametrize("arguments", [{}, {"tlu": False}, {"learn_eps": True}], ids=str)
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)])
def test_equation(shape, arguments):
    agrees(shaken(FilterResponseNorm(6, eps=1e-3, **arguments)), paper(1e-3, **arguments), data(*shape))


def test_maps_of_one_element_need_a_learned_eps():
    agrees(shaken(FilterResponseNorm(6, learn_eps=True)), paper(1e-6, learn_eps=True), data(5, 6))
    with pytest.raises(ValueError, match="larger feature maps"):
        FilterResponseNorm(6)(torch.randn(5, 6))


def test_tokens():
    x, layer = data(5, 7, 6), shaken(FilterResponseNorm(6, channel_dim=-1))
    expected = paper(1e-6)(x.movedim(-1, 1), dict(layer.named_parameters())).movedim(1, -1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_starting_values():
    layer = FilterResponseNorm(6, learn_eps=True)
    assert (layer.tau == 0).all()
    assert layer.extra_eps == 1e-4
    x = data(5, 6, 7, 3).float()
    root = (x.square().mean((2, 3), keepdim=True) + 1e-6 + 1e-4).sqrt()
    torch.testing.assert_close(layer(x), torch.relu(x / root))
    assert layer.monitor() == {"tau": 0.0, "extra_eps": layer.extra_eps}


def test_an_activation_and_a_residual_come_behind_the_threshold():
    layer = shaken(FilterResponseNorm(6))
    x, residual = data(5, 6, 7, 3), data(5, 6, 7, 3, seed=1)
    torch.testing.assert_close(layer(x, "relu", residual), torch.relu(layer(x) + residual))


def test_half_inputs_keep_their_dtype():
    layer = FilterResponseNorm(6)
    x = data(5, 6, 7, 3).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert layer.double()(data(5, 6, 7, 3)).dtype == torch.float64


def test_a_swap_takes_weight_and_bias():
    model = nn.Sequential(nn.BatchNorm2d(6))
    weight = model[0].weight
    report = swap(model, "frn", norm_args={"tlu": False})
    assert model[0].weight is weight
    assert not report.layers[0].preserves_eval
    report.undo()
    assert isinstance(model[0], nn.BatchNorm2d)


def test_refuses_running_statistics():
    with pytest.raises(TypeError, match="keeps no running statistics"):
        FilterResponseNorm(6, track_running_stats=True)
