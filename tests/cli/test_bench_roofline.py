"""The report of ``bench --device cuda``, by the same code on the CPU."""

import json

import pytest
import torch

from lightning_norm.cli import bench, bench_clock, bench_network, bench_peers, bench_roofline

SHORT = ["--roofline", "--repeats", "3", "--threads", "1"]


def test_report(tmp_path, capsys):
    arguments = ["--shapes", "4x6x8x8,3x6x5x5", "--norms", "bn,bnet", "--no-compile", "--save", str(tmp_path)]
    rows = bench.run([*SHORT, *arguments, "--dtypes", "fp32,bf16"])
    cases = list(dict.fromkeys(r["case"] for r in rows))
    forms = ("contiguous", "channels_last")
    assert cases == [f"{s} {d} {f}" for d in ("fp32", "bf16") for s in ("4x6x8x8", "3x6x5x5") for f in forms]
    names = {r["name"] for r in rows if r["case"] == "4x6x8x8 fp32 contiguous"}
    assert names == {"torch", "bn", "bn naive", "torch + depthwise", "bnet", "bnet naive"}
    data = json.loads((tmp_path / "roofline.json").read_text())
    assert data["roofline"] == rows
    assert data["left_out"] == []
    row = next(r for r in rows if r["name"] == "bn" and r["case"] == "4x6x8x8 bf16 contiguous")
    assert row["mb"] == 4 * 6 * 64 * 2 / 1e6
    assert row["forward_gb_s"] == pytest.approx(3 * row["mb"] / row["forward_ms"])
    assert row["forward_of_floor"] == pytest.approx(row["forward_gb_s"] / data["copy_gb_s"])
    assert {p["name"] for p in data["passes"]} == {"moments", "apply", "sums", "combine"}
    text = (tmp_path / "roofline.md").read_text()
    assert "of floor" in text
    assert "combine" in text
    assert (tmp_path / "roofline.png").read_bytes()[:4] == b"\x89PNG"
    assert "4x6x8x8 bf16 channels_last" in capsys.readouterr().out


def test_steps_of_networks(monkeypatch):
    modes = ("eager", "AMP channels_last")
    monkeypatch.setattr(bench_network, "MODES", {m: bench_network.MODES[m] for m in modes})
    budget = bench_roofline.Budget(9)
    tiny = bench_network.Network("resnet18", 2, 32)
    rows = bench_network.steps(tiny, ["sn", "cn"], "cpu", 2, False, budget, {})
    assert [(r["case"], r["name"]) for r in rows] == [(f"resnet18 {m}", n) for m in modes for n in ("torch", "sn")]
    assert all(r["ratio"] == 1 for r in rows if r["name"] == "torch")


def test_what_does_not_fit_is_left_out_and_named(capsys):
    assert bench.run([*SHORT, "--shapes", "4x6x8x8", "--norms", "bn", "--minutes", "0"]) == []
    text = capsys.readouterr().out
    assert "left out: 4x6x8x8 fp32 contiguous" in text
    assert "left out: 4x6x8x8 bf16 contiguous compiled" in text


def test_a_wrong_normalizer_stops_and_a_wrong_peer_is_noted(monkeypatch):
    case, budget = bench_roofline.Case((4, 6, 5, 5), "fp32", False), bench_roofline.Budget(9)
    monkeypatch.setattr(bench_peers, "depthwise_peer", lambda c: torch.nn.BatchNorm2d(c))
    monkeypatch.setattr(bench, "depthwise_peer", bench_peers.depthwise_peer)
    rows = bench_roofline.measure(case, ["bnet"], "cpu", 2, 1.0, budget)
    assert "torch + depthwise" not in {r["name"] for r in rows}
    assert "torch + depthwise: ArithmeticError" in budget.left_out[0]
    monkeypatch.setitem(bench_roofline.TOLERANCE, "fp32", 0.0)
    with pytest.raises(ArithmeticError):
        bench_roofline.measure(case, ["bn"], "cpu", 2, 1.0, budget)


def test_clock():
    assert bench_clock.copy_speed("cpu", 4, 3) > 0.01
    assert bench_clock.launches(lambda: None, "cpu") is bench_clock.peak_memory(lambda: None, "cpu") is None
    calls = []
    runs = {name: bench_clock.Timed(lambda name=name: calls.append(name), "cpu") for name in "ab"}
    calls.clear()
    bench_clock.interleaved(runs, 3)
    assert calls == list("ababab")


@pytest.mark.slow
def test_compiled_contenders():
    rows = bench.run([*SHORT, "--shapes", "8x6x5x5", "--norms", "bn", "--dtypes", "fp32"])
    compiled = {r["name"] for r in rows if r["case"].endswith("compiled")}
    assert compiled == {"torch", "torch compiled", "bn", "bn compiled", "bn naive", "bn naive compiled"}


def test_bad_dtypes():
    with pytest.raises(ValueError, match=r"--dtypes: \['fp8'\] unknown"):
        bench.run(["--dtypes", "fp32,fp8"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(tmp_path):
    rows = bench.run(
        ["--device", "cuda", "--shapes", "8x64x14x14", "--norms", "bn,sn", "--save", str(tmp_path), "--minutes", "2"]
    )
    sn = next(r for r in rows if r["name"] == "sn")
    assert sn["clock"] == "graph replay"
    assert sn["kernels_forward"] <= 4
    assert sn["kernels_backward"] <= 5
