"""The formulas as published, for ``lightning-norm bench``: whole tensors, one full reduction per statistic."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, dropout, linear, normalize

from lightning_norm.layers.arguments import number_of_groups
from lightning_norm.layers.base import Normalizer

CONTEXTS = 3
"""Of cn, given in turn to the samples of the batch."""

Parameters = Mapping[str, Tensor]


class Naive(nn.Module):
    """A layer of ours, written naively, with parameters of its own that start alike.

    Args:
        layer: the layer.

    Attributes:
        dropout: probability with which afn leaves a statistic out.
    """

    dropout: float

    def __init__(self, layer: Normalizer) -> None:
        super().__init__()
        self.key, self.dropout = layer.key, float(getattr(layer, "dropout", 0.0))
        for name, parameter in layer.named_parameters():
            # Copies, or both layers would add to the same gradients.
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, (N, C, *), by the statistics of this batch."""
        p = dict(self.named_parameters())
        if self.key in ("afn", "asr"):
            return recoded(x, p, self.key, self.dropout)
        return FORMULAS[self.key](x, p)


def along(t: Tensor, x: Tensor) -> Tensor:
    """Return a (C,) or (1, C) tensor so that it broadcasts against x."""
    return t.reshape(1, -1, *(1,) * (x.dim() - 2))


def space(x: Tensor) -> tuple[int, ...]:
    """Return the axes of the positions."""
    return tuple(range(2, x.dim()))


