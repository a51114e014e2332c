"""What the authors' checkpoints need of bcn, asr, afn and cn: their estimators, in training and evaluation."""

import copy

import pytest
import torch

from lightning_norm import AdaptiveFusionNorm, ASRNorm, BatchChannelNorm, ContextNorm, contexts
from tests.normalizers.paper import F64, agrees, along, data, shaken
from tests.normalizers.test_adaptive_fusion_norm import adapted
from tests.normalizers.test_batch_channel_norm import paper as bcn

SHAPES = [(5, 6, 7), (5, 6, 4, 3)]
ENDS = [(1, True), (1, False), (0, True)]


def public(rows, correction, outside, eps=1e-6, running=None):
    """Statistics of each sample, or of the batch, by the public code's estimators."""

    def of(x, p):
        dims = [d for d in range(x.dim()) if d != 1]
        mean, var = running or (x.mean(dims), x.var(dims, unbiased=bool(correction)))
        sd = var.sqrt() + eps if outside else (var + eps).sqrt()
        m, d, gamma, beta = adapted(mean, sd, p, 0.0)
        return along(gamma, x) * (x - along(m, x)) / along(d, x) + along(beta, x)

    return lambda x, p: torch.cat([of(row, p) for row in x.unsqueeze(1)]) if rows else of(x, p)


@pytest.mark.parametrize(("correction", "outside"), ENDS)
@pytest.mark.parametrize("cls", [ASRNorm, AdaptiveFusionNorm])
@pytest.mark.parametrize("shape", SHAPES)
def test_encoder_decoders(shape, cls, correction, outside):
    arguments = {"correction": correction, "eps": 1e-6, "eps_outside": outside}
    batch = cls is AdaptiveFusionNorm
    layer = shaken(cls(6, **arguments, **({"dropout": 0.0} if batch else {})))
    agrees(layer, public(not batch, correction, outside), data(*shape))
    running = (layer.running_mean, layer.running_var) if batch else None
    # Running variances are unbiased already.
    agrees(layer.eval(), public(not batch, correction, outside, running=running), data(*shape))
    assert f"correction={correction}" in repr(layer)
    assert layer.fused_spec(None) is None


@pytest.mark.parametrize("cls", [ASRNorm, AdaptiveFusionNorm])
def test_a_constant_channel_has_gradients(cls):
    layer = shaken(cls(6, correction=1, eps=1e-6, eps_outside=True))
    x = data(5, 6, 4, 3)
    x[:, 2] = 1.0
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *layer.parameters()))


@pytest.mark.parametrize("shape", [(5, 6), *SHAPES])
def test_bcn(shape):
    layer = shaken(BatchChannelNorm(6, correction=1, momentum=1.0))
    x = data(*shape)
    agrees(layer, bcn(), x)
    dims = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(layer.running_var, x.var(dims, unbiased=False))
    layer.eval()
    for n in (len(x), 2):
        m = x[:n].numel() / 6
        agrees(layer, bcn(running=(layer.running_mean, layer.running_var * m / (m - 1))), x[:n])
    assert not layer.preserves_eval
    assert layer.plain(4) is None


class TestConstantPriors:
    PRIORS = (0.5, 0.3, 0.2)

    def layer(self, **arguments):
        layer = ContextNorm(6, context="ids", prior_scale=True, priors=list(self.PRIORS), **arguments).double()
        with torch.no_grad():
            layer.running_mean[:2] += torch.randn(2, 6, dtype=F64)
            layer.running_var[:2] += torch.rand(2, 6, dtype=F64)
            layer.weight += torch.randn(3, 6, dtype=F64)
            layer.bias += torch.randn(3, 6, dtype=F64)
        return layer

    def reference(self, layer, x, ids):
        rows = []
        for row, k in zip(x, ids.tolist(), strict=True):
            z = (row - layer.running_mean[k, :, None]) / (layer.running_var[k, :, None] + 1e-5).sqrt()
            rows.append((z * layer.weight[k, :, None] + layer.bias[k, :, None]) / self.PRIORS[k] ** 0.5)
        return torch.stack(rows)

    def test_each_context_stands_alone(self):
        """The last one was never seen in training, and is answered by what it has, as published."""
        layer, x, ids = self.layer().eval(), data(9, 6, 5), torch.arange(9) % 3
        with contexts(layer, ids), torch.no_grad():
            torch.testing.assert_close(layer(x), self.reference(layer, x, ids), rtol=1e-12, atol=1e-12)

    def test_training_leaves_them(self):
        layer, x = self.layer(), data(9, 6, 5)
        before = layer.running_mean.clone()
        with contexts(layer, torch.zeros(9, dtype=torch.long)):
            layer(x).square().mean().backward()
        torch.testing.assert_close(layer.prior, torch.tensor(self.PRIORS, dtype=F64), rtol=1e-6, atol=0)
        assert not torch.equal(layer.running_mean[0], before[0])
        layer.reset_running_stats()
        torch.testing.assert_close(layer.prior, torch.tensor(self.PRIORS, dtype=F64), rtol=1e-6, atol=0)

    def test_they_survive(self):
        layer = self.layer()
        again = ContextNorm(6, context="ids", prior_scale=True, priors=self.PRIORS).double()
        again.load_state_dict(copy.deepcopy(layer.state_dict()))
        x, ids = data(9, 6, 5), torch.arange(9) % 3
        for each in (layer, again):
            each.eval()
        with contexts(layer, ids):
            y = layer(x)
        with contexts(again, ids):
            assert torch.equal(again(x), y)

    @pytest.mark.parametrize(
        "priors", [[0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.4, float("nan")], [True, 0.5, 0.5], [1.5, 0.2, 0.1]]
    )
    def test_bad_ones_are_named(self, priors):
        with pytest.raises(
            ValueError, match=r"priors must be one number in \(0, 1\] for each of num_contexts=3, .*Type priors=\[0.333"
        ):
            ContextNorm(6, priors=priors)
