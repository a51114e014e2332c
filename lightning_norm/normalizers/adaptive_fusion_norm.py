"""Adaptive fusion normalization: encoder-decoders on the batch statistics, gated into them."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from lightning_norm.layers.accumulators import StatisticsAccumulator
from lightning_norm.layers.base import Paper
from lightning_norm.layers.scheduled import Scheduled, was_scheduled
from lightning_norm.normalizers.encoder_decoder import EncoderDecoderNorm
from lightning_norm.ops.moments import Affine, Moments


class AdaptiveFusionNorm(EncoderDecoderNorm):
    r"""Normalize by batch statistics that an encoder-decoder adapts; a second one adapts gamma and beta.

    .. math::
        y = \gamma \frac{x - m}{d} + \beta, \qquad m = \mu + g_\mu (D_\mu E_s \mu - \mu), \quad
        d = \sigma + g_\sigma (D_\sigma E_s \sigma - \sigma), \quad
        \beta = b_\beta + \lambda_\beta D_\beta E_r \mu, \quad \gamma = b_\gamma + \lambda_\gamma D_\gamma E_r \sigma

    with mu and sigma = sqrt(variance + eps) of the batch per channel, g the sigmoid of lambda, ``weight`` b_gamma and
    ``bias`` b_beta. An encoder is Linear, ReLU; a decoder Linear, then nothing, ReLU, tanh and sigmoid for mu, sigma,
    beta and gamma. Zhou et al. 2023, arXiv 2308.03321.

    When: domain generalization with batches large enough for BatchNorm. When not: wide networks that must not grow: a
    layer adds about 1.7 C^2 parameters.

    Args:
        num_features: channels, the C of an input (N, C, *).
        dropout: probability with which an entry of mu or of sigma is hidden from E_s in training, scheduled.
        std_ratio: E_s has C // std_ratio hidden units, at least one.
        rescale_ratio: E_r has C // rescale_ratio, at least one.
        gate_init: start of lambda_mu and lambda_sigma; ``-inf`` closes the gates for good, for it has no gradient.
        rescale_init: start of lambda_beta and lambda_gamma, which no sigmoid bounds.
        options: ``correction=1`` and ``eps_outside=True`` are as in the public code, whose checkpoints need them; eps,
            momentum, affine, bias, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: a ratio, a start or dropout out of range.

    Differs from the paper's code: evaluation feeds running statistics to the same encoder-decoders, so that a sample
    does not depend on its batch mates (``track_running_stats=False`` is published: statistics of the test batch); one
    sigmoid per gate, and not two, so that it starts near batch normalization; biased variance, eps inside the root; at
    least one hidden unit; d is at least sqrt(eps). Without affine b_gamma is 1 and b_beta 0. Each rank of a distributed
    run draws its own dropout mask.

    >>> AdaptiveFusionNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "afn"
    paper = Paper(
        "Zhou et al.",
        2023,
        "AFN: Adaptive Fusion Normalization via an Encoder-Decoder Framework",
        "arXiv 2308.03321",
    )
    eval_uses_input_stats: ClassVar[bool] = False
    repr_arguments: ClassVar[tuple[str, ...]] = ("dropout", *EncoderDecoderNorm.repr_arguments)
    test_arguments: ClassVar[dict[str, Any]] = {"dropout": 0.0}

    def __init__(
        self,
        num_features: int,
        *,
        dropout: Annotated[float, Scheduled(0, 1, training_only=True)] = 0.3,
        std_ratio: int = 2,
        rescale_ratio: int = 16,
        gate_init: float = -3.0,
        rescale_init: float = 0.0067,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features,
            std_ratio=std_ratio,
            rescale_ratio=rescale_ratio,
            gate_init=gate_init,
            rescale_init=rescale_init,
            **options,
        )
        # After the base class, for the tensor behind it goes where the parameters are.
        self.dropout = dropout

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        # The networks see the batch's statistics, and the map is written around each sample's mean.
        return self.recode(self.track(m.over_batch()), m)

    # A description holds for the class that defines it alone: this line says that it holds here, too.
    fused_spec = EncoderDecoderNorm.fused_spec

    def drop_statistics(self, statistics: Tensor) -> Tensor:
        """Return ``statistics`` after dropout: some entries 0, the others divided by the probability to stay."""
        p = self.drop_prob()
        if p is None:
            return statistics
        # One mask for mu and another for sigma, since the two lie one below the other.
        stays = torch.rand_like(statistics) >= p
        # At a dropout of 1 nothing stays, and 0 / 0 would be NaN.
        return statistics * stays / (1 - p).clamp_min(torch.finfo(torch.float32).tiny)

    def drop_prob(self) -> Tensor | None:
        """Return ``dropout`` in training; ``None`` otherwise, and where no random numbers are to be drawn for a 0."""
        # Recalibration estimates the statistics of the layer in evaluation, which drops nothing.
        if not self.training or isinstance(self._accumulator, StatisticsAccumulator):
            return None
        # A compiled graph serves every value that a schedule may set, so it draws for a dropout of 0 as well.
        any_value = torch.compiler.is_compiling() or was_scheduled(self, "dropout")
        return self.scheduled("dropout") if any_value or self.dropout else None

    @property
    def fused_spec_key(self) -> bool:
        """Whether nothing is dropped, which the value of ``dropout`` decides."""
        # The value is in a tensor, whose changes no attribute of the layer shows.
        return not self.training or self.drop_prob() is None

    @property
    def preserves_eval(self) -> bool:
        """Whether all gates start closed."""
        return self.gate_init == -math.inf and self.rescale_init == 0
