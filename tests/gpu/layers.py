"""Layers on the kernels, moved from their start, and the same in float64 on plain PyTorch."""

import copy

import torch

import lightning_norm
from lightning_norm.normalizers.context.assignment import assign, context_layers
from lightning_norm.testing.kit import distance, features, noise, statistics

C = 24
OF_CN = {"context": "ids", "num_contexts": 3}
LAYERS = [
    *((key, OF_CN if key == "cn" else dict(cls.test_arguments)) for key, cls in lightning_norm.normalizers().items()),
    ("ubn", {"threshold": -0.5, "min_updates": 0}),
]
"""Every registered normalizer; ubn once more with condensation, at a threshold that every batch passes."""

NAMES = [key + (" condensed" if "threshold" in arguments else "") for key, arguments in LAYERS]
FORMS = ("contiguous", "channels_last", "tokens")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2.0**-7, "fp16": 2.0**-9}
"""Of the norm: the gates see sums in float32; an ulp of the half types (the interpreter truncates to bfloat16)."""


def layer_of(key, arguments, device, form="contiguous", n=16, c=C):
    """A layer whose parameters and running statistics were moved from their start."""
    arguments = dict(arguments)
    if form == "tokens":
        arguments |= {"channel_dim": -1, **({"spatial_dims": 1} if key == "bnet" else {})}
    layer = lightning_norm.create(key, c, **arguments)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.2 * noise(*p.shape, seed=300 + i))
        for i, name in enumerate(layer.running_names if layer.track_running_stats else ()):
            buffer = layer._buffers[name]
            buffer.add_(noise(*buffer.shape, seed=5 + i).abs())
    layer.backend = "triton"
    layer = layer.to(device)
    if key == "cn":
        assign(context_layers(layer), torch.arange(n, device=device) % 3)
    return layer


def twin(layer):
    """The same layer in float64 on plain PyTorch."""
    exact = copy.deepcopy(layer).double()
    exact.backend = "eager"
    return exact


def inputs(device, form="contiguous", dtype=torch.float32, shape=None, seed=1):
    """x, dy and a residual; small ones for the interpreter."""
    n, c, h, w = shape or ((16, C, 14, 14) if device == "cuda" else (3, C, 5, 4))
    size = (n, c, h * w) if form == "tokens" else (n, c, h, w)
    tensors = (features(*size, seed=seed), noise(*size, seed=seed + 6), noise(*size, seed=seed + 8))
    if form == "tokens":
        tensors = tuple(t.movedim(1, -1).contiguous() for t in tensors)
    last = torch.channels_last if form == "channels_last" else torch.contiguous_format
    return tuple(t.to(device, dtype).contiguous(memory_format=last) for t in tensors)


def results(layer, x, dy, **more):
    """Output, every gradient, and the buffers afterwards."""
    x = x.detach().requires_grad_()
    residual = more.get("residual")
    if residual is not None:
        more["residual"] = residual = residual.detach().requires_grad_()
    y = layer(x, **more)
    named = {"dx": x, **({} if residual is None else {"dresidual": residual}), **dict(layer.named_parameters())}
    grads = torch.autograd.grad(y, list(named.values()), dy, allow_unused=True, materialize_grads=True)
    tensors = {"y": y.detach(), **dict(zip(named, grads, strict=True))}
    return {k: v.detach().clone() for k, v in {**tensors, **statistics(layer)}.items()}


def close(got, want, tolerance):
    """Each tensor, relative to its norm; gradients that are nearly zero absolutely.

    A parameter's gradient is a sum of which much cancels.
    """
    assert got.keys() == want.keys()
    for name, t in want.items():
        direct = name.split()[-1] in ("y", "dx", "dresidual") or "running" in name
        error = distance(got[name], t) * min(1.0, float(t.double().norm()) / 0.1)
        assert error < (tolerance if direct else max(tolerance, 1e-4)), f"{name}: {error:.1e}"


def equal(got, want):
    """The same bits."""
    for name, t in want.items():
        assert torch.equal(got[name], t), name
