"""Checkpoints of swapped networks through a real Trainer: written, read, resumed, refused."""

import copy
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

import lightning_norm
from lightning_norm import CheckpointError, MomentNorm, NormSwap, load_from_checkpoint
from lightning_norm.callbacks.patching import Patch
from tests.callbacks.toy import LateNet, Net, loader, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:The dirpath has changed", "ignore:Checkpoint directory"
)


class HNet(LateNet):
    """With hyper-parameters, and something of its own in the checkpoint."""

    def __init__(self, channels=6, eps=1e-5):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels, eps=eps), nn.ReLU(inplace=True))
        self.loaded_entry = None

    def setup(self, stage=None):
        pass

    def configure_model(self):
        if self.late is None:
            channels = self.hparams.channels
            self.built = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6))
            self.late = nn.BatchNorm2d(6)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 7

    def on_load_checkpoint(self, checkpoint):
        self.loaded_entry = checkpoint["mine"]


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def fit(model, *callbacks, tmp_path, epochs=1, name="last", ckpt_path=None, **save):
    saver = ModelCheckpoint(tmp_path, filename=name, save_top_k=-1, enable_version_counter=False, **save)
    runner = trainer(*callbacks, saver, max_epochs=epochs, enable_checkpointing=True, tmp_path=tmp_path)
    runner.fit(model, loader(), ckpt_path=ckpt_path)
    return runner, str(tmp_path / f"{name}.ckpt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A trained sn network's file, and a trained plain network's, both with their models."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("files")
    swapped, plain = HNet(channels=5), HNet(channels=5)
    _, sn = fit(swapped, NormSwap("sn", norm_args={"momentum": 0.2}), tmp_path=folder, name="sn")
    _, bn = fit(plain, tmp_path=folder, name="plain")
    return {"sn": (sn, swapped), "plain": (bn, plain)}


class TestManifest:
    def test_is_plain_and_says_everything(self, files):
        path, _ = files["sn"]
        checkpoint = torch.load(path, weights_only=True)
        manifest = checkpoint["lightning_norm"]
        assert manifest["version"] == lightning_norm.__version__
        assert [row["name"] for row in manifest["layers"]] == ["net.1", "built.1", "late"]
        row = manifest["layers"][0]
        assert row["norm"] == {"class_path": "sn", "init_args": {"momentum": 0.2}}
        assert (row["source"], row["target"], row["num_features"]) == ("BatchNorm2d", "SwitchableNorm", 5)
        assert row["options"] == {"sync": True, "sync_group": "world", "backend": "auto", "compile": False}
        assert checkpoint["mine"] == 7

    def test_is_in_weights_only_files_and_in_files_of_other_moments(self, tmp_path):
        class Stop(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                raise ZeroDivisionError

        runner, path = fit(HNet(), NormSwap("sn"), tmp_path=tmp_path, save_weights_only=True)
        assert len(torch.load(path)["lightning_norm"]["layers"]) == 3
        paths = [path]
        for name, weights_only in (("after.ckpt", False), ("after_weights.ckpt", True)):
            paths.append(str(tmp_path / name))
            runner.save_checkpoint(paths[-1], weights_only=weights_only)
        saving = {"save_on_exception": True, "save_weights_only": True}
        with pytest.raises(ZeroDivisionError):
            fit(HNet(), NormSwap("sn"), Stop(), tmp_path=tmp_path, name="broken", **saving)
        paths.append(str(tmp_path / "broken.ckpt"))
        for path in paths:
            assert load_from_checkpoint(HNet, path).late.mean_weight.shape == (3,), path

    def test_shared_layers_and_training_options(self, tmp_path):
        class Shared(HNet):
            def __init__(self):
                super().__init__()
                self.twin = self.net[1]

        _, path = fit(Shared(), NormSwap("bcn", sync=False, backend="eager"), tmp_path=tmp_path)
        row = torch.load(path)["lightning_norm"]["layers"][0]
        assert (row["name"], row["also"]) == ("net.1", ["twin"])
        model = load_from_checkpoint(Shared, path)
        assert model.net[1] is model.twin
        assert (model.twin.sync, model.twin.backend) == (False, "eager")

    def test_nothing_is_written_where_nothing_is_swapped(self, files, tmp_path):
        assert "lightning_norm" not in torch.load(files["plain"][0])
        swap, model = NormSwap("sn"), HNet()
        runner, _ = fit(model, swap, tmp_path=tmp_path)
        swap.report.undo()
        runner.save_checkpoint(tmp_path / "undone.ckpt")
        assert "lightning_norm" not in torch.load(tmp_path / "undone.ckpt")

    def test_the_module_can_be_copied_and_pickled_during_the_fit(self, tmp_path):
        class Copy(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                assert isinstance(pl_module.on_save_checkpoint, Patch)
                for twin in (copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))):
                    assert twin.on_save_checkpoint.target is twin
                    assert twin.on_load_checkpoint.target is twin
                    checkpoint = {}
                    twin.on_save_checkpoint(checkpoint)
                    assert checkpoint["mine"] == 7
                    assert len(checkpoint["lightning_norm"]["layers"]) == 3

        model = HNet()
        fit(model, NormSwap("sn"), NormSwap("sn", source="BatchNorm"), Copy(), tmp_path=tmp_path)
        hooks = {"on_save_checkpoint", "on_load_checkpoint", "configure_model", "configure_optimizers"}
        assert not hooks & set(model.__dict__)

    def test_a_hook_that_was_on_the_instance_is_called_and_comes_back(self, tmp_path):
        model, seen = HNet(), []
        model.on_save_checkpoint = custom = seen.append
        fit(model, NormSwap("sn"), tmp_path=tmp_path)
        assert len(seen) == 1
        assert model.__dict__["on_save_checkpoint"] is custom

    def test_exceptions_leave_no_hook(self):
        class Broken(HNet):
            def training_step(self, batch, batch_idx):
                raise ZeroDivisionError

        model = Broken()
        with pytest.raises(ZeroDivisionError):
            trainer(NormSwap("sn")).fit(model, loader())
        assert not {"on_save_checkpoint", "on_load_checkpoint"} & set(model.__dict__)


class TestLoadFromCheckpoint:
    def test_rebuilds_and_loads_strictly(self, files):
        path, model = files["sn"]
        loaded = load_from_checkpoint(HNet, path)
        same_state(loaded, model)
        assert loaded.hparams.channels == 5
        assert loaded.net[1].momentum == 0.2
        assert loaded.loaded_entry == 7
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(loaded.eval()(x), model.eval()(x))
        assert not isinstance(vars(HNet)["on_load_checkpoint"], Patch)
        assert vars(HNet)["on_load_checkpoint"].__name__ == "on_load_checkpoint"
        with pytest.raises(RuntimeError, match="Unexpected key"):  # the class is as it was: Lightning's own still fails
            HNet.load_from_checkpoint(path)

    def test_arguments_win_over_the_saved_ones(self, files, tmp_path):
        loaded = load_from_checkpoint(HNet, files["sn"][0], map_location="cpu", eps=0.5)
        assert (loaded.hparams.eps, loaded.net[1].eps) == (0.5, 0.5)
        hparams = tmp_path / "hparams.yaml"
        hparams.write_text("channels: 5\neps: 0.25\n")
        assert load_from_checkpoint(HNet, files["sn"][0], hparams_file=hparams).net[1].eps == 0.25

    def test_of_a_base_class_without_hooks(self, tmp_path):
        class Custom(Net):
            pass

        model = Custom()
        _, path = fit(model, NormSwap("gn", norm_args={"num_groups": 2}), tmp_path=tmp_path)
        loaded = load_from_checkpoint(Custom, path)
        assert loaded.net[1].num_groups == 2
        same_state(loaded, model)
        assert "on_load_checkpoint" not in vars(Custom)

    def test_plain_stays_plain(self, files):
        path, model = files["plain"]
        loaded = load_from_checkpoint(HNet, path)
        assert type(loaded.late) is nn.BatchNorm2d
        same_state(loaded, model)

    def test_a_module_that_swaps_itself(self, tmp_path):
        class Custom(Net):
            def __init__(self):
                super().__init__()
                lightning_norm.swap(self, "sn")

        model = Custom()
        _, path = fit(model, tmp_path=tmp_path)  # no NormSwap: the layers' own metadata
        same_state(load_from_checkpoint(Custom, path), model)
        same_state(load_from_checkpoint(Net, path), model)

    def test_layers_swapped_twice(self, tmp_path):
        model = Net()
        lightning_norm.swap(model, "sn", norm_args={"momentum": 0.3})
        fit(model, NormSwap("bcn", source="sn"), tmp_path=tmp_path)
        loaded = load_from_checkpoint(Net, tmp_path / "last.ckpt")
        same_state(loaded, model)
        assert loaded.net[1].momentum == 0.3

    def test_compiled_names(self, files, tmp_path):
        model = HNet()
        model.net[1] = torch.compile(model.net[1], backend="eager")
        model.net = torch.compile(model.net, backend="eager")
        _, path = fit(model, NormSwap("sn"), tmp_path=tmp_path)
        checkpoint = torch.load(path)
        assert "net._orig_mod.1._orig_mod.mean_weight" in checkpoint["state_dict"]
        assert checkpoint["lightning_norm"]["layers"][0]["name"] == "net.1"
        loaded = load_from_checkpoint(HNet, path)
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
        again = HNet()
        again.net = torch.compile(again.net, backend="eager")
        trainer(NormSwap("sn")).test(again, loader(), ckpt_path=path)
        assert torch.equal(again.net._orig_mod[1].mean_weight, loaded.net[1].mean_weight)

    def test_class_that_is_not_imported(self, tmp_path):
        class OnlyHere(MomentNorm):
            def algebra(self, m):
                b = self.track(m.over_batch())
                return self.standardize(b.mean, b.var)

        model = Net()
        lightning_norm.swap(model, OnlyHere)
        _, path = fit(model, tmp_path=tmp_path)
        same_state(load_from_checkpoint(Net, path), model)
        checkpoint = torch.load(path)
        checkpoint["state_dict"]._metadata["net.1"]["lightning_norm"]["norm"]["class_path"] = "os.path"
        torch.save(checkpoint, path)
        with pytest.raises(CheckpointError, match="'os.path', which is not imported"):
            load_from_checkpoint(Net, path)

    def test_of_another_module(self, files, tmp_path):
        _, path = fit(Net(), NormSwap("sn"), tmp_path=tmp_path)

        class Without(Net):
            def __init__(self):
                super().__init__()
                self.net[1] = nn.Identity()

        with pytest.raises(CheckpointError, match="sn at 'net.1' in place of a BatchNorm2d, and this Without has"):
            load_from_checkpoint(Without, path)

    def test_without_a_manifest(self, tmp_path):
        model = Net()
        lightning_norm.swap(model, "sn")
        runner = trainer()
        runner.fit(model, loader())
        path = tmp_path / "old.ckpt"
        runner.save_checkpoint(path)
        checkpoint = torch.load(path)
        checkpoint["state_dict"] = dict(checkpoint["state_dict"])  # no metadata
        torch.save(checkpoint, path)
        with pytest.raises(CheckpointError, match="holds 'net.1.mean_weight' of 'sn', and neither says"):
            load_from_checkpoint(Net, path)

    def test_of_a_later_version(self, files, tmp_path):
        checkpoint = torch.load(files["sn"][0])
        checkpoint["lightning_norm"]["format"] = 2
        torch.save(checkpoint, tmp_path / "later.ckpt")
        with pytest.raises(CheckpointError, match="format 2.*Update lightning_norm"):
            load_from_checkpoint(HNet, tmp_path / "later.ckpt")


class TestResume:
    def test_equals_the_run_that_was_not_interrupted(self, tmp_path):
        torch.manual_seed(3)
        whole = HNet()
        start = copy.deepcopy(whole)
        torch.manual_seed(4)  # the layers of configure_model
        fit(whole, NormSwap("sn"), tmp_path=tmp_path, epochs=2, name="whole")
        torch.manual_seed(4)
        fit(start, NormSwap("sn"), tmp_path=tmp_path, name="half")
        resumed = HNet()
        runner, _ = fit(
            resumed, NormSwap("sn"), tmp_path=tmp_path, epochs=2, name="more", ckpt_path=str(tmp_path / "half.ckpt")
        )
        assert runner.global_step == 4
        same_state(resumed, whole)

    @pytest.mark.parametrize("stage", ["test", "validate", "predict"])
    def test_other_stages_without_fit(self, stage, files):
        path, model = files["sn"]
        fresh = HNet(channels=5)
        getattr(trainer(NormSwap("sn", norm_args={"momentum": 0.2})), stage)(fresh, loader(), ckpt_path=path)
        same_state(fresh, model)
        assert not {"on_save_checkpoint", "on_load_checkpoint"} & set(fresh.__dict__)

    def test_the_checkpoint_is_a_plan(self, files):
        path, model = files["sn"]
        fresh = HNet(channels=5)
        trainer(NormSwap(plan=path)).test(fresh, loader(), ckpt_path=path)
        same_state(fresh, model)
        with pytest.raises(ValueError, match="of a network that was not swapped"):
            NormSwap(plan=files["plain"][0])


class TestRefused:
    @pytest.mark.parametrize(
        ("swap", "said"),
        [
            (NormSwap("bcn"), "net.1 is sn in the file and bcn here"),
            (NormSwap("sn"), r"net.1 \(sn\) has momentum=0.2 in the file and 0.1 here"),
            (
                NormSwap("sn", norm_args={"momentum": 0.2, "choices": ["ln", "bn"]}),
                r"net.1 \(sn\) has choices=\['in', 'ln', 'bn'\] in the file and \['ln', 'bn'\] here",
            ),
            (
                NormSwap("sn", norm_args={"momentum": 0.2}, exclude=["late"]),
                "late is sn in the file and BatchNorm2d here",
            ),
        ],
        ids=["normalizer", "number", "list", "layers"],
    )
    @pytest.mark.parametrize("stage", ["fit", "test"])
    def test_another_swap(self, stage, swap, said, files):
        path, _ = files["sn"]
        fresh = HNet(channels=5)
        before = copy.deepcopy(fresh.net[0].state_dict())
        with pytest.raises(CheckpointError, match=f"another swap: {said}.*Type NormSwap\\(plan='.*sn.ckpt'\\)"):
            getattr(trainer(copy.deepcopy(swap)), stage)(fresh, loader(), ckpt_path=path)
        assert all(torch.equal(v, fresh.net[0].state_dict()[k]) for k, v in before.items()), "loaded half-way"
        assert not {"on_save_checkpoint", "on_load_checkpoint"} & set(fresh.__dict__)

    def test_a_layer_more_than_the_file(self, tmp_path):
        _, path = fit(HNet(), NormSwap("sn", exclude=["late"]), tmp_path=tmp_path)
        with pytest.raises(CheckpointError, match="late is BatchNorm2d in the file and sn here"):
            trainer(NormSwap("sn")).test(HNet(), loader(), ckpt_path=path)

    def test_other_arguments_that_mean_the_same_are_fine(self, tmp_path):
        _, path = fit(HNet(), NormSwap("sn", norm_args={"choices": ["in", "ln", "bn"]}), tmp_path=tmp_path)
        trainer(NormSwap("sn", norm_args={"momentum": "0.1"})).test(HNet(), loader(), ckpt_path=path)

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda b: b"", "it is empty"),
            (lambda b: b[: len(b) // 2], "begins as one and breaks off after"),
            (lambda b: b[: len(b) // 2] + b"\xff" + b[len(b) // 2 + 1 :], "checksum of"),
            (lambda b: b"no checkpoint at all\n" * 20, "damaged or no file that torch.save wrote"),
        ],
        ids=["empty", "truncated", "damaged", "text"],
    )
    def test_files_that_cannot_be_read(self, damage, said, files, tmp_path):
        path = tmp_path / "bad.ckpt"
        data = Path(files["sn"][0]).read_bytes()
        assert data[len(data) // 2] != 0xFF
        path.write_bytes(damage(data))
        for call in (
            lambda: load_from_checkpoint(HNet, path),
            lambda: trainer(NormSwap("sn")).fit(HNet(), loader(), ckpt_path=path),
            lambda: trainer(NormSwap("sn")).test(HNet(), loader(), ckpt_path=str(path)),
            lambda: trainer(NormSwap("sn", warm_start=str(path))).fit(HNet(), loader()),
        ):
            with pytest.raises(CheckpointError, match=f"bad.ckpt': .*{said}"):
                call()

    def test_files_that_are_no_checkpoints(self, tmp_path):
        path = tmp_path / "other.ckpt"
        for stored, said in (([1, 2], "holds a list"), ({"a": 1}, r"holds a dict with the entries \['a'\]")):
            torch.save(stored, path)
            for call in (
                lambda: load_from_checkpoint(HNet, path),
                lambda: trainer(NormSwap("sn")).test(HNet(), loader(), ckpt_path=path),
            ):
                with pytest.raises(CheckpointError, match=f"other.ckpt' is no checkpoint: it {said}"):
                    call()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "hello")
        with pytest.raises(CheckpointError, match="a zip archive that torch.save did not write"):
            load_from_checkpoint(HNet, path)
        torch.save({"state_dict": {}, "more": pytest.approx(1)}, path)
        with pytest.raises(CheckpointError, match=r"holds objects of _pytest\..*ApproxScalar.*weights_only=False"):
            load_from_checkpoint(HNet, path)
        torch.save(HNet().state_dict(), path)
        with pytest.raises(CheckpointError, match="weights alone and was not written by a Trainer"):
            load_from_checkpoint(HNet, path)

    def test_missing_files(self):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
            load_from_checkpoint(HNet, "nowhere.ckpt")
        with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
            trainer(NormSwap("sn")).test(HNet(), loader(), ckpt_path="nowhere.ckpt")

    def test_torch_files_of_the_old_format_are_read(self, files, tmp_path):
        path = tmp_path / "old.ckpt"
        torch.save(torch.load(files["sn"][0]), path, _use_new_zipfile_serialization=False)
        same_state(load_from_checkpoint(HNet, path), files["sn"][1])


class TestPlainIntoSwapped:
    def test_as_ckpt_path_of_test(self, files, caplog):
        path, model = files["plain"]
        fresh = HNet(channels=5)
        with caplog.at_level("INFO"):
            trainer(NormSwap("bcn")).test(fresh, loader(), ckpt_path=path)
        assert "3 parameters of the normalizers (first: net.1.iota) at the starting value" in caplog.text
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x))

    def test_as_ckpt_path_of_fit_names_warm_start(self, files):
        path, _ = files["plain"]
        with pytest.raises(CheckpointError, match=r"before the swap: it has no net.1.mean_weight.*warm_start='.*plain"):
            trainer(NormSwap("sn")).fit(HNet(channels=5), loader(), ckpt_path=path)

    def test_the_optimizer_fits_where_nothing_is_added(self, files):
        path, _ = files["plain"]
        fresh = HNet(channels=5)
        runner = trainer(NormSwap("bn"), max_epochs=2)
        runner.fit(fresh, loader(), ckpt_path=path)
        assert runner.global_step == 4

    @pytest.mark.parametrize("which", ["plain", "sn"])
    def test_warm_start(self, which, files):
        path, model = files[which]
        fresh, seen = HNet(channels=5), []

        class See(Callback):
            def on_train_start(self, trainer, pl_module):
                seen.append((trainer.global_step, copy.deepcopy(pl_module.state_dict())))

        swap = NormSwap("sn", norm_args={"momentum": 0.2}, warm_start=path)
        trainer(swap, See()).fit(fresh, loader())
        step, state = seen[0]
        assert step == 0
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name
        if which == "plain":
            assert torch.equal(state["net.1.mean_weight"], torch.ones(3))
        trained = copy.deepcopy(fresh.state_dict())
        trainer(swap).test(fresh, loader())  # not read again
        assert all(torch.equal(v, trained[k]) for k, v in fresh.state_dict().items())

    def test_warm_start_that_does_not_fit(self, files, tmp_path):
        with pytest.raises(CheckpointError, match="another swap: net.1 is sn in the file and bcn here"):
            trainer(NormSwap("bcn", warm_start=files["sn"][0])).fit(HNet(channels=5), loader())
        with pytest.raises(CheckpointError, match="(?s)do not fit this HNet.*size mismatch"):
            trainer(NormSwap("bcn", warm_start=files["plain"][0])).fit(HNet(channels=6), loader())
        torch.save(HNet(channels=6).state_dict() | {"extra": torch.zeros(1)}, tmp_path / "raw.pt")
        with pytest.raises(CheckpointError, match="(?s)Unexpected key.*extra"):
            trainer(NormSwap("bcn", warm_start=str(tmp_path / "raw.pt"))).fit(HNet(), loader())

    def test_a_swapped_bn_checkpoint_loads_into_the_plain_network(self, tmp_path):
        model, plain = HNet(), HNet()
        _, path = fit(model, NormSwap("bn"), tmp_path=tmp_path)
        trainer().test(plain, loader(), ckpt_path=path)
        assert type(plain.late) is nn.BatchNorm2d
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(plain.eval()(x), model.eval()(x))


