"""The kernels as torch operators, ``torch.ops.lightning_norm``: opaque to torch.compile and torch.export.

Defined whether or not Triton is installed; Triton is imported when one runs. Arguments and results are plain: ``coef``
is (3, N, C) pivot, scale and offset, ``line`` (2, N, C) constant and slope, ``plan`` the fields of
``lightning_norm.kernels.launch_algebra.Plan``. None has an autograd formula: ``ops/fused.py`` and ``ops/recipe.py``
call them from autograd functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_norm.ops.sync import Ranks

DOUBLE = "the Triton kernels have no second derivative: swap(..., backend='eager'), or layer.backend = 'eager'."
_library: Any = torch.library.Library("lightning_norm", "DEF")  # type: ignore[no-untyped-call]
_HELD = "Tensor x, Tensor? weight, Tensor? bias, Tensor? w, Tensor? v"
_BUFFERS = "Tensor{0}? running_mean, Tensor{1}? running_var, Tensor{2}? tracked, Tensor{3}? skipped, Tensor? momentum"
_PLAN = "int channel_dim, int[] plan, float eps"
_STATS = "Tensor own, Tensor batch, Tensor layer, Tensor coef, Tensor total"
_GROUP = "str group) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
SCHEMAS = {
    "moments": "(Tensor x, int channel_dim) -> Tensor",
    "sums": "(Tensor dy, Tensor x, Tensor coef, int channel_dim) -> Tensor",
    "apply": "(Tensor x, Tensor coef, int channel_dim, str activation, Tensor? residual) -> Tensor",
    "combine": "(Tensor dy, Tensor x, Tensor coef, Tensor? line, int channel_dim) -> Tensor",
    "coefficients": f"({_HELD}, {_BUFFERS.format('', '', '', '')}, {_PLAN}, {_GROUP}",
    "coefficients_and_track": f"({_HELD}, {_BUFFERS.format('(a!)', '(b!)', '(c!)', '(d!)')}, {_PLAN}, {_GROUP}",
    "gradients": f"(Tensor dy, Tensor x, {_STATS}, Tensor? weight, Tensor? w, "
    f"Tensor? v, Tensor? running_mean, Tensor? running_var, Tensor? residual, {_PLAN}, str activation, "
    "bool need_dx, str group) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "recover": "(Tensor x, Tensor coef, Tensor kernel, Tensor? bias) -> Tensor",
    "recover_gradients": f"(Tensor dy, Tensor x, {_STATS}, Tensor kernel, Tensor? running_mean, "
    "Tensor? running_var, int[] plan, float eps, bool need_dx, str group) -> (Tensor, Tensor, Tensor)",
}


def _moments(x: Tensor, channel_dim: int) -> Tensor:
    from lightning_norm.kernels.passes import launch

    return launch.moments(x, channel_dim)


def _sums(dy: Tensor, x: Tensor, coef: Tensor, channel_dim: int) -> Tensor:
    from lightning_norm.kernels.passes import launch

    return launch.sums(dy, x, coef, channel_dim)


def _apply(x: Tensor, coef: Tensor, channel_dim: int, activation: str, residual: Tensor | None) -> Tensor:
    from lightning_norm.kernels.passes import launch

    return launch.apply(x, coef, channel_dim, activation, residual)


def _combine(dy: Tensor, x: Tensor, coef: Tensor, line: Tensor | None, channel_dim: int) -> Tensor:
    from lightning_norm.kernels.passes import launch

    return launch.combine(dy, x, coef, line, channel_dim)[0]


def _coefficients(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    tracked: Tensor | None,
    skipped: Tensor | None,
    momentum: Tensor | None,
    channel_dim: int,
    plan: list[int],
    eps: float,
    group: str,
) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.mixture.launch import Plan, coefficients

    running = (running_mean, running_var, tracked, skipped, momentum)
    return coefficients(x, weight, bias, w, v, running, channel_dim, Plan(*plan), eps, over(group))


def _gradients(
    dy: Tensor,
    x: Tensor,
    own: Tensor,
    batch: Tensor,
    layer: Tensor,
    coef: Tensor,
    total: Tensor,
    weight: Tensor | None,
    w: Tensor | None,
    v: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    channel_dim: int,
    plan: list[int],
    eps: float,
    activation: str,
    need_dx: bool,
    group: str,
) -> tuple[Tensor, ...]:
    from lightning_norm.kernels.mixture.launch import Plan, gradients

    stats, running = (own, batch, layer, coef, total), (running_mean, running_var)
    return gradients(
        dy, x, stats, weight, w, v, running, residual, channel_dim, Plan(*plan), eps, activation, need_dx, over(group)
    )  # fmt: skip


def _recover(x: Tensor, coef: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    from lightning_norm.kernels.depthwise import launch

    return launch.recover(x, coef, kernel, bias)


def _recover_gradients(
    dy: Tensor,
    x: Tensor,
    own: Tensor,
    batch: Tensor,
    layer: Tensor,
    coef: Tensor,
    total: Tensor,
    kernel: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    plan: list[int],
    eps: float,
    need_dx: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from lightning_norm.kernels.depthwise.launch import gradients
    from lightning_norm.kernels.mixture.launch import Plan

    stats, running = (own, batch, layer, coef, total), (running_mean, running_var)
    return gradients(dy, x, stats, kernel, running, Plan(*plan), eps, need_dx, over(group))


def over(group: str) -> Callable[[Tensor], Tensor] | None:
    """Return what adds a tensor up over the ranks of that name."""
    return Ranks(group).sum if group else None


def _numbers(x: Tensor, channel_dim: int, *lead: int) -> Tensor:
    return x.new_empty((*lead, x.shape[0], x.shape[channel_dim]), dtype=torch.float32)


def _fake_coefficients(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    channel_dim, plan, _, group = args[-4:]
    coef = _numbers(x, channel_dim, 3)
    own = torch.empty_like(coef) if plan[0] else coef.new_empty(0)
    batch = coef.new_empty(3, x.shape[channel_dim]) if plan[0] and plan[3] >= 0 and not plan[7] else coef.new_empty(0)
    layer = coef.new_empty(3, x.shape[0], plan[9]) if plan[0] and plan[2] >= 0 else coef.new_empty(0)
    total = coef.new_empty((1, 1 + 2 * x.shape[channel_dim]) if group else (0,), dtype=torch.float64)
    return own, batch, layer, coef, total


def _fake_gradients(dy: Tensor, x: Tensor, own: Tensor, batch: Tensor, layer: Tensor, coef: Tensor, *args: Any) -> Any:
    residual, channel_dim, plan, _, _, need_dx, _ = args[-7:]
    c = x.shape[channel_dim]
    dx, dresidual = fake_input_gradients(x, coef, residual, need_dx)
    dw, dv = coef.new_empty(c if plan[6] else plan[4]), coef.new_empty(plan[4])
    return dx, coef.new_empty(c), coef.new_empty(c), dw, dv, dresidual


def fake_input_gradients(x: Tensor, coef: Tensor, residual: Tensor | None, need_dx: bool) -> tuple[Tensor, Tensor]:
    """Return what ``kernels.launch.input_gradients`` returns, of the same shapes."""
    dx = torch.empty_like(x) if need_dx or residual is not None else coef.new_empty(0)
    return dx, coef.new_empty(0) if residual is None else torch.empty_like(x)


def _fake_recover_gradients(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    kernel, *_, need_dx, _ = args[5:]
    coef = args[3]
    dx = torch.empty_like(x) if need_dx else coef.new_empty(0)
    return dx, torch.empty_like(kernel, dtype=torch.float32), coef.new_empty(x.shape[1])


_REAL: dict[str, Callable[..., Any]] = {
    "moments": _moments,
    "sums": _sums,
    "apply": _apply,
    "combine": _combine,
    "coefficients": _coefficients,
    "coefficients_and_track": _coefficients,
    "gradients": _gradients,
    "recover": _recover,
    "recover_gradients": _recover_gradients,
}
_FAKE: dict[str, Callable[..., Any]] = {
    "moments": lambda x, channel_dim: _numbers(x, channel_dim, 3),
    "sums": lambda dy, x, coef, channel_dim: _numbers(x, channel_dim, 2),
    "apply": lambda x, *args: torch.empty_like(x),
    "combine": lambda dy, x, *args: torch.empty_like(x),
    "coefficients": _fake_coefficients,
    "coefficients_and_track": _fake_coefficients,
    "gradients": _fake_gradients,
    "recover": lambda x, *args: torch.empty_like(x),
    "recover_gradients": _fake_recover_gradients,
}


def define(
    schemas: dict[str, str],
    real: dict[str, Callable[..., Any]],
    fake: dict[str, Callable[..., Any]],
    keys: tuple[str, ...] = ("CUDA", "CPU"),
) -> None:
    """Define operators, by default for CUDA and for the interpreter on the CPU."""
    for name, schema in schemas.items():
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in keys:
            _library.impl(name, real[name], key)
        torch.library.register_fake(f"lightning_norm::{name}", fake[name], lib=_library)


def refuse_second_derivatives() -> None:
    """Name the way out where a backward pass is recorded.

    Raises:
        RuntimeError: under ``create_graph=True``.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(DOUBLE)


define(SCHEMAS, _REAL, _FAKE)
