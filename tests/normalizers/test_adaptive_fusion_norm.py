"""Zhou et al. 2023: two encoder-decoders on the batch statistics."""

import math

import pytest
import torch
from torch import nn

from lightning_norm import AdaptiveFusionNorm, ASRNorm, recalibrate
from lightning_norm.errors import OtherFileWarning
from tests.normalizers.paper import F64, agrees, along, data, shaken

SHAPES = [(5, 6), (5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]
CLOSED = {"gate_init": -math.inf, "rescale_init": 0.0, "dropout": 0.0}


def encode(p, name, v):
    hidden = (p[f"{name}_encoder_weight"] @ v + p[f"{name}_encoder_bias"]).clamp(min=0)

    def decode(letter):
        return p[f"{letter}_decoder_weight"] @ hidden + p[f"{letter}_decoder_bias"]

    return decode


def adapted(mu, sd, p, eps, seen=None, gated=True):
    """m, d, gamma and beta of one vector of statistics (C,); E_s reads ``seen``."""
    seen_mu, seen_sd = (mu, sd) if seen is None else seen
    g_mu, g_sd = torch.sigmoid(p["lambda_mu"]), torch.sigmoid(p["lambda_sigma"])
    m = g_mu * encode(p, "std", seen_mu)("mu") + (1 - g_mu) * mu
    d = g_sd * encode(p, "std", seen_sd)("sigma").clamp(min=0) + (1 - g_sd) * sd
    l_beta, l_gamma = (p["lambda_beta"], p["lambda_gamma"]) if gated else (1, 1)
    gamma = l_gamma * torch.sigmoid(encode(p, "rescale", sd)("gamma")) + p.get("weight", 1)
    beta = l_beta * torch.tanh(encode(p, "rescale", mu)("beta")) + p.get("bias", 0)
    return m, torch.maximum(d, torch.tensor(eps, dtype=F64).sqrt()), gamma, beta


def paper(running=None, eps=1e-5):
    def reference(x, p):
        dims = [d for d in range(x.dim()) if d != 1]
        mean, var = running or (x.mean(dims), x.var(dims, unbiased=False))
        m, d, gamma, beta = adapted(mean, torch.sqrt(var + eps), p, eps)
        return along(gamma, x) * (x - along(m, x)) / along(d, x) + along(beta, x)

    return reference


@pytest.mark.parametrize("arguments", [{}, {"affine": False}, {"std_ratio": 1, "rescale_ratio": 2}, {"eps": 0.3}])
@pytest.mark.parametrize("shape", SHAPES)
def test_equation(shape, arguments):
    layer = shaken(AdaptiveFusionNorm(6, dropout=0.0, **arguments))
    agrees(layer, paper(eps=layer.eps), data(*shape))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 6, 1, 1)])
