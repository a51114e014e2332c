import csv
import math

import numpy as np
import pytest
from scipy import stats

from lightning_norm.cli import compare
from lightning_norm.cli.compare_report import draw, interval, summarize
from lightning_norm.cli.main import main

TINY = ["--epochs", "2", "--limit", "2", "--batch-size", "8", "--accelerator", "cpu", "--arch", "resnet18"]


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def made_up(norm, seed, accuracy, step=10.0, params=1000):
    return {
        "norm": norm, "seed": str(seed), "test_acc": str(accuracy), "step_ms": str(step), "params": str(params),
        "val_acc": f"[0.5, {accuracy}]", "train_loss": "[1.0, 0.1]",
    }  # fmt: skip


def test_two_norms_two_seeds(tmp_path, capsys, monkeypatch):
    arguments = ["compare", "--norms", "bn,sn", "--seeds", "2", *TINY]
    finished = compare.one_run
    calls = []

    def interrupted(norm, seed, data, options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append((norm, seed))
        return finished(norm, seed, data, options)

    monkeypatch.setattr(compare, "one_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert calls == [("bn", 0), ("sn", 0)]
    assert len(rows_in(tmp_path / "compare/runs.csv")) == 2

    rest = []
    monkeypatch.setattr(compare, "one_run", lambda *a: rest.append(a[:2]) or finished(*a))
    main(arguments)
    assert rest == [("bn", 1), ("sn", 1)]
    shown = capsys.readouterr().out
    assert "An interval that contains 0 is no evidence of a difference." in shown
    assert "+120" in shown
    rows = rows_in(tmp_path / "compare/runs.csv")
    assert [(r["norm"], r["seed"]) for r in rows] == [("bn", "0"), ("sn", "0"), ("bn", "1"), ("sn", "1")]
    assert rows[0]["batch_size"] == "8"
    assert rows[0]["val_acc"].count(",") == 1  # two epochs
    assert (tmp_path / "compare/curves.png").read_bytes().startswith(b"\x89PNG")

    rest.clear()
    main(arguments)
    assert rest == []
    with pytest.raises(SystemExit) as error:
        main([*arguments, "--lr", "0.2"])
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "--out" in said
    assert "{'lr': '0.2'}" in said


def test_the_interval_is_students():
    differences = [0.01, -0.02, 0.03, 0.015]
    low, high = stats.t.interval(0.95, 3, np.mean(differences), stats.sem(differences))
    assert interval(differences) == f"{np.mean(differences):+.4f} [{low:+.4f}, {high:+.4f}]"
    assert "no interval" in interval([0.1])


def test_the_pairs_are_of_the_same_seed():
    rows = [made_up("bn", s, a) for s, a in enumerate((0.5, 0.9, 0.7))]
    rows += [made_up("sn", s, a + 0.01, step=15.0, params=1120) for s, a in reversed(list(enumerate((0.5, 0.9, 0.7))))]
    line = next(line for line in summarize(rows, ["bn", "sn"], "bn").splitlines() if line.startswith("sn"))
    assert "+0.0100 [+0.0100, +0.0100]" in line  # the same difference at every seed, however they spread
    assert "1.50 x" in line
    assert line.endswith("+120")


def test_another_baseline_where_bn_is_missing():
    rows = [made_up(n, s, 0.5) for n in ("ln", "sn") for s in (0, 1)]
    text = summarize(rows, ["ln", "sn"], "ln")
    assert "vs ln" in text
    assert "unswapped" not in text


def test_one_seed_draws_without_a_band(tmp_path):
    draw([made_up(n, 0, 0.5) for n in "abcdefgh"], list("abcdefgh"), tmp_path / "p.png", "t")
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--norms", "snn"], "Did you mean 'sn'"),
        (["--data", "ImageNet"], "choose one of Digits"),
        (["--seeds", "0"], "at least one"),
        (["--norms", ","], "at least one"),
    ],
)
def test_bad_input(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        compare.run(arguments)
    assert not (tmp_path / "compare").exists()


def test_the_same_seed_gives_the_same_run():
    options = compare.parser().parse_args(TINY)
    data = compare.DATA_SETS["Digits"](batch_size=8)
    first, second = (compare.one_run("sn", 0, data, options) for _ in range(2))
    for column in ("test_acc", "val_acc", "train_loss", "params"):
        assert first[column] == second[column]
    assert math.isfinite(float(first["step_ms"]))
