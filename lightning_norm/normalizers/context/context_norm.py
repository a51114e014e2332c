"""Context normalization: each context, a component of the data's mixture, has its own statistics and affine map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.layers.arguments import plain_value
from lightning_norm.layers.base import Paper
from lightning_norm.layers.declared import ExtraBuffers, SwapAdvice, Unsupported, declared
from lightning_norm.layers.fused_specs import per_channel_spec, uses_running_stats
from lightning_norm.layers.inference import double_copy, per_channel
from lightning_norm.layers.published_files import PublishedEntries, PublishedLayer
from lightning_norm.layers.running_stats import moves_running_stats
from lightning_norm.layers.told import block
from lightning_norm.normalizers.context.assignment import ContextState, check_contexts_of, contexts_of_forward
from lightning_norm.normalizers.context.statistics import ContextStatistics
from lightning_norm.ops import kmeans, torch_private
from lightning_norm.ops.fused.per_channel import GATES, PerChannelSpec
from lightning_norm.ops.layout import Layout, at_least_float32, stat_dtype
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.torch_private import in_backward_pass

MAX_FUSED_CONTEXTS = 16
"""Contexts that a kernel holds at once."""


class ContextNorm(ContextStatistics):
    r"""Normalize each sample by the statistics of its context, or by a mixture of contexts.

    .. math::
        y_n = \sum_k g_{nk} \left[\gamma_k \frac{x_n - \mu_k}{\sqrt{\sigma^2_k + \epsilon}} + \beta_k\right], \qquad
        \mu_k = \frac{\sum_n g_{nk}\,\bar x_n}{\sum_n g_{nk}}

    with sigma_k^2 alike and g_nk the responsibility of context k for sample n: 0 or 1 for hard contexts, and rows sum
    to 1. ``weight``, ``bias``, ``running_mean`` and ``running_var`` are (K, C), ``prior`` (K,) is the running
    frequency of the contexts. Faye et al. 2023, arXiv 2303.07651, and its successors.

    When: the data are a mixture, such as several domains, and the context is known in inference as well. When not: if
    the context follows from the label, for then the layer is told part of the answer.

    Args:
        num_features: channels, the C of an input (N, C, *).
        num_contexts: K.
        context: where g comes from: "input" (the nearest centroid of the input image), "ids" (from NormContext or
            :func:`lightning_norm.contexts`), or "gate" (learned from the layer's own input).
        missing: what evaluation does without a context: "pooled" moments of all contexts, the "posterior" of the
            contexts given the layer's input, or "error". Training without contexts is always an error.
        prior_scale: multiply context k by 1 / sqrt(prior_k), as published.
        priors: constants in place of the running frequencies, as published, where each context is then answered by its
            own statistics alone; checkpoints of the authors need them, and do not hold them.
        min_count: elements per channel below which a context's statistics are drawn to those of all contexts.
        options: eps, momentum, affine, bias, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: an unknown context or missing, bad num_contexts, priors or min_count, contexts of the wrong length.
        RuntimeError: training without contexts, or a recomputation by activation checkpointing.

    Differs from the paper: ``prior_scale`` is off, for it multiplies the variance by K; rare contexts borrow from the
    others and move their statistics less; evaluation without contexts is defined; momentum has torch's meaning.

    >>> ContextNorm(8, context="gate")(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    key = "cn"
    paper = Paper("Faye et al.", 2023, "Context Normalization Layer with Applications", "arXiv 2303.07651")
    extra_parameters: ClassVar[dict[str, str]] = {"gate_weight": "3 * C", "gate_bias": "3"}
    repr_arguments: ClassVar[tuple[str, ...]] = (
        "num_contexts",
        "context",
        "missing",
        "prior_scale",
        "priors",
        "min_count",
    )
    evaluation_arguments: ClassVar[tuple[str, ...]] = ("context", "missing", "prior_scale")
    extra_buffers: ClassVar[ExtraBuffers] = ExtraBuffers(
        float32=("prior", "running_spread", "centroids", "descriptor_scale")
    )
    swap_advice: ClassVar[SwapAdvice] = SwapAdvice(required_callback="NormContext")
    test_arguments: ClassVar[dict[str, Any]] = {"context": "gate"}
    centroids: Tensor
    descriptor_scale: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        num_contexts: int = 3,
        context: Literal["input", "ids", "gate"] = "input",
        missing: Literal["pooled", "posterior", "error"] = "pooled",
        prior_scale: bool = False,
        priors: Sequence[float] | None = None,
        min_count: int = 16,
        **options: Any,
    ) -> None:
        if min_count < 1:
            raise ValueError(f"ContextNorm: min_count must be at least 1, got {min_count!r}.")
        self.context, self.missing, self.prior_scale, self.min_count = context, missing, prior_scale, int(min_count)
        self.priors = None if priors is None else checked_priors(priors, num_contexts)
        super().__init__(num_features, num_contexts=num_contexts, **options)
        if missing == "posterior" and not self.track_running_stats:
            raise ValueError("ContextNorm: missing='posterior' needs track_running_stats=True.")
        device, dtype = options.get("device"), options.get("dtype")
        wide = at_least_float32(dtype)
        if missing == "posterior":
            self.register_buffer("running_spread", torch.ones(num_contexts, num_features, device=device, dtype=wide))
        if context == "input":
            self.register_buffer("centroids", torch.zeros(num_contexts, 2 * kmeans.BANDS, device=device, dtype=wide))
            self.register_buffer("descriptor_scale", torch.zeros(2 * kmeans.BANDS, device=device, dtype=wide))
        if context == "gate":
            self.gate_weight = nn.Parameter(torch.empty(num_contexts, num_features, device=device, dtype=dtype))
            self.gate_bias = nn.Parameter(torch.empty(num_contexts, device=device, dtype=dtype))
        # Known to the layer by attribute, for the forward of a network has no place for a second argument.
        self.contexts = ContextState()
        self.reset_parameters()

    @declared(True)
    def eval_uses_input_stats(self) -> bool:
        """Whether the sample's own statistics tell its context; known or pooled contexts need none of them."""
        return self.context == "gate" or self.missing == "posterior"

    @property
    def unsupported(self) -> Unsupported:
        """Statistics cannot be re-estimated, nor with ``missing="posterior"`` wait for the end of a window."""
        return Unsupported(
            recalibration="each context has statistics of its own, and batches without contexts move none",
            window="missing='posterior' follows the spread of each batch" if self.missing == "posterior" else "",
        )

    @property
    def train_uses_running_stats(self) -> bool:
        """The priors of the contexts, and where contexts are missing the statistics too."""
        return moves_running_stats(self)

    def forward(
        self, input: Tensor, activation: str = "none", residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalize the input x, by the contexts that the layer was told of its samples."""
        # What is no input at all is refused by the base class, with its better message.
        told = self.context != "gate" and isinstance(input, Tensor) and input.dim() > 1 and input.is_floating_point()
        n = torch_private.static_shape(input)[0] if told else 0
        compiling = torch.compiler.is_compiling()
        if told and not compiling and in_backward_pass():
            with contexts_of_forward(self, n):
                return super().forward(input, activation, residual, mask)
        if told:
            check_contexts_of(self, n)
        y = super().forward(input, activation, residual, mask)
        if told and not compiling:
            self.contexts.remember(y)
        return y

    @contextmanager
    def _part_of_batch(self, start: int, stop: int) -> Iterator[None]:
        """While it is open, the layer knows the contexts of these samples alone."""
        responsibilities = None if self.context == "gate" else self.contexts.responsibilities
        with block():
            if responsibilities is not None:
                self.contexts.responsibilities = responsibilities[start:stop]
            yield

    def algebra_of(self, x: Tensor, layout: Layout) -> Callable[[Moments], Affine]:
        """Return the algebra that mixes the contexts of this input."""
        if self.context == "gate":
            return self.algebra
        responsibilities = self.contexts.responsibilities
        return lambda m: self.mixture(m, responsibilities)

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above, with the responsibilities of the gate."""
        return self.mixture(m, self.gate(m))

    @property
    def fused_spec_varies(self) -> bool:  # type: ignore[override]
        """Whether the contexts of each batch, which no attribute holds, decide on the description."""
        return self.context != "gate"

    def fused_spec(self, layout: Layout) -> PerChannelSpec | None:
        """Return the same equations for the kernels; what concerns the posterior is computed in PyTorch."""
        responsibilities, gated = self.contexts.responsibilities, self.context == "gate"
        frozen, posterior = self.has_running_stats and not self.training, self.missing == "posterior"
        if self.num_contexts > MAX_FUSED_CONTEXTS or (posterior and not frozen) or self.priors is not None:
            return None  # the kernels move the priors, and answer for contexts that training has not seen
        if self.prior_scale and self.has_running_stats and not uses_running_stats(self):
            return None  # the kernels know the priors of running statistics that they read or move
        pooled = not gated and responsibilities is None
        # The kernels give no gradient of responsibilities from outside, which probabilities of another network may
        # want.
        needs_grad = not gated and responsibilities is not None and responsibilities.requires_grad
        if needs_grad or (pooled and posterior):
            return None
        flags = {"contexts": self.num_contexts, "prior": self.prior_scale, "gate": gated, "pooled": pooled and frozen}
        numbers = {"least": float(self.min_count)}
        spec = per_channel_spec(self, numbers, needs_moments=gated or not frozen, **flags)
        # Evaluation without running statistics is on the batch's, and all contexts count alike.
        if pooled and not frozen:
            uniform = (layout.n, self.num_contexts), 1 / self.num_contexts
            responsibilities = self.prior_or_uniform().new_full(*uniform, dtype=torch.float32)
        gates = tuple(getattr(self, name, None) for name in GATES)
        if gated or responsibilities is None:
            return replace(spec, gates=gates, counters=(self.prior,))
        return replace(
            spec, gates=gates, responsibilities=responsibilities.float().contiguous(), counters=(self.prior,)
        )

    def eval_affine(self) -> Affine | None:
        """Return the pooled map, which evaluation without contexts is; ``None`` where contexts are always there."""
        if self.context != "ids" or self.missing != "pooled" or not self.has_running_stats:
            return None
        # In float64, because the map is folded into other layers.
        twin: Any = double_copy(self)
        return per_channel(twin.mixture(twin.running(), None), self.num_features)

    def why_not_plain(self, dims: int | None = None) -> str:
        """Return why :meth:`plain` gives ``None``."""
        return super().why_not_plain(dims) if self.context == "gate" else "its contexts choose the map in evaluation"

    def gate(self, m: Moments) -> Tensor:
        """Return the learned responsibilities, softmax(W mean + b), (N, K)."""
        # Responsibilities whose sum is off by 1e-7 would scale the output.
        wide = stat_dtype(m.var)
        logits = (m.mean.to(wide).unsqueeze(1) * self.gate_weight.to(wide)).sum(2) + self.gate_bias.to(wide)
        return torch.softmax(logits, 1)

    def mixture(self, m: Moments, responsibilities: Tensor | None) -> Affine:
        """Return the affine map of each sample: the sum over the contexts, which is affine in x again.

        Args:
            m: moments of each sample.
            responsibilities: of the contexts for each sample, (N, K); ``None`` where they are not known.
        """
        if responsibilities is None and self.missing == "posterior":
            responsibilities = self.posterior(m)
        weight, bias = self.per_context_affine(wide := stat_dtype(m.var))
        # This happens in evaluation only, where all contexts then count as one.
        if responsibilities is None:
            prior = self.seen_prior().to(wide)
            pooled = self.running() if self.has_running_stats else m.over_batch()
            scale = (pooled.var + self.eps).rsqrt() * (prior * weight).sum(0, keepdim=True)
            return Affine(pooled.mean, scale, (prior * bias).sum(0, keepdim=True).expand_as(scale))
        responsibilities = responsibilities.to(wide)
        if self.training or not self.has_running_stats:
            contexts, pivot = self.statistics(m, responsibilities)
        else:
            contexts, _, pooled = self.running_per_context()
            pivot = pooled.mean
        # Every context's map is written around one pivot near all the means, so that the sum loses no digit.
        scale = (contexts.var + self.eps).rsqrt() * weight
        shift = bias - scale * (contexts.mean - pivot)
        # No matmul: autocast would round the matrix product in its backward pass to half precision.
        scale, shift = ((responsibilities.unsqueeze(2) * t).sum(1) for t in (scale, shift))
        return Affine(m.mean, scale, torch.addcmul(shift, scale, m.mean - pivot))

    def per_context_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return gamma and beta of each context, (K, C) or (K, 1), times 1 / sqrt(prior) with ``prior_scale``."""
        ones = torch.ones((), dtype=dtype, device=self.prior_or_uniform().device).expand(self.num_contexts, 1)
        weight = ones if self.weight is None else self.weight.to(dtype)
        bias = 0 * ones if self.bias is None else self.bias.to(dtype)
        if self.prior_scale and self.priors is not None:
            # Each by a fill, for a tensor of numbers from the host could not be part of a recorded graph.
            factor = torch.stack([weight.new_full((1,), p**-0.5) for p in self.priors])
            weight, bias = factor * weight, factor * bias
        elif self.prior_scale:
            prior = self.seen_prior().to(dtype)
            # A rare context has a factor of 10 at most.
            factor = prior.clamp_min(0.01).rsqrt()
            # A context that training has not seen has the others' factor, as it has their statistics.
            factor = torch.where(prior > 0, factor, (prior * factor).sum())
            weight, bias = factor * weight, factor * bias
        return weight, bias

    def nearest(self, descriptors: Tensor) -> Tensor:
        """Return the context of each described image, (N,)."""
        return kmeans.nearest(descriptors, self.centroids, self.descriptor_scale)

    def is_fitted(self) -> bool:
        """Tell whether the centroids were fitted, or loaded from a checkpoint."""
        return bool(self.descriptor_scale.any())

    @property
    def preserves_eval(self) -> bool:
        """Whether all contexts start alike, without the factor 1 / sqrt(prior)."""
        return not self.prior_scale

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the prior of each context, and the entropy of the priors: log K where all are alike."""
        if self.prior is None:
            return {}
        priors = {f"prior_{k}": prior for k, prior in enumerate(self.prior)}
        return {**priors, "entropy": torch.special.entr(self.prior).sum()}

    def shared_quantities(self) -> tuple[str, ...]:
        """Return the priors and their entropy, where all layers are told of the same contexts."""
        told = self.context != "gate" and self.prior is not None
        return (*(f"prior_{k}" for k in range(self.num_contexts)), "entropy") if told else ()

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and the gate to small numbers which are the same for layers of one size."""
        super().reset_parameters()
        # The base class calls this before there is a gate.
        if hasattr(self, "gate_weight"):
            # Every rank must start from the same gate.
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                self.gate_weight.copy_(0.01 * torch.randn(self.gate_weight.shape, generator=generator))
                self.gate_bias.zero_()

    @classmethod
    def read_published(cls, entries: PublishedEntries) -> PublishedLayer | None:
        """Return a row per BatchNorm of the authors' layer, whose priors are constants outside of the file."""
        first = entries.get("context_norm_layers.0.running_mean")
        if first is None:
            return None
        c, k = getattr(first, "numel", int)(), 0
        rows: dict[str, list[Tensor]] = {}
        names: tuple[str, ...] = ("weight", "bias", "running_mean", "running_var")
        names = names if "context_norm_layers.0.weight" in entries else names[2:]
        while f"context_norm_layers.{k}.running_mean" in entries:
            for name in names:
                rows.setdefault(name, []).append(entries.take(f"context_norm_layers.{k}.{name}", (c,)))
            k += 1
        counters = [f"context_norm_layers.{i}.num_batches_tracked" for i in range(k)]
        seen = [entries.take(name, ()) for name in counters if name in entries]
        tensors = {name: torch.stack(each) for name, each in rows.items()}
        if seen:
            tensors["num_batches_tracked"] = torch.stack(seen).amax()
        fixed = {"num_contexts": k, "context": "ids", "missing": "error", "prior_scale": True, "eps": 1e-3}
        arguments = {**fixed, "affine": len(names) == 4}
        return PublishedLayer(c, arguments, tensors, ask={"priors": [round(1 / k, 6)] * k})


def checked_priors(priors: Sequence[float], num_contexts: int) -> tuple[float, ...]:
    """Return priors as a tuple of numbers.

    Raises:
        ValueError: not one number in (0, 1] for each context.
    """
    numbers = tuple(plain_value(priors))
    if len(numbers) != num_contexts or not all(type(p) in (int, float) and 0 < p <= 1 for p in numbers):
        raise ValueError(
            f"ContextNorm: priors must be one number in (0, 1] for each of num_contexts={num_contexts}, got "
            f"{priors!r}. Type priors={[round(1 / num_contexts, 3)] * num_contexts}, say."
        )
    return tuple(float(p) for p in numbers)
