"""Chen et al. 2025, arXiv 2512.10938: y = gamma erf(alpha x + s) + beta, with erf as the series of its integral."""

import math

import pytest
import torch

from lightning_norm import DynamicErf
from tests.normalizers.paper import agrees, along, data, shaken


def series(z):
    """2 / sqrt(pi) times the integral of exp(-t^2) from 0 to z, term by term."""
    term, total = z, z
    for n in range(1, 120):
        term = -term * z.square() / n
        total = total + term / (2 * n + 1)
    return 2 / math.sqrt(math.pi) * total


def paper(x, p):
    return along(p["weight"], x) * series(p["alpha"] * x + p["offset"]) + along(p["bias"], x)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 7), (3, 6, 2, 5, 3)])
def test_equation(shape):
    agrees(shaken(DynamicErf(6)), paper, data(*shape) / 2)  # the series loses digits at a large z


def test_it_starts_odd_and_bounded():
    layer, x = DynamicErf(6), data(4, 6, 3, 3)
    torch.testing.assert_close(layer(-x), -layer(x))
    assert layer(1e6 * x).abs().max() <= 1
