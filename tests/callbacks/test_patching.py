"""Patches call what they cover, come off in any order, and leave no trace of any callback of ours."""

import copy
import functools
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_norm import (
    NormContext,
    NormMonitor,
    NormRecalibrate,
    NormScheduler,
    NormSwap,
    NormSync,
    load_from_checkpoint,
)
from lightning_norm.callbacks.lightning_compat import is_instance
from lightning_norm.callbacks.patching import Patch, Patches, is_patched
from tests.callbacks.toy import LateNet, Net, loader, trainer

ROOT = Path(__file__).parents[2]


class Thing:
    def speak(self, word):
        return f"{type(self).__name__} {word}"

    @staticmethod
    def whisper(word):
        return word


class Child(Thing):
    pass


def loudly(original, *args):
    return f"{original(*args)}!"


def marked(thing, original, word):
    return f"{original(word)} of {thing.tag}"


class TestInstances:
    def test_calls_the_original_and_leaves_no_trace(self):
        thing, patches = Thing(), Patches()
        patches.wrap(thing, "speak", loudly)
        patches.wrap(thing, "whisper", loudly)
        assert (thing.speak("a"), thing.whisper("b"), Thing().speak("c")) == ("Thing a!", "b!", "Thing c")
        patches.undo()
        assert vars(thing) == {}

    def test_what_was_on_the_instance_is_called_and_comes_back(self):
        thing = Thing()
        thing.speak = custom = lambda word: f"own {word}"
        with Patches() as patches:
            patches.wrap(thing, "speak", loudly)
            assert thing.speak("a") == "own a!"
        assert vars(thing) == {"speak": custom}

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
    def test_owners_undo_in_any_order(self, order):
        thing, owners = Thing(), [Patches() for _ in range(3)]
        for owner in owners:
            owner.wrap(thing, "speak", loudly)
        for count, i in enumerate(order):
            assert thing.speak("a") == "Thing a" + "!" * (3 - count)
            owners[i].undo()
        assert vars(thing) == {}

    def test_a_function_that_somebody_puts_on_top_stays(self):
        thing, patches = Thing(), Patches()
        patches.wrap(thing, "speak", loudly)
        below = thing.speak
        thing.speak = lambda word: f"({below(word)})"
        patches.undo()
        assert thing.speak("a") == "(Thing a)"

    def test_an_exception_in_a_block_takes_them_off(self):
        def fails(original, word):
            raise ZeroDivisionError

        thing = Thing()
        with pytest.raises(ZeroDivisionError), Patches() as patches:
            (patches.wrap(thing, "speak", fails), thing.speak("a"))
        assert vars(thing) == {}

    def test_a_method_that_does_not_exist(self):
        with pytest.raises(AttributeError, match="sing"):
            Patches().wrap(Thing(), "sing", loudly)

    def test_lightning_finds_the_hook_overridden(self):
        model = LightningModule()
        assert not is_overridden("configure_model", model)
        with Patches() as patches:
            patches.wrap(model, "configure_model", loudly)
            assert is_overridden("configure_model", model)
        assert not is_overridden("configure_model", model)

    @pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, copy_of):
        thing = Thing()
        thing.tag = "first"
        with Patches() as patches:
            patches.wrap(thing, "speak", functools.partial(marked, thing), follows_copies=True)
            patches.wrap(thing, "whisper", loudly)
            twin = copy_of(thing)
        twin.tag = "twin"
        assert isinstance(twin.speak, Patch)
        assert twin.speak.target is twin
        assert twin.speak("a") == "Thing a of twin"
        assert twin.whisper("a") == "a"  # nobody would take this one off the copy: it only calls the original

    def test_is_patched_sees_through_partials_and_other_patches(self):
        thing = Thing()
        thing.tag = "x"
        with Patches() as patches:
            assert not is_patched(thing, "speak", marked)
            patches.wrap(thing, "speak", functools.partial(marked, thing))
            patches.wrap(thing, "speak", loudly)
            assert is_patched(thing, "speak", marked)
        assert not is_patched(thing, "speak", marked)


class TestClasses:
    def test_inherited_and_defined_methods(self):
        before = dict(vars(Thing)), dict(vars(Child))

        def around(original, instance, word):
            return f"[{original(instance, word)}]"

        with Patches() as patches:
            patches.wrap(Child, "speak", around)
            assert (Child().speak("a"), Thing().speak("a")) == ("[Child a]", "Thing a")
            patches.wrap(Thing, "speak", around)
            assert (Child().speak("a"), Thing().speak("a")) == ("[[Child a]]", "[Thing a]")
        assert (dict(vars(Thing)), dict(vars(Child))) == before


