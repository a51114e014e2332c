"""Subclasses of torch's layers: taken where they compute what their base does, refused with the reason otherwise."""

import copy
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_norm
from lightning_norm import LeftAloneWarning, NoEffectWarning, is_norm, swap
from lightning_norm.surgery.whole import Whole, read


class NormAct(nn.BatchNorm2d):
    """As timm's, under another name and with the children registered the other way round."""

    def __init__(self, c, act=None):
        super().__init__(c)
        self.act = nn.SiLU() if act is None else act
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class BitGroupNormActivation(nn.GroupNorm):
    """As transformers'."""

    def __init__(self, c):
        super().__init__(2, c)
        self.activation = nn.ReLU()

    def forward(self, x):
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.activation(x)


class PermutingLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


class EmptyBatches(nn.BatchNorm2d):
    """As detectron2's and mmcv's: does what its base does wherever that does anything."""

    def forward(self, x):
        return super().forward(x) if x.numel() else x


class Twice(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Gate(nn.BatchNorm2d):
    def __init__(self, c):
        super().__init__(c)
        self.gate = nn.Parameter(torch.ones(c))  # computes what BatchNorm does, until it is trained

    def forward(self, x):
        return super().forward(x * self.gate.view(1, -1, 1, 1))


class Counting(nn.BatchNorm2d):
    def __init__(self, c):
        super().__init__(c)
        self.register_buffer("seen", torch.zeros(()))


class Before(nn.BatchNorm2d):
    def __init__(self, c):
        super().__init__(c)
        self.act = nn.ReLU()

    def forward(self, x):
        return super().forward(self.act(x))


class SplitBatchNorm(nn.BatchNorm2d):
    """As lightly's: parts of the batch by themselves in training."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return torch.cat([nn.BatchNorm2d.forward(self, part) for part in x.chunk(4)])


class GhostBatchNorm(nn.BatchNorm1d):
    """As pytorch-tabnet's, in one class."""

    def forward(self, x):
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in x.split(128)])


