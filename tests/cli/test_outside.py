"""Checkpoints that the command did not write, and configurations that nobody should write."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

from lightning_norm import NormSwap
from lightning_norm.cli.main import main

# LightningCLI 2.6 calls names that jsonargparse renamed in 4.5x.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

JOB = """
import torch
from lightning.pytorch import LightningDataModule
from tests.callbacks.toy import Net, loader

import lightning_norm


class Wide(Net):
    def __init__(self, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.net[0], self.net[1] = torch.nn.Conv2d(3, width, 3), torch.nn.BatchNorm2d(width)

    def on_test_start(self):
        print("layers", type(self.net[1]).__name__, self.net[1].num_features)

    on_validation_start = on_predict_start = on_test_start


class Itself(Wide):
    def __init__(self, width: int = 4):
        super().__init__(width)
        lightning_norm.swap(self, "bcn")


class Data(LightningDataModule):
    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = lambda self: loader()
"""
QUIET = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "outside_job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("outside_job", None)
    return tmp_path


def written(model, *callbacks):
    trainer = Trainer(**QUIET, callbacks=list(callbacks))
    trainer.fit(model)
    trainer.save_checkpoint("outside.ckpt")


def configuration(model="outside_job.Wide", **more):
    config = {"model": {"class_path": model}, "data": {"class_path": "outside_job.Data"}, "trainer": QUIET, **more}
    Path("job.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
@pytest.mark.parametrize(
    ("name", "callbacks", "layer"),
    [("Wide", [], "BatchNorm2d"), ("Wide", ["sn"], "SwitchableNorm"), ("Itself", [], "BatchChannelNorm")],
)
def test_a_checkpoint_that_a_script_wrote(job, capfd, command, name, callbacks, layer):
    """With the hyper-parameters of the file, and swapped as it says, without a section norm."""
    import outside_job

    model = getattr(outside_job, name)(width=6)
    model.train_dataloader = outside_job.loader
    written(model, *map(NormSwap, callbacks))
    configuration(f"outside_job.{name}")
    capfd.readouterr()
    main([command, "--config", "job.yaml", "--ckpt_path", "outside.ckpt"])
    assert f"layers {layer} 6" in capfd.readouterr().out


def test_a_checkpoint_of_another_class(job, capfd):
    import outside_job

    class Elsewhere(outside_job.Wide):
        train_dataloader = staticmethod(outside_job.loader)

    model = Elsewhere(width=6)
    model.hparams["not_of_the_model"] = 3
    model.hparams["_class_path"] = "elsewhere.Elsewhere"
    written(model)
    configuration()
    main(["test", "--config", "job.yaml", "--ckpt_path", "outside.ckpt"])
    assert "layers BatchNorm2d 6" in capfd.readouterr().out


def refused(arguments, capfd):
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "traceback" not in line]
    said = [line for line in lines if line.startswith("lightning-norm: error:")]
    assert ended.value.code == 2, lines
    assert len(said) == 1, lines
    return "\n".join(lines[lines.index(said[0]) :])


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict"])
def test_a_file_that_is_missing_or_broken_is_one_line(job, capfd, command):
    configuration()
    arguments = [command, "--config", "job.yaml", "--ckpt_path", "nowhere.ckpt"]
    assert refused(arguments, capfd) == (
        "lightning-norm: error: no checkpoint 'nowhere.ckpt': the file does not exist."
    )
    Path("nowhere.ckpt").write_bytes(b"PK\x03\x04 broken off")
    assert "cannot read the checkpoint 'nowhere.ckpt': it begins as one and breaks off" in refused(arguments, capfd)


def bomb():
    value = ["x"] * 9
    for _ in range(9):
        value = [value] * 9
    return value


def circle():
    value = {}
    value["x"] = value
    return value


SECTIONS = {
    "trainer: 0": ({"trainer": 0}, "trainer: is a section of options"),
    "trainer: a list": ({"trainer": [1]}, "trainer: is a section of options"),
    "norm: a number": ({"norm": 3}, "norm: is a section of options, such as {norm: sn}, got 3"),
    "norm: a list": ({"norm": ["sn"]}, "norm: is a section of options"),
    "norm: true": ({"norm": True}, "norm: is a section of options"),
    "a key that is no text": ({"norm": {1: "sn"}}, "Key must be a string, got: 1"),
    "an argument that is no text": ({"norm": {"norm": "sn", "norm_args": {1: 2}}}, "norm_args must have names as keys"),
    "a rule that is no text": ({"norm": {"rules": {1: "sn"}}}, "rules must have names as keys"),
    "in a spec": (
        {"norm": {"norm": {"class_path": "sn", "init_args": {1: 2}}}},
        "init_args must be a mapping of names",
    ),
    "source: a number": ({"norm": {"norm": "sn", "source": 3}}, "norm.source: "),
    "a relative norm": ({"norm": {"norm": ".mine.Norm"}}, "'.mine.Norm' is a relative path.*'my_package.mine.Norm'"),
    "a relative class_path": ({"norm": {"norm": {"class_path": ".mine.Norm"}}}, "'.mine.Norm' is a relative path"),
    "a relative model": ({"model": {"class_path": ".mine.Model"}}, "'.mine.Model' is a relative path"),
    "an alias bomb": (
        {"norm": {"norm": "sn", "norm_args": {"x": bomb()}}},
        "aliases stand for more than 100000 values",
    ),
    "a bomb elsewhere": ({"model": {"class_path": "x.Y", "init_args": {"x": bomb()}}}, "more than 100000 values"),
    "a circle": ({"norm": {"norm": "sn", "norm_args": circle()}}, "alias stands inside of what it stands for"),
}


@pytest.mark.parametrize("case", SECTIONS)
def test_a_configuration_that_cannot_be_is_a_line(job, capfd, case):
    section, message = SECTIONS[case]
    configuration(**section)
    assert re.search(message, refused(["fit", "--config", "job.yaml"], capfd))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00norm: sn", "norm: sn".encode("utf-16"), b"\x80"])
def test_a_configuration_that_is_no_text_is_a_line(job, capfd, content):
    Path("job.yaml").write_bytes(content)
    assert "job.yaml is no text in UTF-8: " in refused(["fit", "--config", "job.yaml"], capfd)


def test_a_module_of_the_other_name_of_lightning(job, capfd):
    """The command runs lightning.pytorch; it says which import to change."""
    Path("other_job.py").write_text("import pytorch_lightning as pl\n\nclass Other(pl.LightningModule):\n    pass\n")
    configuration("other_job.Other")
    sys.modules.pop("other_job", None)
    said = refused(["fit", "--config", "job.yaml"], capfd)
    assert "import lightning.pytorch as pl" in said
