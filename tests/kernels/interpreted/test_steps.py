"""How often a program waits for the memory: the lengths of the loops of every launch, counted from its arguments."""

import copy
import inspect

import pytest
import torch

import lightning_norm
from lightning_norm.kernels import launcher
from lightning_norm.kernels.grid import FEW, JOINED, cdiv, grid_of
from lightning_norm.kernels.passes.launch import join_tile
from lightning_norm.testing.kit import features, noise, statistics, step

FLAT = [(65536, 256), (8192, 1024), (256, 64)]
OF_THE_BATCH = [("bn", {}), ("dbn", {}), ("brn", {}), ("afn", {"dropout": 0.0})]
RESNET = [(64, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7)]
POOLS = ("pool", "vjp_pool")


def launches_of(key, arguments, x):
    """The launches of a training step, without one of them being run, and the bytes that are kept for backward."""
    layer = lightning_norm.create(key, x.shape[1], **arguments)
    layer.backend = "triton"
    plans, real = [], launcher.record

    def record(inputs, call):
        plans.append(real(inputs, call))
        plans[-1]._launch_as_usual = lambda tensors: None
        return plans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "record", record)
        patch.setattr(launcher, "_plans", {})
        x = x.requires_grad_()
        y = layer(x)
        torch.autograd.grad(y, [x, *layer.parameters()], y.detach())
    assert len(plans) == 2
    return [launch for plan in plans for launch in plan.launches], 4 * plans[0].sizes[0]


def loops(launch):
    """The steps of each loop that grows with x: name of what it goes over -> steps."""
    names = list(inspect.signature(launch.kernel.fn).parameters)
    a = {**dict(zip(names, launch.args, strict=False)), **launch.options}
    flags, tile = a.get("FLAGS"), a.get("TILE")
    reads_pieces = "pieces" in a and getattr(flags, "merge", a.get("MERGE", "P_BLOCK" in a))
    over = {"pieces": cdiv(a["pieces"], a.get("P_BLOCK", 1)) if reads_pieces else 1}
    # Moments of parts, where they are that, are counted as pieces.
    counted = isinstance(a.get("parts"), int) and "P_BLOCK" in a
    over["parts"] = cdiv(a["parts"], a["P_BLOCK"]) if counted else 1
    name = launch.kernel.fn.__name__
    if name in ("moments_columns", "sums_columns"):
        over["piece"] = cdiv(a["piece"], a["ROWS"])
    if name in ("moments_rows", "sums_rows"):
        over["piece"] = cdiv(a["piece"] + a["ALIGN"] - 1, a["BLOCK"])
    if name in POOLS and a["column_jobs"]:
        over["samples"] = cdiv(a["samples"], tile.n)
    if name in POOLS and launch.grid[0] > a["column_jobs"]:
        over["channels"] = cdiv(a["per_group"], tile.t)
    if name in ("channels_of", "channels_vjp", "pool_channels", "encode", "decode", "vjp_affine", "vjp_encode"):
        over["samples"] = cdiv(a["samples"], tile.n)
    return over


@pytest.mark.parametrize("shape", FLAT, ids=str)
@pytest.mark.parametrize(("key", "arguments"), OF_THE_BATCH, ids=str)
def test_inputs_without_positions(key, arguments, shape):
    """Read as one sample: no launch waits long, and nothing is kept for each element."""
    x = torch.zeros(shape, dtype=torch.bfloat16)
    launches, kept = launches_of(key, arguments, x)
    for launch in launches:
        assert max(loops(launch).values()) <= 16, (launch.kernel.fn.__name__, loops(launch))
    assert kept <= 0.1 * x.numel() * x.element_size() + 64 * 1024  # beside x itself
    if x.numel() > 1 << 20:
        assert kept <= 0.1 * x.numel() * x.element_size()


@pytest.mark.parametrize("key", ["sn", "rbn"])
@pytest.mark.parametrize(
    "shape", [(32, 128, 4, 4), (176, 64, 16, 16), (32, 64, 56, 56)], ids=["whole", "parts", "joined"]
)
def test_the_mean_of_a_sample_is_kept_once(key, shape):
    """Mean, what rounding left of it, variance, scale and offset: five numbers for each sample and channel."""
    _, kept = launches_of(
        key, {}, torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    )
    assert kept <= 4 * (5 * shape[0] * shape[1] + 1500)


@pytest.mark.parametrize(("key", "arguments"), OF_THE_BATCH, ids=str)
@pytest.mark.parametrize("shape", [(5, 6), (70, 3), (300, 8), (1, 6)], ids=str)
def test_values_without_positions(key, arguments, shape):
    """As in float64, in training and in evaluation; dy may be expanded, and the residual x itself."""
    ours = lightning_norm.create(key, shape[1], **arguments)
    exact = copy.deepcopy(ours).double()
    ours.backend, exact.backend = "triton", "eager"
    x, dy = features(*shape), noise(*shape, seed=7)
    if shape[0] == 1:
        ours.eval(), exact.eval()
    for _ in range(2):
        a, b = step(ours, x, dy), step(exact, x.double(), dy.double())
        got = {"y": a.y, "dx": a.dx, **a.grads, **statistics(ours)}
        for name, t in {"y": b.y, "dx": b.dx, **b.grads, **statistics(exact)}.items():
            error = (got[name].double() - t.double()).norm() / t.double().norm().clamp_min(0.1)
            assert error < 1e-5, f"{name}: {error:.1e}"
    y = ours(x, activation="relu", residual=x)
    want = exact(x.double(), activation="relu", residual=x.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


JOINS = [(8, 64, 112, 112), (1, 3, 224, 224), (2, 64, 56, 56), (1, 1, 600, 600), (16, 24, 64, 64)]


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", JOINS, ids=str)
@pytest.mark.parametrize("key", ["sn", "rbn", "bnet"])
def test_joins_of_pieces(key, shape, form):
    """Never more than four steps over pieces, wherever they are read."""
    launches, _ = launches_of(key, {}, torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=form))
    for launch in launches:
        over = loops(launch)
        assert max(over["pieces"], over["parts"]) <= FEW, (launch.kernel.fn.__name__, over)


def test_the_most_pieces_that_there_can_be():
    """One channel whose positions are taken for channels."""
    grid = grid_of(torch.empty(1, 1 << 26, 1, device="meta"), -1)
    assert grid.parts > JOINED[-2]
    assert cdiv(grid.parts, join_tile(grid.parts)[0]) <= FEW


@pytest.mark.parametrize("key", ["sn", "bcn", "gn", "ln", "bn"])
@pytest.mark.parametrize("shape", RESNET, ids=str)
def test_pools_at_the_shapes_of_a_resnet(key, shape):
    """Over 64 samples, and over the 256 to 2048 channels of a layer: two steps at most."""
    n, c = shape[:2]
    launches, _ = launches_of(key, {}, torch.zeros(n, c, 2, 2, dtype=torch.bfloat16))
    pools = [launch for launch in launches if launch.kernel.fn.__name__ in POOLS]
    assert len(pools) == 2
    for launch in pools:
        assert max(loops(launch).values()) <= 2, (launch.kernel.fn.__name__, loops(launch))