class FiveD(nn.BatchNorm2d):
    """As spikingjelly's: (T, N, C, H, W)."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Momentum(nn.BatchNorm2d):
    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.running_mean.mul_(0.5)
        return y


class Tuple(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x), x


class ZeroStart(nn.BatchNorm2d):
    """At its start both are 0."""

    def __init__(self, c):
        super().__init__(c)
        nn.init.zeros_(self.weight)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, 3 * self.weight, self.bias, self.training)


class Unknown(nn.BatchNorm2d):
    def __init__(self, c):
        super().__init__(c)
        self.register_forward_pre_hook(lambda *_: calls.append(1))

    def forward(self, x):
        torch.rand(3)
        return super().forward(x)


calls = []
Fake = type("BatchNorm2d", (nn.BatchNorm2d,), {"forward": lambda self, x: nn.BatchNorm2d.forward(self, x) + 1})


class PyGBatchNorm(nn.Module):
    """As torch_geometric's: a wrapper that holds torch's."""

    def __init__(self, c):
        super().__init__()
        self.module = nn.BatchNorm1d(c)

    def forward(self, x):
        return self.module(x)


def randomized(model):
    torch.manual_seed(0)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if t.is_floating_point():
            t.data.copy_(torch.rand_like(t) + 0.5 if "var" in name else torch.randn_like(t))
    return model


TAKEN = {
    "act and drop": (lambda: NormAct(6), "bn", (4, 6, 5, 4), None),
    "no act": (lambda: NormAct(6, nn.Identity()), "bn", (4, 6, 5, 4), None),
    "parameters of act": (lambda: NormAct(6, nn.PReLU(6)), "bn", (4, 6, 5, 4), None),
    "group norm": (
        lambda: BitGroupNormActivation(6),
        {"class_path": "gn", "init_args": {"num_groups": 2}},
        (4, 6, 5, 4),
        "GroupNorm",
    ),
    "empty batches": (lambda: EmptyBatches(6), "bn", (4, 6, 5, 4), None),
    "a wrapper": (lambda: PyGBatchNorm(6), "bn", (8, 6), None),
    "no forward": (lambda: type("Mine", (nn.BatchNorm3d,), {})(6), "bn", (4, 6, 3, 4, 5), None),
    "1d": (lambda: type("Mine", (nn.BatchNorm1d,), {})(6), "bn", (4, 6), None),
    "instance norm": (
        lambda: type("Mine", (nn.InstanceNorm2d,), {})(6, affine=True),
        "in",
        (4, 6, 5, 4),
        "InstanceNorm",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_taken(case):
    make, norm, shape, source = TAKEN[case]
    model, x = randomized(nn.Sequential(nn.Identity(), make())).eval(), torch.randn(shape)
    want, state, before = model(x), copy.deepcopy(model.state_dict()), model[1]
    report = swap(model, norm, source=source)
    assert len(report) == report.candidates == 1
    assert report.layers[0].preserves_eval, report
    torch.testing.assert_close(model(x), want)
    assert model.state_dict().keys() >= state.keys()
    report.undo()
    assert model[1] is before
    assert torch.equal(model(x), want)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_layer_norm_of_images():
    model = randomized(nn.Sequential(PermutingLayerNorm(6)))
    assert read(model[0]) == Whole(nn.LayerNorm, channel_dim=1)
    assert read(type("Mine", (nn.LayerNorm,), {})(6)) == Whole(nn.LayerNorm, channel_dim=-1)
    report = swap(model, "ln", source="LayerNorm")
    assert model(torch.randn(2, 6, 4, 5)).shape == (2, 6, 4, 5)
    assert not report.layers[0].preserves_eval


REFUSED = {
    Twice: "its own forward, outputs differ by",
    Gate: "it holds gate beside the tensors of BatchNorm2d",
    Counting: "it holds seen beside the tensors of BatchNorm2d",
    Before: "its own forward, outputs differ by",
    SplitBatchNorm: "its own forward, outputs differ by .* in training",
    GhostBatchNorm: "its own forward, outputs differ by .* in training",
    FiveD: r"raises on an input \(\d+, 6, 3, 2\): expected 4D input",
    Momentum: "its own forward, running statistics differ by .* in training",
    Tuple: "it returns a tuple",
    ZeroStart: "its own forward, outputs differ by",
    Fake: r"1 [a-z_.]*test_whole.BatchNorm2d \(0\): its own forward, outputs differ by 1 from those of",
}


@pytest.mark.parametrize("cls", REFUSED, ids=lambda c: c.__name__)
def test_refused(cls):
    model = nn.Sequential(cls(6), nn.BatchNorm2d(6))
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.warns(LeftAloneWarning, match=f"(?s){REFUSED[cls]}") as caught:
        report = swap(model, "sn")
    assert len(caught) == 1
    assert (len(report), type(model[0])) == (1, cls)
    assert "left alone  1 " in report.summary()
    report.undo()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.warns(NoEffectWarning, match="it holds|its own forward"):  # also where its name is typed
        assert not len(swap(model, "bn", include="0", source=cls))


def test_measuring_calls_no_hook_and_moves_nothing():
    model = nn.Sequential(Unknown(6))
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = swap(model, "bn")
    assert (len(report), calls) == (1, [])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    model(torch.randn(2, 6, 4, 4))
    assert calls == [1]


def test_a_forward_of_the_instance():
    module = nn.BatchNorm2d(6)
    module.forward = types.MethodType(nn.BatchNorm2d.forward, module)
    assert len(swap(nn.Sequential(module), "bn")) == 1
    # A closure over the layer runs the layer itself, also where a copy of it is asked.
    module = nn.BatchNorm2d(6)
    module.forward = lambda x: nn.BatchNorm2d.forward(module, x) + 1
    state = copy.deepcopy(module.state_dict())
    with pytest.warns(NoEffectWarning, match="its own forward, outputs differ by"):
        assert not len(swap(nn.Sequential(module), "bn"))
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_parametrized_and_meta():
    class Positive(nn.Module):
        def forward(self, w):
            return w.abs()

    model = nn.Sequential(nn.BatchNorm2d(6))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Positive())
    with pytest.warns(NoEffectWarning, match="is parametrized.* Type .*remove_parametrizations"):
        swap(model, "sn")
    with pytest.warns(NoEffectWarning, match="cannot be measured on the meta device"):
        swap(nn.Sequential(Twice(6).to("meta")), "sn")


def test_one_line_per_class():
    model = nn.Sequential(
        nn.BatchNorm2d(6), *[Twice(6) for _ in range(3)], nn.GroupNorm(2, 6), nn.GroupNorm(3, 6), nn.RMSNorm(6)
    )
    with pytest.warns(LeftAloneWarning, match="leaves 6 normalization layers alone: 3 Twice"):
        report = swap(model, "sn")
    left = [line for line in report.summary().splitlines() if "left alone" in line]
    assert len(left) == 3
    assert "2 GroupNorm (first: 4): source='GroupNorm' includes it" in left[1]
    assert len(report.to_dict()["skipped"]) == 6
    report.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap(
            nn.Sequential(model[0], *model[4:]), "sn", source="BatchNorm"
        )  # whoever names the kinds has left out the others


def test_norm_swap_warns_once():
    from tests.callbacks.toy import Net, loader, trainer

    model = Net()
    model.net.append(nn.GroupNorm(2, 6))
    with pytest.warns(LeftAloneWarning, match=r"1 GroupNorm \(net.3\)") as caught:
        trainer(lightning_norm.NormSwap("sn")).test(model, loader())
    assert len([w for w in caught if w.category is LeftAloneWarning]) == 1


def test_fold_leaves_subclasses_and_their_activation():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), randomized(NormAct(6))).eval()
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    report = lightning_norm.fold(model, x)
    torch.testing.assert_close(model(x), want)
    assert "swap it to 'bn' first" in str(report)
    swap(model, "bn")
    assert lightning_norm.fold(model, x).names("folded") == ["1"]
    torch.testing.assert_close(model(x), want)


NORMS = [
    nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.LazyBatchNorm1d(), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4),
    nn.InstanceNorm1d(4), nn.LocalResponseNorm(2), NormAct(4), lightning_norm.create("sn", 4),
    type("LlamaRMSNorm", (nn.Module,), {})(), type("EvoNorm2dS0", (nn.Module,), {})(),
]  # fmt: skip
OTHERS = [
    nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4)), PyGBatchNorm(4), nn.Identity(),
    type("Normalize", (nn.Module,), {})(), nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
]  # fmt: skip


@pytest.mark.parametrize("module", NORMS + OTHERS, ids=lambda m: type(m).__name__)
def test_is_norm(module):
    assert is_norm(module) == any(module is m for m in NORMS)
    assert not any(is_norm(m) for m in nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)).modules())


class ChannelsFirst(nn.Module):
    """As the LayerNorm of ConvNeXt's authors: no base of torch's, channels on axis 1."""

    def __init__(self, c, scale=1.0):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.normalized_shape, self.scale, self.eps = (c,), scale, 1e-6

    def forward(self, x):
        y = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + self.eps).sqrt()
        return self.weight[:, None, None] * y * self.scale + self.bias[:, None, None]


class Tokens(ChannelsFirst):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class EvolvedNorm(ChannelsFirst):
    """As EvoNorm, FilterResponseNorm with a threshold, or InplaceABN: an activation that is no module."""

    def forward(self, x):
        return torch.maximum(super().forward(x), self.bias[:, None, None])


@pytest.mark.parametrize(("kind", "dim"), [(ChannelsFirst, 1), (Tokens, -1)])
def test_the_channel_axis_of_a_class_of_no_base_is_found_by_trial(kind, dim):
    model = nn.Sequential(kind(8))
    assert len(swap(model, "gn", source=kind.__name__)) == 1
    assert model[0].channel_dim == dim


def test_a_class_of_no_base_that_holds_an_activation_is_left():
    model = nn.Sequential(EvolvedNorm(8))
    with pytest.warns(NoEffectWarning, match="does more than normalize"):
        report = swap(model, "gn", source="EvolvedNorm")
    assert not len(report)
    assert type(model[0]) is EvolvedNorm
    model.append(nn.BatchNorm2d(8))
    with pytest.warns(LeftAloneWarning, match="does more than normalize"):  # and no hint to ask for it
        swap(model, "gn")


class Scaled(nn.BatchNorm2d):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Gated(nn.Module):
    """As transformers' gated norms, which derive from none of torch's."""

    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(c))

    def forward(self, x, gate=None):
        y = F.rms_norm(x, x.shape[-1:], self.weight)
        return y if gate is None else y * F.silu(gate)


@pytest.mark.parametrize(("layer", "beside"), [(Scaled(4), "scale"), (Gated(4), "gate")])
def test_a_forward_with_more_than_the_input_is_refused(layer, beside):
    """With its default it computes what its base does, and with another value it does not."""
    model = nn.Sequential(layer)
    with pytest.warns(NoEffectWarning, match=f"its forward takes {beside} beside the input"):
        swap(model, "sn", source=type(layer).__name__)
    assert model[0] is layer


def of_jit(net, x):
    return torch.jit.trace(net, x)


def of_script(net, x):
    return torch.jit.script(net)


def of_export(net, x):
    return torch.export.export(net, (x,)).module()


def of_unflatten(net, x):
    return torch.export.unflatten(torch.export.export(net, (x,)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [of_jit, of_script, of_export, of_unflatten])
def test_no_hint_leads_into_a_program_of_torch(make):
    """Such a program keeps BatchNorm's tensors in modules of another class, and calls none of these modules."""
    program = make(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 5, 5))
    (_, kind, why), *_ = swap(program, "sn").others
    assert why.endswith("swap the network that this was made from")
    assert (
        len(swap(program, "sn", source=kind)) == 0
    )  # it names no class to type, and typing it all the same is no error
