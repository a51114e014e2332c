"""Shao et al. 2019 (arXiv 1903.03793): sparsestmax against the recursion of the paper, and where it could break."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_norm.ops.sparsestmax import sparsemax, sparsestmax, without_entry

F64 = torch.float64


def simplex(z):
    """Euclidean projection on the simplex by bisection of the threshold."""
    low, high = z.min() - 1.0, z.max()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.clip(z - tau, 0, None).sum() > 1 else (low, tau)
    return np.clip(z - tau, 0, None)


def recursive(z, radius):
    """The authors' recursion, from the paper's text."""
    p = simplex(z)
    return outward(p, np.where(p > 0, 1 / (p > 0).sum(), 0.0), radius)


def outward(p, centre, radius):
    if (p > 1e-12).sum() == 1:
        return p
    away = np.linalg.norm(p - centre)
    if away >= radius:
        return p
    p = centre + radius * (p - centre) / away
    if p.min() >= 0:
        return p
    p = simplex(p)
    smaller = np.where(p > 1e-12, 1 / (p > 1e-12).sum(), 0.0)
    return outward(p, smaller, math.sqrt(max(radius**2 - np.linalg.norm(smaller - centre) ** 2, 0.0)))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_sparsestmax_agrees_with_the_recursion(k):
    g = torch.Generator().manual_seed(k)
    for _ in range(60):
        z = torch.randn(k, generator=g, dtype=F64)
        for radius in (0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0):
            expected = torch.from_numpy(recursive(z.numpy(), radius))
            torch.testing.assert_close(sparsestmax(z, radius), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sparsemax(z), torch.from_numpy(simplex(z.numpy())), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_sparsestmax_stays_on_the_simplex_at_equal_weights(k, dtype):
    for value, radius in itertools.product((0.0, 1.0, -7.3), np.linspace(0, 1, 21)):
        z = torch.full((k,), value, dtype=dtype).requires_grad_()
        p = sparsestmax(z, float(radius))
        torch.testing.assert_close(p, torch.full((k,), 1 / k, dtype=dtype))
        (grad,) = torch.autograd.grad(p, z, torch.arange(k, dtype=dtype))
        assert grad.isfinite().all()


@pytest.mark.parametrize("tie", [(0.5, 0.5, 0.1), (0.5, 0.1, 0.1), (0.5, 0.5 + 1e-7, 0.5)])
def test_sparsestmax_with_ties(tie):
    for radius in np.linspace(0, 1, 21):
        z = torch.tensor(tie, dtype=torch.float32).requires_grad_()
        p = sparsestmax(z, float(radius))
        assert p.min() >= 0
        torch.testing.assert_close(p.sum(), torch.tensor(1.0))
        (grad,) = torch.autograd.grad(p, z, torch.tensor([1.0, -2.0, 0.5]))
        assert grad.isfinite().all()


def test_sparsestmax_ends_in_a_corner():
    corner = math.sqrt(2 / 3)
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        z = torch.randn(3, generator=g, dtype=F64)
        for radius in (corner + 1e-9, 0.9, 1.0):
            expected = F.one_hot(z.argmax(), 3).double()
            torch.testing.assert_close(sparsestmax(z, radius), expected, rtol=0, atol=1e-12)
    assert sparsestmax(torch.tensor([0.3, 0.2, 0.1], dtype=F64), 0.8).max() < 1  # before it, not yet


def test_sparsestmax_gradient():
    z = torch.tensor([0.4, 0.15, -0.1], dtype=F64, requires_grad=True)
    for radius in (0.0, 0.2, 0.5, 0.65):
        assert torch.autograd.gradcheck(lambda z, r=radius: sparsestmax(z, r), z)


@pytest.mark.parametrize("entry", [0, 1, 2])
def test_without_entry_the_others_are_as_if_it_were_not_there(entry):
    z = torch.tensor([0.3, -1.0, 2.0], dtype=F64, requires_grad=True)
    rest = [k for k in range(3) if k != entry]
    weights = without_entry(lambda z: torch.softmax(z, 0), z, entry)
    assert weights[entry] == 0
    assert torch.equal(weights[rest], torch.softmax(z[rest], 0))
    (grad,) = torch.autograd.grad(weights[rest[0]], z)
    assert grad[entry] == 0
    assert grad[rest].all()
