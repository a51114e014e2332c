"""``python -m benchmarks.roofline``, on the CPU."""

import json

import pytest
import torch

from benchmarks import counters, network, peers, roofline, roofline_report, roofline_rows
from benchmarks.budget import SHAPES, Budget, Case, Stage, stages
from lightning_norm import normalizers
from lightning_norm.bench import clock, contenders, formulas

SHORT = ["--repeats", "3", "--threads", "1", "--minutes", "600"]  # nothing is left out on a busy machine


def test_report(tmp_path, capsys):
    arguments = ["--shapes", "4x6x8x8,3x6x5x5", "--norms", "bn,bnet", "--no-compile", "--save", str(tmp_path)]
    rows = roofline.run([*SHORT, *arguments, "--dtypes", "fp32,bf16"])
    cases = list(dict.fromkeys(r["case"] for r in rows))
    forms = ("contiguous", "channels_last")
    assert cases == [f"{s} {d} {f}" for s in ("3x6x5x5", "4x6x8x8") for d in ("fp32", "bf16") for f in forms]
    names = {r["name"] for r in rows if r["case"] == "4x6x8x8 fp32 contiguous"}
    assert names == {"torch", "bn", "bn naive", "torch + depthwise", "bnet", "bnet naive"}
    names = {r["name"] for r in rows if r["case"] == "3x6x5x5 fp32 channels_last"}
    assert names == {"torch", "bn", "torch + depthwise", "bnet"}
    data = json.loads((tmp_path / "roofline.json").read_text())
    assert data["roofline"] == rows
    assert data["left_out"] == []
    row = next(r for r in rows if r["name"] == "bn" and r["case"] == "4x6x8x8 bf16 contiguous")
    assert row["mb"] == 4 * 6 * 64 * 2 / 1e6
    assert row["forward_gb_s"] == pytest.approx(3 * row["mb"] / row["forward_ms"])
    assert row["forward_of_floor"] == pytest.approx(row["forward_gb_s"] / data["copy_gb_s"]["bf16"])
    assert 0 < row["error_y"] < 4e-3
    assert 0 < row["error_dx"] < 4e-3
    bnet = next(r for r in rows if r["name"] == "bnet")
    peer = next(r for r in rows if r["name"] == "torch + depthwise" and r["case"] == bnet["case"])
    assert bnet["vs_peer"] == pytest.approx(bnet["ratio"] / peer["ratio"])
    assert {p["name"] for p in data["passes"]} == {"moments", "apply", "sums", "combine", "copy"}
    assert "not measured" in {b["verdict"] for b in data["bars"]}
    text = (tmp_path / "roofline.md").read_text()
    assert "of floor" in text
    assert "combine" in text
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "4x6x8x8 bf16 channels_last" in printed
    for bar in data["bars"]:
        assert bar["bar"] in text
        assert bar["bar"] in printed
    assert roofline_report.BARS in printed


def test_steps_of_networks(monkeypatch):
    modes = ("eager", "AMP channels_last")
    monkeypatch.setattr(network, "MODES", {m: network.MODES[m] for m in modes})
    budget = Budget(600)
    tiny = network.Network("resnet18", 2, 32)
    rows = network.steps(tiny, ["sn", "cn"], "cpu", 2, False, budget, contenders.ARGUMENTS)
    names = ("torch", "sn", "cn")
    assert [(r["case"], r["name"]) for r in rows] == [(f"resnet18 {m}", n) for m in modes for n in names]
    assert budget.left_out == []
    assert all(r["ratio"] == 1 for r in rows if r["name"] == "torch")


def test_what_does_not_fit_is_left_out_and_named(capsys):
    assert roofline.run([*SHORT, "--shapes", "4x6x8x8", "--norms", "bn", "--minutes", "0"]) == []
    text = capsys.readouterr().out
    assert "left out: 4x6x8x8 fp32 contiguous" in text
    assert "left out: 4x6x8x8 bf16 contiguous compiled" in text


def test_a_wrong_peer_is_noted(monkeypatch):
    case, budget = Case((4, 6, 5, 5), "fp32", False), Budget(600)
    monkeypatch.setattr(contenders, "depthwise_peer", lambda c: torch.nn.BatchNorm2d(c))
    rows = roofline_rows.measure(case, ["bnet"], "cpu", 2, 1.0, budget)
    assert "torch + depthwise" not in {r["name"] for r in rows}
    assert next(r for r in rows if r["name"] == "bnet")["vs_peer"] is None
    assert "torch + depthwise: ArithmeticError" in budget.left_out[0]
    assert budget.failed == []


def test_a_wrong_normalizer_is_an_error_after_all_the_others_were_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(formulas.FORMULAS, "sn", lambda x, p: 2 * x)
    arguments = ["--shapes", "4x6x5x4", "--norms", "sn,bn", "--no-compile", "--dtypes", "fp32", "--save", str(tmp_path)]
    with pytest.raises(ArithmeticError, match=r"not all of it ran:\n4x6x5x4 fp32 contiguous: sn: ArithmeticError"):
        roofline.run([*SHORT, *arguments])
    data = json.loads((tmp_path / "roofline.json").read_text())
    assert {r["name"] for r in data["roofline"]} == {"torch", "bn", "bn naive"}
    assert "sn: ArithmeticError: sn: the output differs from float64" in (tmp_path / "roofline.md").read_text()


