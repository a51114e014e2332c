import contextlib
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lightning_norm
import lightning_norm.cli.main
from lightning_norm.cli.main import COMMANDS, TRAIN, main
from lightning_norm.cli.norm_cli import clarify, expand_root

# LightningCLI 2.6 calls names that jsonargparse renamed in 4.5x.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SN = str(CONFIGS / "digits_sn.yaml")
QUICK = ["--trainer.fast_dev_run", "1", "--data.batch_size", "8", "--trainer.enable_progress_bar", "false"]

CUSTOM = """
import lightning.pytorch as pl
import torch
from torch import nn

class OwnModel(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.lost = []

    def training_step(self, batch, batch_idx):
        self.lost.append(type(self.net[1]).__name__)
        return self.net(batch).square().mean()

    def on_train_end(self):
        print("trained with", self.lost[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4)
"""


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def script(*args, **kwargs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lightning_norm", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **kwargs)


def refused(capfd, *args):
    with pytest.raises(SystemExit) as error:
        main(list(args))
    assert error.value.code == 2
    return capfd.readouterr().err


def edited(tmp_path, *changes):
    text = Path(SN).read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "edited.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no BrokenPipeError here")
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        (["--help"], ""),
        (["list"], ""),
        (["list"], "1"),
        (["list", "--no"], ""),
        (["plan", "--help"], ""),
        pytest.param(["fit", "--help"], "", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_command_whose_reader_has_left_ends_quietly(arguments, unbuffered):
    command = [sys.executable, "-W", "ignore", "-m", "lightning_norm", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": unbuffered}
    wrong = "--no" in arguments
    reader, writer = os.pipe()
    os.close(reader)
    # An error of the command line goes to the other stream.
    streams = {"stdout": subprocess.PIPE if wrong else writer, "stderr": writer if wrong else subprocess.PIPE}
    done = subprocess.run(command, **streams, text=True, env=environment)
    os.close(writer)
    assert not done.stderr
    assert not done.stdout
    # argparse passes over what it cannot write; unbuffered, nothing is left that would tell.
    assert done.returncode in ({0, 141} if "--help" in arguments else {141})


def test_another_broken_pipe_is_an_error(monkeypatch):
    def broken(*_):
        raise BrokenPipeError("of a logger")

    monkeypatch.setattr(lightning_norm.cli.main, "_run", broken)
    with pytest.raises(BrokenPipeError, match="of a logger"):
        main(["list"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_for_another_library_is_told(monkeypatch, capsys, number):
    """As Lightning's TensorBoardLogger has it: it calls the number that it was to log not supported."""

    def run(*_):
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise ValueError("you tried to log 2.25 which is currently not supported") from error

    monkeypatch.setattr("lightning_norm.cli.main._run", run)
    with pytest.raises(SystemExit) as end:
        main(["list"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert (
        said == f"lightning-norm: error: [Errno {number}] {os.strerror(number)}. Make room, and type the same again.\n"
    )
    monkeypatch.setenv("LIGHTNING_NORM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="not supported"):
        main(["list"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--json", ""],
        ["bench", "--save", ""],
        ["convert", "a.pth", "--out", ""],
        ["export", "--out", "a.pt2", "--ckpt_path", ""],
        ["export", "--out", ""],
    ],
)
def test_an_empty_path_is_no_path(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    option = arguments[-2]
    assert re.search(rf"argument {option}: expected a path, got ''. Type {option} \w+", capsys.readouterr().err)


def test_the_overview_shows_an_example_of_every_command(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"lightning-norm {command}" in shown


def test_ten_lines_say_what_it_can_do(capsys):
    main([])
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 10
    assert {name for name in COMMANDS if re.search(rf"\b{name}\b", shown)} == set(COMMANDS)
    # Its example is one of a job that needs no file.
    assert "lightning-norm fit --model ImageClassifier --norm sn\n" in shown


def test_a_file_or_folder_with_run_is_a_command_and_a_command_has_its_own():
    here = Path(lightning_norm.cli.main.__file__).parent
    files = {f.stem for f in here.glob("*.py") if "\ndef run(" in f.read_text()}
    files |= {f.parent.name for f in here.glob("*/__init__.py") if "import run as run" in f.read_text()}
    assert files == {name for name, command in COMMANDS.items() if command.group != TRAIN}


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-norm {lightning_norm.__version__}\n"


def test_an_unknown_command_names_the_nearest(capfd):
    assert "Did you mean 'compare'?" in refused(capfd, "compar")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(capsys, command):
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert f"lightning-norm {command}" in capsys.readouterr().out.replace("usage: ", "", 1)


def test_fit_prints_the_swap_the_progress_the_result_and_what_is_next(tmp_path):
    done = script(
        "fit", "--config", SN, "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "3", "--data.batch_size",
        "16", "--trainer.log_every_n_steps", "1", "--trainer.limit_test_batches", "1.0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # In two streams, each in its order; nothing else is in either.
    lines = [*done.stderr.splitlines(), *done.stdout.splitlines()]
    first, *_, length, epoch1, epoch2, closing = lines
    assert first == "NormSwap: 20 of 20 BatchNorm2d layers -> SwitchableNorm (sn, Luo et al. 2021)"
    assert [line.split()[0] for line in lines] == [
        *("NormSwap:", "parameters", "evaluation", "backend", "2", "Epoch", "Epoch", "Test"),
    ]
    assert re.fullmatch("2 epochs of 3 steps, (about [\\d.]+|a few) (second|minute|hour)s? on this machine", length)
    for i, line in enumerate((epoch1, epoch2), start=1):
        assert re.fullmatch(rf"Epoch {i}/2  train_loss [\d.]+  val_acc [\d.]+  \d+ s", line)
    assert closing.startswith("Test accuracy 0.")
    assert "tensorboard --logdir lightning_logs" in closing
    # Of this configuration, and not of the job without it.
    assert closing.endswith(f"lightning-norm compare --config {SN} --norms bn,sn,bcn --metric test_acc")
    assert "Weights: lightning_logs/version_0/checkpoints/epoch=1-step=6.ckpt" in closing
    assert "\x1b" not in done.stdout + done.stderr
    assert list(tmp_path.glob("lightning_logs/version_0/events*"))
    saved = yaml.safe_load((tmp_path / "lightning_logs/version_0/config.yaml").read_text())
    assert saved["model"]["init_args"]["num_classes"] == 10


@pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
@pytest.mark.parametrize("config", sorted(CONFIGS.glob("digits_*.yaml")), ids=lambda p: p.stem)
def test_every_configuration_trains(config):
    main(["fit", "--config", str(config), *QUICK])


def test_the_printed_configuration_is_a_configuration(tmp_path, capsys):
    printed = []
    config = SN
    for i in range(2):
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", config, "--print_config"])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
        config = str(tmp_path / f"printed{i}.yaml")
        Path(config).write_text(printed[-1], encoding="utf-8")
    assert printed[0] == printed[1]
    assert yaml.safe_load(printed[0])["model"]["class_path"].endswith("ImageClassifier")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("max_epochs", "max_epoch"), "Did you mean 'trainer.max_epochs'?"),
        (("momentum: 0.9", "momentun: 0.9"), "Did you mean 'momentum'?"),
        (("compile: false", "compil: false"), "Did you mean 'compile'?"),
        (("class_path: Digits", "class_path: Digit"), "Did you mean 'Digits'?"),
        (("class_path: NormSwap", "class_path: NormSwp"), "Did you mean 'NormSwap'?"),
        (("class_path: NormMonitor", "class_path: lightning_norm.NormMonitr"), "Did you mean 'NormMonitor'?"),
        (("class_path: NormMonitor", "class_path: EarlyStoping"), "Did you mean 'EarlyStopping'?"),
        (("norm: sn", "norm: switchabel"), "Did you mean 'sn' (SwitchableNorm)"),
        (("arch: resnet18", "arch: resnet17"), "Did you mean resnet18"),
    ],
)
def test_a_typo_is_told_with_the_nearest_name(tmp_path, capfd, change, said):
    message = refused(capfd, "fit", "--config", edited(tmp_path, change), *QUICK)
    assert said in message
    assert "Traceback" not in message
    assert "usage:" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("norm: sn\nnorm: bn\nmodel: ImageClassifier\n", "line 2, column 1: 'norm' stands there twice"),
        ("norm:\n  norm: sn\n  sync: true\n  sync: false\nmodel: ImageClassifier\n", "line 4, column 3: 'sync' stands"),
        (
            "model: ImageClassifier\ntrainer: {callbacks: [{class_path: A, class_path: B}]}\n",
            "'class_path' stands there",
        ),
    ],
)
@pytest.mark.parametrize("command", ["fit", "plan"])
def test_an_entry_that_stands_twice_is_told(tmp_path, capfd, command, text, said):
    """YAML takes the last of the two without a word."""
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        main([command, "--config", str(tmp_path / "job.yaml")])
    assert end.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot read" in line
    assert said in line


def test_a_typo_in_a_schedule_and_a_plugin(tmp_path, capfd):
    linear = "{class_path: NormScheduler, init_args: {schedules: {momentum: {class_path: Linaer}}}}"
    change = ("    - class_path: NormMonitor", f"    - {linear}\n    - class_path: NormMonitor")
    assert "Did you mean 'Linear'?" in refused(capfd, "fit", "--config", edited(tmp_path, change), *QUICK)
    change = ("  callbacks:", "  plugins: [{class_path: NormSink}]\n  callbacks:")
    assert "Did you mean 'NormSync'?" in refused(capfd, "fit", "--config", edited(tmp_path, change), *QUICK)


def test_a_missing_file_and_a_missing_model_are_told(capfd):
    assert "nowhere.yaml" in refused(capfd, "fit", "--config", "nowhere.yaml")
    assert "Type --model my_module.MyModel" in refused(capfd, "fit")


def test_a_users_own_module_and_data_less_model(tmp_path, capfd):
    (tmp_path / "own_job.py").write_text(CUSTOM)
    main(
        ["fit", "--model", "own_job.OwnModel", "--trainer.max_epochs", "1", "--trainer.callbacks+=NormSwap",
         "--trainer.callbacks.norm=sn", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false",
         "--trainer.enable_progress_bar", "false"]
    )  # fmt: skip
    shown = capfd.readouterr()
    assert "trained with SwitchableNorm" in shown.out
    assert "Test accuracy" not in shown.out + shown.err


def test_a_users_own_error_keeps_its_traceback(tmp_path):
    (tmp_path / "broken_job.py").write_text(CUSTOM.replace("self.lost = []", "raise ValueError('mine')"))
    with pytest.raises(ValueError, match="mine"):
        main(["fit", "--model", "broken_job.OwnModel", "--trainer.logger", "false"])


def test_our_own_error_with_its_traceback(monkeypatch):
    monkeypatch.setenv("LIGHTNING_NORM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="switchabel"):
        main(["compare", "--norms", "switchabel"])


def test_validate_test_and_predict_read_the_checkpoint(tmp_path, capfd, caplog):
    small = ["--model.arch", "resnet18", "--data.batch_size", "8", "--trainer.enable_progress_bar", "false"]
    limits = [f"--trainer.limit_{s}_batches=2" for s in ("train", "val", "test", "predict")]
    main(["fit", "--config", SN, "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1", *small, *limits])
    (checkpoint,) = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    assert "net.layer1.0.bn1.mean_weight" in torch.load(checkpoint, weights_only=True)["state_dict"]
    for command, shown in (("validate", "val_acc"), ("test", "test_acc"), ("predict", "NormSwap")):
        caplog.clear()
        main([command, "--config", SN, "--ckpt_path", str(checkpoint), *small[:-2], *limits])
        captured = capfd.readouterr()
        assert "\r" not in captured.out + captured.err  # no bar where there is no terminal
        # Which of the two gets Lightning's log depends on whether a handler stood when it was imported.
        assert shown in captured.out + captured.err + caplog.text


def test_root_goes_behind_the_data():
    assert expand_root(["fit", "--root=d", "--data", "X"]) == ["fit", "--data", "X", "--data.init_args.root", "d"]
    assert expand_root(["fit", "--root"]) == ["fit", "--data.init_args.root"]


def test_clarify_leaves_other_messages_alone():
    assert clarify("something else", ["--a"]) == "something else"
