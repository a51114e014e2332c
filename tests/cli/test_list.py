import json

import pytest
from torch import nn

from lightning_norm import normalizers, swap
from lightning_norm.cli.list import run


def test_the_table_has_a_row_per_normalizer(capsys):
    run([])
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(normalizers())
    columns = {name: lines[0].index(name) for name in ("added", "batch", "keeps")}
    for line in lines[1:]:
        assert all(line[start - 2 : start] == "  " for start in columns.values())
    sn = next(line for line in lines if line.startswith("sn "))
    assert sn[columns["added"] :].split() == ["+6", "yes", "yes", "no", "-"]
    assert next(line for line in lines if line.startswith("cn ")).endswith("NormContext")


def test_json_holds_the_declarations(capsys):
    run(["--json"])
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(normalizers())
    for key, cls in normalizers().items():
        assert rows[key]["added"] == cls.extra_parameters
        assert rows[key]["train_uses_batch_stats"] is cls.train_uses_batch_stats
        assert rows[key]["paper"] == (str(cls.paper) if cls.paper else None)


@pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
@pytest.mark.parametrize("key", normalizers())
def test_what_is_added_is_what_a_swap_adds(key, capsys):
    report = swap(nn.Sequential(nn.BatchNorm2d(64)), key)
    run(["--json"])
    row = next(row for row in json.loads(capsys.readouterr().out) if row["key"] == key)
    assert row["added_to_64"] == report.parameters_added - report.parameters_removed
