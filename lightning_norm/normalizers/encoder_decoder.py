"""Two gated encoder-decoders, from statistics to statistics: what AFN and ASR-Norm share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_norm.kernels.encoder_decoder.flags import EncoderDecoderFlags
from lightning_norm.layers.arguments import check_count
from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.declared import SwapAdvice
from lightning_norm.layers.fused_specs import running_stats, uses_running_stats
from lightning_norm.layers.published_files import PublishedEntries, PublishedLayer, PublishedNames, unit_at_least
from lightning_norm.ops.fused.encoder_decoder import EncoderDecoderSpec
from lightning_norm.ops.layout import Layout, at_least_float32, stat_dtype
from lightning_norm.ops.linear import linear
from lightning_norm.ops.moments import Affine, Moments
from lightning_norm.ops.torch_private import loads_strictly

DECODERS = {"std": ("mu", "sigma"), "rescale": ("beta", "gamma")}
"""Each encoder, and its two decoders."""

GATES = ("lambda_mu", "lambda_sigma", "lambda_beta", "lambda_gamma")


class EncoderDecoderNorm(MomentNorm):
    r"""Abstract: standardize and rescale by statistics that two encoder-decoders make of the measured ones.

    .. math::
        y = \gamma \frac{x - m}{d} + \beta, \qquad m = \mu + g_\mu (D_\mu E_s \mu - \mu), \quad
        d = \sigma + g_\sigma (D_\sigma E_s \sigma - \sigma), \quad
        \beta = b_\beta + \lambda_\beta D_\beta E_r \mu, \quad \gamma = b_\gamma + \lambda_\gamma D_\gamma E_r \sigma

    with g the sigmoid of lambda. An encoder is Linear, ReLU; a decoder Linear, then nothing, ReLU, tanh and sigmoid for
    mu, sigma, beta and gamma. ``algebra`` chooses which statistics mu and sigma are, and calls :meth:`recode`.

    Args:
        num_features: channels, the C of an input (N, C, *).
        std_ratio: E_s has C // std_ratio hidden units, at least one.
        rescale_ratio: E_r has C // rescale_ratio, at least one.
        gate_init: start of lambda_mu and lambda_sigma.
        rescale_init: start of lambda_beta and lambda_gamma.
        rescale_gate: ``False`` for 1 in place of lambda_beta and lambda_gamma.
        correction: 0 for the biased variance, 1 for the unbiased one of the public code, which its checkpoints need.
        eps_outside: sigma is sqrt(variance) + eps, as in the public code of AFN, and d has no lower limit.
        options: see :class:`MomentNorm`.

    Raises:
        ValueError: a ratio or a start out of range.
    """

    swap_advice: ClassVar[SwapAdvice] = SwapAdvice(
        growth="a larger std_ratio (norm_args={'std_ratio': 16}, say) needs fewer"
    )
    extra_parameters: ClassVar[dict[str, str]] = {
        "std_encoder_weight": "max(1, C//2)*C",
        "std_encoder_bias": "max(1, C//2)",
        "mu_decoder_weight": "C*max(1, C//2)",
        "mu_decoder_bias": "C",
        "sigma_decoder_weight": "C*max(1, C//2)",
        "sigma_decoder_bias": "C",
        "rescale_encoder_weight": "max(1, C//16)*C",
        "rescale_encoder_bias": "max(1, C//16)",
        "beta_decoder_weight": "C*max(1, C//16)",
        "beta_decoder_bias": "C",
        "gamma_decoder_weight": "C*max(1, C//16)",
        "gamma_decoder_bias": "C",
        **dict.fromkeys(GATES, "1"),
    }
    published_names: ClassVar[PublishedNames] = PublishedNames(
        (
            *("standard_encoder.", "standard_mean_decoder.", "standard_std_decoder.", "rescale_encoder."),
            *("rescale_beta_decoder.", "rescale_gamma_decoder.", "bias_beta", "bias_gamma", "real_gamma", "real_beta"),
        )
    )
    repr_arguments: ClassVar[tuple[str, ...]] = (
        *("std_ratio", "rescale_ratio", "gate_init", "rescale_init", "correction", "eps_outside"),
    )
    evaluation_arguments: ClassVar[tuple[str, ...]] = ("correction", "eps_outside")

    lambda_mu: nn.Parameter
    lambda_sigma: nn.Parameter

    def __init__(
        self,
        num_features: int,
        *,
        std_ratio: int,
        rescale_ratio: int,
        gate_init: float,
        rescale_init: float,
        rescale_gate: bool = True,
        correction: Literal[0, 1] = 0,
        eps_outside: bool = False,
        **options: Any,
    ) -> None:
        who = type(self).__name__
        self.std_ratio = check_count(f"{who}: std_ratio", std_ratio)
        self.rescale_ratio = check_count(f"{who}: rescale_ratio", rescale_ratio)
        if math.isnan(gate_init):
            raise ValueError(f"{who}: gate_init must be a number or -inf (closed), got {gate_init!r}.")
        if not math.isfinite(rescale_init):
            raise ValueError(f"{who}: rescale_init must be a finite number, got {rescale_init!r}.")
        self.rescale_gate = rescale_gate
        self.gate_init, self.rescale_init = float(gate_init), float(rescale_init)
        self.correction, self.eps_outside = correction, bool(eps_outside)
        super().__init__(num_features, **options)
        layers: dict[str, tuple[int, ...]] = {}
        for encoder, ratio in (("std", self.std_ratio), ("rescale", self.rescale_ratio)):
            # Narrow layers, as the first one of a network, still have a unit to code with.
            hidden = max(1, num_features // ratio)
            shapes = {f"{encoder}_encoder": (hidden, num_features)}
            shapes |= {f"{decoder}_decoder": (num_features, hidden) for decoder in DECODERS[encoder]}
            for name, shape in shapes.items():
                layers[f"{name}_weight"], layers[f"{name}_bias"] = shape, shape[:1]
        rescale_shape = (1,) if rescale_gate else None
        gates = dict(zip(GATES, ((1,), (1,), rescale_shape, rescale_shape), strict=True))
        self._add_parameters(options, **layers, **gates)

    def recode(self, s: Moments, m: Moments) -> Affine:
        """Return the affine map of the equation above, written around the mean of x, where no digit is lost.

        Args:
            s: the statistics mu and sigma^2, (N, C) or (1, C).
            m: the moments of x, (N, C); the same object where mu and sigma^2 are those of x.
        """
        if self.correction:
            same, s = s is m, s.unbiased()  # running statistics, which are so already, stay as they are
            m = s if same else m
        # The networks run in the dtype of the variances; the sums with mu and sigma in that of the means.
        wide = stat_dtype(s.var)
        std, least_d = self._std(s.var.to(wide))
        # An encoder reads mu and sigma by the same weights: one matrix product for both, one below the other.
        measured = torch.cat([s.mean.to(m.var.dtype), std.to(m.var.dtype)])
        mu, sigma = self._decode("std", self.drop_statistics(measured), wide)
        beta, gamma = self._decode("rescale", measured, wide)
        beta, gamma = beta.tanh(), gamma.sigmoid()
        if self.rescale_gate:
            beta = self._parameter("lambda_beta", wide) * beta
            gamma = self._parameter("lambda_gamma", wide) * gamma
        bias, weight = 0.0 if self.bias is None else self.bias, 1.0 if self.weight is None else self.weight
        # The mean of x minus the adapted m: two near numbers are subtracted before anything is multiplied by their
        # rounding.
        centered_mean = self._parameter("lambda_mu", wide).sigmoid() * (s.mean - mu)
        if s is not m:
            # The two differences are small, so that their sum rounds less than one of the means would.
            centered_mean = (m.mean - s.mean) + centered_mean
        d = std + self._parameter("lambda_sigma", wide).sigmoid() * (sigma.relu() - std)
        scale = (weight + gamma) / d.clamp_min(least_d)
        return Affine(m.mean, scale, scale * centered_mean + (bias + beta))

    def _std(self, var: Tensor) -> tuple[Tensor, float]:
        """Return sigma, and the least that d may be."""
        if self.eps_outside:
            tiny = torch.finfo(var.dtype).tiny  # the root of 0 has an infinite slope
            return var.clamp_min(tiny).sqrt() + self.eps, tiny
        # An adapted deviation may come near 0, and sqrt(eps) is the least that a measured one can be.
        return (var + self.eps).sqrt(), math.sqrt(self.eps)

    def fused_spec(self, layout: Layout) -> EncoderDecoderSpec | None:
        """Return the same equations for the kernels, if encoders and decoders have one dtype. AFN and ASR opt in."""
        if self.correction or self.eps_outside:
            return None  # the kernels know sigma = sqrt(biased variance + eps)
        linear_layers = tuple(p for pair in self.linear_parameters() for p in pair)
        # The kernels read all weights as one dtype; mixed ones are rare, and PyTorch takes them.
        if len({p.dtype for p in linear_layers}) > 1:
            return None
        gates = tuple(self._parameters[f"lambda_{name}"] for name in ("mu", "sigma", "beta", "gamma"))
        flags = EncoderDecoderFlags(batch=self.train_uses_batch_stats)
        spec = EncoderDecoderSpec(
            self.weight, self.bias, gates, linear_layers, flags, float(self.eps), drop_prob=self.drop_prob()
        )
        if not self.train_uses_batch_stats or not uses_running_stats(self):
            return spec
        running = (*running_stats(self), self._buffers["_momentum"])
        track = (2 if running[4] is None else 1) if self.training else 0
        return replace(spec, flags=replace(flags, frozen=not self.training, track=track), running=running)

    def drop_statistics(self, statistics: Tensor) -> Tensor:
        """Return what E_s reads of ``statistics``, mu and sigma one below the other, (2 N, C) or (2, C): all of it."""
        return statistics

    def drop_prob(self) -> Tensor | None:
        """Return the probability, 0-dim, with which :meth:`drop` sets an entry to 0; ``None`` where it never does."""
        return None

    @torch.no_grad()
    def monitor(self) -> dict[str, Tensor]:
        """Return the gates: ``gate_mu`` and ``gate_sigma`` after the sigmoid, ``gate_beta`` and ``gate_gamma`` raw."""
        shown = {}
        for name in GATES:
            parameter = getattr(self, name)
            if parameter is not None:
                # A copy, for the monitor keeps it while training goes on.
                value = parameter.detach().squeeze().to(at_least_float32(parameter.dtype), copy=True)
                bounded = name in ("lambda_mu", "lambda_sigma")
                shown[name.replace("lambda", "gate")] = value.sigmoid() if bounded else value
        return shown

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, the gates to their starts and the linear layers as nn.Linear does."""
        super().reset_parameters()
        for weight, bias in self.linear_parameters():
            # As nn.Linear starts, whose modules the authors' code is made of.
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(bias, -bound, bound)

    def start_values(self) -> dict[str, float | Tensor]:
        """Return the starts of the gates."""
        return dict(zip(GATES, (self.gate_init,) * 2 + (self.rescale_init,) * 2, strict=True))

    def linear_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield weight and bias of each linear layer, an encoder before its two decoders."""
        for name, weight in self.named_parameters(remove_duplicate=False):
            # Encoders and decoders by their names, so that the order of registration is the order of the kernels'
            # arguments.
            if name.endswith("coder_weight"):
                yield weight, getattr(self, name.replace("weight", "bias"))

    def _decode(self, encoder: str, measured: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return the last linear layer of both decoders, each (N, C) or (1, C) and in ``dtype``."""
        hidden = self._linear(f"{encoder}_encoder", measured).relu()
        # Of mu, and of sigma; by slices, for onnxscript fails at the sequence that it makes of chunk.
        half = hidden.shape[0] // 2
        halves = zip(DECODERS[encoder], (hidden[:half], hidden[half:]), strict=True)
        return [self._linear(f"{name}_decoder", half).to(dtype) for name, half in halves]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self._parameter(f"{name}_weight", x.dtype), self._parameter(f"{name}_bias", x.dtype))

    def _parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        parameter: nn.Parameter = getattr(self, name)
        return parameter.to(dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # AFN and ASR-Norm have the same parameters: without this, each would load the other's checkpoint in silence.
        if prefix + "std_encoder_weight" in state_dict:
            tracked, strict = prefix + "running_mean" in state_dict, loads_strictly()
            # Running statistics are what tells the two methods' files apart.
            if tracked != self.track_running_stats and (strict or tracked):
                kinds = ("ASRNorm, or of AdaptiveFusionNorm with track_running_stats=False", "AdaptiveFusionNorm")
                raise RuntimeError(
                    f"checkpoint of another normalizer: {prefix[:-1] or 'this layer'} is {type(self).__name__} with "
                    f"track_running_stats={self.track_running_stats}, the file holds that of {kinds[tracked]}. Swap "
                    "the model to that normalizer before loading."
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @classmethod
    def read_published(cls, entries: PublishedEntries) -> PublishedLayer | None:
        """Return what the public code does: unbiased variance, eps = 1e-6; AFN's statistics are the test batch's."""
        if "standard_encoder.weight" not in entries:
            return None
        c = getattr(entries.get("bias_gamma"), "numel", int)()
        tensors = {
            "bias": entries.take("bias_beta", (c,)),
            "weight": entries.take("bias_gamma", (c,)),
            **{name: entries.take(name, (1,)) for name in GATES},
        }
        for (encoder, decoders), ratio in zip(DECODERS.items(), (2, 16), strict=True):
            theirs = {"std": "standard", "rescale": "rescale"}[encoder]
            sizes = dict.fromkeys((c // ratio, max(1, c // ratio)))
            weight = entries.take(f"{theirs}_encoder.weight", *((h, c) for h in sizes))
            h = len(weight)
            tensors[f"{encoder}_encoder_weight"] = unit_at_least(weight, 0)
            tensors[f"{encoder}_encoder_bias"] = unit_at_least(entries.take(f"{theirs}_encoder.bias", (h,)), 0)
            for decoder in decoders:
                name = f"{theirs}_{_PUBLIC_NAMES.get(decoder, decoder)}_decoder.1"
                tensors[f"{decoder}_decoder_weight"] = unit_at_least(entries.take(f"{name}.weight", (c, h)), 1)
                tensors[f"{decoder}_decoder_bias"] = entries.take(f"{name}.bias", (c,))
        arguments: dict[str, Any] = {"correction": 1, "eps": 1e-6}
        if cls.train_uses_batch_stats:
            tracked = "running_mean" in entries
            arguments |= {"eps_outside": True, "track_running_stats": tracked}
            tensors |= entries.running_stats(c) if tracked else {}
        return PublishedLayer(c, arguments, tensors)


_PUBLIC_NAMES = {"mu": "mean", "sigma": "std"}
"""Names of decoders here -> in the public code, where they differ."""
