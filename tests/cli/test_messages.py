"""Mistakes on the command line: one line, exit status 2, what was expected, what came, what to type."""

from pathlib import Path

import pytest
import yaml

from lightning_norm.cli.main import COMMANDS, main
from lightning_norm.cli.parsing import nearest

# LightningCLI 2.6 calls names that jsonargparse renamed in 4.5x.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

SMALL = """
import lightning.pytorch as pl
import torch
from torch import nn


class Plain(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Linear(3, width)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 3)), batch_size=4)

    val_dataloader = train_dataloader


class Small(Plain):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))

    def forward(self, x):
        return self.net(x)
"""
QUIET = {
    "logger": False, "enable_checkpointing": False, "max_epochs": 1, "enable_progress_bar": False,
    "enable_model_summary": False, "accelerator": "cpu",
}  # fmt: skip
JOB = ["--model", "small_job.Small", *(f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items())]

EXPORT = ["export", "--out", "net.pt2", "--model", "small_job.Small"]


@pytest.fixture(autouse=True)
def _job(tmp_path, monkeypatch):
    (tmp_path / "small_job.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def refused(capfd, *arguments):
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert ended.value.code == 2
    assert lines[-1].startswith("lightning-norm: error: ")
    assert not any("Traceback" in line or "usage" in line for line in lines)
    return lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit"], "no model. Type --model my_module.MyModel"),
        (["fit", "--modle", "x.Y"], "Did you mean '--model'?"),
        (["fit", *JOB, "--max_epochs", "3"], "Did you mean '--trainer.max_epochs'?"),
        (["fit", *JOB, "--mdel.width", "3"], "Did you mean '--model.width'?"),
        (["fit", *JOB, "--norm.nrom", "sn"], "Did you mean '--norm.norm'?"),
        (["fit", *JOB, "--trainer.max_epochs", "three"], "trainer.max_epochs: expected int, got 'three'"),
        (["fit", *JOB, "--trainer.accelerator", "gpuu"], "Available names are: "),
        (["fit", *JOB, "--norm", "torch.nn.Linear"], "'torch.nn.Linear' is not a normalizer"),
        (["fit", *JOB, "--norm", "sn,bn"], "Type lightning-norm compare --norms sn,bn."),
        (
            ["fit", *JOB, "--trainer.callbacks+=NormMonitor", "--trainer.callbacks.init_args.norm=bn"],
            "NormMonitor': Option 'norm' is not accepted. It takes every_n_steps",
        ),
        (["fit", *JOB, "--norm", "nowhere.Norm"], "cannot import the normalizer 'nowhere.Norm'"),
        (["fit", "--model", "small_job.Smal"], "Did you mean 'Small'?"),
        (["fit", "job.yaml", "--norm", "sn"], "Type --config job.yaml."),
        (["train", "--config", "job.yaml"], "no command 'train'. Did you mean 'fit'?"),
        (["fit", "--model", "smal_job.Small"], "No module named 'smal_job'. Did you mean 'small_job'?"),
        (["fit", *JOB, "--model.width", "8.5"], "small_job.Small': width: expected int, got '8.5'"),
        (["fit", "--model", "nowhere.Net"], "model: Problem with given class_path 'nowhere.Net': No module named"),
        (["fit", *JOB, "--trainer.callbacks+=NormMonitr"], "Did you mean 'NormMonitor'?"),
        (["fit", *JOB, "--optimizer", "SGDD"], "Did you mean 'SGD'?"),
        (["fit", "--config", "list.yaml"], "a configuration holds sections such as norm: sn"),
        (["fit", "--config", "empty.yaml"], "cannot read empty.yaml: a configuration holds sections such as norm: sn"),
        (["fit", "--config", "utf16.yaml"], "utf16.yaml is no text in UTF-8: "),
        *(
            (
                [*command, "--config", "bad.yaml"],
                "cannot read bad.yaml: line 2, column 1: did not find expected ',' or '}'",
            )
            for command in (["fit"], ["plan"], ["compare", "--metric", "x"], ["export", "--out", "x.pt2"])
        ),
        (["fit", *JOB, "--norm", "bad.yaml"], "'bad.yaml'; line 2, column 1: did not find expected"),
        (["fit", *JOB, "--norm", "nothing.yaml"], "norm: there is no file 'nothing.yaml'"),
        (
            ["fit", *JOB, "--norm.plan", "bad.yaml"],
            "the plan 'bad.yaml': line 2, column 1: expected ',' or '}', but got",
        ),
        (["fit", *JOB, "--norm.plan", "nothing.yaml"], "the plan 'nothing.yaml': the file does not exist."),
        (["fit", "--model", "bad.yaml"], "sub-config file bad.yaml: line 2, column 1: did not find expected"),
        (["fit", *JOB, "--trainer", "bad.yaml"], "'bad.yaml'; line 2, column 1: did not find expected"),
        (
            ["fit", *JOB, "--norm.norm_args", "{eps: 1"],
            "norm.norm_args: cannot read '{eps: 1': line 1, column 8: expected",
        ),
        (["fit", *JOB, "--norm.norm_args", "5"], "norm.norm_args: expected a mapping such as {name: value}, got '5'"),
        (["compare", "--norms", "bn,{class_path: sn"], "cannot be read: expected ',' or '}', but got the end."),
        (["compare", "--norms", "bad.yaml"], 'takes normalizers and no file: type --norms "$(cat bad.yaml)"'),
        (["test", *JOB], "No `test_step()` method defined"),
        (["plan", "--model", "small_job.Small", "--sve", "x"], "Did you mean '--save'?"),
        (["list", "--jsn"], "Did you mean '--json'?"),
        (["compare", "--norm", "bn"], "--norms bn,sn"),
        (["compare", "--seedz", "3"], "Did you mean '--seeds'?"),
        (["compare", "--seeds", "three"], "argument --seeds: invalid int value: 'three'"),
        (["bench", "--normz", "sn"], "Did you mean '--norms'?"),
        (["convert", "x.pth", "--out", "y.ckpt", "--nrom", "sn"], "Did you mean '--norm'?"),
        (["bench", "--norms", "sn", "--device", "tpu"], "choose from 'cpu', 'cuda'"),
        (["bench", "--norms", "sn", "--repeats", "1"], "--repeats must be 2 or more, for quartiles, got 1"),
        (["bench", "--norms", "sn", "--threads", "0"], "--threads must be 1 or more, got 0"),
        (["bench", "--norms", "sn", "--shapes", "2x3x"], "--shapes: '2x3x' is no shape. Expected sizes joined by x"),
        (["bench", "--norms", "sn", "--activation", "gelu"], "invalid choice: 'gelu' (choose from 'none', 'relu'"),
        (["convert"], "the following arguments are required: FILE, --out"),
        (["convert", "x.pth", "--out", "y.ckpt"], "no checkpoint 'x.pth': the file does not exist"),
        (["convert", "bad.yaml", "--out", "y.ckpt"], "no file that torch.save wrote"),
        (["convert", "bad.yaml", "--out", "y.ckpt", "--norm_args", "{a"], "--norm_args must be a mapping such as"),
        (["convert", "bad.yaml", "--out", "y.ckpt", "--rename", "x"], "--rename must read PATTERN=REPLACEMENT, got"),
        (["convert", "bad.yaml", "--out", "y.ckpt", "--rename", "(=x"], "--rename: '(' is no regular expression: "),
        (["export"], "the following arguments are required: --out"),
        (["export", "--out", "net.txt"], "--out must end in .pt2 or .onnx, got 'net.txt'"),
        (["export", "--out", "net.pt2"], "no model. Type --model my_module.MyModel"),
        ([*EXPORT, "--shpe", "2x3"], "Did you mean '--shape'?"),
        ([*EXPORT[:3], "--model", "small_job.Plain", "--shape", "2x3"], "Plain has no forward, which export writes"),
        (EXPORT, "the input of Small is not known: type --shape 1x3x32x32 (say)"),
        ([*EXPORT, "--shape", "2,3"], "--shape must read like 1x3x32x32, got '2,3'"),
        ([*EXPORT, "--shape", "2x5"], "Small takes no input of 2x5: mat1 and mat2 shapes cannot be multiplied"),
        ([*EXPORT, "--shape", "2x3", "--ckpt_path", "x.ckpt"], "no checkpoint 'x.ckpt': the file does not exist"),
        ([*EXPORT, "--shape", "2x3", "--layers", "foldd"], "invalid choice: 'foldd' (choose from 'fold'"),
        ([*EXPORT, "--shape", "2x3", "--harden", "3"], "threshold must lie in (0.5, 1], got 3.0"),
    ],
    ids=lambda value: " ".join(w for w in value if w not in JOB)[:50] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_with_what_to_type(capfd, arguments, said):
    Path("list.yaml").write_text("- 1\n- 2\n")
    Path("bad.yaml").write_text("trainer: {max_epochs: 5\n")
    Path("empty.yaml").write_text("")
    Path("utf16.yaml").write_text("norm: sn", encoding="utf-16")
    (line,) = refused(capfd, *arguments)
    assert said in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", *JOB, "--norm", "snn"],
        ["plan", "--model", "small_job.Small", "--norm", "snn"],
        ["compare", "--norms", "bn,snn"],
        ["bench", "--norms", "snn"],
        ["convert", "x.pth", "--out", "y.ckpt", "--norm", "snn"],
        ["export", "--out", "net.pt2", "--model", "small_job.Small", "--norm", "snn", "--shape", "2x3"],
    ],
    ids=lambda value: value[0],
)
def test_a_mistyped_norm_is_told_on_every_command(capfd, arguments):
    (line,) = refused(capfd, *arguments)
    assert "Did you mean 'sn' (SwitchableNorm)" in line
    assert "NormName" not in line
    assert "<class" not in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_command_is_told(capfd, command):
    (line,) = refused(capfd, command[:-1] if len(command) > 3 else command + "t")
    assert f"Did you mean '{command}'?" in line


