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
    assert len(plan["layers"]) == 19
    plan["layers"][0]["norm"] = None
    path.write_text(yaml.safe_dump(plan))
    spec = yaml.safe_load(Path(RULES).read_text())
    spec["trainer"]["callbacks"] = [{"class_path": "NormSwap", "init_args": {"plan": str(path)}}]
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(spec))
    main(["plan", "--config", str(again)])
    shown = capsys.readouterr().out
    assert "net.layer1.0.bn1 " not in shown
    assert "net.layer1.0.bn2 " in shown


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
    [(["--model", "ImageClassifier"], "no NormSwap"), (["--config", RULES, "--save"], "--save needs a path")],
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
