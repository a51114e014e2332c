"""Ahead-of-time compilation, no GPU needed: no spills, loads of 16 bytes, no float64, registers within their budget."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest

pytest.importorskip("triton")

SHORT = """
import sys
from benchmarks.aot_report import usage, variants
archs, names, shapes, dtypes = (text.split(",") for text in sys.argv[1:])
for arch in map(int, archs):
    for v in variants():
        if (names != [""] and v.name not in names) or (shapes != [""] and v.shape not in shapes):
            continue
        if v.dtype not in dtypes or (arch != 90 and "threshold" in v.shape):  # as the others but for one more sum
            continue
        try:
            print(usage(v, arch))
        except Exception as error:
            if arch < 100:
                raise
            print(f"SKIP {type(error).__name__}")
"""

BUDGET = {
    "moments_rows": 80,
    "sums_rows": 128,
    "moments_columns": 154,
    "sums_columns": 144,
    "apply_flat": 96,
    "apply_columns": 72,
    "combine_flat": 128,
    "combine_columns": 112,
    "join_moments": 128,
    "join_sums": 108,
    "mix": 80,
    "pool": 200,
    "vjp_pool": 216,
    "vjp_mix": 96,
    "pack": 48,
    "unpack": 48,
    "pack_gradient": 64,
    "unpack_gradient": 48,
    "survey": 124,
    "pool_channels": 96,
    "channels_of": 112,
    "commit": 96,
    "channels_vjp": 120,
    "gate_logits_vjp": 40,
    "gate_vjp": 52,
    "encode": 200,
    "decode": 190,
    "vjp_affine": 180,
    "vjp_decode": 136,
    "vjp_encode": 246,
    "directions": 56,
    "depthwise_apply": 200,
    "depthwise_sums": 210,
    "depthwise_combine": 160,
    "join_taps": 58,
    "own_mixture": 128,
    "own_mixture_vjp": 128,
    "own_channels": 128,
    "own_channels_vjp": 128,
    "cooperative_mixture": 168,
    "cooperative_mixture_vjp": 248,
    "apply_elementwise": 100,
    "combine_elementwise": 128,
    "join_elementwise": 96,
}
"""Registers of a thread, about a fifth above what triton 3.8 uses; 128 threads may have 255 each without a spill."""

SPILL = 0 if version("triton").startswith("3.8.") else 16
"""Bytes of a thread: the limits of registers were chosen by triton 3.8; by 3.6 one kernel spills 8 on sm_90."""

STREAMS = {"moments_rows", "sums_rows", "moments_columns", "sums_columns", "apply_flat", "apply_columns", "combine_flat", "combine_columns", "directions"}  # noqa: E501  # fmt: skip


OWNERS = {"own_mixture", "own_mixture_vjp", "own_channels", "own_channels_vjp"}

TICKETS = {"own_mixture": 1, "own_channels": 1, "cooperative_mixture": 6, "cooperative_mixture_vjp": 6}
"""Kernels whose programs count by atomics which of them are done; no result depends on their order."""

ELEMENTWISE = {"apply_elementwise": 1, "combine_elementwise": 2}
"""The tensors that each reads."""

STENCILS = {"depthwise_apply", "depthwise_combine"}


def usages(archs, names="", shapes="", dtypes="fp32,bf16,fp16"):
    """Compile in a process that does not interpret."""
    from benchmarks.aot_report import Usage

    command = [sys.executable, "-c", SHORT, archs, names, shapes, dtypes]
    run = subprocess.run(command, capture_output=True, text=True, env=clean())
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    return [eval(line, {"Usage": Usage}) for line in lines if line.startswith("Usage")], lines


def clean():
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def check_result(u):
    assert u.stack <= SPILL, f"spills: {u}"
    assert u.doubles == 0 or "ranks" in u.shape, f"float64: {u}"  # what travels between ranks: C numbers
    assert u.atomics <= TICKETS.get(u.kernel, 0), f"atomics: {u}"
    assert u.registers <= BUDGET[u.kernel], f"registers: {u}"
    if u.kernel in STREAMS:
        tensors = 1 + ("sums" in u.kernel or "combine" in u.kernel) + ("relu" in u.shape)
        vectors = 2048 * (4 if u.dtype == "fp32" else 2) // 16 // 128  # of a thread and tensor
        assert u.loads128 >= tensors * vectors, f"narrow loads: {u}"
        if "apply" in u.kernel or "combine" in u.kernel:
            assert u.stores128 >= vectors, f"narrow stores: {u}"
    if u.kernel in ELEMENTWISE and not u.shape.startswith("49"):
        vectors = 2048 * (4 if u.dtype == "fp32" else 2) // 16 // (32 * u.warps)
        assert u.loads128 >= (ELEMENTWISE[u.kernel] + ("relu" in u.shape)) * vectors, f"narrow loads: {u}"
        assert u.stores128 >= vectors, f"narrow stores: {u}"
    if u.kernel in OWNERS and u.shape.startswith("49"):
        # x is read twice, and so are dy and the residual in the backward pass.
        tensors = 4 + 2 * ("relu" in u.shape) if "vjp" in u.kernel else 2 + ("relu" in u.shape)
        tile = 2048 if "cn" in u.shape or "last" in u.shape else 4096
        vectors = tile * (4 if u.dtype == "fp32" else 2) // 16 // 256  # of a thread and tensor
        assert u.loads128 >= tensors * vectors, f"narrow loads: {u}"
        assert u.stores128 >= vectors, f"narrow stores: {u}"
    if u.kernel in STENCILS and "channels last" in u.shape:  # rows of maps are met at every offset, so one by one
        taps = int(u.shape[0]) ** 2 if u.shape[0] == "3" else int(u.shape[0])
        assert u.loads128 >= taps, f"narrow loads: {u}"
        assert u.stores128 >= 1, f"narrow stores: {u}"


@pytest.mark.timeout(7200)
def test_a_stream_on_hopper():
    measured, _ = usages("90", "apply_flat", "any")
    assert {u.dtype for u in measured} == {"fp32", "bf16", "fp16"}
    for u in measured:
        check_result(u)


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_kernel(arch):
    wanted = set(BUDGET)
    dtypes = "fp32,bf16,fp16" if arch == "90" else "fp32,bf16"  # the half types compile alike
    measured, lines = usages(arch, ",".join(sorted(wanted)), dtypes=dtypes)
    if arch == "100" and not measured:
        pytest.skip(f"this Triton cannot compile for sm_100: {lines[0]}")
    assert {u.kernel for u in measured} == wanted
    if arch == "90":
        sizes = ("49", "196", "any", "channels last")
        streams = [u for u in measured if u.kernel in STREAMS and any(size in u.shape for size in sizes)]
        assert len(streams) >= 3 * (2 * 2 + 2 + 4 + 1)  # dtypes x (rows at two sizes, flat, columns, condensation)
    for u in measured:
        check_result(u)


ONES = """
from benchmarks.aot_report import compiled, variants
seen = set()
for v in variants():
    if v.dtype == "fp32" and (v.name, v.shape) not in seen:
        seen.add((v.name, v.shape))
        compiled(v, 90, ones=True)
print(len(seen))
"""


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_every_kernel_where_all_sizes_are_1():
    """The launcher makes constants of them, and device code must not take them for tensors."""
    run = subprocess.run([sys.executable, "-c", ONES], capture_output=True, text=True, env=clean())
    assert run.returncode == 0, run.stderr[-3000:]
    assert int(run.stdout) > 50


def test_check_result_can_fail():
    from benchmarks.aot_report import Usage

    good = Usage("apply_flat", "any", "fp32", 90, 4, 60, 0, 0, 0, 4, 50, 4, 0, 0)
    check_result(good)
    for bad in (
        {"stack": SPILL + 8},
        {"doubles": 1},
        {"atomics": 1},
        {"registers": 200},
        {"loads128": 3},
        {"stores128": 0},
    ):
        with pytest.raises(AssertionError):
            check_result(replace(good, **bad))
