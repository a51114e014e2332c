"""Switchable normalization: a learned mixture of instance, layer and batch statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_norm.errors import CheckpointError
from lightning_norm.layers import on_cpu
from lightning_norm.layers.base import Paper
from lightning_norm.layers.choice import Choice
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.mixed import MixedNorm
from lightning_norm.layers.published_files import (
    SOURCES,
    PublishedEntries,
    PublishedLayer,
    PublishedNames,
    channels_of_one_layer,
)
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.layers.token_norm import PerToken
from lightning_norm.ops import torch_private
from lightning_norm.ops.clipped import clip_gradient
from lightning_norm.ops.eager import may_read_back
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout, at_least_float32
from lightning_norm.ops.moments import Affine, Moments, mixture
from lightning_norm.ops.per_token import Tokens
from lightning_norm.ops.sparsestmax import sparsestmax, without_entry


class SwitchableNorm(PerToken, MixedNorm):
    r"""Mix instance, layer and batch statistics by learned weights, separate ones for mean and variance.

    .. math::
        y = \gamma \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma^2_k + \epsilon}} + \beta, \qquad
        w = \mathrm{softmax}(\lambda),\; w' = \mathrm{softmax}(\lambda'), \qquad
        k \in \{\mathrm{in}, \mathrm{ln}, \mathrm{bn}\}

    With ``per_token`` the k = ln entries are :math:`\mu_{nl} = \frac{1}{C} \sum_c x_{nlc}` and
    :math:`\sigma^2_{nl} = \frac{1}{C} \sum_c (x_{nlc} - \mu_{nl})^2`.

    ``mean_weight`` is lambda and ``var_weight`` lambda', (3,) each, starting at 1. Luo et al., TPAMI 2021, arXiv
    1806.10779; sparse: Shao et al., CVPR 2019, arXiv 1903.03793.

    When: small batches, where it turns from batch to instance and layer statistics by itself. When not: if the network
    must be folded for inference, for instance and layer statistics stay data dependent.

    Args:
        num_features: channels, the C of an input (N, C, *).
        choices: which statistics to mix, in the order of the weights: "in", "ln", "bn" and also "gn".
        num_groups: for "gn"; "auto" as in :class:`lightning_norm.GroupNorm`.
        channels_per_group: for "gn", in place of it.
        correction: 0 for biased variances, 1 for the authors' estimator (unbiased within each sample), which their
            checkpoints need.
        sparse: replace the softmax by sparsestmax, which reaches one-hot weights as ``radius`` grows.
        radius: of sparsestmax, scheduled from 0 (softmax-like freedom) to 1 (one choice).
        clip_grad: largest Euclidean norm of the gradient of lambda, and of lambda'; a longer one is scaled down before
            it reaches any optimizer. ``None`` clips nothing.
        per_token: for tokens (N, L, C) with ``channel_dim=-1``: "ln" is the mean and the variance of each token over
            its C channels, as ``torch.nn.LayerNorm`` has them, in place of those of the whole sample.
        zero_weight: start gamma at 0, for the last normalizer of a residual branch.
        momentum: weight of the new batch in the running statistics of "bn".
        options: eps, affine, bias, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: unknown, repeated or no choices, a correction other than 0 and 1, a clip_grad not above 0, or
            ``per_token`` without "ln" among the choices or without ``channel_dim=-1``.

    Differs from the paper: momentum has torch's meaning (the authors' 0.997 and 0.9 are 0.003 and 0.1); the running
    variance starts at 1 and not at 0; where a statistic does not exist (instance statistics of one element) it leaves
    and the softmax is taken over the others, as in the authors' 1d layer; equal weights are a fixed point of
    sparsestmax (theirs leave the simplex).

    >>> SwitchableNorm(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "sn"
    paper = Paper(
        "Luo et al.", 2021, "Switchable Normalization for Learning-to-Normalize Deep Representation", "arXiv 1806.10779"
    )
    repr_arguments: ClassVar[tuple[str, ...]] = ("choices", "correction", "sparse", "clip_grad", "per_token")
    evaluation_arguments: ClassVar[tuple[str, ...]] = ("choices", "correction", "sparse", "per_token")

    def __init__(
        self,
        num_features: int,
        *,
        choices: Sequence[Literal["in", "ln", "bn", "gn"]] = ("in", "ln", "bn"),
        num_groups: int | Literal["auto"] = "auto",
        channels_per_group: int | None = None,
        correction: Literal[0, 1] = 0,
        sparse: bool = False,
        radius: Annotated[float, Scheduled(0, 1)] = 0.0,
        clip_grad: float | None = None,
        per_token: bool = False,
        zero_weight: bool = False,
        momentum: Annotated[float | None, Scheduled(0, 1, training_only=True)] = 0.1,
        **options: Any,
    ) -> None:
        if clip_grad is not None and not 0 < clip_grad < math.inf:
            raise ValueError(f"SwitchableNorm: clip_grad must be a number > 0 or None, got {clip_grad!r}.")
        self.clip_grad = None if clip_grad is None else float(clip_grad)
        if per_token and "ln" not in choices:
            raise ValueError(f'SwitchableNorm: per_token=True is about "ln", got choices={tuple(choices)}: add it.')
        self.correction, self.sparse, self.zero_weight, self.per_token = correction, sparse, zero_weight, per_token
        groups: dict[str, Any] = {"num_groups": num_groups, "channels_per_group": channels_per_group}
        super().__init__(num_features, choices=choices, momentum=momentum, **groups, **options)
        self._check_per_token()
        self.radius = radius

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        if self.correction:
            m = m.unbiased()
        statistics = [self._statistic(k, m) for k in self.choices]
        # In float64 for float32 inputs: a sum of weights that is off by 1e-7 would be multiplied by the mean.
        w, v = (self.weights(logits.to(m.mean.dtype), m.count) for logits in self._logits())
        return self.standardize(mixture(w, [s.mean for s in statistics]), mixture(v, [s.var for s in statistics]))

    def of_tokens(self, t: Tokens) -> Tensor:
        """Return y, with "ln" of each token: its entry is no part of the mixtures per sample and channel."""
        m = t.moments.unbiased() if self.correction else t.moments
        # Those per sample and channel meet as usual; "ln" joins them on tensors of the size of x.
        others = [(i, self._statistic(k, m)) for i, k in enumerate(self.choices) if k != "ln"]
        ln = self.choices.index("ln")
        w, v = (self.weights(logits.to(m.mean.dtype), m.count).to(m.mean.dtype) for logits in self._logits())
        zero = m.mean.new_zeros(1, 1)
        mean = sum((s.mean.to(m.mean.dtype) * w[i] for i, s in others), zero)
        var = sum((s.var.to(m.mean.dtype) * v[i] for i, s in others), zero)
        # The authors' estimator is unbiased over the axis that each token has, as their 1d layer's.
        of_token = t.var * (self.num_features / max(self.num_features - 1, 1)) if self.correction else t.var
        scale = torch.addcmul(t.along(var + self._eps), t.along(v[ln]), of_token).rsqrt()
        return t.scaled(t.minus(mean, w[ln]), scale, self.weight, self.bias)

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Return lambda and lambda', behind what clips their gradients."""
        mean, var, limit = self.mean_weight, self.var_weight, self.clip_grad
        return (mean, var) if limit is None else (clip_gradient(mean, limit), clip_gradient(var, limit))

    def _statistic(self, k: str, m: Moments) -> Moments:
        if k == "in":
            return m
        # Each is pooled only where it is asked for: over the batch, ranks would meet in vain.
        s = {"ln": m.over_channels, "gn": lambda: m.over_channels(self.num_groups), "bn": m.over_batch}[k]()
        s = _unbiased_of_one(s, m.count) if self.correction else s
        return self.track(s) if k == "bn" else s

    def weights(self, logits: Tensor, count: int | Tensor = 2) -> Tensor:
        """Return w or w', (len(choices),); 0 for "in" where one element per sample and channel has no variance."""
        if (isinstance(count, Tensor) or count == 1) and "in" in self.choices and len(self.choices) > 1:
            return self._weights_by_count(logits, count)
        logits = logits.to(at_least_float32(logits.dtype))
        return sparsestmax(logits, self.scheduled("radius")) if self.sparse else torch.softmax(logits, 0)

    def _weights_by_count(self, logits: Tensor, count: int | Tensor) -> Tensor:
        """Return them without "in" for one element; for a count of each sample, (N, 1), as (len(choices), N, 1)."""
        # The variance of one element is 0, and would pull the mixture towards it.
        if _is_one(count):
            return without_entry(self.weights, logits, self.choices.index("in"))
        if isinstance(count, Tensor) and count.dim() == 2:
            # In most batches no sample has a single position; one without any has no output.
            looks = may_read_back(count) and not torch_private.is_transformed()
            if looks and not bool((count == 1).any()):
                return self.weights(logits)
            without, with_in = (self.weights(logits, n).view(-1, 1, 1) for n in (1, 2))
            return torch.where(count <= 1, without, with_in)
        return self.weights(logits)

    def _on_cpu(self, x: Tensor, layout: Layout) -> Tensor | None:
        """Return the same equation with a backward pass that is written out, for softmax weights and no groups."""
        if self.correction or self.sparse or self.per_token or "gn" in self.choices:
            return None
        # As in ``weights``: the variance of one element is 0.
        left_out = "in" if layout.size == 1 and len(self.choices) > 1 else ""
        entries = tuple(i for i, k in enumerate(self.choices) if k != left_out)
        statistics = tuple(self.choices[i] for i in entries)
        return on_cpu.mixture(self, x, layout, statistics, *self._logits(), entries=entries)

    def fused_spec(self, layout: Layout) -> MixtureSpec | None:
        """Return the same equation for the kernels, which know either "ln" or "gn" and more than one element."""
        # Maps of one element have no instance statistics, and the kernels hold one kind of pooling over channels.
        if self.per_token or layout.size == 1 or {"ln", "gn"} <= set(self.choices):
            return None
        # The kernels take a softmax themselves; sparsestmax has a loop and stays in PyTorch.
        w, v = (self.weights(t) if self.sparse else t for t in self._logits())
        names, groups = (k.replace("gn", "ln") for k in self.choices), self.num_groups if "gn" in self.choices else 1
        more = {"correction": self.correction, "num_groups": groups, "softmax": not self.sparse}
        return mixture_spec(self, tuple(names), w=w, v=v, **more)

    def running_target(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean and variance that the running ones move towards; the authors' estimator as it is."""
        return (m.mean, m.var) if self.correction else super().running_target(m)

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements behind the batch statistics, or the layer's where there are none."""
        if "bn" in self.choices:
            return n * size
        if self.per_token:
            return self.num_features
        return size if self.choices == ("in",) else size * self.num_features

    def evaluates_as_layer_norm(self) -> bool:
        """Tell whether all importance is on "ln", whose variance is biased."""
        # Exactly 1 and not nearly: torch.nn.LayerNorm is then the same function.
        weights = [float(w[self.choices.index("ln")]) for w in self.importance().values()]
        return weights == [1.0, 1.0] and not self.correction

    def choice(self, threshold: float) -> Choice:
        """Return the statistic on which nearly all importance is, of the mean as of the variance."""
        return self._choice_of_tokens(super().choice(threshold))

    def without_effect(self) -> dict[str, str]:
        """Name the radius of a softmax."""
        return {**super().without_effect(), **({} if self.sparse else {"radius": "sparse=False"})}

    published_names: ClassVar[PublishedNames] = PublishedNames(
        ("radius", "mean_fixed", "var_fixed"), layers={r"\bsn(\d+)\b": r"bn\1"}
    )

    @classmethod
    def read_published(cls, entries: PublishedEntries) -> PublishedLayer | None:
        """Return the authors' estimator, the choices by the number of weights, and the radius of the sparse layer."""
        weight: Any = entries.get("weight")
        channels = channels_of_one_layer(weight)
        if "mean_weight" not in entries or channels is None:
            return None
        # The shape of the weight tells whether the authors' layer is of images, sequences or vectors.
        axes, mixes_two = weight.dim() - 2, getattr(entries["mean_weight"], "shape", ()) == (2,)
        choices: tuple[str, ...] = ("in", "ln", "bn")
        if mixes_two:
            # The authors' 1d layer has no "in"; their others have no "bn" where they keep no running statistics.
            choices = ("ln", "bn") if not axes or "running_mean" in entries else ("in", "ln")
        tensors = {name: entries.per_channel(name, channels) for name in ("weight", "bias")}
        tensors |= {name: entries.take(name, (len(choices),)) for name in ("mean_weight", "var_weight")}
        tensors |= entries.running_stats(channels) if "bn" in choices else {}
        arguments: dict[str, Any] = {"choices": choices, "correction": 1, "eps": 1e-5}
        fixed: tuple[str, ...] = ()
        if "radius" in entries:
            arguments |= {"sparse": True, "radius": entries.number("radius")}
            fixed = tuple(q for q in ("mean", "var") if entries.number(f"{q}_fixed"))
        for quantity in fixed:
            # The authors' code then takes the parameter itself for the weights.
            logits = tensors[f"{quantity}_weight"].tolist()
            if sorted(logits) != [0.0] * (len(choices) - 1) + [1.0]:
                raise CheckpointError(f"{quantity}_fixed is set, and {quantity}_weight is not one-hot: {logits}")
        return PublishedLayer(channels, arguments, tensors, SOURCES[axes], tuple(f"{q}_weight" for q in fixed))


def _unbiased_of_one(s: Moments, count: int | Tensor) -> Moments:
    """Return pooled statistics; of one element unbiased over the only axis there is, as in the authors' 1d layer."""
    if isinstance(count, Tensor) and count.dim() == 2:
        return Moments(s.mean, torch.where(count.max() <= 1, s.unbiased().var, s.var), s.count, s.ranks)
    return s.unbiased() if _is_one(count) else s


def _is_one(count: int | Tensor) -> bool:
    """Tell whether a map has one element; a graph of ``torch.jit.trace`` counts anew and has no branch."""
    return isinstance(count, int) and count == 1
