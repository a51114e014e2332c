import json
import subprocess
import sys

import pytest
from torch import nn

import lightning_norm
from lightning_norm import swap
from lightning_norm.cli.list import describe, run

BUILT_IN = {k: cls for k, cls in lightning_norm.normalizers().items() if cls.__module__.startswith("lightning_norm.")}
HEAVY = ("torch", "lightning", "numpy", "yaml", "jsonargparse", "triton")


@pytest.mark.parametrize("command", [[], ["--help"], ["--version"], ["list"], ["list", "--json"], ["list", "--help"]])
def test_what_is_only_looked_at_waits_for_nothing(command):
    code = (
        "import sys; from lightning_norm.cli.main import main\n"
        f"try: main({command})\nexcept SystemExit: pass\n"
        f"print({{*{HEAVY}}} & {{*sys.modules}}, len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout
    heavy, _, number = done.stderr.strip().rpartition(" ")
    assert heavy == "set()"
    assert int(number) < 300  # torch alone brings 1500


def test_the_file_says_what_the_classes_say(capsys):
    run(["--json"])
    assert json.loads(capsys.readouterr().out) == [describe(cls) for cls in BUILT_IN.values()]


def test_the_table_has_a_row_per_normalizer(capsys):
    run([])
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(BUILT_IN)
    columns = {name: lines[0].index(name) for name in ("added", "batch", "keeps")}
    for line in lines[1:]:
        assert all(line[start - 2 : start] == "  " for start in columns.values())
    sn = next(line for line in lines if line.startswith("sn "))
    assert sn[columns["added"] :].split() == ["+6", "yes", "yes", "no", "-"]
    assert next(line for line in lines if line.startswith("cn ")).endswith("NormContext")


def test_json_holds_the_declarations(capsys):
    run(["--json"])
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(BUILT_IN)
    for key, cls in BUILT_IN.items():
        assert rows[key]["added"] == cls.extra_parameters
        assert rows[key]["train_uses_batch_stats"] is cls.train_uses_batch_stats
        assert rows[key]["paper"] == (str(cls.paper) if cls.paper else None)


@pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
@pytest.mark.parametrize("key", BUILT_IN)
def test_what_is_added_is_what_a_swap_adds(key, capsys):
    report = swap(nn.Sequential(nn.BatchNorm2d(64)), key)
    run(["--json"])
    row = next(row for row in json.loads(capsys.readouterr().out) if row["key"] == key)
    assert row["added_to_64"] == report.parameters_added - report.parameters_removed
