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


def save_runs(folder, runs):
    (folder / "runs").mkdir(parents=True)
    for i, (label, sweep, history) in enumerate(runs):
        (folder / "runs" / f"{i}.json").write_text(json.dumps({"label": label, "sweep": sweep, "history": history}))


def test_switch_weights_are_means_over_seeds_after_the_last_epoch(tables, tmp_path):
    runs = [("sn", "32", [0.3, 0.2]), ("sn", "32", [0.3, 0.4]), ("sn", "4", [0.1]), ("bn", "4", None)]
    save_runs(
        tmp_path / "sn",
        [
            (label, {tables.BATCH: size}, {"norm/mean_bn": weights} if weights else {"norm/iota": [1.0]})
            for label, size, weights in runs
        ],
    )
    tables.save_from_runs(tmp_path / "sn")
    assert tables.switch_weights()[2:] == ["| sn | 4 | 1 | 0.100 |", "| sn | 32 | 2 | 0.300 |"]


def test_epochs_to_what_batchnorm_reaches(tables, tmp_path):
    curves = [("bn", [0.1, 0.5]), ("bn", [0.4, 0.3]), ("sn", [0.3, 0.1]), ("sn", [0.2, 0.2]), ("in", [0.0, 0.2])]
    save_runs(tmp_path / "ubn", [(label, {}, {"val/acc": curve}) for label, curve in curves])
    tables.save_from_runs(tmp_path / "ubn")
    head, _, *lines = tables.epochs_to_target("ubn")
    assert "epochs to 30.0 %" in head
    assert lines == ["| bn | 2 of 2 | 1.5 |", "| sn | 1 of 2 | 1.0 |", "| in | 0 of 1 | - |"]


def test_condensations_at_both_ends_of_training(tables, tmp_path):
    names = ("condensed/relu_1", "condensed/conv_1", "val/acc")
    curves = [("bn", [0.1, 0.2, 0.3]), ("bn", [0.3, 0.2, 0.5]), ("none", [0.4, 0.4, 0.4]), ("none", [0.4, 0.4, 0.6])]
    save_runs(tmp_path / "condensation", [(label, {}, dict.fromkeys(names, curve)) for label, curve in curves])
    tables.save_from_runs(tmp_path / "condensation")
    head, _, *lines = tables.condensations()
    assert head == "| features | bn, first epoch | bn, last epoch | none, first epoch | none, last epoch |"
    values = "0.200 ± 0.141 | 0.400 ± 0.141 | 0.400 ± 0.000 | 0.500 ± 0.141"
    assert lines == [f"| conv_1 | {values} |", f"| relu_1 | {values} |"]


def test_parts_of_the_test_are_means_in_percent(tables, tmp_path):
    (tmp_path / "domains" / "runs").mkdir(parents=True)
    for i, accuracy in enumerate((0.5, 0.7)):
        test = {f"test/acc_{part}": accuracy for part in tables.PARTS["domains"]}
        (tmp_path / "domains" / "runs" / f"{i}.json").write_text(json.dumps({"label": "bn", "test": test}))
    tables.save_from_runs(tmp_path / "domains")
    assert tables.parts("domains")[2:] == ["| bn | 2 | 60.0 | 60.0 | 60.0 | 60.0 |"]


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