def traces(*objects):
    """What methods stand on these objects, and everything that stands on their classes, torch's and Lightning's too."""
    methods = [{k: v for k, v in vars(x).items() if inspect.isroutine(v) or isinstance(v, Patch)} for x in objects]
    for of_object, x in zip(methods, objects, strict=True):
        if is_instance(x, Callback):  # under either name of Lightning
            of_object.pop("log", None)  # Lightning attaches these two
            of_object.pop("log_dict", None)
    classes = {c: dict(vars(c)) for x in objects for c in type(x).__mro__ if c is not object}
    return methods, classes


OURS = {
    "swap": lambda: [NormSwap("sn", include=["net.1"], accumulate_statistics=True), NormSwap("bn")],
    "scheduler": lambda: [
        NormSwap("sn", {"sparse": True}),
        NormScheduler({"momentum": 0.2}),
        NormScheduler({"radius": 0.5}, "step"),
    ],
    "monitor": lambda: [NormSwap("sn"), NormMonitor(pictures=False), NormMonitor(prefix="second", pictures=False)],
    "recalibrate": lambda: [NormSwap("sn"), NormRecalibrate(2)],
    "context": lambda: [NormSwap("cn", {"num_contexts": 2}), NormContext()],
}


class Stop(Callback):
    """Raise in one hook, last of all callbacks."""

    def __init__(self, hook):
        setattr(self, hook, self.stop)

    @staticmethod
    def stop(*_, **__):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", OURS)
class TestNoTrace:
    def run(self, name, tmp_path, *more):
        model, callbacks = LateNet(), OURS[name]()
        runner = trainer(*callbacks, *more, logger=TensorBoardLogger(tmp_path), plugins=[NormSync(start_epoch=1)])
        objects = (model, runner, runner.strategy, *runner.callbacks)
        return model, runner, objects, traces(*objects)

    def test_after_a_fit_and_a_test(self, name, tmp_path):
        model, runner, objects, before = self.run(name, tmp_path)
        runner.fit(model, loader(), loader())
        assert traces(*objects) == before
        runner.test(model, loader(), verbose=False)
        assert traces(*objects) == before

    @pytest.mark.parametrize(
        "hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_start", "on_validation_batch_end"]
    )
    def test_after_an_exception(self, name, hook, tmp_path):
        model, runner, objects, before = self.run(name, tmp_path, Stop(hook))
        with pytest.raises(ZeroDivisionError):
            runner.fit(model, loader(), loader())
        assert traces(*objects) == before


def test_norm_sync():
    model, sync = LateNet(), NormSync(start_epoch=1)
    model.late = torch.nn.BatchNorm2d(6)
    before = traces(model, sync)
    sync.apply(model)
    assert traces(model, sync) != before
    sync.revert(model)
    assert traces(model, sync) == before


def test_construction_and_load_from_checkpoint_leave_no_trace(tmp_path):
    model = Net()
    runner = trainer()
    before = traces(model, runner, runner.strategy)
    callbacks = [callback for make in OURS.values() for callback in make()]
    assert traces(model, runner, runner.strategy) == before
    writer = trainer(callbacks[0])
    writer.fit(model, loader())
    writer.save_checkpoint(tmp_path / "a.ckpt")
    load_from_checkpoint(Net, tmp_path / "a.ckpt")
    assert traces(model, runner, runner.strategy) == before


def train_in_forked_processes():
    """Check that nothing is left behind; in a process without other threads, whose locks a fork would never get."""
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    before = dict(vars(_MultiProcessingLauncher))
    swap, model = NormSwap("sn"), Net()
    swap.swap_before_launch(model)
    runner = trainer(swap, strategy="ddp_fork", devices=2)
    objects = (model, runner, runner.strategy, runner.strategy.launcher, *runner.callbacks)
    methods = traces(*objects)
    runner.fit(model, loader())
    assert traces(*objects) == methods
    assert dict(vars(_MultiProcessingLauncher)) == before
    assert not torch.equal(model.net[1].mean_weight, torch.ones(3))
    assert os.environ.get("LOCAL_RANK", "0") == "0"


def test_processes_that_a_strategy_starts():
    code = "from tests.callbacks.test_patching import train_in_forked_processes as train; train()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1200)
    assert run.returncode == 0, run.stderr