class TestAverages:
    @pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
    def test_ema(self, tmp_path):
        model = HNet()
        swap, ema = NormSwap("sn"), EMAWeightAveraging(decay=0.5)
        runner, path = fit(model, swap, ema, tmp_path=tmp_path)
        runner.save_checkpoint(tmp_path / "after.ckpt")  # its state_dict is the averaged one, without metadata
        load_from_checkpoint(HNet, tmp_path / "after.ckpt")
        checkpoint = torch.load(path)
        assert "current_model_state" in checkpoint
        loaded = load_from_checkpoint(HNet, path)
        for name, value in checkpoint["state_dict"].items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert not torch.equal(loaded.late.mean_weight, checkpoint["current_model_state"]["late.mean_weight"])
        again = HNet()
        runner, _ = fit(
            again, NormSwap("sn"), EMAWeightAveraging(decay=0.5), tmp_path=tmp_path, epochs=2, name="b", ckpt_path=path
        )
        whole = copy.deepcopy(loaded)
        assert runner.global_step == 4
        assert not torch.equal(again.late.mean_weight, whole.late.mean_weight)
        with pytest.raises(CheckpointError, match="late is sn in the file and bcn here|net.1 is sn in the file"):
            trainer(NormSwap("bcn")).test(HNet(), loader(), ckpt_path=path)

    @pytest.mark.filterwarnings("ignore:Found keys", "ignore::lightning_norm.ConflictWarning")
    def test_swa(self, tmp_path):
        class Early(Net):
            pass

        model = Early()
        _, path = fit(
            model, NormSwap("sn"), StochasticWeightAveraging(0.05, swa_epoch_start=1), tmp_path=tmp_path, epochs=2
        )
        loaded = load_from_checkpoint(Early, path)
        for name, value in torch.load(path)["state_dict"].items():
            assert torch.equal(loaded.state_dict()[name], value), name
        again = Early()
        runner, _ = fit(
            again,
            NormSwap("sn"),
            StochasticWeightAveraging(0.05, swa_epoch_start=1),
            tmp_path=tmp_path,
            epochs=3,
            name="b",
            ckpt_path=path,
        )
        assert runner.global_step == 6


def test_a_state_dict_of_plain_pytorch_says_what_it_is(tmp_path):
    from lightning_norm.surgery.manifest import manifest_in, rebuild

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    lightning_norm.swap(model, "sn", norm_args={"choices": ["ln", "bn"]})
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    again = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    rebuild(again, manifest_in({"state_dict": state}))
    assert again[1].choices == ("ln", "bn")
    again.load_state_dict(state)
