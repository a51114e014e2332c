"""Two gloo ranks through Lightning's ddp strategy equal one process on the whole batch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]


def train(key, devices, out, *backend):
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.train", key, str(devices), str(out), *backend]
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if backend else {})
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("key", ["sn", *(pytest.param(key, marks=pytest.mark.slow) for key in ("bn", "bcn", "bn+"))])
def test_two_ranks_train_as_one(key, tmp_path):
    one = train(key, 1, tmp_path / "one.pt")
    two = train(key, 2, tmp_path / "two.pt")
    assert one.keys() == two.keys()
    for name, value in one.items():
        # float64, six steps: rounding 1e-16 grows by the learning dynamics to about 1e-13
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow  # tests/kernels/interpreted/test_ranks.py is quicker
@pytest.mark.parametrize("key", ["bn", "sn"])
def test_two_ranks_train_as_one_on_the_kernels(key, tmp_path):
    pytest.importorskip("triton")
    one = train(key, 1, tmp_path / "one.pt")
    two = train(key, 2, tmp_path / "two.pt", "triton")
    for name, value in one.items():
        # float32, six steps of a network that starts far from its optimum
        torch.testing.assert_close(two[name].to(value.dtype), value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # test_agree.py is quicker
def test_ranks_that_disagree_on_the_swap_are_told_at_setup():
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.disagree_at_setup"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    plan = r"layers \(hash \w{8}"
    expected = rf"ranks disagree on the swap: rank 0 has 3 {plan}\), rank 1 has 2 \(hash \w{{8}}; missing there: late"
    assert re.search(expected, done.stderr)


@pytest.mark.slow
def test_ranks_agree_on_the_contexts_of_images(tmp_path):
    out = tmp_path / "held"
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.contexts", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(f"{out}.{rank}") for rank in (0, 1))
    assert first["net.1.centroids"].abs().sum() > 0
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_the_monitor_reads_and_logs_on_rank_zero_alone(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.monitor", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {f.name: f.read_text() for f in tmp_path.glob("rank*")} == {"rank0": "5", "rank1": "0"}  # steps 0 to 4
    # Beside it lies the row of the HParams page.
    (events,) = (f for f in tmp_path.rglob("events.out.tfevents.*") if f.parent.name != "hparams")
    series = EventAccumulator(str(events)).Reload().Scalars("norm/sn/mean_in/net.1")
    assert [e.step for e in series] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("strategy", ["ddp_notebook", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_the_process_that_starts_the_others_gets_the_swap_and_what_was_learned(strategy, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.spawned", strategy, str(tmp_path / "held.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "BatchNorm2d"
    # Once for fit and test together, although each has processes of its own.
    assert (done.stderr + done.stdout).count("-> SwitchableNorm") == 1


def test_without_the_swap_beforehand_what_to_type_is_told_before_the_training(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.spawned", "ddp_notebook"]
    command += [str(tmp_path / "held.pt"), "late"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Type norm_swap.swap_before_launch(model) before trainer.fit(model)" in done.stderr
    assert not (tmp_path / "held.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("section", ["norm", "trainer.callbacks"])
def test_the_command_line_swaps_before_it_starts_processes(section, tmp_path):
    swap = ["--norm", "sn"] if section == "norm" else ["--trainer.callbacks+=NormSwap", "--trainer.callbacks.norm=sn"]
    command = [sys.executable, "-W", "ignore", "-m", "lightning_norm", "fit", "--trainer.strategy", "ddp_spawn"]
    command += ["--model", "tests.cli.own_job.Classifier", "--data", "tests.cli.own_job.Stripes", *swap]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.max_epochs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 of 2 BatchNorm2d layers -> SwitchableNorm") + done.stderr.count("2 of 2 Batch") == 1
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    learned = torch.load(checkpoint)["state_dict"]["net.1.mean_weight"]
    assert not torch.equal(learned, torch.ones(3))


@pytest.mark.slow
def test_the_example_configuration_runs(tmp_path):
    config = str(ROOT / "examples" / "configs" / "ddp.yaml")
    command = [sys.executable, "-W", "ignore", "-m", "lightning_norm", "fit", "--config", config]
    command += ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.accelerator", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "19 of 20 BatchNorm2d layers -> SwitchableNorm" in done.stderr + done.stdout
