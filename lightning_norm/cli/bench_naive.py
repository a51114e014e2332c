"""Formulas as published, for ``lightning-norm bench``, that take more than a few lines."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear


def recoded(x: Tensor, mean: Tensor, var: Tensor, p: Mapping[str, Tensor], share: float) -> Tensor:
    """Normalize x by what the encoder-decoders of "afn" and "asr" make of its statistics.

    Args:
        x: (N, C, *).
        mean: broadcastable to x.
        var: likewise.
        p: the parameters, by their names in our layers.
        share: of the statistics that the first encoder does not see.
    """

    def decoded(encoder: str, decoder: str, v: Tensor) -> Tensor:
        hidden = linear(v, p[f"{encoder}_encoder_weight"], p[f"{encoder}_encoder_bias"]).relu()
        return linear(hidden, p[f"{decoder}_decoder_weight"], p[f"{decoder}_decoder_bias"])

    mu, sigma = mean.flatten(1), torch.sqrt(var.flatten(1) + 1e-5)
    center = torch.lerp(mu, decoded("std", "mu", dropout(mu, share)), p["lambda_mu"].sigmoid())
    spread = torch.lerp(sigma, decoded("std", "sigma", dropout(sigma, share)).relu(), p["lambda_sigma"].sigmoid())
    beta = p["lambda_beta"] * decoded("rescale", "beta", mu).tanh() + p["bias"]
    gamma = p["lambda_gamma"] * decoded("rescale", "gamma", sigma).sigmoid() + p["weight"]
    center, spread, beta, gamma = (t.view(t.shape + (1,) * (x.dim() - 2)) for t in (center, spread, beta, gamma))
    return (x - center) / spread * gamma + beta
