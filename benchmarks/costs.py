"""What each normalizer costs a whole network: time of a training step, memory kept for backward, parameters.

    python -m benchmarks.costs
    python -m benchmarks.costs --norms bn,sn --save /tmp/cost.csv

Steps of a ResNet-18 with 16 images of 64 x 64 run in turn, one of each normalizer in every round, and the medians are
held against the network with torch's own BatchNorm. Bytes are counted, not measured. docs/evidence/cost.md shows the
saved file beside what the studies found.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import budget, network
from lightning_norm.bench.clock import machine
from lightning_norm.bench.contenders import ARGUMENTS, bytes_kept
from lightning_norm.cli.list import added_to
from lightning_norm.normalizers import normalizers

SAVED = Path(__file__).resolve().parents[1] / "docs" / "evidence" / "results" / "cost.csv"


def run(argv: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Measure, save, and return a row for each normalizer."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.costs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--norms", default=",".join(normalizers()), help="by commas (default: all)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--save", type=Path, default=SAVED, metavar="FILE", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keys = options.norms.split(",")
    times = network.steps(
        network.SMALL, keys, "cpu", options.repeats, False, budget.Budget(60), ARGUMENTS, ("eager", "channels_last")
    )
    ratios = {(row["name"], row["case"].rpartition(" ")[2]): row["ratio"] for row in times}
    kept = {
        key: bytes_kept(network.training_step(network.SMALL, key, "cpu", ARGUMENTS.get(key or "")))
        for key in (None, *keys)
    }
    rows = []
    for key in keys:
        added = added_to(64, normalizers()[key])
        rows.append(
            {
                "norm": key,
                "step_ratio": f"{ratios[key, 'eager']:.3f}",
                "channels_last_ratio": f"{ratios[key, 'channels_last']:.3f}",
                "kept_ratio": f"{kept[key] / kept[None]:.3f}",
                "added_to_64": "" if added is None else str(added),
                "rounds": str(options.repeats),
                "machine": ", ".join(f"{name} {value}" for name, value in machine(options.threads).items() if value),
            }
        )
    with options.save.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"saved: {options.save}")
    return rows


if __name__ == "__main__":
    run()
