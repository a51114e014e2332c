"""After the first training step: layers that were not reached, and norms that other code treats as no BatchNorm."""

import copy
import dataclasses
import functools
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

import lightning_norm
from lightning_norm import ConflictWarning, NormSwap, NotReachedWarning, WeightDecayWarning, is_norm, norm_types, swap
from tests.callbacks.toy import Net, loader, trainer


class Reached(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.build()

    def build(self):
        pass

    def forward(self, x):
        return self.bn(self.conv(x))


class Deep(Net):
    def __init__(self, layers):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), *(nn.BatchNorm2d(6) for _ in range(layers)))


@pytest.mark.parametrize("layers", [1, 9])
def test_from_the_second_step_on_nothing_is_asked_of_any_layer(layers):
    """Counted and not timed: which functions of the checks are called between the starts of two batches."""
    called, steps = [], []

    def note(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and path.endswith(("first_step.py", "surgery/reach.py")) and "tests" not in path:
            called.append(frame.f_code.co_name)

    class Counter(Callback):
        def on_train_batch_start(self, *_):
            steps.append(called.copy())
            called.clear()

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        trainer(Counter(), NormSwap("sn")).fit(Deep(layers), loader(16, 4))
    finally:
        sys.setprofile(before)
    assert len(steps[1]) > layers  # the first one has been watched
    assert steps[2] == steps[3] == ["after_backward", "before_step", "after_batch"]


class InList(Reached):
    def build(self):
        self.ops = [self.conv, self.bn]

    def forward(self, x):
        for op in self.ops:
            x = op(x)
        return x


class Nested(InList):
    def build(self):
        self.ops = [self.conv, {"n": (self.bn,)}["n"][0]]


class InDict(Reached):
    def build(self):
        self.__dict__["hidden"] = self.bn

    def forward(self, x):
        return self.hidden(self.conv(x))


class Closure(Reached):
    def build(self):
        bn = self.bn
        self.call = lambda x: bn(x)

    def forward(self, x):
        return self.call(self.conv(x))


class Partial(Closure):
    def build(self):
        self.call = functools.partial(self.bn)


class Bound(Closure):
    def build(self):
        self.call = self.bn.forward


class Functional(Reached):
    def forward(self, x):
        bn = self.bn
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)


class Unused(Reached):
    def forward(self, x):
        return self.conv(x)


class NoGradient(Reached):
    def forward(self, x):
        with torch.no_grad():
            y = self.bn(self.conv(x))
        return self.conv(x) + y


class Both(Reached):
    def build(self):
        self.twice = [self.bn]

    def forward(self, x):
        return self.twice[0](self.bn(self.conv(x)))


class Tied(Reached):
    def build(self):
        self.other = nn.Module()
        self.other.gamma = self.bn.weight

    def forward(self, x):
        return super().forward(x) * self.other.gamma.sum()


class Direct(Reached):
    """Calls the swapped layer past its hooks: it runs, and learns."""

    def forward(self, x):
        return self.bn.forward(self.conv(x))


class Frozen(Reached):
    def build(self):
        self.bn.requires_grad_(False)


MISSED = {
    InList: "the BatchNorm2d that it has replaced ran in its place",
    Nested: "the BatchNorm2d that it has replaced ran in its place",
    InDict: "the BatchNorm2d that it has replaced ran in its place",
    Closure: "the BatchNorm2d that it has replaced ran in its place",
    Partial: "the BatchNorm2d that it has replaced ran in its place",
    Both: "the BatchNorm2d that it has replaced ran as well",
    Bound: "was not called, and code that uses its tensors was",
    Functional: "was not called, and code that uses its tensors was",
    Unused: "did not run: this step does not use it",
    NoGradient: "ran, and weight, bias, mean_weight, var_weight got no gradient",
}
FINE = (Reached, Tied, Direct, Frozen)


class Job(Net):
    def __init__(self, net):
        super().__init__()
        self.net = net


def not_reached(caught):
    return [str(w.message) for w in caught if issubclass(w.category, NotReachedWarning)]


@pytest.mark.parametrize("cls", [*MISSED, *FINE], ids=lambda c: c.__name__)
def test_by_a_trainer_and_by_hand(cls):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(NormSwap("sn"), max_steps=3, max_epochs=-1).fit(Job(cls()), loader(16))
    told = not_reached(caught)
    assert len(told) == (cls in MISSED)
    assert all(
        f"1 layer of the swap learned nothing in the first training step: net.bn ({MISSED[cls]}" in t for t in told
    )

    model = cls()
    report = swap(model, "sn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        missed = report.check(model, torch.randn(4, 3, 8, 8))
    assert len(not_reached(caught)) == (cls in MISSED)
    assert missed.keys() == ({"bn"} if cls in MISSED else set())
    assert all(why.startswith(MISSED[cls]) for why in missed.values())


class Noisy(Reached):
    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(2))
        self.momentum = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.steps = nn.BatchNorm2d(6).eval()

    def forward(self, x, *, scale=1.0):
        self.queue = self.queue + 1
        with torch.no_grad():
            self.momentum += 1
        random.random()
        np.random.rand()
        return {"loss": [scale * F.dropout(self.steps(super().forward(x)))], "n": 3}


