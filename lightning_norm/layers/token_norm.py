"""Layers that take their layer statistics from each token alone, as LayerNorm in transformers does."""

from __future__ import annotations

from torch import nn

from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.choice import Choice
from lightning_norm.layers.inference import share_parameters


class PerToken(MomentNorm):
    r"""Abstract: ``per_token=True`` replaces the statistics of a sample over channels and positions by each token's.

    .. math::
        \mu_{nl} = \frac{1}{C} \sum_c x_{nlc}, \qquad \sigma^2_{nl} = \frac{1}{C} \sum_c (x_{nlc} - \mu_{nl})^2

    Such a y is no longer affine in x with coefficients per sample and channel, so a subclass writes it in
    :meth:`of_tokens`, and runs in plain PyTorch.
    """

    def _check_per_token(self) -> None:
        """Refuse an input without tokens.

        Raises:
            ValueError: the channels are not on the last axis.
        """
        if self.per_token and self.channel_dim != -1:
            raise ValueError(
                f"{type(self).__name__}: per_token=True is for tokens (N, L, C), got channel_dim={self.channel_dim}. "
                "Type channel_dim=-1, or in a swap source='LayerNorm'; for images leave per_token out."
            )

    def evaluates_as_layer_norm(self) -> bool:
        """Tell whether all weight is on the statistics of each token."""
        raise NotImplementedError

    def plain(self, dims: int | None = None) -> nn.Module | None:
        """Return torch's LayerNorm where all weight is on the statistics of each token."""
        if not (self.per_token and self.evaluates_as_layer_norm()):
            return super().plain(dims)
        return share_parameters(self, nn.LayerNorm(self.num_features, eps=self.eps))

    def why_not_plain(self, dims: int | None = None) -> str:
        """Return why there is no layer of torch's."""
        if self.per_token and self.eval_affine() is None:
            return "mixes the statistics of each token with others"
        return super().why_not_plain(dims)

    def _choice_of_tokens(self, choice: Choice) -> Choice:
        """Return the choice, undecided where it is the layer normalization of each token."""
        # The plain normalizer "ln" takes the statistics of a whole sample, which is another function.
        if not self.per_token or choice.norm != "ln":
            return choice
        why = "chose ln of each token, which is torch.nn.LayerNorm and no normalizer here"
        return Choice("", choice.weight, f"{why}: type lightning_norm.to_plain once the weight is exactly 1")
