"""Fan et al. 2021: two encoder-decoders on each sample's own statistics."""

import math

import pytest
import torch

from lightning_norm import ASRNorm, InstanceNorm
from tests.normalizers.paper import agrees, along, data, shaken
from tests.normalizers.test_adaptive_fusion_norm import adapted

SHAPES = [(5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]


def paper(gated=True, eps=1e-5):
    def reference(x, p):
        rows = []
        for row in x.unsqueeze(1):  # (1, C, *)
            dims = [0, *range(2, row.dim())]
            sd = torch.sqrt(row.var(dims, unbiased=False) + eps)
            m, d, gamma, beta = adapted(row.mean(dims), sd, p, eps, gated=gated)
            rows.append(along(gamma, row) * (row - along(m, row)) / along(d, row) + along(beta, row))
        return torch.cat(rows)

    return reference


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "arguments", [{}, {"rescale_gate": False}, {"affine": False}, {"std_ratio": 1, "rescale_ratio": 2}, {"eps": 0.3}]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_equation(shape, arguments, training):
    layer = shaken(ASRNorm(6, **arguments)).train(training)
    agrees(layer, paper(layer.rescale_gate, layer.eps), data(*shape))


@pytest.mark.parametrize("channels", [1, 3, 8, 40])
def test_there_is_a_hidden_unit(channels):
    agrees(shaken(ASRNorm(channels)), paper(), data(5, channels, 4, 3))


def test_closed_gates_are_instance_norm():
    layer = ASRNorm(6, gate_init=-math.inf, rescale_init=0.0).double()
    x = data(5, 6, 7, 3)
    torch.testing.assert_close(layer(x), InstanceNorm(6).double()(x), rtol=1e-12, atol=1e-12)
    assert not layer.preserves_eval


def test_without_the_rescaling_gate():
    layer = ASRNorm(6, rescale_gate=False)
    assert set(layer.monitor()) == {"gate_mu", "gate_sigma"}
    assert {n for n, _ in ASRNorm(6).named_parameters()} - {n for n, _ in layer.named_parameters()} == {
        "lambda_beta",
        "lambda_gamma",
    }


@pytest.mark.parametrize("training", [True, False])
def test_one_pixel_is_refused(training):
    with pytest.raises(ValueError, match=r"more than one value per statistic.*exclude="):
        ASRNorm(6).train(training)(torch.randn(4, 6, 1, 1))


@pytest.mark.parametrize("argument", [{"momentum": 0.1}, {"track_running_stats": True}])
def test_running_statistics_are_refused(argument):
    with pytest.raises(TypeError, match=f"ASRNorm keeps no running statistics.*{next(iter(argument))}"):
        ASRNorm(6, **argument)
