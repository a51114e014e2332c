"""Adaptive standardization and rescaling normalization: encoder-decoders on the instance statistics."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning_norm.layers.arguments import stateless
from lightning_norm.layers.base import Paper
from lightning_norm.normalizers.encoder_decoder import EncoderDecoderNorm
from lightning_norm.ops.moments import Affine, Moments


class ASRNorm(EncoderDecoderNorm):
    r"""Normalize by each sample's own statistics, adapted by an encoder-decoder; a second one adapts gamma and beta.

    .. math::
        y = \gamma \frac{x - m}{d} + \beta, \qquad m = \mu + g_\mu (D_\mu E_s \mu - \mu), \quad
        d = \sigma + g_\sigma (D_\sigma E_s \sigma - \sigma), \quad
        \beta = b_\beta + \lambda_\beta D_\beta E_r \mu, \quad \gamma = b_\gamma + \lambda_\gamma D_\gamma E_r \sigma

    with mu and sigma = sqrt(variance + eps) per sample and channel, g the sigmoid of lambda, ``weight`` b_gamma and
    ``bias`` b_beta. An encoder is Linear, ReLU; a decoder Linear, then nothing, ReLU, tanh and sigmoid for mu, sigma,
    beta and gamma. Training and evaluation are the same. Fan et al., CVPR 2021, arXiv 2106.01899.

    When: generalization to unseen domains, trained with adversarial domain augmentation. When not: plain
    classification, where it is behind batch normalization, and feature maps of one element.

    Args:
        num_features: channels, the C of an input (N, C, *).
        std_ratio: E_s has C // std_ratio hidden units, at least one.
        rescale_ratio: E_r has C // rescale_ratio, at least one.
        gate_init: start of lambda_mu and lambda_sigma; ``-inf`` closes the gates for good, for it has no gradient.
        rescale_init: start of lambda_beta and lambda_gamma, which no sigmoid bounds.
        rescale_gate: ``False`` for 1 in place of lambda_beta and lambda_gamma, for training from scratch.
        options: ``correction=1`` and ``eps_outside=True`` are as in the public code, whose checkpoints need them; eps,
            affine, bias, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: a ratio or a start out of range, or one element per sample and channel.

    Differs from the public code, which is not the authors': one sigmoid per gate, and not two; biased variance; at
    least one hidden unit; d is at least sqrt(eps). Without affine b_gamma is 1 and b_beta 0.

    >>> ASRNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "asr"
    paper = Paper(
        "Fan et al.",
        2021,
        "Adversarially Adaptive Normalization for Single Domain Generalization",
        "arXiv 2106.01899",
    )
    train_uses_batch_stats: ClassVar[bool] = False
    repr_arguments: ClassVar[tuple[str, ...]] = (*EncoderDecoderNorm.repr_arguments, "rescale_gate")
    evaluation_arguments: ClassVar[tuple[str, ...]] = (*EncoderDecoderNorm.evaluation_arguments, "rescale_gate")

    def __init__(
        self,
        num_features: int,
        *,
        std_ratio: int = 2,
        rescale_ratio: int = 16,
        gate_init: float = -3.0,
        rescale_init: float = 0.0067,
        rescale_gate: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            num_features,
            std_ratio=std_ratio,
            rescale_ratio=rescale_ratio,
            gate_init=gate_init,
            rescale_init=rescale_init,
            rescale_gate=rescale_gate,
            **stateless(type(self).__name__, options),
        )

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        # The same object twice tells ``recode`` that the statistics are those of the sample itself.
        return self.recode(m, m)

    # A description holds for the class that defines it alone: this line says that it holds here, too.
    fused_spec = EncoderDecoderNorm.fused_spec

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements per sample and channel."""
        # No other sample takes part, in training neither.
        return size
