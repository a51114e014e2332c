"""``benchmarks/gpu.sh``: what will run on a GPU runs here first, on the interpreter, the stub and the CPU."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("xdist")

from benchmarks import bars
from benchmarks.gpu import odd_shapes, ratios, report, rows, switches, values
from benchmarks.gpu.rows import Part
from lightning_norm import normalizers
from lightning_norm.kernels import grid
from lightning_norm.kernels.cooperative import launch as cooperative
from tests.gpu import test_runtime, test_switches, test_values

ROOT = Path(__file__).parent.parent.parent
needs_a_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


@needs_a_compiler
@pytest.mark.slow
def test_every_part_writes_its_rows(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON"))}
    environment |= {"OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", "--dry"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text()
    assert process.returncode == 0, process.stderr
    made = rows.read(tmp_path)
    ended = {r["part"]: r["status"] for r in made if r["kind"] == "ended"}
    assert ended == dict.fromkeys(report.PARTS, 0), log
    assert [r for r in made if r["kind"] == "failed"] == []
    kinds = {(r["part"], r["kind"]) for r in made}
    assert kinds >= {
        ("values", "test"),
        ("odd_shapes", "warmed up"),
        ("odd_shapes", "odd shape"),
        *(("ratios", kind) for kind in ("machine", "copy", "layer", "pass")),
        *(("host", kind) for kind in ("host", "step")),
        *(("switches", kind) for kind in ("switch", "A/B")),
    }
    outcomes = [r["outcome"] for r in made if r["kind"] == "test"]
    assert sorted(outcomes) == ["passed"] * (len(values.DRY) - 1) + ["skipped"]
    assert all(r["finite"] for r in made if r["kind"] == "odd shape")
    assert {r["name"] for r in made if r["kind"] == "switch"} == set(switches.SWITCHES)
    text = (tmp_path / "report.md").read_text()
    assert all(title in text for title in report.PARTS.values())
    assert "no figure of a GPU" in text
    assert "| met |" not in text  # nothing is claimed without one
    assert "compute-sanitizer (it did not run)" in process.stdout
    files = [p.name for p in tmp_path.iterdir()]
    assert len(files) <= 8  # as many as come back from a lent machine


def test_every_test_for_a_gpu_is_in_the_order():
    """But those of whole gigabytes."""
    there = {
        f"tests/gpu/{Path(module.__file__).name}::{name}"
        for module in (test_values, test_runtime, test_switches)
        for name, function in vars(module).items()
        if name.startswith("test_") and inspect.isfunction(function) and function.__module__ == module.__name__
    }
    assert there - set(values.FIRST) == {"tests/gpu/test_values.py::test_the_documentation_counts_launches",
                                         "tests/gpu/test_runtime.py::test_second_device"}  # fmt: skip
    assert set(values.FIRST) <= there


def test_odd_shapes_meet_every_normalizer_early():
    cases = list(odd_shapes.cases(False))
    assert {key for _, key, _, _ in cases[: len(normalizers())]} == set(normalizers())
    x, _ = odd_shapes.tensors((3, 5, 7, 3), "misaligned", odd_shapes.DTYPES["bf16"], "cpu")
    assert x.is_contiguous()
    assert x.data_ptr() % 16 == 2


def test_processes_that_warm_up_share_the_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(odd_shapes, "ready", lambda *a: 1 / 0)
    for which in (None, "0/4", "1/4", "2/4", "3/4"):
        odd_shapes.run(Part("odd_shapes", Namespace(out=tmp_path, until=None, dry=True, slice=which)), "cpu")
    tried = [r["what"] for r in rows.read(tmp_path) if r["kind"] == "failed"]
    half = len(tried) // 2
    assert sorted(tried[:half]) == sorted(tried[half:])


@needs_a_compiler
@pytest.mark.slow
def test_what_torch_compiles_is_timed(tmp_path):
    """torch's layer, which a bar compares with, and the naive formula."""
    ratios.run(Part("ratios", Namespace(out=tmp_path, until=None, dry=True)), "cpu")
    timed = {(r["case"], r["name"]) for r in rows.read(tmp_path) if r["kind"] == "layer"}
    assert ("4x6x5x5 bf16 channels_last", "torch compiled") in timed
    assert ("4x6x5x5 fp32 contiguous compiled", "bn naive compiled") in timed


def test_torchs_compiled_layer_is_timed_where_a_bar_needs_it():
    first, formulas, _ = ratios.stages(False)
    small = [case for case in first.cases if case.small]
    assert {(case.dtype, case.format) for case in small} == bars.EVERYWHERE
    assert first.peer
    assert len(formulas.cases) * len(formulas.keys) <= 4  # compilation takes seconds each
    assert formulas.seconds < 60


def part(folder):
    return Part("ratios", Namespace(out=folder, until=None, dry=False))