def test_evaluation_feeds_the_running_statistics_to_the_same_networks(shape):
    layer = shaken(AdaptiveFusionNorm(6)).eval()
    agrees(layer, paper((layer.running_mean, layer.running_var)), data(*shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_published_evaluation_uses_the_test_batch(shape):
    layer = shaken(AdaptiveFusionNorm(6, track_running_stats=False)).eval()
    x = data(*shape)
    agrees(layer, paper(), x)
    assert (layer(x[:2])[0] - layer(x)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("channels", [1, 3, 8, 40])
def test_there_is_a_hidden_unit(channels):
    layer = shaken(AdaptiveFusionNorm(channels, dropout=0.0))
    assert layer.std_encoder_weight.shape == (max(1, channels // 2), channels)
    assert layer.rescale_encoder_weight.shape == (max(1, channels // 16), channels)
    agrees(layer, paper(), data(5, channels, 4, 3))


def test_running_statistics_are_batch_norms():
    ours, theirs = AdaptiveFusionNorm(6, momentum=0.3).double(), nn.BatchNorm2d(6, momentum=0.3).double()
    for seed in range(3):
        ours(data(5, 6, 7, 3, seed=seed)), theirs(data(5, 6, 7, 3, seed=seed))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


def test_starts():
    torch.manual_seed(0)
    layer = AdaptiveFusionNorm(64)
    shown = {name: round(value.item(), 4) for name, value in layer.monitor().items()}
    assert shown == {"gate_mu": 0.0474, "gate_sigma": 0.0474, "gate_beta": 0.0067, "gate_gamma": 0.0067}
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)  # made first, as the layer's first encoder is
    assert torch.equal(layer.std_encoder_weight, linear.weight)
    assert torch.equal(layer.std_encoder_bias, linear.bias)
    y = layer.double()(data(16, 64, 5, 5))
    assert y.mean().abs() < 0.1  # with the published gate of 0.512 about 0.5 and 1.9
    assert 0.9 < y.std() < 1.2


@pytest.mark.parametrize("training", [True, False])
def test_closed_gates_are_batch_norm(training):
    ours, theirs = AdaptiveFusionNorm(6, **CLOSED).double(), nn.BatchNorm2d(6).double()
    for layer in (ours, theirs):
        layer(data(5, 6, 7, 3, seed=1))
        nn.init.constant_(layer.weight, 1.7)
        layer.train(training)
    x, dy = data(5, 6, 7, 3), data(5, 6, 7, 3, seed=99)
    results = []
    for layer in (ours, theirs):
        a = x.clone().requires_grad_()
        y = layer(a)
        results.append((y, *torch.autograd.grad(y, [a, layer.weight, layer.bias], dy)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert ours.preserves_eval
    assert not AdaptiveFusionNorm(6, gate_init=-math.inf).preserves_eval
    assert not AdaptiveFusionNorm(6, rescale_init=0.0).preserves_eval
    ours(x).mean().backward()
    assert ours.lambda_mu.grad == ours.lambda_sigma.grad == 0  # closed for good


def test_the_divisor_never_vanishes():
    layer = AdaptiveFusionNorm(6, dropout=0.0, gate_init=math.inf).double()
    for p in (layer.sigma_decoder_weight, layer.sigma_decoder_bias):
        nn.init.constant_(p, -1.0)  # D_sigma is 0 everywhere
    agrees(layer, paper(), data(5, 6, 7, 3))
    assert layer(data(5, 6, 7, 3)).isfinite().all()


@pytest.mark.parametrize("make", [AdaptiveFusionNorm, ASRNorm])
def test_a_constant_channel_has_finite_gradients(make):
    layer = make(6).double()
    x = data(5, 6, 7, 3)
    x[:, 2] = 4.0
    x.requires_grad_()
    layer(x).square().sum().backward()
    for name, grad in (("x", x.grad), *((n, p.grad) for n, p in layer.named_parameters())):
        assert grad.isfinite().all(), name


class TestDropout:
    def layer(self, p=0.3):
        return shaken(AdaptiveFusionNorm(64, dropout=p))

    def test_recalibration_drops_nothing(self):
        first, second = self.layer(), nn.BatchNorm2d(64).double()
        model, seen = nn.Sequential(first, second), []
        for seed in (0, 1):
            torch.manual_seed(seed)
            recalibrate(model, [data(5, 64, 3, 3)])
            seen.append(second.running_var.clone())
        assert torch.equal(*seen)

    def test_equation_with_the_mask(self):
        """The first C numbers drawn are for mu, the next for sigma; the rescaling network sees all statistics."""
        layer, x = self.layer(), data(5, 64, 3, 3)

        def reference(x, p):
            mean, sd = x.mean((0, 2, 3)), torch.sqrt(x.var((0, 2, 3), unbiased=False) + 1e-5)
            torch.manual_seed(7)
            keep = torch.rand(2, 64, dtype=F64) >= 0.3
            m, d, gamma, beta = adapted(mean, sd, p, 1e-5, (mean * keep[0] / 0.7, sd * keep[1] / 0.7))
            return along(gamma, x) * (x - along(m, x)) / along(d, x) + along(beta, x)

        torch.manual_seed(7)
        agrees(layer, reference, x)

    def test_keeps_the_expectation(self):
        layer = self.layer()
        statistics = torch.full((2000, 64), 3.0)
        dropped = layer.drop_statistics(statistics)
        assert dropped.unique().tolist() == [0.0, pytest.approx(3 / 0.7)]
        error = 3 * math.sqrt(0.3 / 0.7 / statistics.numel())  # standard error of the mean
        assert abs(dropped.mean().item() - 3) < 5 * error

    def test_only_in_training(self):
        layer, x = self.layer(), data(5, 64, 3, 3)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))

    @pytest.mark.parametrize("fraction", [0.0, 1.0])
    def test_ends(self, fraction):
        layer, x = self.layer(fraction), data(5, 64, 3, 3)
        expected = x if fraction == 0 else torch.zeros_like(x)
        assert torch.equal(layer.drop_statistics(x), expected)
        assert layer(x).isfinite().all()

    def test_a_new_share_compiles_nothing_anew(self, monkeypatch):
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compiler(f, backend="aot_eager", **kwargs))
        layer, x = AdaptiveFusionNorm(64, dropout=0.5), data(5, 64, 3, 3).float()
        layer.compile()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        first = [layer(x) for _ in range(2)]
        assert not torch.equal(*first)
        layer.dropout = 0.0
        exact = [layer(x) for _ in range(2)]
        assert torch.equal(*exact)
        layer.compiled = False
        torch.testing.assert_close(layer(x), exact[0])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("std_ratio", 0), ("std_ratio", 2.0), ("std_ratio", True), ("rescale_ratio", -1), ("gate_init", math.nan),
        ("rescale_init", math.inf), ("dropout", 1.1), ("dropout", -0.1),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=f"AdaptiveFusionNorm: {argument} must .* got {value!r}"):
        AdaptiveFusionNorm(6, **{argument: value})


def test_one_value_in_training_is_refused():
    with pytest.raises(ValueError, match="more than one value per statistic"):
        AdaptiveFusionNorm(6)(torch.randn(1, 6, 1, 1))


def test_the_checkpoint_of_the_other_one_is_refused():
    afn, asr = AdaptiveFusionNorm(6), ASRNorm(6)
    with pytest.raises(RuntimeError, match="the file holds that of ASRNorm"):
        afn.load_state_dict(asr.state_dict())
    with pytest.raises(RuntimeError, match="the file holds that of AdaptiveFusionNorm. Swap"):
        asr.load_state_dict(afn.state_dict())
    with pytest.warns(OtherFileWarning, match="the file's layers are of 'asr'"):  # the same tensors
        AdaptiveFusionNorm(6, track_running_stats=False).load_state_dict(asr.state_dict())
