"""A normalizer that mixes several statistics by learned weights: its parameters, and what the weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.layers.arguments import arguments_of, number_of_groups, settled_groups
from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.choice import Choice


class MixedNorm(MomentNorm):
    """Abstract: mean and variance are mixtures of statistics, with weights that :meth:`weights` makes of parameters.

    ``mean_weight`` and ``var_weight`` have an entry for each of ``choices`` and start at 1. From the weights follow
    what the monitor shows, when the layer is batch normalization, and which plain normalizer it has chosen.

    Args:
        num_features: channels.
        choices: which statistics are mixed: "in", "ln", "bn", "gn".
        num_groups: for "gn"; a number, or "auto".
        channels_per_group: for "gn", in place of it.
        options: see :class:`MomentNorm`.

    Raises:
        ValueError: no choices, or groups that do not divide the channels.
    """

    extra_parameters: ClassVar[dict[str, str]] = {"mean_weight": "3", "var_weight": "3"}
    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        choices: Sequence[str],
        num_groups: int | Literal["auto"],
        channels_per_group: int | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        if not choices:
            raise ValueError(f"{name}: choices must name at least one statistic, got none.")
        self.choices = tuple(choices)
        if "bn" not in choices:
            # Running statistics that nobody reads would still be saved, synchronized and shown.
            options["track_running_stats"] = False
        super().__init__(num_features, **options)
        self.num_groups: Any = num_groups
        # Only there must the groups divide the channels.
        if "gn" in choices:
            self.num_groups = number_of_groups(name, self.num_features, num_groups, channels_per_group)
        self._add_parameters(options, mean_weight=(len(choices),), var_weight=(len(choices),))

    def _settled_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments with the number of groups where there are groups, and without where there are none."""
        return settled_groups(type(self), arguments, self.num_groups if "gn" in self.choices else None)

    @classmethod
    def _earlier_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments, with the 32 groups that no number has meant before "auto"."""
        groups = "gn" in (arguments.get("choices") or ()) and "num_groups" in arguments_of(cls)
        return {**({"num_groups": 32} if groups else {}), **arguments}

    def start_values(self) -> dict[str, float | Tensor]:
        """Return 1 for every entry: all statistics count alike."""
        return {"mean_weight": 1.0, "var_weight": 1.0}

    def weights(self, logits: Tensor) -> Tensor:
        """Return the weights of the statistics, non-negative with sum 1, given ``mean_weight`` or ``var_weight``."""
        raise NotImplementedError(f"{type(self).__name__} must define weights(self, logits: Tensor) -> Tensor.")

    @torch.no_grad()
    def importance(self) -> dict[str, Tensor]:
        """Return the importance weights of means and variances, each (len(choices),), in the order of ``choices``."""
        return {"mean": self.weights(self.mean_weight), "var": self.weights(self.var_weight)}

    def monitor(self) -> dict[str, Tensor]:
        """Return the importance weights one by one: ``mean_in``, ``mean_ln``, ..., ``var_bn``."""
        return {f"{q}_{k}": w[i] for q, w in self.importance().items() for i, k in enumerate(self.choices)}

    def evaluates_on_running_stats(self) -> bool:
        """Tell whether all importance is on the batch statistics."""
        # Exactly 1 and not nearly: what follows is folded, and must compute the same.
        at = self.choices.index("bn") if "bn" in self.choices and self.has_running_stats else None
        return at is not None and all(float(w[at]) == 1 for w in self.importance().values())

    def choice(self, threshold: float) -> Choice:
        """Return the statistic on which nearly all importance is, of the mean as of the variance."""
        # In float64, so that the weights of a layer in half are compared with the threshold as they are.
        best = {quantity: w.double().cpu().max(0) for quantity, w in self.importance().items()}
        mean, var = (self.choices[int(b.indices)] for b in best.values())
        weights = [float(b.values) for b in best.values()]
        said = f"mean: {mean} {weights[0]:.3g}, variance: {var} {weights[1]:.3g}"
        if not all(weight >= threshold for weight in weights):  # so that NaN has not decided
            return Choice("", min(weights), f"undecided ({said})")
        if mean != var:
            return Choice("", min(weights), f"no plain normalizer mixes its choices ({said})")
        # The authors' estimator divides by n - 1, and no plain normalizer of single samples does.
        biased = getattr(self, "correction", 0) and mean != "bn"
        why = "correction=1: the plain normalizer's variance is biased" if biased else ""
        return Choice(mean, min(weights), why, {"num_groups": self.num_groups} if mean == "gn" else {})

    def _arguments_that_fit(self, name: str, tensor: Tensor) -> str:
        """Return the choices behind a checkpoint's weights."""
        known = {2: '("in", "ln") or, for the authors\' 1d layer, ("ln", "bn")', 3: '("in", "ln", "bn")'}
        fit = known.get(tensor.numel(), f"the {tensor.numel()} statistics of the checkpoint")
        return f"choices={fit} in place of {self.choices}" if name in self.extra_parameters else ""