def test_what_a_kill_leaves_is_read_and_told(tmp_path):
    some = part(tmp_path)
    some.write("copy", gb_s={"bf16": 1.0})
    some.leave_out("a case")
    some.fail("another", ValueError("why\nand more"))
    with (tmp_path / rows.FILE).open("a") as file:
        file.write('{"part": "ratios", "ki')  # the process was killed while it wrote
    made = rows.read(tmp_path)
    assert [r["kind"] for r in made] == ["copy", "left out", "failed"]
    made.append({"part": "ratios", "kind": "ended", "status": 124, "seconds": 170})
    text = "\n".join(report.final(made))
    assert "- ratios: a case (no time left)" in text
    assert "- ratios: another (ValueError: why)" in text
    assert "- ratios: killed after 170 s" in text
    assert "- host: did not run" in text


def verdict_on(made, bar):
    return next(v["verdict"] for v in report.verdicts(made) if bar in v["bar"])


def test_verdicts_on_values_and_memory():
    test = {"part": "values", "kind": "test", "id": "a", "outcome": "passed", "why": ""}
    ended = {"kind": "ended", "status": 0, "seconds": 1}
    clean = report.memcheck("========= ERROR SUMMARY: 0 errors\n")
    good = [test, {**ended, "part": "values"}, {"part": "odd_shapes", "kind": "odd shape", "finite": True}, clean]
    good.append({**ended, "part": "odd_shapes"})
    assert verdict_on(good, "tests that fail") == verdict_on(good, "compute-sanitizer") == "met"
    assert verdict_on([*good, {**test, "outcome": "failed"}], "tests that fail") == "not met"
    assert verdict_on(good[:1], "tests that fail") == "not measured"
    left = {"part": "values", "kind": "left out", "what": "b", "why": ""}
    assert verdict_on([*good, left], "tests that fail") == "not measured"
    assert verdict_on([*good, report.memcheck("x\n==== ERROR SUMMARY: 2 errors")], "compute-sanitizer") == "not met"
    assert verdict_on([r for r in good if r is not clean], "compute-sanitizer") == "not measured"
    infinite = {"part": "odd_shapes", "kind": "odd shape", "finite": False}
    assert verdict_on([*good, infinite], "compute-sanitizer") == "not met"
    assert verdict_on([{"part": "run", "kind": "run", "dry": True}, *good], "tests that fail") == "not measured"


def test_verdicts_on_the_host_and_on_steps():
    host = [{"part": "host", "kind": "host", "name": n, "ratio": r, "bar": b} for n, r, b in
            (("nn.BatchNorm2d", 1.0, None), ("sn", 1.4, 1.5), ("bn", 1.6, 1.5), ("rbn", 1.9, 2.0))]  # fmt: skip
    assert verdict_on(host, "host: at most 1.5") == "not met"
    assert verdict_on(host, "host: at most 2.0") == "met"
    assert verdict_on([], "host") == "not measured"
    step = {"part": "host", "kind": "step", "case": "resnet50 eager", "name": "sn", "batch": 8, "ratio": 2.0}
    bar = "resnet50 step"
    assert next(v for v in report.verdicts([step]) if bar in v["bar"])["figure"] is None  # the bar is at batch 64
    assert next(v for v in report.verdicts([{**step, "batch": 64}]) if bar in v["bar"])["figure"] == 2.0


def test_the_wheels_follow_from_the_packages_own_requirements():
    script = (ROOT / "benchmarks/gpu_wheels.sh").read_text()
    assert "pyproject.toml" in script
    command = ["bash", "-n", "benchmarks/gpu_wheels.sh"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_a_switch_nobody_has_built_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(switches, "SWITCHES", {"one": switches.attribute("NO_SUCH_THING")})
    monkeypatch.setattr(switches, "SHAPES", ())
    switches.run(Part("switches", Namespace(out=tmp_path, until=None, dry=False)), "cpu")
    lines = (tmp_path / rows.FILE).read_text().splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["not built"]


def test_programs_that_wait_for_each_other_are_timed_last():
    turns = switches.turns(switches.SWITCHES, False)
    waits = ["cooperative launch" in turn.switches for turn in turns]
    assert waits == sorted(waits)
    assert tuple(turns[0].keys) == ("sn", "bn")
    timed = {(switch, key) for turn in turns for switch in turn.switches for key in turn.keys}
    assert {("owner kernel", key) for key in ("bn", "rbn", "dbn")} < timed
    assert {("cooperative launch", key) for key in ("sn", "gn", "bcn")} < timed


def test_a_cooperative_launch_is_timed_where_it_is_taken(monkeypatch):
    """And an owner kernel: elsewhere a switch would be timed that changes nothing."""
    monkeypatch.setattr(grid, "COOPERATIVE", True)
    flags = SimpleNamespace(needs_moments=True)
    for shape in switches.HELD:
        assert cooperative.grid_for(torch.empty(shape, dtype=torch.bfloat16, device="meta"), 1, flags) is not None
