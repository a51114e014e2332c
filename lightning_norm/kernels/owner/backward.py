"""Device code: sums, adjoint and dx in one launch, a program for a few channels of all samples. As ``forward``."""

import triton
import triton.language as tl

from lightning_norm.kernels.mixture.backward import vjp_columns, vjp_mix_at
from lightning_norm.kernels.owner.forward import maps_at, places_at
from lightning_norm.kernels.passes.backward import before_activation, products
from lightning_norm.kernels.per_channel.backward import channels_vjp


@triton.jit
def add_up(
    dy, x, residual, affine, sums, samples, channels, size, units, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, N_TILE: tl.constexpr, C_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sums of g and of g * (x - pivot), (2, N * C), of the program's channels."""
    number = samples * channels
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    for begin in range(0, samples, N_TILE):
        n = begin + tl.arange(0, N_TILE)
        lane, loaded, keep, i, inside = maps_at(n, c, samples, channels, size, units, ALIGN, COLUMNS, S_BLOCK)
        k = tl.load(affine + i, mask=inside, other=0.0)[:, :, None]
        a, b = k, k
        if ACT != 0:
            # Of the shape of a tile, which a multiply-add wants of all three.
            wide = tl.zeros((1, 1, S_BLOCK), tl.float32)
            a = tl.load(affine + number + i, mask=inside, other=0.0)[:, :, None] + wide
            b = tl.load(affine + 2 * number + i, mask=inside, other=0.0)[:, :, None] + wide
        g, gu = products(dy, x, residual, lane, loaded, keep, k, a, b, ACT, RESIDUAL)
        tl.store(sums + i, tl.sum(g, 2), mask=inside)
        tl.store(sums + number + i, tl.sum(gu, 2), mask=inside)


@triton.jit
def spread(
    dy, x, residual, dx, dresidual, affine, dx_affine, samples, channels, size, units, magic, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, COLUMNS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, W_TILE: tl.constexpr,
    C_BLOCK: tl.constexpr, S_BLOCK: tl.constexpr, F_BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = scale * g + constant + slope * (x - pivot) for the program's channels; also g itself for the residual."""
    number = samples * channels
    c = tl.program_id(0) * C_BLOCK + tl.arange(0, C_BLOCK)
    for begin in range(0, samples, W_TILE):
        n = begin + tl.arange(0, W_TILE)
        lane, keep, at, exists = places_at(
            n, c, samples, channels, size, units, magic, ALIGN, FLAT, COLUMNS, C_BLOCK, S_BLOCK, F_BLOCK
        )
        g = tl.load(dy + lane, mask=keep, other=0.0).to(tl.float32)
        u = tl.load(x + lane, mask=keep, other=0.0).to(tl.float32) - tl.load(affine + at, mask=exists, other=0.0)
        zero = u * 0.0
        a = tl.load(affine + number + at, mask=exists, other=0.0) + zero
        # g before the activation.
        if ACT != 0:
            z = tl.fma(a, u, tl.load(affine + 2 * number + at, mask=exists, other=0.0) + zero)
            g = before_activation(g, z, residual, lane, keep, ACT, RESIDUAL)
        if RESIDUAL:
            # The residual was added as it is, so its gradient is g.
            tl.store(dresidual + lane, g.to(dresidual.dtype.element_ty), mask=keep)
        # The large term last: it alone is rounded at full size.
        constant = tl.load(dx_affine + at, mask=exists, other=0.0) + zero
        d = tl.fma(a, g, tl.fma(tl.load(dx_affine + number + at, mask=exists, other=0.0) + zero, u, constant))
        tl.store(dx + lane, d.to(dx.dtype.element_ty), mask=keep)


@triton.jit
def own_mixture_vjp(
    dy, x, residual, dx, dresidual, weight, running_mean, running_var, moments, batch, affine, dbatch, dweight, dbias,
    sums, dx_affine, samples, channels, size, units, magic, eps, factor, BN: tl.constexpr, WEIGHT: tl.constexpr,
    NEED: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr,
    COLUMNS: tl.constexpr, N_TILE: tl.constexpr, W_TILE: tl.constexpr, N_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr, F_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of what ``own_mixture`` computes; dx only with NEED. The grid is (blocks of channels,)."""
    number, pid = samples * channels, tl.program_id(0)
    add_up(
        dy, x, residual, affine, sums, samples, channels, size, units, ALIGN, COLUMNS, ACT, RESIDUAL, N_TILE, C_BLOCK,
        S_BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    vjp_columns(
        pid, sums, sums + number, affine, moments, batch, affine, weight, affine, affine, running_mean, running_var,
        dbatch, dweight, dbias, affine, affine, samples, number, channels, samples, channels, 1, 1, channels, number,
        eps, factor, True, False, -1 if BN else 0, -1, 0 if BN else -1, 0, False, False, False, WEIGHT, N_BLOCK,
        C_BLOCK,
    )  # fmt: skip
    if NEED:
        tl.debug_barrier()
        c = (pid * C_BLOCK + tl.arange(0, C_BLOCK))[None, :]
        for begin in range(0, samples, N_BLOCK):
            n = (begin + tl.arange(0, N_BLOCK))[:, None]
            vjp_mix_at(
                sums, sums + number, affine, moments, batch, affine, weight, affine, affine, running_mean, running_var,
                dbatch, affine, dx_affine, n + c * 0, c + n * 0, (n < samples) & (c < channels), samples, number,
                channels, samples, channels, 1, channels, number, size, eps, factor, True, False, -1 if BN else 0, -1,
                0 if BN else -1, 0, False, False, False, WEIGHT,
            )  # fmt: skip
        tl.debug_barrier()
        spread(
            dy, x, residual, dx, dresidual, affine, dx_affine, samples, channels, size, units, magic, ALIGN, FLAT,
            COLUMNS, ACT, RESIDUAL, W_TILE, C_BLOCK, S_BLOCK, F_BLOCK,
        )  # fmt: skip


@triton.jit
def own_channels_vjp(
    dy, x, residual, dx, dresidual, responsibilities, weight, bias, center_weight, scale_weight, scale_bias,
    affine_weight, affine_bias, moments, stats, affine, dweight, dbias, dcenter_weight, dscale_weight, dscale_bias,
    daffine_weight, daffine_bias, sums, dx_affine, samples, channels, contexts, size, units, magic, inner, least,
    unit_scale, unit_affine, STD: tl.constexpr, RENORM: tl.constexpr, CONTEXTS: tl.constexpr, CENTER: tl.constexpr,
    SCALE: tl.constexpr, AFFINE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, NEED: tl.constexpr,
    ACT: tl.constexpr, RESIDUAL: tl.constexpr, ALIGN: tl.constexpr, FLAT: tl.constexpr, COLUMNS: tl.constexpr,
    N_TILE: tl.constexpr, W_TILE: tl.constexpr, N_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr, F_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of what ``own_channels`` computes; dx only with NEED. The grid is (blocks of channels,)."""
    number = samples * channels
    add_up(
        dy, x, residual, affine, sums, samples, channels, size, units, ALIGN, COLUMNS, ACT, RESIDUAL, N_TILE, C_BLOCK,
        S_BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    channels_vjp(
        sums, sums + number, affine, moments, stats, responsibilities, affine, weight, bias, center_weight,
        scale_weight, scale_bias, affine_weight, affine_bias, dweight, dbias, dcenter_weight, dscale_weight,
        dscale_bias, daffine_weight, daffine_bias, dx_affine, affine, stats, stats, stats, samples, number, channels,
        contexts, contexts, 1, channels, number, size, inner, least, unit_scale, unit_affine, True, False, STD, STD,
        RENORM, CONTEXTS, False, False, 0, CENTER, SCALE, AFFINE, WEIGHT, BIAS, N_BLOCK, K_BLOCK, C_BLOCK,
    )  # fmt: skip
    if NEED:
        tl.debug_barrier()
        spread(
            dy, x, residual, dx, dresidual, affine, dx_affine, samples, channels, size, units, magic, ALIGN, FLAT,
            COLUMNS, ACT, RESIDUAL, W_TILE, C_BLOCK, S_BLOCK, F_BLOCK,
        )  # fmt: skip
