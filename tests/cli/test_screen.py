"""What a training command shows beside what Lightning and other packages would."""

import contextlib
import copy
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lightning_norm.cli.screen import (
    HIDDEN,
    LOGGERS,
    EpochLines,
    Forecast,
    QuietWorkers,
    can_be_timed,
    screen_callbacks,
    seconds_per_batch,
    without_noise,
)
from lightning_norm.demo.data import Digits
from lightning_norm.demo.job import ImageClassifier
from tests.callbacks.toy import Net, loader

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
TIP = "\N{ELECTRIC LIGHT BULB} Tip: For seamless cloud logging, try another product"


def test_only_the_lines_of_others_are_hidden(caplog):
    caplog.set_level(logging.INFO)
    seed = logging.getLogger("lightning.fabric.utilities.seed")
    said = "NormSwap: 3 of 3 BatchNorm2d layers"
    with without_noise():
        seed.info("[rank: 1] Seed set to 0")
        rank_zero_info("GPU available: False, used: False")
        rank_zero_info(TIP)
        rank_zero_info(said)
    assert caplog.messages == [said]
    seed.info("Seed set to 0")
    assert caplog.messages == [said, "Seed set to 0"]


@pytest.mark.parametrize(
    ("category", "filename", "shown"),
    [
        (DeprecationWarning, "/x/site-packages/torch/a.py", False),
        (FutureWarning, "/x/dist-packages/lightning/a.py", False),
        (UserWarning, "/x/site-packages/torch/a.py", True),
        (DeprecationWarning, "/home/me/my_job.py", True),
        (FutureWarning, __file__, True),
    ],
)
def test_a_deprecation_is_shown_to_whom_it_concerns(recwarn, category, filename, shown):
    warnings.simplefilter("always")
    with without_noise():
        warnings.warn_explicit("old", category, filename, 1)
    assert len(recwarn) == shown


def test_the_library_hides_nothing(recwarn, caplog):
    import lightning_norm.cli.screen  # noqa: F401

    caplog.set_level(logging.INFO)
    warnings.simplefilter("always")
    warnings.warn_explicit("old", FutureWarning, "/x/site-packages/torch/a.py", 1)
    rank_zero_info("GPU available: False, used: False")
    assert len(recwarn) == len(caplog.messages) == 1


def say_in_a_process(callback):
    """Log two lines in a process of its own, which the callback was sent to."""
    for line in (TIP, "NormSwap: 3 of 3"):
        logging.getLogger("lightning.pytorch.utilities.rank_zero").info(line)


@pytest.mark.parametrize("hidden", [True, False])
def test_a_spawned_process_hides_what_its_parent_hides(capfd, hidden):
    with without_noise() if hidden else contextlib.nullcontext():
        callback = QuietWorkers()
    process = multiprocessing.get_context("spawn").Process(target=say_in_a_process, args=(callback,))
    process.start()
    process.join()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith((TIP, "NormSwap"))]
    assert said == [TIP, "NormSwap: 3 of 3"][hidden:]
    copy.deepcopy(callback)
    assert not any(logging.getLogger(name).filters for name in LOGGERS)  # nothing in this process


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_two_ranks_of_the_command_tell_of_their_training_alone(tmp_path, strategy):
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_epochs": 1}
    trainer |= dict.fromkeys(("limit_train_batches", "limit_val_batches", "limit_test_batches"), 1)
    options = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    command = [sys.executable, "-m", "lightning_norm", "fit", "--model", "ImageClassifier", "--norm", "bn", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "MEMBER: 2/2" in said
    assert (said.count("NormSwap: 20 of 20"), said.count("Test accuracy")) == (1, 1)
    assert not any(part in said for part in (*HIDDEN, "is deprecated", "sync_dist")), said


@pytest.mark.parametrize(
    ("trainer", "callbacks", "terminal", "lines"),
    [
        ({}, [], False, True),
        ({}, [], True, False),
        ({"enable_progress_bar": False}, [], False, False),
        ({}, [TQDMProgressBar()], False, False),
    ],
)
def test_lines_take_the_place_of_a_bar_where_there_is_no_terminal(monkeypatch, trainer, callbacks, terminal, lines):
    monkeypatch.setattr(
        "lightning_norm.cli.screen.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: terminal))
    )
    made = screen_callbacks(trainer, callbacks)
    assert isinstance(made[0], Forecast)
    assert any(isinstance(c, EpochLines) for c in made) == lines


def test_any_job_tells_its_length_and_a_line_per_epoch(capsys):
    trainer = Trainer(max_epochs=2, callbacks=[Forecast(), EpochLines()], **QUIET)
    trainer.fit(Net(), loader())
    length, *epochs = capsys.readouterr().out.splitlines()
    assert length.startswith(f"2 epochs of {len(loader())} steps, ")
    assert [line.split()[:2] for line in epochs] == [["Epoch", "1/2"], ["Epoch", "2/2"]]


def test_a_job_that_puts_nothing_in_the_bar_shows_what_it_logged(capsys):
    trainer = Trainer(max_epochs=1, callbacks=[EpochLines()], **QUIET)
    trainer.fit(Net(), loader(), loader())
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Epoch 1/1  val_loss [\d.]+  \d+ s", line)


@pytest.mark.parametrize(
    "options", [{"fast_dev_run": True}, {"max_steps": 3}, {"max_epochs": -1, "max_time": "00:00:00:01"}], ids=str
)
def test_a_length_that_nobody_knows_is_not_told(capsys, options):
    Trainer(callbacks=[Forecast()], enable_progress_bar=False, **options, **QUIET).fit(Net(), loader())
    assert "machine" not in capsys.readouterr().out


def test_the_built_in_job_is_timed_beside_the_training():
    model, data = ImageClassifier("resnet18"), Digits(batch_size=4)
    data.setup()
    trainer = Trainer(**QUIET)
    trainer.datamodule = data
    assert can_be_timed(trainer, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    assert min(seconds_per_batch(trainer, model)) > 0
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not can_be_timed(trainer, LightningModule())
