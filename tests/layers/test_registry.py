"""create(norm, num_features): what it takes, and what it says otherwise."""

import copy
import inspect
import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from lightning_norm import (
    BatchChannelNorm,
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    Normalizer,
    SwitchableNorm,
    create,
    normalizers,
    swap,
)
from lightning_norm.layers.arguments import arguments_of

KEYS = [key for key, cls in normalizers().items() if cls.__module__.startswith("lightning_norm.")]


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (["sn", "bn"], r"one normalizer is expected, got \['sn', 'bn'\]. Type rules="),
        (nn.GroupNorm, "Type 'gn' for it"),
        ("torch.nn.SyncBatchNorm", "Type 'bn' for it"),
        (nn.Linear, "write_your_own.py"),
        ({"layer4": "sn"}, r"got the entries \['layer4'\]. What becomes of which layer goes in rules="),
    ],
    ids=str,
)
def test_what_is_no_normalizer_says_what_to_type(norm, said):
    with pytest.raises(TypeError, match=said):
        create(norm, 4)


class OwnForward(Normalizer):
    """All that the base class of MomentNorm asks for."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, x):
        return x


def test_a_normalizer_that_is_no_moment_norm_is_refused():
    for use in (lambda: create(OwnForward, 6), lambda: swap(nn.Sequential(nn.BatchNorm2d(6)), OwnForward)):
        with pytest.raises(TypeError, match=r"expected a subclass of lightning_norm\.MomentNorm, got .*OwnForward"):
            use()


@pytest.mark.parametrize("key", KEYS)
def test_text_is_a_number_or_an_error(key):
    arguments = normalizers()[key].test_arguments
    assert create(key, 6, **arguments, eps="1e-3").eps == 1e-3
    with pytest.raises(ValueError, match=r"\w+: eps must be a number, got the text 'small'. Type it like 1.0e-3"):
        create(key, 6, **arguments, eps="small")
    with pytest.raises(ValueError, match=r"eps must be a number, got '1e-3'"):
        normalizers()[key](6, **arguments, eps="1e-3")


def arguments_that_take(*kinds):
    """Yield every argument of every normalizer whose annotation names one of these types."""
    for key in KEYS:
        for name, parameter in arguments_of(normalizers()[key]).items():
            if re.search(rf"\b({'|'.join(kinds)})\b", inspect.formatannotation(parameter.annotation)):
                yield key, name


def refused(key, name, value):
    cls = normalizers()[key]
    with pytest.raises((ValueError, TypeError), match=rf"{cls.__name__}\b.*\b{name}"):
        cls(**{"num_features": 6, **cls.test_arguments, name: value})


@pytest.mark.parametrize("value", [True, False, np.True_, torch.tensor(False)])
def test_a_bool_is_no_number(value):
    names = [*arguments_that_take("int", "float", r"Literal\[\d"), *arguments_that_take("Sequence")]
    assert {"kernel_size", "correction", "channel_dim", "min_count", "gate_init", "priors"} <= {n for _, n in names}
    for key, name in names:
        refused(key, name, value)


@pytest.mark.parametrize("value", ["false", "no", [], [True], None, 2.5, 1j, object(), {}, b"x", torch.ones(2)])
def test_nothing_but_a_bool_is_a_bool(value):
    for key, name in arguments_that_take("bool"):
        refused(key, name, value)


@pytest.mark.parametrize("value", ["abc", [], 1j, object(), {}, b"x", torch.ones(2), math.nan])
def test_what_is_no_number_is_refused_by_name(value):
    for key, name in arguments_that_take("int", "float"):
        if name != "priors" or not isinstance(value, list):
            refused(key, name, value)


def test_numbers_of_other_libraries():
    for key, name in arguments_that_take("int"):
        cls = normalizers()[key]
        default = cls.test_arguments.get(name, arguments_of(cls)[name].default)
        if isinstance(default, int):
            layer = cls(**{"num_features": 6, **cls.test_arguments, name: np.int64(default)})
            assert type(getattr(layer, name)) is int


@pytest.mark.parametrize(("key", "typo", "meant"), [("sn", "momentun", "momentum"), ("gn", "group", "num_groups")])
@pytest.mark.parametrize("form", ["argument", "init_args"])
def test_an_unknown_argument_names_class_and_nearest(key, typo, meant, form):
    spec, arguments = (key, {typo: 1}) if form == "argument" else ({"class_path": key, "init_args": {typo: 1}}, {})
    said = f"{normalizers()[key].__name__} takes no argument '{typo}'. Did you mean '{meant}'"
    with pytest.raises(TypeError, match=said):
        create(spec, 8, **arguments)


class TestDirectConstruction:
    """A class says the same as ``create``, and takes torch's order where torch has the class."""

    @pytest.mark.parametrize("key", KEYS)
    def test_an_unknown_argument(self, key):
        cls, more = normalizers()[key], normalizers()[key].test_arguments
        with pytest.raises(TypeError, match=f"{cls.__name__} takes no argument 'epss'. Did you mean 'eps'"):
            cls(6, **more, epss=1e-3)

    @pytest.mark.parametrize(
        ("name", "meant"),
        [("num_channels", "num_features"), ("normalized_shape", "num_features"), ("elementwise_affine", "affine")],
    )
    def test_a_name_of_torchs(self, name, meant):
        with pytest.raises(TypeError, match=f"takes no argument '{name}'. Did you mean '{meant}'"):
            create("ln", 8, **{name: 8})

    @pytest.mark.parametrize("norm", [BatchNorm, InstanceNorm])
    def test_torchs_order(self, norm):
        torchs = {BatchNorm: nn.BatchNorm2d, InstanceNorm: nn.InstanceNorm2d}[norm]
        ours, theirs = (cls(8, 1e-3, 0.2, False, True, "cpu", torch.float64) for cls in (norm, torchs))
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.running_mean.dtype == torch.float64

    def test_group_norms_order_is_refused(self):
        with pytest.raises(
            TypeError, match=r"torch's order \(num_groups, num_channels\).*GroupNorm\(8, num_groups=4\)"
        ):
            GroupNorm(4, 8)

    def test_layer_norm(self):
        layer = LayerNorm(8, 1e-3, False)
        assert (layer.eps, layer.affine) == (1e-3, False)
        with pytest.raises(ValueError, match=r"got \(8, 5, 5\).*Type LayerNorm\(8\), or use torch.nn.LayerNorm"):
            LayerNorm((8, 5, 5))

    def test_the_others_take_arguments_by_name(self):
        with pytest.raises(TypeError, match=r"Type SwitchableNorm\(8, eps=1e-05, momentum=0.1\)"):
            SwitchableNorm(8, 1e-5, 0.1)

    @pytest.mark.parametrize(
        ("cls", "arguments", "said"),
        [
            (BatchChannelNorm, {"constraint": "tanh"}, r"one of \('clamp', 'sigmoid', None\), got 'tanh'"),
            (SwitchableNorm, {"correction": 2}, r"one of \(0, 1\), got 2. Type correction=0"),
            (SwitchableNorm, {"choices": "in"}, r"choices must be a list, got 'in'. Type choices=\('in', 'ln', 'bn'\)"),
            (SwitchableNorm, {"choices": ["in", "in"]}, "distinct names out of"),
        ],
    )
    def test_a_value_that_is_none_of_the_choices(self, cls, arguments, said):
        with pytest.raises(ValueError, match=said):
            cls(8, **arguments)

    def test_torchs_helpers_still_work(self):
        assert list(inspect.signature(BatchNorm).parameters)[:3] == ["num_features", "eps", "momentum"]
        assert nn.utils.skip_init(BatchNorm, 8).weight.shape == (8,)
        assert copy.deepcopy(pickle.loads(pickle.dumps(BatchNorm(8)))).num_features == 8

    def test_a_class_of_ones_own_is_checked_as_well(self):
        class Mine(BatchNorm):
            def __init__(self, num_features: int, *, tau: float = 1.0, **options) -> None:
                super().__init__(num_features, **options)
                self.tau = tau

        assert Mine(8, tau=2.0, eps=1e-3).eps == 1e-3
        with pytest.raises(TypeError, match="Mine takes no argument 'taw'. Did you mean 'tau'"):
            Mine(8, taw=2.0)


def test_the_input_by_torchs_name():
    x = torch.randn(4, 8, 3, 3)
    assert torch.equal(BatchNorm(8)(input=x), BatchNorm(8)(x))


def test_compile_takes_torchs_arguments_and_no_others():
    layer = BatchNorm(8)
    layer.compile(backend="eager", dynamic=False)
    x = torch.randn(4, 8, 3, 3)
    torch.testing.assert_close(layer(x), BatchNorm(8)(x))
    with pytest.raises(TypeError, match="takes .*mode.*, got 'mod'"):
        layer.compile(mod="max-autotune")