def test_a_run_without_a_norm_says_that_nothing_is_swapped(capfd, caplog):
    caplog.set_level("INFO")
    main(["fit", *JOB])
    assert "No norm: nothing is swapped. Type --norm sn" in capfd.readouterr().err + caplog.text


def test_a_run_of_ones_own_job_says_where_its_weights_are_and_how_to_compare(capfd):
    Path("job.yaml").write_text("model: small_job.Small\nnorm: sn\n")
    main(["fit", "--config", "job.yaml", *JOB[2:], "--trainer.enable_checkpointing=true", "--trainer.logger=true"])
    closing = capfd.readouterr().out.splitlines()[-1]
    assert closing == (
        "Weights: lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt     "
        "TensorBoard: tensorboard --logdir lightning_logs     "
        "compare: lightning-norm compare --config job.yaml --norms bn,sn,bcn --metric val_loss"
    )


def test_a_job_with_a_schedule_is_not_told_to_compare_what_has_no_such_value(capfd):
    schedule = {"class_path": "NormScheduler", "init_args": {"schedules": {"radius": 0.1}}}
    norm = {"norm": "sn", "norm_args": {"sparse": True}}
    job = {"model": "small_job.Small", "norm": norm, "trainer": {"callbacks": [schedule]}}
    Path("job.yaml").write_text(yaml.safe_dump(job))
    main(["fit", "--config", "job.yaml", *JOB[2:], "--trainer.enable_checkpointing=true"])
    closing = capfd.readouterr().out.splitlines()[-1]
    assert closing.startswith("Weights: ")
    assert "compare" not in closing


