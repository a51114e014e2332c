"""Let every command write its files while no file may become longer than 40 bytes; prints what came of it."""

import json
import os
import resource
import warnings
from pathlib import Path

import torch
from torch import nn

from lightning_norm.bench import tables
from lightning_norm.cli import bench, export, plan
from lightning_norm.cli.compare.comparison import Report
from lightning_norm.cli.compare.store import RunStore

JOB = ("--model", "ImageClassifier", "--data", "Digits")
model, example = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), torch.zeros(2, 3, 8, 8)
row = {
    "shape": "2x3",
    "ms": 1.0,
    "low": 1.0,
    "high": 1.0,
    "ratio": 1.0,
    "vs_peer": None,
    "vs_naive": None,
    "saved": None,
}
rows = {"machine": {}, "command": "bench", "rows": [{**row, "name": name} for name in ("torch", "bn")]}


def record(label, seed):
    return {
        "name": f"{label}-{seed}",
        "label": label,
        "seed": seed,
        "sweep": {},
        "swap": {},
        "set": {},
        "settings": {},
        "history": {"val/acc": [0.5, 0.6]},
        "test": {},
        "steps": 4,
        "step_ms": 1.0,
        "peak_mb": 5.0,
        "parameters": 10,
        "seconds": 1.0,
        "versions": {},
        "device": "cpu",
        "format": 1,
    }


runs = [record(name, seed) for name in ("bn", "sn") for seed in (0, 1)]


def bench_json():
    bench.run(["--norms", "bn", "--shapes", "2x4", "--repeats", "2", "--no-compile", "--json", "bench_own.json"])


writers = {
    "plan.yaml": lambda: plan.run([*JOB, "--norm", "sn", "--save", "plan.yaml"]),
    "bench_own.json": bench_json,
    "bench.json": lambda: tables.save(rows, Path(".")),
    "bench.png": lambda: tables.plot(rows["rows"], Path("bench.png")),
    "net.pt2": lambda: export.write(model, example, "net.pt2"),
    "runs/a.json": lambda: RunStore(Path(".")).write("a", record("bn", 0)),
    "results.csv": lambda: Report(runs, "val/acc", True, False, "bn").save(Path(".")),
}
if os.environ.get("ONNX"):
    writers["net.onnx"] = lambda: export.write(model, example, "net.onnx")


def main():
    warnings.simplefilter("ignore")
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


if __name__ == "__main__":  # pytest imports every file, in search of doctests
    main()