@pytest.mark.parametrize("norm", ["sn", "bn", "dbn", "ubn"])
@pytest.mark.parametrize("how", ["arguments", "function"])
def test_a_check_leaves_everything_as_it_was(norm, how):
    model = Noisy()
    report = swap(model, norm, include="bn")
    x = torch.randn(4, 3, 8, 8, requires_grad=False)
    model(x)["loss"][0].square().sum().backward()
    state, grads = copy.deepcopy(model.state_dict()), {n: p.grad for n, p in model.named_parameters()}
    copies = {n: None if g is None else g.clone() for n, g in grads.items()}
    buffers, modes = dict(model.named_buffers()), [m.training for m in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    if how == "arguments":
        assert report.check(model, x, scale=2.0) == {}
    else:
        assert report.check(model, lambda m: m(x)["loss"][0].square().mean()) == {}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(v is buffers[k] for k, v in model.named_buffers())
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    assert all(g is None or torch.equal(g, copies[n]) for n, g in grads.items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    report.undo()
    with pytest.raises(RuntimeError, match="nothing to check"):
        report.check(model, x)


def fit_silently(job, *callbacks, **kwargs):
    """Every warning is an error here."""
    trainer(NormSwap("sn"), *callbacks, **{"max_epochs": 2, **kwargs}).fit(job, loader(16))


class Manual(Job):
    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))

    def training_step(self, batch, batch_idx):
        turn = batch_idx % 2
        optimizer = self.optimizers()[turn]
        loss = (self.net, self.other)[turn](batch[0]).square().mean()
        optimizer.zero_grad()
        if turn:
            self.manual_backward(loss)
        else:
            loss.backward()
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), 0.1) for m in (self.net, self.other)]


