"""Every normalizer reaches every target: what the command of docs/deployment.md prints, row by row."""

import re
import shutil

import pytest
import torch

from benchmarks import deploy_table
from lightning_norm.normalizers import normalizers

QUICK, ALL = ["onnx", "export"], list(deploy_table.TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("key", normalizers())
def test_every_normalizer_reaches_onnx_and_another_process(key):
    for extra in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(extra)
    cells = deploy_table.row(key, QUICK)
    for target in QUICK:
        assert re.match(r"\de[+-]\d\d", cells[target]), (key, target, cells[target])


@pytest.mark.slow
@pytest.mark.parametrize("key", ["dbn", "sn"])
def test_a_folded_and_an_unfolded_one_reach_every_target(key):
    for extra in ("onnx", "onnxscript", "onnxruntime", "torchao"):
        pytest.importorskip(extra)
    cells = deploy_table.row(key, ALL)
    wanted = [t for t in ALL if t != "aot" or any(map(shutil.which, ("c++", "g++", "clang++")))]
    assert all(re.match(r"\de[+-]\d\d", cells[target]) for target in wanted), cells
    assert ("normalizers in float" in cells["int8"]) is (cells["fold"] == "as it is") is (key == "sn")


def test_the_comparison_sees_a_fault():
    model = deploy_table.network("bn")
    assert deploy_table.compared(model, model, 0.0) == 0
    with pytest.raises(AssertionError, match="off by"):
        deploy_table.compared(lambda x: model(x) + 0.1, model, 1e-3)
    with pytest.raises(AssertionError, match="off by nan"):
        deploy_table.compared(lambda x: model(x) * torch.nan, model, 1e-3)
    with pytest.raises(AssertionError, match="in place of"):
        deploy_table.compared(lambda x: model(x)[:1], model, 1e-3)


def test_the_page_has_a_row_for_each():
    text = deploy_table.PAGE.read_text()
    table = text.partition(deploy_table.BEGIN)[2].partition(deploy_table.END)[0]
    rows = re.findall(r"^\| (\w+) \|", table, re.M)
    missing = ",".join(key for key in normalizers() if key not in rows)
    assert rows[1:] == list(normalizers()), f"type python -m benchmarks.deploy_table --norms {missing} --write"
    assert not [line for line in table.splitlines() if "no: " in line.replace("no: torchao cannot", "")]


def test_rows_that_were_not_measured_stay():
    text = deploy_table.PAGE.read_text(encoding="utf-8")
    cells = dict.fromkeys(["fold", *ALL], "new")
    changed = deploy_table.with_rows(text, [{"norm": "sn", **cells}], ALL)
    before, after = text.splitlines(), changed.splitlines()
    assert len(after) == len(before)
    differs = [line for line, old in zip(after, before, strict=True) if line != old]
    assert differs == [f"| sn | {' | '.join(['new'] * len(cells))} |"]
    # Rows with other columns would not fit.
    alone = deploy_table.with_rows(text, [{"norm": "sn", "fold": "new"}], [])
    assert "| --- | --- |\n| sn | new |\n<!-- end" in alone
