"""Each private name of others that ``lightning_private.py`` reads is still there and means what it is read for."""

import ast
import inspect
import pathlib

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary

from lightning_norm.callbacks import lightning_private
from lightning_norm.callbacks.lightning_private import (
    averaged_model,
    event_writer,
    fresh_training_loader,
    logs_hyperparameters,
    starts_processes,
    synchronizes_batchnorm,
    tag_prefix,
)
from tests.callbacks.toy import Net, loader, trainer

ROOT = inspect.getfile(lightning_private).rpartition("callbacks")[0]


@pytest.mark.parametrize(
    ("strategy", "starts"), [("ddp", False), ("ddp_spawn", True), ("ddp_notebook", True), ("auto", False)]
)
def test_strategies_that_start_processes(strategy, starts):
    runner = Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, enable_checkpointing=False)
    assert starts_processes(runner) is starts


@pytest.mark.parametrize("on", [True, False])
def test_synchronized_batchnorm(on):
    runner = trainer(strategy="ddp", devices=2, sync_batchnorm=on)
    assert synchronizes_batchnorm(runner) is on


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
def test_averaged_models():
    seen = []

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(averaged_model(trainer.callbacks[0]))

    trainer(EMAWeightAveraging(), Look()).fit(Net(), loader())
    assert seen[0].module.net[1].weight.shape == (6,)
    swa = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    trainer(swa, max_epochs=2).fit(Net(), loader())
    assert averaged_model(swa).net[1].weight.shape == (6,)


def test_training_data_is_combined_as_the_training_combines_it():
    seen = []

    class Two(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["a"]) + self.loss(batch["b"])

        def on_train_start(self):
            fresh = fresh_training_loader(self.trainer)
            assert all(a is not b for a, b in zip(fresh.flattened, self.trainer.train_dataloader.values(), strict=True))
            seen.extend(sorted(batch) for batch, _, _ in fresh)

    trainer().fit(Two(), {"a": loader(8), "b": loader(16)})
    assert seen == [["a", "b"]] * 4  # the longer one, the shorter one starting again


def test_tensorboard_logger(tmp_path):
    assert tag_prefix(TensorBoardLogger(tmp_path)) == ""
    logger = TensorBoardLogger(tmp_path, prefix="run", default_hp_metric=False)
    assert tag_prefix(logger) == "run-"
    event_writer(logger).add_summary(Summary(value=[Summary.Value(tag="a", simple_value=1.0)]), 0)
    logger.finalize("success")
    assert list(tmp_path.rglob("events.*"))


@pytest.mark.parametrize("on", [True, False])
def test_logged_hyperparameters(on):
    class Saved(Net):
        def __init__(self, lr=0.1):
            super().__init__()
            self.save_hyperparameters(logger=on)

    class Data(LightningDataModule):
        def __init__(self, size=1):
            super().__init__()
            self.save_hyperparameters(logger=on)

    assert logs_hyperparameters(Saved()) is on
    assert logs_hyperparameters(Data()) is on


def test_no_other_file_of_callbacks_and_plugins_reads_a_private_name():
    for path in sorted(pathlib.Path(ROOT).rglob("*.py")):
        if path.relative_to(ROOT).parts[0] not in ("callbacks", "plugins") or path.name == "lightning_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert ast.unparse(node.value) == "self", f"{path.name}:{node.lineno} {ast.unparse(node)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                private = [n for n in names for part in n.split(".") if part.startswith("_") and n != "__future__"]
                assert not private, f"{path.name}:{node.lineno} imports {private}"


def test_only_one_file_imports_lightning():
    for path in sorted(pathlib.Path(ROOT).rglob("*.py")):
        if path.relative_to(ROOT).parts[0] in ("callbacks", "plugins") and not path.name.startswith("lightning_"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith(("lightning.", "pytorch_lightning")), path
                if isinstance(node, ast.Import):
                    assert not any(a.name.startswith(("lightning.", "pytorch_lightning")) for a in node.names), path
