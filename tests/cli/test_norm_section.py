"""The section ``norm:``: NormSwap's arguments at the top level of a configuration."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_norm import NormMonitor, NormScheduler, NormSwap, SwitchableNorm
from lightning_norm.cli.main import main
from lightning_norm.cli.norm_cli import NormCLI
from lightning_norm.cli.screen import EpochLines, Forecast, QuietWorkers
from tests.callbacks.toy import Net, loader

pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:You're using the WeightAveraging callback with a model",
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "configs" / "digits_section.yaml"


class Job(Net):
    """Random in all that a seed has to fix: weights, order, dropout."""

    configure_optimizers = LightningModule.configure_optimizers

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*self.net, nn.Dropout(0.2), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))

    def train_dataloader(self):
        return DataLoader(loader(16).dataset, batch_size=4, shuffle=True)


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config_file(norm=None, name="run.yaml", trainer=(), **more):
    config = {
        **({"norm": norm} if norm else {}),
        "model": {"class_path": f"{__name__}.Job"},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **dict(trainer),
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        **more,
    }
    config = {key: value for key, value in config.items() if value is not None}
    Path(name).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return name


def fit(*arguments, **options):
    return NormCLI(["fit", *arguments], **{"save_config_callback": None, **options})


def kinds(model):
    return [type(model.net[i]).__name__ for i in (1, 5)]


SPEC = {"class_path": "lightning_norm.SwitchableNorm", "init_args": {"choices": ["in", "bn"]}}
SECTIONS = {
    "key": ({"norm": "sn"}, ["SwitchableNorm", "SwitchableNorm"]),
    "arguments": ({"norm": "sn", "norm_args": {"eps": 1e-3}, "exclude": ["net.5"]}, ["SwitchableNorm", "BatchNorm2d"]),
    "spec": ({"norm": SPEC, "include": ["net.1"]}, ["SwitchableNorm", "BatchNorm2d"]),
    "rules": ({"rules": {r"net\.1": SPEC, ".*": "bcn"}}, ["SwitchableNorm", "BatchChannelNorm"]),
    "plan": ({"plan": "plan.yaml"}, ["BatchNorm2d", "BatchChannelNorm"]),
}  # fmt: skip


@pytest.mark.parametrize("form", SECTIONS)
def test_swaps_and_trains(form):
    section, expected = SECTIONS[form]
    Path("plan.yaml").write_text("layers: [{name: net.5, source: BatchNorm2d, norm: bcn}]\n", encoding="utf-8")
    cli = fit("--config", config_file(section))
    assert kinds(cli.model) == expected
    learned = [p for m in cli.model.net for n, p in m.named_parameters() if n in ("mean_weight", "iota")]
    assert learned
    assert all((p - 1).abs().max() > 0 for p in learned)


def swap_callback(spec):
    return {"callbacks": [{"class_path": "NormSwap", "init_args": {"norm": spec}}]}


KEYED = {"class_path": "sn", "init_args": {"choices": ["in", "bn"]}}
KEYS = {
    "bare section": {"norm": "sn"},
    "bare section, class name": {"norm": "SwitchableNorm"},
    "spec in the section": {"norm": {"norm": KEYED}},
    "spec in the callback": {"trainer": swap_callback(KEYED)},
}


@pytest.mark.parametrize("form", KEYS)
def test_a_key_is_enough_and_survives_print_config(form, capsys):
    path = config_file(**KEYS[form])
    for i in range(2):
        cli = fit("--config", path)
        assert kinds(cli.model) == ["SwitchableNorm"] * 2
        assert cli.model.net[1].choices == (("in", "bn") if "spec" in form else ("in", "ln", "bn"))
        capsys.readouterr()  # the progress of the training above
        with pytest.raises(SystemExit):
            fit("--config", path, "--print_config")
        path = f"printed{i}.yaml"
        Path(path).write_text(capsys.readouterr().out, encoding="utf-8")
    assert Path("printed0.yaml").read_text() == Path("printed1.yaml").read_text()


def test_a_bare_section_on_the_command_line_and_one_in_a_file():
    assert kinds(fit("--config", config_file(), "--norm", "sn").model) == ["SwitchableNorm"] * 2
    Path("section.yaml").write_text("{norm: bcn, exclude: [net.5]}", encoding="utf-8")
    assert kinds(fit("--config", config_file("section.yaml")).model) == ["BatchChannelNorm", "BatchNorm2d"]


def test_without_a_section_nothing_is_swapped():
    cli = fit("--config", config_file())
    assert kinds(cli.model) == ["BatchNorm2d"] * 2
    assert not [c for c in cli.trainer.callbacks if isinstance(c, NormSwap)]


def of_the_job(cli):
    """The kinds of callbacks, without those that only show the progress."""
    return [type(c) for c in cli.trainer.callbacks if not isinstance(c, (Forecast, EpochLines, QuietWorkers))]


def test_it_stands_before_all_callbacks():
    averaging = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.5}}
    cli = fit("--config", config_file({"norm": "sn"}, trainer={"callbacks": [averaging]}))
    assert of_the_job(cli)[:2] == [NormSwap, EMAWeightAveraging]


def test_callbacks_are_added_by_a_second_file_and_on_the_command_line():
    first = config_file({"norm": "sn"}, trainer={"callbacks": [{"class_path": "EMAWeightAveraging"}]})
    more = [{"class_path": "NormScheduler", "init_args": {"schedules": {"momentum": 0.3}}}]
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": more}}), encoding="utf-8")
    cli = fit(
        "--config", first, "--config", "more.yaml", "--trainer.callbacks+=NormMonitor",
        "--trainer.callbacks.prefix=mine", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs",
    )  # fmt: skip
    assert of_the_job(cli)[:4] == [NormSwap, EMAWeightAveraging, NormScheduler, NormMonitor]
    assert next(c for c in cli.trainer.callbacks if isinstance(c, NormMonitor)).prefix == "mine"
    assert cli.model.net[1].momentum == 0.3


def test_from_the_command_line_alone():
    options = ["--norm.norm", "sn", "--norm.norm_args.momentum", "0.3", "--norm.exclude", "[net.5]"]
    cli = fit("--config", config_file(), *options, "--optimizer", "Adam", "--optimizer.lr", "0.01")
    assert kinds(cli.model) == ["SwitchableNorm", "BatchNorm2d"]
    assert cli.model.net[1].momentum == 0.3
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.Adam)
    assert sum(p is cli.model.net[1].mean_weight for g in optimizer.param_groups for p in g["params"]) == 1


def test_options_win_over_the_file():
    cli = fit("--config", config_file({"norm": "sn", "exclude": ["net.5"]}), "--norm.norm", "bcn")
    assert kinds(cli.model) == ["BatchChannelNorm", "BatchNorm2d"]


def test_the_printed_configuration_is_a_configuration(capsys):
    printed, path = [], config_file({"norm": SPEC, "exclude": ["net.5"]})
    for i in range(2):
        with pytest.raises(SystemExit) as end:
            fit("--config", path, "--print_config")
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
        path = f"printed{i}.yaml"
        Path(path).write_text(printed[-1], encoding="utf-8")
    assert printed[0] == printed[1]
    assert kinds(fit("--config", path).model) == ["SwitchableNorm", "BatchNorm2d"]


def test_a_run_from_the_saved_configuration_has_identical_weights():
    """With what came from the command line, from a second file and from defaults."""
    path = config_file({"norm": "sn", "norm_args": {"sparse": True}}, trainer={"logger": True, "log_every_n_steps": 1})
    schedule = {"radius": {"class_path": "Linear", "init_args": {"start": 0.2, "end": 0.6, "epochs": 2}}}
    more = [{"class_path": "NormScheduler", "init_args": {"schedules": schedule}}]
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": more}}), encoding="utf-8")
    options = ["--seed_everything", "7", "--norm.switch_lr_scale", "3", "--norm.accumulate_statistics", "true"]
    options += ["--trainer.accumulate_grad_batches", "2", "--optimizer.lr", "0.05"]
    first = NormCLI(["fit", "--config", path, "--config", "more.yaml", *options]).model
    torch.manual_seed(99)
    second = NormCLI(["fit", "--config", "lightning_logs/version_0/config.yaml"]).model
    assert Path("lightning_logs/version_1/config.yaml").is_file()
    assert isinstance(second.net[1], SwitchableNorm)
    assert second.net[1].radius == 0.4
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:No seed found")
def test_the_seed_that_lightning_chose_is_saved():
    path = config_file({"norm": "sn"}, trainer={"logger": True, "log_every_n_steps": 1})
    first = NormCLI(["fit", "--config", path, "--seed_everything", "true"]).model
    second = NormCLI(["fit", "--config", "lightning_logs/version_0/config.yaml"]).model
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("kind", ["yaml", "checkpoint"])
def test_a_plan_is_saved_itself_and_not_by_its_path(kind):
    path = config_file(trainer={"logger": True, "log_every_n_steps": 1, "enable_checkpointing": True})
    plan = {"layers": [{"name": "net.5", "source": "BatchNorm2d", "norm": {"class_path": "bcn", "init_args": {}}}]}
    Path("plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    first = NormCLI(["fit", "--config", path, "--norm.plan", "plan.yaml"])
    if kind == "checkpoint":
        Path(first.trainer.checkpoint_callback.best_model_path).rename("plan.yaml")
        first = NormCLI(["fit", "--config", path, "--norm.plan", "plan.yaml"])
    Path("plan.yaml").unlink()
    second = NormCLI(["fit", "--config", f"{first.trainer.log_dir}/config.yaml"]).model
    assert kinds(second) == ["BatchNorm2d", "BatchChannelNorm"]
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.model.state_dict().items())


QUICK = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1",
         "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
         "--data.batch_size=8"]  # fmt: skip


def test_plan_honours_it_and_its_file_is_a_section(capsys):
    saves, reads = ["--config", str(EXAMPLE), "--save", "plan.yaml"], ["--norm.plan", "plan.yaml"]
    for options in (saves, ["--model", "ImageClassifier", *reads]):
        main(["plan", *options])
        assert "17 of 20 BatchNorm2d layers would become SwitchableNorm" in capsys.readouterr().out


@pytest.mark.slow
def test_fit_test_and_export_honour_it(capsys):
    main(["fit", "--config", str(EXAMPLE), "--norm.norm", "bn", *QUICK])
    (checkpoint,) = Path("lightning_logs/version_0/checkpoints").glob("*.ckpt")
    assert len(torch.load(checkpoint)["lightning_norm"]["layers"]) == 17
    main(["test", "--config", str(EXAMPLE), "--norm.norm", "bn", "--ckpt_path", str(checkpoint), *QUICK])
    assert "test_acc" in capsys.readouterr().out
    main(["export", "--config", str(EXAMPLE), "--shape", "2x3x8x8", "--layers", "keep", "--out", "net.pt2"])
    names = torch.export.load("net.pt2").state_dict
    assert sum("mean_weight" in name for name in names) == 17


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--norm", "my.Norm"], "cannot import the normalizer 'my.Norm'"),
        (["--norm", "switchabel"], "Did you mean 'sn'"),
        (["--norm.exclude", "[bn1]"], "NormSwap needs norm='sn'"),
        (["--norm.norm", "switchabel"], "Did you mean 'sn'"),
        (['--norm={"norm": "sn", "exclud": ["bn1"]}'], "Did you mean 'norm.exclude'?"),
        (["--norm.norm", "sn", "--norm.sync", "maybe"], "maybe"),
    ],
)
def test_a_mistake_is_told(arguments, said, capfd):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", config_file(), *arguments])
    assert end.value.code == 2
    message = capfd.readouterr().err
    assert said in message
    assert "Traceback" not in message
