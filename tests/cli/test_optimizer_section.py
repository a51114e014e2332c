"""LightningCLI builds the optimizer of its ``optimizer:`` section before the Trainer, so before any swap."""

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from lightning_norm import OptimizerError
from lightning_norm.cli.norm_cli import NormCLI
from tests.callbacks.toy import LateNet, Net, loader


class WithoutOptimizer(Net):
    configure_optimizers = LightningModule.configure_optimizers

    def train_dataloader(self):
        return loader()


class LateWithoutOptimizer(LateNet):
    configure_optimizers = LightningModule.configure_optimizers
    train_dataloader = WithoutOptimizer.train_dataloader


SPEC = {"class_path": "lightning_norm.SwitchableNorm", "init_args": {"choices": ["in", "bn"]}}
SWAPS = {
    "key": ({"norm": "sn"}, 3),
    "arguments": ({"norm": "sn", "norm_args": SPEC["init_args"]}, 2),
    "spec": ({"norm": SPEC}, 2),
    "rules": ({"rules": {".*": SPEC}}, 2),
    "short rules": ({"rules": {r"net\..*": {**SPEC, "class_path": "sn"}}}, 2),
}


SCHEDULERS = {
    "LambdaLR": {"lr_lambda": f"{__name__}.halved"},
    "CosineAnnealingLR": {"T_max": 4},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 9},
}


def halved(epoch):
    return 0.5**epoch


def config_file(folder, swap, model="WithoutOptimizer", scheduler="ExponentialLR", more=(), **trainer):
    config = {
        "model": {"class_path": f"{__name__}.{model}"},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "callbacks": [{"class_path": "NormSwap", "init_args": swap}, *more],
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **trainer,
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {
            "class_path": f"torch.optim.lr_scheduler.{scheduler}",
            "init_args": SCHEDULERS.get(scheduler, {"gamma": 0.5}),
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.mark.parametrize("form", SWAPS)
def test_new_parameters_are_trained_and_their_rate_follows_the_schedule(form, tmp_path):
    swap, weights = SWAPS[form]
    cli = NormCLI(["fit", "--config", config_file(tmp_path, swap)], save_config_callback=None)
    layer = cli.model.net[1]
    assert layer.mean_weight.shape == (weights,)
    assert (layer.mean_weight - 1).abs().max() > 0
    (group,) = cli.trainer.optimizers[0].param_groups
    assert all(sum(p is q for q in group["params"]) == 1 for p in cli.model.parameters())
    assert group["lr"] == 0.1 * 0.5**2
    torch.testing.assert_close(layer.importance()["mean"].sum(), torch.tensor(1.0))


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_groups_of_their_own_follow_the_schedule_and_a_resume(scheduler, tmp_path):
    """The rates are those of the scheduler on one group, times the scale; a resumed run ends as the other did."""
    swap = {"norm": "sn", "norm_weight_decay": 0.3, "switch_lr_scale": 0.1}
    path = config_file(
        tmp_path, swap, scheduler=scheduler, max_epochs=3, enable_checkpointing=True, default_root_dir=str(tmp_path)
    )
    cli = NormCLI(["fit", "--config", path], save_config_callback=None)
    rest, norm, switch = cli.trainer.optimizers[0].param_groups
    assert [g["weight_decay"] for g in (rest, norm, switch)] == [0, 0.3, 0.3]
    assert [len(g["params"]) for g in (rest, norm, switch)] == [2, 2, 2]

    one = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    alone = getattr(torch.optim.lr_scheduler, scheduler)(
        one, **{**SCHEDULERS[scheduler], **({"lr_lambda": halved} if scheduler == "LambdaLR" else {})}
    )
    for _ in range(3):  # an epoch each: the command line's default
        one.step(), alone.step()
    assert [g["lr"] for g in (rest, norm, switch)] == pytest.approx(
        [s * one.param_groups[0]["lr"] for s in (1, 1, 0.1)]
    )

    folder = {"enable_checkpointing": True, "default_root_dir": str(tmp_path / "cut")}
    cut = config_file(tmp_path, swap, scheduler=scheduler, max_epochs=2, **folder)
    first = NormCLI(["fit", "--config", cut], save_config_callback=None)
    saved = first.trainer.checkpoint_callback.best_model_path
    path = config_file(tmp_path, swap, scheduler=scheduler, max_epochs=3)
    resumed = NormCLI(["fit", "--config", path, "--ckpt_path", saved], save_config_callback=None)
    assert all(torch.equal(v, resumed.model.state_dict()[k]) for k, v in cli.model.state_dict().items())


def test_a_key_as_class_path_is_answered_with_what_to_type(tmp_path, capfd):
    """On the command line; in a file the key is enough."""
    options = ["--trainer.callbacks+=NormSwap", "--trainer.callbacks.norm={class_path: sn, init_args: {sparse: true}}"]
    with pytest.raises(SystemExit):
        NormCLI(["fit", "--config", config_file(tmp_path, {"norm": "sn"}), *options])
    assert "Type norm: sn with norm_args: {...}, or class_path: lightning_norm.SwitchableNorm" in capfd.readouterr().err


def test_layers_built_after_the_optimizer_stop_the_run(tmp_path):
    """Lightning trains nothing that ``setup`` builds under an ``optimizer:`` section, and says nothing; we do."""
    with pytest.raises(OptimizerError, match=r"in no optimizer \(first: built.1.weight"):
        NormCLI(
            ["fit", "--config", config_file(tmp_path, {"norm": "sn"}, "LateWithoutOptimizer")],
            save_config_callback=None,
        )


def test_rows_of_contexts_take_the_place_of_what_the_optimizer_held(tmp_path):
    context = {"class_path": "NormContext", "init_args": {"context_fn": "tests.callbacks.test_norm_context.by_sign"}}
    swap = {"norm": "cn", "norm_args": {"context": "ids"}}
    cli = NormCLI(["fit", "--config", config_file(tmp_path, swap, more=[context])], save_config_callback=None)
    layer = cli.model.net[1]
    assert not torch.equal(layer.bias[0], layer.bias[1])
    (group,) = cli.trainer.optimizers[0].param_groups
    assert all(sum(p is q for q in group["params"]) == 1 for p in cli.model.parameters())
