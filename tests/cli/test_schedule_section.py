"""NormScheduler from YAML: short class names, numbers, nested schedules, and the printed configuration."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_norm import (
    Chain,
    Constant,
    Cosine,
    Exponential,
    InversePower,
    Linear,
    NormScheduler,
    Staircase,
    Steps,
    Warmup,
)
from lightning_norm.cli.norm_cli import NormCLI
from tests.callbacks.toy import Net, loader


class WithData(Net):
    def train_dataloader(self):
        return loader()


SECTION = """
radius: {class_path: Linear, init_args: {start: 0.5, end: 0.9, epochs: 10}}
net\\..*:momentum: 0.3
a:radius: {class_path: Cosine, init_args: {start: 1, end: 0, steps: 100}}
b:radius: {class_path: Steps, init_args: {values: {0: 0.5, 10: 0.1}}}
c:radius: {class_path: lightning_norm.Exponential, init_args: {start: 1.0, gamma: 0.9, epochs: 3.5}}
d:radius: {class_path: InversePower, init_args: {power: 0.5}}
e:radius:
  class_path: Chain
  init_args:
    schedules:
      - {class_path: Linear, init_args: {start: 0, end: 1, epochs: 5}}
      - {class_path: Constant, init_args: {value: 1, epochs: 2}}
      - class_path: Warmup
        init_args: {schedule: {class_path: Cosine, init_args: {start: 1, end: 0, epochs: 4}}, epochs: 2}
f:radius: {class_path: Warmup, init_args: {schedule: 0.4, start: 0.1, steps: 50}}
g:radius: {0: 0.9, 10: 0.1}
h:radius: {class_path: Warmup, init_args: {schedule: {0: 0.9, 10: 0.1}, steps: 50}}
i:momentum: {class_path: Staircase, init_args: {start: 0.5, gamma: 0.5, every: 20, floor: 0.01}}
"""
EXPECTED = {
    "radius": Linear(0.5, 0.9, epochs=10),
    "net\\..*:momentum": Constant(0.3),
    "a:radius": Cosine(1.0, 0.0, steps=100),
    "b:radius": Steps({0: 0.5, 10: 0.1}),
    "c:radius": Exponential(1.0, 0.9, epochs=3.5),
    "d:radius": InversePower(power=0.5),
    "e:radius": Chain(
        [
            Linear(0.0, 1.0, epochs=5),
            Constant(1.0, epochs=2),
            Warmup(schedule=Cosine(1.0, 0.0, epochs=4), epochs=2),
        ]
    ),
    "f:radius": Warmup(schedule=0.4, start=0.1, steps=50),
    "g:radius": Steps({0: 0.9, 10: 0.1}),
    "h:radius": Warmup(schedule={0: 0.9, 10: 0.1}, steps=50),
    "i:momentum": Staircase(0.5, 0.5, every=20, floor=0.01),
}

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def config_file(folder, schedules, name="config.yaml", **arguments):
    config = {
        "model": {"class_path": f"{__name__}.WithData"},
        "trainer": {
            "max_epochs": 4,
            "accelerator": "cpu",
            "callbacks": [
                {"class_path": "NormSwap", "init_args": {"norm": "sn", "norm_args": {"sparse": True}}},
                {"class_path": "NormScheduler", "init_args": {"schedules": schedules, **arguments}},
            ],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    path = folder / name
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


def built(path):
    cli = NormCLI(["--config", path], run=False, save_config_callback=None)
    (scheduler,) = (c for c in cli.trainer.callbacks if isinstance(c, NormScheduler))
    return scheduler


def test_every_schedule_is_parsed(tmp_path):
    scheduler = built(config_file(tmp_path, yaml.safe_load(SECTION), interval="step"))
    assert scheduler.schedules == EXPECTED
    assert list(scheduler.schedules) == list(EXPECTED)
    assert scheduler.interval == "step"


def test_the_printed_configuration_is_a_configuration(tmp_path, capsys):
    path = config_file(tmp_path, yaml.safe_load(SECTION), interval="step")
    printed = []
    for i in range(2):
        with pytest.raises(SystemExit) as end:
            NormCLI(["fit", "--config", path, "--print_config"])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
        path = str(tmp_path / f"printed{i}.yaml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(printed[-1])
    assert printed[0] == printed[1]
    config = yaml.safe_load(printed[0])
    config.pop("ckpt_path")  # of fit alone
    config.pop("weights_only", None)
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config, sort_keys=False))
    assert built(str(again)).schedules == EXPECTED


def test_fit_follows_the_schedule(tmp_path):
    schedules = {"radius": {"class_path": "Linear", "init_args": {"start": 0.2, "end": 0.8, "epochs": 3}}}
    cli = NormCLI(["fit", "--config", config_file(tmp_path, schedules)], save_config_callback=None)
    assert cli.model.net[1].radius == 0.8


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"class_path": "Linaer", "init_args": {"start": 0}}, "Linaer"),
        (
            {"class_path": "Linear", "init_args": {"start": 0, "stop": 1, "epochs": 3}},
            "Did you mean 'steps'? It takes start, end, epochs, steps.",
        ),
        ({"class_path": "Linear", "init_args": {"start": 0, "end": 1}}, "Linear needs its duration"),
        ("fast", "fast"),
    ],
)
def test_a_mistake_is_told(schedule, said, tmp_path, capfd):
    with pytest.raises((SystemExit, ValueError)) as error:
        built(config_file(tmp_path, {"radius": schedule}))
    assert said in capfd.readouterr().err + str(error.value)


def test_from_the_command_line(tmp_path):
    path = config_file(tmp_path, {"radois": 0.3}, name="run.yaml")  # config.yaml is what the run itself saves
    command = [sys.executable, "-W", "ignore", "-m", "lightning_norm", "fit", "--config", path]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean 'radius'? They have: momentum (1 layer), radius (1 layer)." in done.stderr
    assert "Traceback" not in done.stderr