class Alternating(Job):
    """The layer is used in every second batch of an accumulation window."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            return None
        return super().training_step(batch, batch_idx) if batch_idx % 2 else self.net.conv(batch[0]).square().mean()


class Manually(Manual):
    def training_step(self, batch, batch_idx):
        """No backward at all."""


def test_optimizers_that_take_turns():
    fit_silently(Manual(Reached()))
    job = Manual(Reached())
    job.other.forward = types.MethodType(lambda self, x, ops=list(job.other): ops[1](ops[0](x)), job.other)
    with pytest.warns(NotReachedWarning, match=r"other.1 \(the BatchNorm2d"):
        fit_silently(job)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_accumulation_and_a_skipped_batch():
    fit_silently(Alternating(Reached()), accumulate_grad_batches=2)


def test_a_run_without_a_backward_says_nothing():
    fit_silently(Manually(Reached()), limit_train_batches=2)


def test_a_second_fit_checks_again():
    swap_callback, job = NormSwap("sn"), Job(InList())
    for _ in range(2):
        with pytest.warns(NotReachedWarning):
            trainer(swap_callback).fit(job, loader())
    assert not any("FirstStep" in repr(h) for h in job.net.bn._forward_hooks.values())


class Decay(Net):
    def __init__(self, find, decays=(0.0, 0.1), evaluate=()):
        super().__init__()
        self.net.extend([nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)])
        self.find, self.decays, self.evaluate = find, decays, evaluate

    def configure_optimizers(self):
        norms = {id(p) for m in self.modules() if self.find(m) for p in m.parameters(recurse=False)}
        parts = [[p for p in self.parameters() if (id(p) in norms) == wanted] for wanted in (True, False)]
        groups = [{"params": p, "weight_decay": d} for p, d in zip(parts, self.decays, strict=True)]
        return torch.optim.SGD(groups, 0.1)

    def on_train_epoch_start(self):
        for module in self.modules():
            if isinstance(module, self.evaluate):
                module.eval()


def by_class(module):
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm))


def told(job, category, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(NormSwap("sn", **arguments), max_epochs=2).fit(job, loader())
    return [str(w.message) for w in caught if w.category is category]


def test_weight_decay_of_norms_that_a_class_does_not_find():
    (text,) = told(Decay(by_class), WeightDecayWarning, include=["net.1"])
    assert text.startswith("4 parameters of swapped layers (first: net.1.weight) in groups with weight decay, 0.1, of")
    assert "NormSwap(norm_weight_decay=0)" in text
    assert "is_norm" in text
    for job, arguments in [
        (Decay(is_norm), {}),
        (Decay(lambda m: isinstance(m, norm_types())), {}),
        (Decay(by_class), {"norm_weight_decay": 0.0}),
        (Decay(by_class), {"norm_weight_decay": 0.1}),
        (Decay(by_class, (0.1, 0.1)), {}),
        (Net(), {}),
    ]:
        assert told(job, WeightDecayWarning, **arguments) == []


def test_evaluation_by_a_hook_that_a_swap_hides_from():
    (text,) = told(Decay(is_norm, evaluate=(nn.BatchNorm2d,)), ConflictWarning, include=["net.1"])
    assert text.startswith(
        "put in evaluation one by one: 1 BatchNorm layer (first: net.4), and none of the 1 layer of this"
    )
    assert told(Decay(is_norm, evaluate=norm_types()), ConflictWarning, include=["net.1"]) == []
    assert told(Decay(is_norm, evaluate=(nn.Sequential,)), ConflictWarning, include=["net.1"]) == []
    assert told(Decay(is_norm), ConflictWarning, include=["net.1"]) == []
    assert lightning_norm.is_norm(nn.BatchNorm2d(3))


class WithoutMomentum(Decay):
    """Freezes running statistics the way that many recipes do, in a hook."""

    def __init__(self, kinds):
        super().__init__(is_norm)
        self.kinds = kinds

    def on_train_epoch_start(self):
        for module in self.modules():
            if isinstance(module, self.kinds):
                module.momentum = 0.0


def test_a_momentum_of_0_by_a_hook_that_a_swap_hides_from():
    (text,) = told(WithoutMomentum(nn.BatchNorm2d), ConflictWarning, include=["net.1"])
    assert text.startswith("given momentum=0: 1 BatchNorm layer (first: net.4), and none of the 1 layer of this")
    assert told(WithoutMomentum(norm_types()), ConflictWarning, include=["net.1"]) == []
    job = WithoutMomentum(())
    for module in (job.net[1], job.net[4]):  # before the swap, which takes it over
        module.momentum = 0.0
    assert told(job, ConflictWarning, include=["net.1"]) == []


class Frozen(Decay):
    """Freezes BatchNorm in one of the places and by one of the settings that recipes use."""

    def __init__(self, kinds, setting, place):
        super().__init__(is_norm)
        self.kinds, self.setting = kinds, setting
        setattr(self, place, self.freeze)

    def freeze(self):
        for module in self.modules():
            if isinstance(module, self.kinds):
                if self.setting == "requires_grad":
                    module.requires_grad_(False)
                else:
                    setattr(module, self.setting, 0.0 if self.setting == "momentum" else False)


@pytest.mark.parametrize("place", ["on_fit_start", "on_train_start", "on_train_epoch_start"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [("momentum", "momentum=0"), ("track_running_stats", "track_running_stats=False"), ("requires_grad",) * 2],
)
def test_frozen_by_any_setting_in_any_hook_that_a_swap_hides_from(setting, said, place):
    (text,) = told(Frozen(nn.BatchNorm2d, setting, place), ConflictWarning, include=["net.1"])
    assert text.startswith(f"given {said}")
    assert "1 BatchNorm layer (first: net.4), and none of the 1 layer of this" in text
    together = (nn.BatchNorm2d, nn.Conv2d) if setting == "requires_grad" else ()
    for kinds in (norm_types(), together):
        assert told(Frozen(kinds, setting, place), ConflictWarning, include=["net.1"]) == []
    job = Frozen((), setting, place)
    job.kinds = norm_types()
    job.freeze()  # before the swap, which takes it over
    job.kinds = ()
    assert told(job, ConflictWarning, include=["net.1"]) == []


def test_what_norm_freeze_has_chosen_by_its_name_is_no_choice_by_class():
    freeze = lightning_norm.NormFreeze(statistics=False, affine=True, include=["net.4"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(NormSwap("sn", include=["net.1"]), freeze).fit(Decay(is_norm), loader())
    assert [str(w.message) for w in caught if w.category is ConflictWarning] == []


class Slower(Net):
    """Gives BatchNorm a learning rate of its own."""

    def __init__(self, find):
        super().__init__()
        self.find = find

    def configure_optimizers(self):
        norms = {id(p) for m in self.modules() if self.find(m) for p in m.parameters(recurse=False)}
        parts = [[p for p in self.parameters() if (id(p) in norms) == wanted] for wanted in (True, False)]
        return torch.optim.SGD([{"params": parts[0], "lr": 0.01}, {"params": parts[1]}], 0.1)


def test_a_group_that_a_swap_has_emptied():
    (text,) = told(Slower(by_class), ConflictWarning)
    assert text.startswith("a SGD has an empty group of parameters (lr=0.01): code that looks for torch's class")
    assert "is_norm" in text
    assert told(Slower(is_norm), ConflictWarning) == []
    assert told(Net(), ConflictWarning) == []


def test_a_check_of_a_network_that_is_compiled_already():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    x = torch.randn(4, 3, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    report = swap(model, "sn")
    compiled(x)  # a graph that knows of no hook
    assert report.check(compiled, x) == {}


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class ReturnsAnObject(nn.Sequential):
    def forward(self, x):
        return Output(super().forward(x))


def test_a_check_of_a_network_that_returns_an_object():
    model = ReturnsAnObject(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    assert swap(model, "sn").check(model, torch.randn(4, 3, 8, 8)) == {}
