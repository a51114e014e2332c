"""Wu and He 2018, equations (1), (2) and (7); Ba et al. 2016, equation (3), is one group."""

import pytest
import torch
from torch import nn

from lightning_norm import GroupNorm, LayerNorm
from tests.normalizers.paper import agrees, along, data, same_as_torch, shaken

SHAPES = [(5, 12), (5, 12, 7), (5, 12, 7, 3), (3, 12, 2, 5, 3)]


def paper(groups, eps=1e-5):
    def reference(x, p):
        size = x.shape[1] // groups
        parts = []
        for g in range(groups):
            part = x[:, g * size : (g + 1) * size]
            dims = list(range(1, x.dim()))
            mean = part.mean(dims, keepdim=True)
            var = ((part - mean) ** 2).mean(dims, keepdim=True)
            parts.append((part - mean) / torch.sqrt(var + eps))
        u = torch.cat(parts, 1)
        return along(p["weight"], x) * u + along(p["bias"], x)

    return reference


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_equation(shape, groups, training):
    agrees(shaken(GroupNorm(12, num_groups=groups)).train(training), paper(groups), data(*shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_is_one_group(shape, training):
    agrees(shaken(LayerNorm(12, eps=0.2)).train(training), paper(1, 0.2), data(*shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"eps": 0.1}])
def test_same_as_torch(shape, arguments):
    same_as_torch(GroupNorm(12, num_groups=3, **arguments), nn.GroupNorm(3, 12, **arguments), shape)
    same_as_torch(LayerNorm(12, **arguments), nn.GroupNorm(1, 12, **arguments), shape)


@pytest.mark.parametrize("groups", [2.0, "x", True])
def test_groups_are_a_number_or_auto(groups):
    with pytest.raises(ValueError, match="num_groups must be an int or 'auto'"):
        GroupNorm(12, num_groups=groups)


@pytest.mark.parametrize("groups", [0, -1, 5])
def test_groups_must_divide(groups):
    with pytest.raises(ValueError, match=r"12 channels.*[Dd]ivisors of 12"):
        GroupNorm(12, num_groups=groups)


@pytest.mark.parametrize("make", [LayerNorm, lambda c, **kw: GroupNorm(c, num_groups=3, **kw)])
@pytest.mark.parametrize("argument", [{"momentum": 0.1}, {"track_running_stats": True}])
def test_running_statistics_are_refused(make, argument):
    with pytest.raises(TypeError, match=next(iter(argument))):
        make(12, **argument)
