"""Faye et al.: a BatchNorm per context, and its soft form, by loops over contexts."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_norm import ContextNorm, contexts
from lightning_norm.testing import checks
from tests.normalizers.paper import agrees, along, data, shaken

SHAPES = [(80, 6), (20, 6, 7), (12, 6, 5, 3), (12, 6, 2, 3, 3)]
F64 = torch.float64


def ids_for(n, k=3):
    return torch.arange(n).flip(0) % k


def per_batch_norm(ids, k=3, factor=None):
    """F.batch_norm on each context's samples alone."""

    def reference(x, p):
        y = torch.zeros_like(x)
        for c in range(k):
            custom = (ids == c).nonzero().flatten()
            if len(custom):
                z = F.batch_norm(x[custom], None, None, p["weight"][c], p["bias"][c], training=True)
                y = y.index_add(0, custom, z if factor is None else z * factor)
        return y

    return reference


def mixture(g, stats=None, eps=1e-5):
    """sum_k g_nk (gamma_k (x - mu_k) / sqrt(var_k + eps) + beta_k), each context on the whole tensor."""

    def reference(x, p):
        shares = g(x, p) if callable(g) else g
        axes = [d for d in range(x.dim()) if d != 1]
        y = 0
        for k in range(shares.shape[1]):
            w = shares[:, k].reshape(-1, *(1,) * (x.dim() - 1))
            if stats is None:
                n = w.sum() * x[0, 0].numel()
                mean = (w * x).sum(axes, keepdim=True) / n
                var = (w * (x - mean) ** 2).sum(axes, keepdim=True) / n
            else:
                mean, var = (along(t[k], x) for t in stats)
            y = y + w * (along(p["weight"][k], x) * (x - mean) / torch.sqrt(var + eps) + along(p["bias"][k], x))
        return y

    return reference


def passed(layer, ids):
    """The layer inside of ``contexts``."""

    class Passed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def named_parameters(self, *args, **kwargs):
            return layer.named_parameters()

        def forward(self, x):
            with contexts(layer, ids):
                return layer(x)

    return Passed()


def shaken_rows(**arguments):
    layer = ContextNorm(6, **arguments)
    with torch.no_grad():
        if layer.prior is not None:
            layer.prior.copy_(torch.tensor([0.5, 0.3, 0.2]))
    return shaken(layer)


