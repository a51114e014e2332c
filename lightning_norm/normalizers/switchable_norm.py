"""Switchable normalization: a learned mixture of instance, layer and batch statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.layers.arguments import check_num_groups
from lightning_norm.layers.base import MomentNorm, Paper
from lightning_norm.layers.fused_specs import mixture_spec
from lightning_norm.layers.scheduled import Scheduled
from lightning_norm.layers.state import of_one_layer
from lightning_norm.layers.variance import unbiased
from lightning_norm.ops.fused.mixture import MixtureSpec
from lightning_norm.ops.layout import Layout, at_least_float32
from lightning_norm.ops.moments import Affine, Moments, mixture
from lightning_norm.ops.sparsestmax import sparsestmax


class SwitchableNorm(MomentNorm):
    r"""Mix instance, layer and batch statistics by learned weights, separate ones for mean and variance.

    .. math::
        y = \gamma \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma^2_k + \epsilon}} + \beta, \qquad
        w = \mathrm{softmax}(\lambda),\; w' = \mathrm{softmax}(\lambda'), \qquad
        k \in \{\mathrm{in}, \mathrm{ln}, \mathrm{bn}\}

    ``mean_weight`` is lambda and ``var_weight`` lambda', (3,) each, starting at 1. Luo et al., TPAMI 2021, arXiv
    1806.10779; sparse: Shao et al., CVPR 2019, arXiv 1903.03793.

    When: small batches, where it turns from batch to instance and layer statistics by itself. When not: if the network
    must be folded for inference, for instance and layer statistics stay data dependent.

    Args:
        num_features: channels, the C of an input (N, C, *).
        choices: which statistics to mix, in the order of the weights: "in", "ln", "bn" and also "gn".
        num_groups: for "gn".
        correction: 0 for biased variances, 1 for the authors' estimator (unbiased within each sample), which their
            checkpoints need.
        sparse: replace the softmax by sparsestmax, which reaches one-hot weights as ``radius`` grows.
        radius: of sparsestmax, scheduled from 0 (softmax-like freedom) to 1 (one choice).
        zero_weight: start gamma at 0, for the last normalizer of a residual branch.
        momentum: weight of the new batch in the running statistics of "bn".
        options: eps, affine, track_running_stats, channel_dim, device, dtype: see :class:`MomentNorm`.

    Raises:
        ValueError: unknown, repeated or no choices, or a correction other than 0 and 1.

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
    extra_parameters: ClassVar[dict[str, str]] = {"mean_weight": "3", "var_weight": "3"}
    repr_arguments: ClassVar[tuple[str, ...]] = ("choices", "correction", "sparse")
    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        choices: Sequence[Literal["in", "ln", "bn", "gn"]] = ("in", "ln", "bn"),
        num_groups: int = 32,
        correction: Literal[0, 1] = 0,
        sparse: bool = False,
        radius: Annotated[float, Scheduled(0, 1)] = 0.0,
        zero_weight: bool = False,
        momentum: Annotated[float | None, Scheduled(0, 1)] = 0.1,
        **options: Any,
    ) -> None:
        if not choices:
            raise ValueError("SwitchableNorm: choices must name at least one statistic, got none.")
        self.choices, self.zero_weight = tuple(choices), zero_weight
        if "bn" not in choices:
            options["track_running_stats"] = False
        super().__init__(num_features, momentum=momentum, **options)
        self.num_groups = (
            check_num_groups("SwitchableNorm", num_features, num_groups) if "gn" in choices else num_groups
        )
        self.correction, self.sparse = correction, sparse
        self.radius = radius
        self._add_parameters(options, mean_weight=(len(choices),), var_weight=(len(choices),))

    def algebra(self, m: Moments) -> Affine:
        """Return the affine map of the equation above."""
        alone = isinstance(m.count, int) and m.count == 1  # one element per sample and channel: no instance statistics
        if self.correction:
            m = Moments(m.mean, m.var * unbiased(m.count), m.count, m.ranks)
        statistics = [self._statistic(k, m, alone) for k in self.choices]
        dtype = m.mean.dtype  # float64 for float32 inputs: a sum of weights off by 1e-7 would be multiplied by the mean
        w, v = (self._mix(logits.to(dtype), alone) for logits in (self.mean_weight, self.var_weight))
        return self.standardize(mixture(w, [s.mean for s in statistics]), mixture(v, [s.var for s in statistics]))

    def fused_spec(self, layout: Layout) -> MixtureSpec | None:
        """Return the same equation for the kernels, which know either "ln" or "gn" and more than one element."""
        if layout.size == 1 or {"ln", "gn"} <= set(self.choices):
            return None
        w, v = (self._mix(t) if self.sparse else t for t in (self.mean_weight, self.var_weight))
        names, groups = (k.replace("gn", "ln") for k in self.choices), self.num_groups if "gn" in self.choices else 1
        more = {"correction": self.correction, "num_groups": groups, "softmax": not self.sparse}
        return mixture_spec(self, tuple(names), w=w, v=v, **more)

    def _statistic(self, k: str, m: Moments, alone: bool) -> Moments:
        if k == "in":
            return m
        s = {"ln": m.over_channels, "gn": lambda: m.over_channels(self.num_groups), "bn": m.over_batch}[k]()
        if alone and self.correction:  # the authors' 1d layer: unbiased over the only axis there is
            s = Moments(s.mean, s.var * unbiased(s.count), s.count, s.ranks)
        return self.track(s) if k == "bn" else s

    def running_target(self, m: Moments) -> tuple[Tensor, Tensor]:
        """Return the mean and variance that the running ones move towards; the authors' estimator as it is."""
        return (m.mean, m.var) if self.correction else super().running_target(m)

    def _mix(self, logits: Tensor, alone: bool = False) -> Tensor:
        """Return the importance weights, (len(choices),), non-negative with sum 1; 0 for "in" where x is ``alone``."""
        if alone and "in" in self.choices and len(self.choices) > 1:
            gone = self.choices.index("in")
            rest = self._mix(torch.cat([logits[:gone], logits[gone + 1 :]]))
            return torch.cat([rest[:gone], rest.new_zeros(1), rest[gone:]])
        logits = logits.to(at_least_float32(logits.dtype))
        return sparsestmax(logits, self.scheduled("radius")) if self.sparse else torch.softmax(logits, 0)

    def without_effect(self) -> dict[str, str]:
        """Name the radius of a softmax."""
        return {**super().without_effect(), **({} if self.sparse else {"radius": "sparse=False"})}

    @torch.no_grad()
    def importance(self) -> dict[str, Tensor]:
        """Return the importance weights of means and variances, each (len(choices),), in the order of ``choices``."""
        return {"mean": self._mix(self.mean_weight), "var": self._mix(self.var_weight)}

    def evaluates_on_running_stats(self) -> bool:
        """Tell whether all importance is on the batch statistics."""
        at = self.choices.index("bn") if self.track_running_stats else None
        return at is not None and all(float(w[at]) == 1 for w in self.importance().values())

    def monitor(self) -> dict[str, Tensor]:
        """Return the importance weights one by one: ``mean_in``, ``mean_ln``, ..., ``var_bn``."""
        return {f"{q}_{k}": w[i] for q, w in self.importance().items() for i, k in enumerate(self.choices)}

    def statistic_size(self, n: int, size: int) -> int:
        """Return the elements behind the batch statistics, or the layer's where there are none."""
        if "bn" in self.choices:
            return n * size
        return size if self.choices == ("in",) else size * self.num_features

    def start_values(self) -> dict[str, float | Tensor]:
        """Return 1 for lambda and lambda', and 0 for weight with ``zero_weight``."""
        return {"mean_weight": 1.0, "var_weight": 1.0, **({"weight": 0.0} if self.zero_weight else {})}

    def take_from(self, source: nn.Module) -> None:
        """Take over a layer's Parameters and running statistics.

        Raises:
            ValueError: ``zero_weight`` was asked for and the layer brings its own weight.
        """
        if self.zero_weight and getattr(source, "weight", None) is not None:
            raise ValueError(
                "SwitchableNorm: zero_weight=True would overwrite the weight that the swap moves. Build the network "
                "with its own zero-init option (torchvision: zero_init_residual=True) and leave zero_weight out."
            )
        super().take_from(source)

    published_names: ClassVar[tuple[str, ...]] = ("radius", "mean_fixed", "var_fixed")
    published_remedy: ClassVar[str] = (
        "It is of the sparse layer: take radius, mean_fixed and var_fixed out of the file, and type "
        "norm_args={'sparse': True, 'correction': 1, 'radius': ...} with the radius that the file has."
    )

    def published_arguments(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        """Return the estimator, and the choices of a file with two: the authors' 1d layer has no "in"."""
        tensors = [loaded.get(name) for name in ("weight", "running_mean")]
        if "mean_weight" not in loaded or not any(of_one_layer(t, self.num_features) for t in tensors):
            return {}
        if loaded["mean_weight"].numel() != 2:
            return {"correction": 1}
        flat = isinstance(tensors[0], Tensor) and tensors[0].dim() == 2
        return {"choices": ("ln", "bn") if flat or tensors[1] is not None else ("in", "ln"), "correction": 1}

    def arguments_that_fit(self, name: str, tensor: Tensor) -> str:
        """Return the choices behind a checkpoint's lambda."""
        known = {2: '("in", "ln") or, for the authors\' 1d layer, ("ln", "bn")', 3: '("in", "ln", "bn")'}
        fit = known.get(tensor.numel(), f"the {tensor.numel()} statistics of the checkpoint")
        return f"choices={fit} in place of {self.choices}" if name in ("mean_weight", "var_weight") else ""
