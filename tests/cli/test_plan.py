import re
from pathlib import Path

import pytest
import yaml

from lightning_norm import NormSwap
from lightning_norm.cli.main import main
from lightning_norm.cli.plan import run

# LightningCLI 2.6 calls names that jsonargparse renamed in 4.5x.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
RULES = str(CONFIGS / "digits_rules.yaml")

LATE = """
import lightning.pytorch as pl
from torch import nn

class LateModel(pl.LightningModule):
    def configure_model(self):
        self.late = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def setup(self, stage):
        pass
"""


def test_the_plan_is_printed_saved_and_applied(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    main(["plan", "--config", RULES, f"--save={path}"])
    shown = capsys.readouterr().out
    assert "net.layer1.0.bn1" in shown
    assert "19 of 20 BatchNorm2d layers would become" in shown
    plan = yaml.safe_load(path.read_text())
    rows = {row["name"]: row for row in plan["layers"]}
    assert len(rows) == 20
    assert rows["net.bn1"]["norm"] is None
    assert "leaves it alone" in rows["net.bn1"]["reason"]
    rows["net.layer1.0.bn1"]["norm"] = None
    path.write_text(yaml.safe_dump(plan))
    spec = yaml.safe_load(Path(RULES).read_text())
    spec["trainer"]["callbacks"] = [{"class_path": "NormSwap", "init_args": {"plan": str(path)}}]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(spec))
    main(["plan", "--config", str(again)])
    shown = capsys.readouterr().out
    assert re.search(r"net.layer1.0.bn1 +BatchNorm2d +- +left alone", shown)
    assert re.search(r"net.layer1.0.bn2 +BatchNorm2d +[A-Z]\w+", shown)


MIXED = """
import lightning.pytorch as pl
from torch import nn

class Mixed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.LayerNorm((3, 4))
        )
"""


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    (tmp_path / "mixed_job.py").write_text(MIXED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return ["--model", "mixed_job.Mixed"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--norm", "sn", "--norm.exclude", "[net.3]"], "exclude names it"),
        (["--norm", "sn", "--norm.include", "[net.0]"], "include does not name it"),
        (["--norm.rules", "{net.0: sn}"], "no rule names it"),
        (["--norm.rules", "{net.3: null, net.0: sn}"], "rules: 'net.3' leaves it alone"),
        (["--norm", "sn", "--norm.every", "2"], "not chosen by every"),
    ],
)
def test_every_layer_has_a_row_in_order_and_those_that_stay_a_reason(mixed, capsys, options, why):
    run([*mixed, *options, "--save", "plan.yaml"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("net.")]
    assert [row.split()[0] for row in rows] == [f"net.{i}" for i in range(5)]
    assert "SwitchableNorm" in rows[0]
    for row, reason in zip(rows[1:], ("source='LayerNorm'", "source='GroupNorm'", why, "the axes (3, 4)"), strict=True):
        assert "left alone: " in row
        assert reason in row
    saved = yaml.safe_load(Path("plan.yaml").read_text())["layers"]
    assert [(row["name"], row["norm"] is None) for row in saved] == [(f"net.{i}", i > 0) for i in range(5)]
    # What was printed and saved is a plan, row by row.
    run([*mixed, "--norm.plan", "plan.yaml"])
    again = [line for line in capsys.readouterr().out.splitlines() if line.startswith("net.")]
    assert [row.split()[2] for row in again] == [row.split()[2] for row in rows]


def test_a_row_needs_a_name_and_a_norm(mixed, capsys):
    Path("plan.yaml").write_text(
        "layers:\n- {name: net.1, norm: ln}\n- {name: net.3, norm: sn}\n- {name: net.0, norm: null}\n"
    )
    run([*mixed, "--norm.plan", "plan.yaml"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("net.")]
    assert [row[2] for row in rows] == ["-", "LayerNorm", "-", "SwitchableNorm", "-"]


def test_options_of_fit_work_here(capsys):
    config = str(CONFIGS / "digits_sn.yaml")
    run(["--config", config, "--model.arch", "resnet34", "--trainer.callbacks.norm_args", "{}"])
    assert "36 of 36" in capsys.readouterr().out


def test_late_layers_are_said_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "late_job.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    run(["--model", "late_job.LateModel", "--trainer.callbacks+=NormSwap", "--trainer.callbacks.norm=sn"])
    shown = capsys.readouterr()
    assert "late.1" in shown.out
    assert "configure_model() was called" in shown.err
    assert "LateModel.setup() was not called" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--model", "ImageClassifier"], "Type --norm sn"), (["--config", RULES, "--save"], "--save needs a path")],
)
def test_bad_input(arguments, said):
    with pytest.raises(ValueError, match=said):
        run(arguments)


def test_nothing_is_changed(monkeypatch):
    seen = []
    original = NormSwap.swap_arguments
    monkeypatch.setattr(NormSwap, "swap_arguments", lambda self: seen.append(self) or original(self))
    run(["--config", RULES])
    assert seen[0].report is None