def test_a_second_fit_without_a_logger_leaves_what_is_there():
    Path("config.yaml").write_text("mine: true\n")
    for _ in range(2):
        main(["fit", *JOB, "--norm", "sn"])
    assert Path("config.yaml").read_text() == "mine: true\n"
    assert yaml.safe_load(Path("config-v1.yaml").read_text())["norm"]["norm"] == "sn"
    assert Path("config-v2.yaml").exists()


def test_a_model_without_batch_norm_is_an_error_unless_it_may_be(capfd):
    plain = ["small_job.Plain" if a == "small_job.Small" else a for a in JOB]
    for command in ("fit", "plan"):
        line = refused(capfd, command, *plain, "--norm", "sn")[-1]
        assert "swap changed nothing: no candidate found" in line
        assert not line.endswith("..")
    with pytest.warns(match="no candidate found"):
        main(["fit", *plain, "--norm", "sn", "--norm.on_empty", "warn"])
    assert "on_empty" in refused(capfd, "fit", *plain, "--norm", "sn", "--norm.on_empty", "silence")[-1]


def test_two_monitors_and_a_metric_that_nobody_logs(capfd):
    twice = ["--trainer.callbacks+=NormMonitor", "--trainer.callbacks+=NormMonitor"]
    line = refused(capfd, "fit", *JOB, "--norm", "sn", *twice)[-1]
    assert "2 NormMonitors log under the same names, with the prefix 'norm'. Give each another one" in line
    main(["fit", *JOB, "--trainer.logger=true", "--norm", "sn", *twice, "--trainer.callbacks.prefix=second"])
    wrong = ["--trainer.callbacks+=NormMonitor", "--trainer.callbacks.metric=val_los"]
    line = refused(capfd, "fit", *JOB, "--trainer.logger=true", "--norm", "sn", *wrong)[-1]
    assert "logged no metric 'val_los'. Did you mean 'val_loss'?" in line


PLAIN = """
from lightning.pytorch.cli import LightningCLI

import lightning_norm.callbacks

LightningCLI(seed_everything_default=0)
"""


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        ("snn", "no normalizer called 'snn'. Did you mean 'sn' (SwitchableNorm)"),
        ("torch.nn.Linear", "'torch.nn.Linear' is not a normalizer"),
        ("sn", None),
    ],
)
def test_a_wrong_key_in_a_script_of_the_user_is_told_by_its_parser(monkeypatch, capfd, norm, said):
    callback = {"class_path": "NormSwap", "init_args": {"norm": norm}}
    trainer = {**QUIET, "callbacks": [callback]}
    Path("job.yaml").write_text(yaml.safe_dump({"model": {"class_path": "small_job.Small"}, "trainer": trainer}))
    monkeypatch.setattr("sys.argv", ["script.py", "fit", "--config", "job.yaml"])
    if said is None:
        exec(PLAIN, {})
        return
    with pytest.raises(SystemExit) as ended:
        exec(PLAIN, {})
    shown = capfd.readouterr().err
    assert ended.value.code == 2
    assert said in shown
    assert "Traceback" not in shown


def test_the_nearest_name():
    options = ["--norms", "--model", "--trainer.max_epochs"]
    assert nearest("--max_epochs", options) == "--trainer.max_epochs"
    assert nearest("--mdel.width", options) == "--model.width"
    assert nearest("--something_else", options) is None
