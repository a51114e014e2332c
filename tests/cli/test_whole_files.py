"""Every file that a command writes is the earlier one or the new one, on a full disk as well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_norm.errors import WriteError
from lightning_norm.surgery.whole_files import write_whole, writing_whole

ROOT = Path(__file__).parents[2]
LIMITED = """
import json, os, resource, sys, warnings
from pathlib import Path
import torch
from torch import nn
import lightning_norm as ln
from lightning_norm.bench import tables
from lightning_norm.cli import export, plan
from lightning_norm.cli.compare.comparison import Report
from lightning_norm.cli.compare.store import RunStore

warnings.simplefilter("ignore")
model, example = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), torch.zeros(2, 3, 8, 8)
row = {"shape": "2x3", "name": "torch", "ms": 1.0, "low": 1.0, "high": 1.0, "ratio": 1.0}
rows = {"machine": {}, "command": "bench", "rows": [{**row, "name": n, **dict.fromkeys(("vs_peer", "vs_naive", "saved"))} for n in ("torch", "bn")]}

def record(label, seed):
    return {"name": f"{label}-{seed}", "label": label, "seed": seed, "sweep": {}, "swap": {}, "set": {}, "settings": {},
            "history": {"val/acc": [0.5, 0.6]}, "test": {}, "steps": 4, "step_ms": 1.0, "peak_mb": 5.0,
            "parameters": 10, "seconds": 1.0, "versions": {}, "device": "cpu", "format": 1}

def bench_json():
    from lightning_norm.cli import bench
    bench.run("--norms bn --shapes 2x4 --repeats 2 --no-compile --json bench_own.json".split())

writers = {
    "plan.yaml": lambda: plan.run(["--model", "ImageClassifier", "--data", "Digits", "--norm", "sn", "--save", "plan.yaml"]),
    "bench_own.json": bench_json,
    "bench.json": lambda: tables.save(rows, Path(".")),
    "bench.png": lambda: tables.plot(rows["rows"], Path("bench.png")),
    "net.pt2": lambda: export.write(model, example, "net.pt2"),
    "runs/a.json": lambda: RunStore(Path(".")).write("a", record("bn", 0)),
    "results.csv": lambda: Report([record(n, s) for n in ("bn", "sn") for s in (0, 1)], "val/acc", True, False, "bn").save(Path(".")),
}
if os.environ.get("ONNX"):
    writers["net.onnx"] = lambda: export.write(model, example, "net.onnx")
said = {}
for name, write in writers.items():
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
    try:
        write()
        said[name] = "no error"
    except BaseException as error:
        said[name] = type(error).__name__
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    said[name] += " " + Path(name).read_text(errors="replace")[:20]
left = sorted(str(p) for p in Path(".").rglob("*") if str(p) not in {*writers, "runs"})
print("RESULT" + json.dumps([said, left]))
"""


def test_a_full_disk_leaves_every_earlier_file_as_it_was(tmp_path):
    """The kernel refuses to make any file longer than 40 bytes, which is what a full disk does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path.parent)}
    try:
        import onnxscript  # noqa: F401

        environment["ONNX"] = "1"
    except ImportError:
        pass
    run = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "RESULT" in run.stdout, run.stderr
    said, left = json.loads(run.stdout.partition("RESULT")[2])
    assert said == dict.fromkeys(said, "WriteError old")
    assert left == []


def test_a_reader_meets_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    write_whole(path, "old")
    with writing_whole(path) as there:
        there.write_text("new")
        (there.parent / "beside.data").write_text("weights")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert (path.parent / "beside.data").read_text() == "weights"
    with pytest.raises(KeyboardInterrupt), writing_whole(path) as there:
        there.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new"
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.txt", "beside.data"]


def test_mode_link_and_device_stay_what_they_are(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "link"
    write_whole(path, "old")
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "new")
    assert (link.is_symlink(), path.read_text(), path.stat().st_mode & 0o777) == (True, "new", 0o640)
    write_whole("/dev/null", "anything")
    assert not Path("/dev/null").is_file()


def test_what_cannot_be_written_is_told_in_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write '.*/file/a.txt': .*as it was"):
        write_whole(tmp_path / "file" / "a.txt", "text")