def moments(x: Tensor, statistic: str) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of instance, layer or batch."""
    axes = {"in": space(x), "ln": (1, *space(x)), "bn": (0, *space(x))}[statistic]
    return x.mean(axes, keepdim=True), x.var(axes, keepdim=True, correction=0)


def standardized(x: Tensor, statistic: str) -> Tensor:
    r"""Return the input with mean 0 and variance 1.

    .. math:: \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad \epsilon = 10^{-5}

    Args:
        x: (N, C, *).
        statistic: over what mean and variance are taken: "bn", "in" or "ln".
    """
    mean, var = moments(x, statistic)
    return (x - mean) / torch.sqrt(var + 1e-5)


def affine(y: Tensor, p: Parameters) -> Tensor:
    """Return gamma * y + beta."""
    return y * along(p["weight"], y) + along(p["bias"], y)


def grouped(x: Tensor, p: Parameters) -> Tensor:
    """Normalize as gn does, with as many groups as it chooses by itself."""
    # A group becomes one channel, whose instance statistics are then those of the group.
    groups = number_of_groups("gn", x.shape[1], "auto", None)
    parts = x.reshape(x.shape[0], groups, -1)
    return affine(standardized(parts, "in").reshape(x.shape), p)


def switchable(x: Tensor, p: Parameters) -> Tensor:
    r"""Normalize as sn does: mix three pairs of statistics.

    .. math:: y = \gamma \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma^2_k + \epsilon}} + \beta
    """
    # One set of importance weights for the means, another for the variances.
    w, v = torch.softmax(p["mean_weight"], 0), torch.softmax(p["var_weight"], 0)
    statistics = [moments(x, statistic) for statistic in ("in", "ln", "bn")]
    zero = x.new_zeros(())
    mean = sum((a * m for a, (m, _) in zip(w, statistics, strict=True)), zero)
    var = sum((a * s for a, (_, s) in zip(v, statistics, strict=True)), zero)
    return affine((x - mean) / torch.sqrt(var + 1e-5), p)


def batch_channel(x: Tensor, p: Parameters) -> Tensor:
    r"""Normalize as bcn does: mix two normalized outputs.

    .. math:: y = \gamma\,(\iota\,\hat{x}_{\mathrm{bn}} + (1 - \iota)\,\hat{x}_{\mathrm{ln}}) + \beta
    """
    iota = along(p["iota"], x)
    return affine(iota * standardized(x, "bn") + (1 - iota) * standardized(x, "ln"), p)


def diminishing(x: Tensor, p: Parameters) -> Tensor:
    r"""Normalize as dbn does with a first batch.

    .. math:: y = \gamma \frac{x - \mu_B}{\sigma_B + \epsilon} + \beta
    """
    mean, var = moments(x, "bn")
    # The paper adds eps to the deviation, outside of the root.
    return affine((x - mean) / (var.sqrt() + 1e-5), p)


def representative(x: Tensor, p: Parameters) -> Tensor:
    r"""Normalize as rbn does with unit gates.

    .. math:: y = \gamma\,\frac{\mathrm{sigmoid}(w_v m + w_b)}{\mathrm{sigmoid}(1)}
        \,\hat{x} + \beta, \qquad \hat{x} = \mathrm{BN}(x + w_m \bar{x}_{nc}), \quad m = \overline{\hat{x}}_{nc}
    """
    # A new tensor, where the published code writes into its input.
    x = x + along(p["center_weight"], x) * x.mean(space(x), keepdim=True)
    x = standardized(x, "bn")
    gate = along(p["scale_weight"], x) * x.mean(space(x), keepdim=True) + along(p["scale_bias"], x)
    return affine(x * gate.sigmoid() / torch.sigmoid(torch.tensor(1.0)), p)


def unified(x: Tensor, p: Parameters) -> Tensor:
    """Normalize as ubn does with unit gates and a batch that is not condensed."""
    # Condensation is the mean cosine of all pairs of samples; no gradient flows through the decision.
    u = normalize(x.detach().flatten(1), dim=1)
    condensed = (u @ u.t()).mean() > 1.0
    gate = along(p["affine_weight"], x) * x.mean(space(x), keepdim=True) + along(p["affine_bias"], x)
    gamma = gate.sigmoid() / torch.sigmoid(torch.tensor(-1.0)) * (~condensed)
    # Beta is added after the gate, so the inner normalization goes without it.
    inner = representative(x, {**p, "bias": torch.zeros_like(p["bias"])})
    return gamma * inner + along(p["bias"], x)


def contextual(x: Tensor, p: Parameters) -> Tensor:
    """Normalize as cn does, each context by its own statistics."""
    y, ids = torch.zeros_like(x), contexts_of(x).view(-1, *(1,) * (x.dim() - 1))
    # As published: one pass over the whole tensor per context, with the other samples masked out.
    for k in range(CONTEXTS):
        chosen = (ids == k).to(x.dtype)
        n = chosen.sum() * x[0, 0].numel()
        mean = (chosen * x).sum((0, *space(x)), keepdim=True) / n
        var = (chosen * (x - mean).square()).sum((0, *space(x)), keepdim=True) / n
        y = y + chosen * affine((x - mean) / torch.sqrt(var + 1e-5), {n: t[k] for n, t in p.items()})
    return y


def recoded(x: Tensor, p: Parameters, key: str, drop_prob: float) -> Tensor:
    """Normalize as afn and asr do, by what two encoder-decoders make of the statistics.

    Args:
        x: (N, C, *).
        p: the parameters.
        key: "afn" or "asr".
        drop_prob: probability with which the first encoder does not see a statistic.
    """
    mean, var = moments(x, "bn" if key == "afn" else "in")

    def decoded(encoder: str, decoder: str, v: Tensor) -> Tensor:
        hidden = linear(v, p[f"{encoder}_encoder_weight"], p[f"{encoder}_encoder_bias"]).relu()
        return linear(hidden, p[f"{decoder}_decoder_weight"], p[f"{decoder}_decoder_bias"])

    mu, sigma = mean.flatten(1), torch.sqrt(var.flatten(1) + 1e-5)
    center = torch.lerp(mu, decoded("std", "mu", dropout(mu, drop_prob)), p["lambda_mu"].sigmoid())
    scale = torch.lerp(sigma, decoded("std", "sigma", dropout(sigma, drop_prob)).relu(), p["lambda_sigma"].sigmoid())
    beta = p["lambda_beta"] * decoded("rescale", "beta", mu).tanh() + p["bias"]
    gamma = p["lambda_gamma"] * decoded("rescale", "gamma", sigma).sigmoid() + p["weight"]
    center, scale, beta, gamma = (t.view(t.shape + (1,) * (x.dim() - 2)) for t in (center, scale, beta, gamma))
    return (x - center) / scale * gamma + beta


def contexts_of(x: Tensor) -> Tensor:
    """Return the context of each sample of the benchmark, (N,)."""
    return torch.arange(x.shape[0], device=x.device) % CONTEXTS


FORMULAS: dict[str, Callable[[Tensor, Parameters], Tensor]] = {
    "bn": lambda x, p: affine(standardized(x, "bn"), p),
    "in": lambda x, p: affine(standardized(x, "in"), p),
    "gn": grouped,
    "ln": lambda x, p: affine(standardized(x, "ln"), p),
    "sn": switchable,
    "bcn": batch_channel,
    "bnet": lambda x, p: conv2d(standardized(x, "bn"), p["kernel"], p["bias"], padding=1, groups=x.shape[1]),
    "dbn": diminishing,
    "rbn": representative,
    "ubn": unified,
    "cn": contextual,
    "afn": lambda x, p: recoded(x, p, "afn", 0.0),
    "asr": lambda x, p: recoded(x, p, "asr", 0.0),
}
