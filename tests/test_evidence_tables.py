"""The tables of docs/evidence, from results in a folder of the test."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tables(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    module = importlib.import_module("evidence_tables")
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(module, "PAGES", tmp_path)
    yield module
    sys.modules.pop("evidence_tables")


def save(tables, name, rows):
    with (tables.PAGES / "results" / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_switch_weights_are_means_over_seeds_after_the_last_epoch(tables, tmp_path):
    (tmp_path / "runs").mkdir()
    runs = [("sn", "32", [0.3, 0.2]), ("sn", "32", [0.3, 0.4]), ("sn", "4", [0.1]), ("bn", "4", None)]
    for i, (label, size, weights) in enumerate(runs):
        history = {"val/acc": [0.5], **({"norm/mean_bn": weights} if weights else {})}
        record = {"label": label, "sweep": {tables.BATCH: size}, "history": history}
        (tmp_path / "runs" / f"{i}.json").write_text(json.dumps(record))
    tables.save_switch_weights(tmp_path)
    assert tables.switch_weights()[2:] == ["| sn | 4 | 1 | 0.100 |", "| sn | 32 | 2 | 0.300 |"]


def test_costs_stand_beside_what_was_gained(tables, tmp_path):
    assert tables.costs()[2:] == []
    cost = {"step_ratio": "1.251", "channels_last_ratio": "1.5", "kept_ratio": "1.02", "added_to_64": "320"}
    save(tables, "cost", [{"norm": "bnet", **cost}, {"norm": "rbn", **cost}])
    row = {"norm": "bnet 3", "difference": "0.01", "low": "0.002", "high": "0.018", "verdict": "higher"}
    save(tables, "bnet", [{"norm": "bn", "difference": "", "low": "", "high": "", "verdict": ""}, row])
    bnet, rbn = tables.costs()[2:]
    assert bnet == (
        "| [bnet](../cards/bnet.md) | 1.25 x | 1.50 x | 1.02 x | 320 | [CIFAR-10](bnet.md): **+1.00 [+0.20, +1.80]** |"
    )
    assert rbn.endswith("| not studied |")
    tables.draw_costs(tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10000


def test_no_verdict_is_no_gain(tables):
    row = {"norm": "bnet 3", "difference": "0.01", "low": "nan", "high": "nan", "verdict": "no verdict from 2 seeds"}
    save(tables, "bnet", [row])
    assert next(found for found in tables.GAINS if found.key == "bnet").row() is None
