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


def config_file(folder, swap, model="WithoutOptimizer", more=()):
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
        },
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}},
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


def test_a_key_as_class_path_is_answered_with_what_to_type(tmp_path, capfd):
    with pytest.raises(SystemExit):
        NormCLI(["fit", "--config", config_file(tmp_path, {"norm": {**SPEC, "class_path": "sn"}})])
    assert "Type norm: sn with norm_args: {...}, or class_path: lightning_norm.SwitchableNorm" in capfd.readouterr().err


def test_layers_built_after_the_optimizer_stop_the_run(tmp_path):
    """Lightning trains nothing that ``setup`` builds under an ``optimizer:`` section, and says nothing; we do."""
    with pytest.raises(OptimizerError, match=r"in no optimizer \(first: built.1.weight"):
        NormCLI(
            ["fit", "--config", config_file(tmp_path, {"norm": "sn"}, "LateWithoutOptimizer")],
            save_config_callback=None,
        )


def test_rows_of_contexts_take_the_place_of_what_the_optimizer_held(tmp_path):
    context = {"class_path": "NormContext", "init_args": {"context_fn": "tests.callbacks.test_context.by_sign"}}
    swap = {"norm": "cn", "norm_args": {"context": "ids"}}
    cli = NormCLI(["fit", "--config", config_file(tmp_path, swap, more=[context])], save_config_callback=None)
    layer = cli.model.net[1]
    assert not torch.equal(layer.bias[0], layer.bias[1])
    (group,) = cli.trainer.optimizers[0].param_groups
    assert all(sum(p is q for q in group["params"]) == 1 for p in cli.model.parameters())