def test_torchs_layer_without_cudnn(monkeypatch):
    """Neither changes what is computed, nor leaves cuDNN switched off."""
    usual, seen = torch.nn.functional.batch_norm, []

    def batch_norm(*args):
        seen.append(torch.backends.cudnn.enabled)
        return usual(*args)

    x, before = torch.randn(4, 6, 5, 5), torch.backends.cudnn.enabled
    torchs, native = torch.nn.BatchNorm2d(6), peers.NativeKernels(6)
    want = torchs(x)
    monkeypatch.setattr(torch.nn.functional, "batch_norm", batch_norm)
    torch.testing.assert_close(native(x), want)
    torch.testing.assert_close(native.running_var, torchs.running_var)
    assert seen == [False]
    assert torch.backends.cudnn.enabled == before


def test_without_torchs_layer_there_is_nothing_to_compare(monkeypatch):
    budget = Budget(600)
    monkeypatch.setitem(roofline_rows.TOLERANCE, "fp32", 0.0)
    case = Case((4, 6, 5, 5), "fp32", False)
    assert roofline_rows.measure(case, ["bn"], "cpu", 2, 1.0, budget) == []
    assert [line.split(":")[1] for line in budget.failed] == [" torch", " bn"]


def test_what_is_measured_without_arguments():
    """On CUDA every normalizer; three on a CPU."""
    assert roofline.sizes("cuda").keys == tuple(normalizers())
    assert roofline.sizes("cuda").shapes == SHAPES
    assert roofline.sizes("cpu").keys == ("bn", "sn", "bcn")


def test_what_the_bars_need_comes_first():
    keys = list(normalizers())
    got = list(stages(SHAPES, ["fp32", "bf16"], keys, True, True))
    plain = (*got[0].cases, *got[3].cases)
    assert len(plain) == 4 * 2 * 2 == len({str(case) for case in plain})
    needed = [case.small or case.bytes >= 50e6 for case in plain]
    assert needed == sorted(needed, reverse=True)
    assert sum(needed) == len(got[0].cases) == 14  # all but the maps of 14 x 14 in bf16
    assert got[1:3] == [Stage(keys=("sn",)), Stage(keys=("sn",), compiled=True)]
    assert next(s.cases[0].shape for s in got if s.cases and s.cases[0].compiled) == SHAPES[0]
    assert {k for s in got if s.compiled for k in s.keys} == set(keys) == {k for s in got for k in s.keys}
    first = list(stages([(8, 6)], ["fp32"], ["bn", "gn"], False, True))
    assert [(len(s.cases), s.keys) for s in first] == [(0, ()), (0, ("bn",)), (1, ()), (0, ()), (0, ("gn",)), (0, ())]


def test_every_normalizer_is_checked():
    x, dy = torch.randn(4, 6, 5, 5).requires_grad_(), torch.randn(4, 6, 5, 5)
    for key in normalizers():
        errors = contenders.check(key, contenders.ready(key, (4, 6, 5, 5), "cpu"), x, dy, 1e-5)
        assert errors is not None, key
        assert max(errors) > 0


def test_clock():
    assert counters.copy_speed("cpu", 4, 3) > 0
    assert counters.launches(lambda: None, "cpu") is counters.peak_memory(lambda: None, "cpu") is None
    assert counters.copy_speed("cpu", 4, 3, torch.bfloat16) > 0
    calls = []
    runs = {name: clock.Timed(lambda name=name: calls.append(name), "cpu") for name in "ab"}
    calls.clear()
    clock.interleaved(runs, 3)
    assert calls == list("ababab")


@pytest.mark.slow
def test_compiled_contenders():
    rows = roofline.run([*SHORT, "--shapes", "8x6x5x5", "--norms", "bn", "--dtypes", "fp32"])
    plain = {r["name"] for r in rows if r["case"] == "8x6x5x5 fp32 contiguous"}
    assert plain == {"torch", "torch compiled", "bn", "bn naive"}  # small maps beside torch's compiled layer
    compiled = {r["name"] for r in rows if r["case"].endswith("compiled")}
    assert compiled == {"torch", "torch compiled", "bn", "bn compiled", "bn naive", "bn naive compiled"}


def test_bad_dtypes():
    with pytest.raises(ValueError, match=r"--dtypes: \['fp8'\] unknown"):
        roofline.run(["--dtypes", "fp32,fp8"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu():
    with pytest.raises(RuntimeError, match="no CUDA device found"):
        roofline.run(["--device", "cuda"])


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(tmp_path):
    shapes = ["--shapes", "8x64x14x14,8x64x7x7", "--norms", "bn,sn,afn", "--minutes", "3"]
    rows = roofline.run(["--device", "cuda", *shapes, "--save", str(tmp_path)])
    sn = next(r for r in rows if r["name"] == "sn")
    assert sn["clock"] == "graph replay"
    assert sn["kernels_forward"] <= 4
    assert sn["kernels_backward"] <= 5
    names = ("torch", "torch compiled", "torch native", "torch sync", "sn", "bn")
    clocks = {r["clock"] for r in rows if r["name"] in names}
    assert clocks == {"graph replay"}  # in the second case and later, too
    bars = {b["bar"]: b for b in json.loads((tmp_path / "roofline.json").read_text())["bars"]}
    assert bars["7 x 7, CUDA graphs: at most torch.compile's BatchNorm"]["figure"] > 0