def soft(n, k=3, seed=3):
    return torch.rand(n, k, dtype=F64, generator=torch.Generator().manual_seed(seed)).softmax(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_hard_contexts_are_a_batch_norm_each(shape):
    ids = ids_for(shape[0])
    agrees(passed(shaken_rows(context="ids"), ids), per_batch_norm(ids), data(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_soft_contexts(shape):
    g = soft(shape[0])
    agrees(passed(shaken_rows(context="ids"), g), mixture(g), data(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape):
    def gate(x, p):
        means = x if x.dim() == 2 else x.flatten(2).mean(2)
        return torch.softmax(means @ p["gate_weight"].t() + p["gate_bias"], 1)

    layer = shaken_rows(context="gate", min_count=1)  # the last shapes leave a context fewer than 16 elements
    agrees(layer, mixture(gate), data(*shape))


@pytest.mark.parametrize("hard", [True, False])
def test_evaluation(hard):
    layer = shaken_rows(context="ids").eval()
    g = F.one_hot(ids_for(12), 3).to(F64) if hard else soft(12)
    agrees(passed(layer, g), mixture(g, (layer.running_mean, layer.running_var)), data(12, 6, 5, 3))


def test_one_context_is_batch_norm():
    x = data(12, 6, 5, 3)
    theirs = nn.BatchNorm2d(6).double()
    ours = ContextNorm(6, num_contexts=1, context="ids").double()
    ours.running_var.mul_(1 + 1e-12)  # off its start: a context's first samples would be taken as they are
    for _ in range(3):
        with contexts(ours, torch.zeros(12, dtype=torch.long)):
            torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_mean[0], theirs.running_mean)
    torch.testing.assert_close(ours.running_var[0], theirs.running_var)


def test_prior_scale_is_the_published_factor():
    layer = shaken_rows(context="ids", prior_scale=True)
    layer.prior.fill_(1 / 3)
    ids = ids_for(12)
    agrees(passed(layer, ids), per_batch_norm(ids, factor=3**0.5), data(12, 6, 5, 3))
    assert not layer.preserves_eval


class TestSmallContexts:
    def test_an_empty_context_is_finite_and_does_not_move(self):
        layer = shaken_rows(context="ids")
        before = copy.deepcopy(layer.state_dict())
        x, ids = data(12, 6, 5, 3).requires_grad_(), torch.arange(12) % 2
        agrees(passed(layer, ids), per_batch_norm(ids), x.detach())
        for name in ("running_mean", "running_var"):
            now = layer.state_dict()[name]
            assert torch.equal(now[2], before[name][2])
            assert not torch.equal(now[0], before[name][0])
        assert layer.prior[2] < 0.2

    def test_borrows_by_the_law_of_total_variance(self):
        """4 of 16 elements: a quarter its own moments, three quarters those of all."""
        layer = ContextNorm(6, context="ids", affine=False).double()
        x = data(12, 6, 2, 2)
        ids = torch.tensor([2] + [0, 1] * 5 + [0])
        with contexts(layer, ids):
            y = layer(x)
        axes = (0, 2, 3)
        custom, every = x[ids == 2], x
        mean = custom.mean(axes) / 4 + 3 * every.mean(axes) / 4
        square = custom.square().mean(axes) / 4 + 3 * every.square().mean(axes) / 4
        expected = (custom - along(mean, x)) / (along(square - mean**2, x) + 1e-5).sqrt()
        torch.testing.assert_close(y[ids == 2], expected)

    def test_moves_the_less_the_rarer(self):
        layer = shaken_rows(context="ids", momentum=0.2)
        before, x = layer.running_mean.clone(), data(12, 6, 5, 5)
        ids = torch.tensor([0] * 9 + [1] * 2 + [2])
        with contexts(layer, ids):
            layer(x)
        for k, fraction in enumerate((9 / 12, 2 / 12, 1 / 12)):
            rate = 0.2 * min(1, 3 * fraction)
            mean = x[ids == k].mean((0, 2, 3))
            torch.testing.assert_close(layer.running_mean[k], (1 - rate) * before[k] + rate * mean)
        expected = 0.8 * torch.tensor([0.5, 0.3, 0.2]) + 0.2 * torch.tensor([9, 2, 1]) / 12
        torch.testing.assert_close(layer.prior, expected, check_dtype=False)

    def test_takes_its_first_samples_as_they_are(self):
        layer = ContextNorm(6, context="ids").double()
        x, ids = data(12, 6, 5, 5), torch.arange(12) % 2
        for scale in (1, 3):
            with contexts(layer, ids):
                layer(scale * x)
            if scale == 1:
                torch.testing.assert_close(layer.running_mean[1], x[ids == 1].mean((0, 2, 3)))
                expected = x[ids == 0].transpose(0, 1).flatten(1).var(1)
                torch.testing.assert_close(layer.running_var[0], expected)
        torch.testing.assert_close(layer.running_mean[1], 1.2 * x[ids == 1].mean((0, 2, 3)))
        assert torch.equal(layer.running_mean[2], torch.zeros(6, dtype=F64))

    def test_momentum_none_averages_all_samples(self):
        layer = ContextNorm(6, context="ids", momentum=None, min_count=1).double()
        x, sums = data(30, 6, 5), torch.zeros(3, 6, dtype=F64)
        ids = torch.tensor([0, 0, 1, 2, 0, 1, 0, 0, 0, 1] + [0] * 10 + [2, 1] * 5)
        for part, who in zip(x.split(10), ids.split(10), strict=True):
            with contexts(layer, who):
                layer(part)
        for k in range(3):
            sums[k] = x[ids == k].mean((0, 2))
        torch.testing.assert_close(layer.running_mean, sums)

    def test_a_context_unknown_in_training_is_answered_by_the_others(self):
        layer = ContextNorm(6, context="ids").double()
        x = data(12, 6, 5, 3)
        with contexts(layer, torch.arange(12) % 2):
            layer(x)
        layer.eval()
        pooled = layer(x)
        with contexts(layer, torch.full((12,), 2)):
            torch.testing.assert_close(layer(x), pooled)


class TestMissing:
    def test_pooled(self):
        layer = shaken_rows(context="ids").eval()
        x, fraction = data(5, 6, 4, 3), torch.tensor([[0.5], [0.3], [0.2]], dtype=F64)
        mean = (fraction * layer.running_mean).sum(0)
        var = (fraction * (layer.running_var + (layer.running_mean - mean) ** 2)).sum(0)
        weight, bias = (fraction * layer.weight).sum(0), (fraction * layer.bias).sum(0)
        expected = F.batch_norm(x, mean, var, weight, bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)  # prior was kept in float32 until here

    def test_posterior_finds_the_context(self):
        layer = ContextNorm(6, context="ids", missing="posterior").double()
        far = torch.tensor([-2.0, 0.0, 2.0], dtype=F64)
        ids = torch.arange(30) % 3
        for seed in range(4):
            x = data(30, 6, 8, 8, seed=seed) * 0.3 + far[ids].reshape(-1, 1, 1, 1)
            with contexts(layer, ids):
                layer(x)
        assert (layer.running_spread < 0.5).all()
        layer.eval()
        with contexts(layer, ids):
            known = layer(x)
        guessed = layer(x)
        pooled = copy.deepcopy(layer)
        pooled.missing = "pooled"
        assert (guessed - known).norm() < 0.2 * (pooled(x) - known).norm()
        expected = mixture(posterior(layer, x), (layer.running_mean, layer.running_var))
        torch.testing.assert_close(guessed, expected(x, dict(layer.named_parameters())))
        torch.testing.assert_close(layer(x[:1]), guessed[:1])

    def test_error_and_training(self):
        layer = ContextNorm(6, context="ids", missing="error").eval()
        for training in (True, False):
            with pytest.raises(RuntimeError, match=r"without contexts. Add NormContext\(context_fn=...\)"):
                layer.train(training)(torch.randn(4, 6, 3))
        with pytest.raises(RuntimeError, match=r"context='input'\) was run without contexts. Add NormContext\(\)"):
            ContextNorm(6)(torch.randn(4, 6, 3))
        assert ContextNorm(6).eval()(torch.randn(4, 6, 3)).isfinite().all()

    def test_without_running_statistics(self):
        layer = ContextNorm(6, context="ids", track_running_stats=False).eval().double()
        x = data(12, 6, 5, 3)
        torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True))
        ids = ids_for(12)
        with contexts(layer, ids):
            torch.testing.assert_close(layer(x), per_batch_norm(ids)(x, dict(layer.named_parameters())))


def posterior(layer, x):
    means = x.flatten(2).mean(2)
    score = [
        torch.log(layer.prior[k])
        - (((means - layer.running_mean[k]) ** 2 / (layer.running_spread[k] + 1e-5)) / 2).mean(1)
        - (layer.running_spread[k] + 1e-5).log().mean() / 2
        for k in range(3)
    ]
    return torch.softmax(torch.stack(score, 1).double(), 1)


class IdsOfInput(ContextNorm):
    """Hard contexts from the sign and size of each sample's first number, through the state as a callback would."""

    key = ""
    extra_parameters = {}

    def __init__(self, num_features, **options):
        super().__init__(num_features, **{"context": "ids", **options})

    def shares_of(self, x):
        if not torch.jit.is_tracing() and 0 in x.shape[1:]:  # a trace records no test of a size
            return x.new_zeros(x.shape[0], 3)
        first = x.detach()[(slice(None), *(0,) * (x.dim() - 1))].unsqueeze(1)  # the same for images and tokens
        ids = (first > 0).long() + (first > 1.0).long()
        return (ids == torch.arange(3, device=x.device)).float()

    def forward(self, x, *args, **kwargs):
        if isinstance(x, torch.Tensor) and x.dim() > 1 and x.dtype.is_floating_point:
            self.contexts.responsibilities = self.shares_of(x)
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.contexts.responsibilities = None


class SharesOfInput(IdsOfInput):
    """Soft contexts."""

    def shares_of(self, x):
        return (super().shares_of(x) + 1) / 4


HEAVY = ("gradgradcheck", "formats_agree", "compiled_equals_eager", "ranks_equal_one_process")


@pytest.mark.parametrize("name", checks())
@pytest.mark.parametrize("cls", [IdsOfInput, SharesOfInput])
def test_conformance_with_given_contexts(cls, name):
    if cls is SharesOfInput and name in HEAVY:
        pytest.skip("the same code as with hard contexts, and slow")
    if name in ("activation_checkpointing", "statistics_move_once"):
        pytest.skip("use_reentrant=True keeps nothing of told contexts: an error says so, and has its test")
    if name == "evaluation_form":
        pytest.skip("contexts that follow the input leave no fixed map")
    checks()[name](functools.partial(cls))


def test_evaluation_without_contexts_is_a_batch_norm():
    layer = shaken(ContextNorm(4, num_contexts=3, context="ids"))
    x = data(5, 4, 6, 3)
    torch.testing.assert_close(layer.plain(4).eval()(x), layer.eval()(x), rtol=1e-12, atol=1e-12)
    for arguments in ({"context": "input"}, {"context": "ids", "missing": "error"}):
        layer = ContextNorm(4, num_contexts=3, **arguments)
        assert layer.plain(4) is None
        assert layer.why_not_plain(4) == "its contexts choose the map in evaluation"


@pytest.mark.parametrize(
    "arguments", [{"context": "class"}, {"missing": "zero"}, {"num_contexts": 0}, {"min_count": 0}]
)
def test_bad_arguments(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        ContextNorm(6, **arguments)
    with pytest.raises(ValueError, match="needs track_running_stats"):
        ContextNorm(6, missing="posterior", track_running_stats=False)


def test_monitor_shows_shares_and_entropy():
    layer = ContextNorm(6, context="ids")
    shown = layer.monitor()
    assert list(shown) == ["prior_0", "prior_1", "prior_2", "entropy"]
    torch.testing.assert_close(shown["entropy"], torch.tensor(3.0).log())
    with contexts(layer, torch.zeros(4, dtype=torch.long)):
        layer(torch.randn(4, 6, 3))
    assert layer.monitor()["prior_0"] > 0.39
    assert layer.monitor()["entropy"] < 1.09
