"""Batch-channel normalization: a learned mixture of batch- and layer-normalized outputs, one weight per channel."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.errors import counted
from lightning_norm.layers import on_cpu
from lightning_norm.layers.base import Paper
from lightning_norm.layers.choice import Choice
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.published_files import PublishedEntries, PublishedLayer, PublishedNames
from lightning_norm.layers.token_norm import PerToken
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout, at_least_float32
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.per_token import Tokens


class BatchChannelNorm(PerToken):
    r"""Mix the batch-normalized and the layer-normalized input, channel by channel.

    .. math::
        y = \gamma\,[\iota X + (1 - \iota) Y] + \beta, \qquad
        X = \frac{x - \mu_B}{\sqrt{\sigma^2_B + \epsilon}},\quad Y = \frac{x - \mu_L}{\sqrt{\sigma^2_L + \epsilon}}

    with mu_B, sigma_B over the batch per channel and mu_L, sigma_L over channels and positions per sample. ``iota``
    (C,) starts at 1, where the layer is batch normalization. With ``per_token``, mu_L and sigma_L are those of each
    token over its channels: :math:`\mu_{nl} = \frac{1}{C} \sum_c x_{nlc}` and
    :math:`\sigma^2_{nl} = \frac{1}{C} \sum_c (x_{nlc} - \mu_{nl})^2`. Khaled et al. 2023, arXiv 2312.00596.

    When: a network trained with BatchNorm whose batches are small or shift, for it starts from the same function. When
    not: if the layer must be folded for inference.

    Args:
        num_features: channels, the C of an input (N, C, *).
        constraint: how iota is kept in [0, 1]: ``None`` not at all (published), "clamp", or "sigmoid" of a stored
            logit, which starts at 6 (iota = 0.9975), since iota = 1 is out of a sigmoid's reach.
        correction: 0, or 1 for the authors' estimator, which their checkpoints need: the running variance is biased,
            and evaluation multiplies it by m / (m - 1), with m the elements per channel of the evaluation batch.
        per_token: for tokens (N, L, C) with ``channel_dim=-1``: mu_L and sigma_L are those of each token over its C
            channels, as ``torch.nn.LayerNorm`` has them, in place of those of the whole sample.
        options: eps, momentum, affine, bias, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: an unknown constraint, or ``per_token`` without ``channel_dim=-1``.

    Differs from the paper: the running variance is stored unbiased, as in torch, and used as it is, so that evaluation
    never depends on the evaluation batch (``correction=1`` is published); ``momentum`` takes effect. Not to be confused
    with Qiao et al.'s batch-channel normalization (arXiv 1911.09738), which applies the two in sequence.

    >>> BatchChannelNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "bcn"
    paper = Paper(
        "Khaled et al.", 2023, "BCN: Batch Channel Normalization for Image Classification", "arXiv 2312.00596"
    )
    extra_parameters: ClassVar[dict[str, str]] = {"iota": "C"}
    repr_arguments: ClassVar[tuple[str, ...]] = ("constraint", "correction", "per_token")
    evaluation_arguments: ClassVar[tuple[str, ...]] = ("constraint", "correction", "per_token")
    published_names: ClassVar[PublishedNames] = PublishedNames(("BCN_var", "gamma", "beta", "Batchh.", "layeer."))
    iota: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        constraint: Literal["clamp", "sigmoid"] | None = None,
        correction: Literal[0, 1] = 0,
        per_token: bool = False,
        **options: Any,
    ) -> None:
        # Before the base class, whose ``reset_parameters`` asks for the start of iota.
        self.constraint, self.correction, self.per_token = constraint, correction, per_token
        super().__init__(num_features, **options)
        self._check_per_token()
        self._add_parameters(options, iota=(num_features,))

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above, around each sample's own mean, where no digit is lost."""
        batch, layer = self._over_batch(m), m.over_channels()
        iota = self.mixture()
        # With X = (x - mu_B) / sigma_B and Y alike, both are affine in x, so their mixture is one affine map.
        x = iota * (batch.var.to(m.mean.dtype) + self.eps).rsqrt()
        y = (1 - iota) * (layer.var.to(m.mean.dtype) + self.eps).rsqrt()
        scale, shift = x + y, x * (m.mean - batch.mean) + y * (m.mean - layer.mean)
        if self.weight is not None:
            scale, shift = self.weight * scale, self.weight * shift
        return Affine(m.mean, scale, shift if self.bias is None else shift + self.bias)

    def _over_batch(self, m: Moments) -> Moments:
        pooled = m.over_batch()
        batch = self.track(pooled)
        # As published: the running variance is biased, and evaluation corrects it by the size of the batch at hand.
        if self.correction and not self.training and self.has_running_stats:
            batch = Moments(batch.mean, batch.var, pooled.count).unbiased()
        return batch

    def of_tokens(self, t: Tokens) -> Tensor:
        """Return y, with the layer-normalized input of each token."""
        batch, iota = self._over_batch(t.moments), self.mixture()
        dtype, zero = t.moments.mean.dtype, t.moments.mean.new_zeros(1, 1)
        # Both are written out: a token's statistics change along the positions, so no map per channel is both.
        x = t.minus(batch.mean, zero) * t.along(iota * (batch.var.to(dtype) + self.eps).rsqrt())
        mixed = torch.addcmul(x, t.centered, (t.var + self.eps).rsqrt() * t.along(1 - iota))
        return t.scaled(mixed, mixed.new_ones(()), self.weight, self.bias)

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return the same equation with a backward pass that is written out."""
        if self.correction or self.per_token:
            return None
        return on_cpu.mixture(self, x, layout, ("bn", "ln"), self.mixture(), outputs=True)

    def fused_spec(self, layout: Layout) -> MixtureSpec | None:
        """Return the same equation for the kernels, which know the running variance of torch alone."""
        if self.correction or self.per_token:
            return None
        return mixture_spec(self, ("bn", "ln"), w=self.mixture(), outputs=True)

    @property
    def preserves_eval(self) -> bool:
        """Whether iota starts at exactly 1, and the running variance means what it means in torch."""
        return self.constraint != "sigmoid" and not self.correction

    def evaluates_on_running_stats(self) -> bool:
        """Tell whether iota is exactly 1 in every channel: batch normalization."""
        return self.has_running_stats and not self.correction and bool((self.mixture() == 1).all())

    def running_target(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean and variance that the running ones move towards; the authors' are biased."""
        return (m.mean, m.var) if self.correction else super().running_target(m)

    def evaluates_as_layer_norm(self) -> bool:
        """Tell whether iota is exactly 0 in every channel."""
        return bool((self.mixture() == 0).all())

    def choice(self, threshold: float) -> Choice:
        """Return batch normalization where iota is near 1 in every channel, layer normalization where it is near 0."""
        iota = self.mixture().detach().double().cpu()
        weights = {"bn": 1 - (1 - iota).abs(), "ln": 1 - iota.abs()}
        # Of channels that are split between the two, the more frequent choice is looked at.
        norm = max(weights, key=lambda norm: int((weights[norm] >= threshold).sum()))
        least = float(weights[norm].min())
        if not least >= threshold:  # so that NaN has not decided
            counts = ", ".join(f"{norm} in {int((w >= threshold).sum())}" for norm, w in weights.items())
            return Choice("", least, f"undecided (of {counted(len(iota), 'channel')} {counts})")
        why = "correction=1: evaluation no longer depends on the batch" if self.correction and norm == "bn" else ""
        return self._choice_of_tokens(Choice(norm, least, why))

    def mixture(self) -> Tensor:
        """Return iota (C,), constrained: 1 is batch normalization, 0 layer normalization."""
        # A sigmoid in half precision has three digits, and iota multiplies the whole output.
        iota = self.iota.to(at_least_float32(self.iota.dtype))
        return {None: lambda: iota, "clamp": lambda: iota.clamp(0, 1), "sigmoid": iota.sigmoid}[self.constraint]()

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the mean, least and greatest iota over the channels."""
        iota = self.mixture()
        return {"iota": iota.mean(), "iota_min": iota.min(), "iota_max": iota.max()}

    def start_values(self) -> dict[str, float | Tensor]:
        """Return 1 for iota; 6 where it is a sigmoid's logit."""
        return {"iota": 6.0 if self.constraint == "sigmoid" else 1.0}

    @classmethod
    def read_published(cls, entries: PublishedEntries) -> PublishedLayer | None:
        """Return the authors' evaluation; the affine maps of their two inner layers are never used."""
        # A name that no other layer has.
        if "BCN_var" not in entries:
            return None
        c = getattr(entries["BCN_var"], "numel", int)()
        # The authors' names of what the layer computes with; all else in their file is left over from its base classes.
        names = {"BCN_var": "iota", "gamma": "weight", "beta": "bias"}
        names |= {"Batchh.runningmean": "running_mean", "Batchh.runningvar": "running_var"}
        tensors = {ours: entries.per_channel(theirs, c) for theirs, ours in names.items()}
        entries.leave_out(f"{inner}.{name}" for inner in ("Batchh", "layeer") for name in ("gamma", "beta"))
        return PublishedLayer(c, {"correction": 1, "eps": 1e-5}, tensors)
