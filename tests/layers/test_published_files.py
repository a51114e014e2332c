"""Files of the papers' authors: what loads and would compute something else is told, what does not load is named."""

import re
import warnings

import pytest
import torch
from torch import nn

from lightning_norm import create, normalizers, swap
from lightning_norm.errors import CheckpointError, OtherFileWarning, PublishedFileWarning

C = 6


def r(*shape):
    return torch.rand(*shape) + 0.5


def sn(*tail, logits=3, running=True):
    names = dict.fromkeys(("weight", "bias"), (1, C, *tail))
    names |= dict.fromkeys(("mean_weight", "var_weight"), (logits,))
    names |= dict.fromkeys(("running_mean", "running_var"), (1, C, 1) if tail else (1, C)) if running else {}
    return {name: r(*shape) for name, shape in names.items()}


def rbn():
    names = ("weight", "bias", "center_weight", "scale_weight", "scale_bias")
    tensors = {name: r(1, C, 1, 1) for name in names} | {"running_mean": r(C), "running_var": r(C)}
    return {**tensors, "num_batches_tracked": torch.tensor(3)}


def asr():
    sizes = {"standard_encoder": (3, C), "standard_mean_decoder.1": (C, 3), "standard_std_decoder.1": (C, 3)}
    sizes |= {"rescale_encoder": (1, C), "rescale_beta_decoder.1": (C, 1), "rescale_gamma_decoder.1": (C, 1)}
    linears = {f"{n}.weight": r(*s) for n, s in sizes.items()} | {f"{n}.bias": r(s[0]) for n, s in sizes.items()}
    gates = {f"lambda_{n}": r(1) for n in ("mu", "sigma", "beta", "gamma")}
    return {**gates, **linears, "bias_beta": r(C), "bias_gamma": r(C)}


def bcn():
    names = ("BCN_var", "gamma", "beta", "Batchh.runningmean", "Batchh.runningvar", "Batchh.gamma", "layeer.gamma")
    return {name: r(C) for name in names}


def cn():
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"context_norm_layers.{k}.{name}": r(C) for k in range(3) for name in names}


SPARSE = {"radius": r(1) / 2, "mean_fixed": torch.tensor([0]), "var_fixed": torch.tensor([0])}

LOADS = {
    "sn 2d": ("sn", {}, sn(1, 1), {"correction": 1}),
    "sn 3d": ("sn", {}, sn(1, 1, 1), {"correction": 1}),
    "sn without bn": ("sn", {"choices": ["in", "ln"]}, sn(1, 1, logits=2, running=False), {"correction": 1}),
    "sn 1d": ("sn", {"choices": ["ln", "bn"]}, sn(logits=2), {"correction": 1}),
    "sn 1d with choices of another layer": (
        *("sn", {"choices": ["in", "ln"]}, sn(logits=2)),
        {"choices": ("ln", "bn"), "correction": 1},
    ),
    "rbn": ("rbn", {}, rbn(), {"gate_init": "paper"}),
}


def network(key, arguments, layers=2):
    model = nn.Sequential(*(nn.BatchNorm2d(C) for _ in range(layers)))
    swap(model, key, norm_args=arguments)
    return model


def in_network(state, layers=2):
    return {f"{i}.{name}": t.clone() for i in range(layers) for name, t in state.items()}


@pytest.mark.parametrize("case", LOADS)
def test_what_loads_and_computes_something_else_is_told_once_a_load(case):
    key, arguments, state, wanted = LOADS[case]
    model = network(key, arguments)
    said = (
        re.escape(f"authors' code of {key!r}, by its shapes (first layer: 0)")
        + ".*"
        + re.escape(f"load_published(model, path, {key!r})")
        + ".*"
        + re.escape(f"norm_args={wanted!r}")
    )
    for _ in range(2):
        with pytest.warns(PublishedFileWarning, match=said) as told:
            model.load_state_dict(in_network(state))
        assert len(told) == 1
    # The hint leads to a layer that is told nothing, and that computes something else than the other.
    x = torch.randn(4, C, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = network(key, {**arguments, **wanted})
        right.load_state_dict(in_network(state))
    # A file of this package in these shapes is none of theirs, and told as that of a layer with other arguments.
    with pytest.warns(OtherFileWarning) as told:
        network(key, arguments).load_state_dict(right.state_dict())
    assert [w.category for w in told] == [OtherFileWarning]
    assert not torch.allclose(model.eval()(x), right.eval()(x))


def test_a_gate_that_is_not_there_is_not_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = create("rbn", C, rectify=["center"])
        layer.load_state_dict({k: v for k, v in rbn().items() if not k.startswith("scale")})


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        (sn(logits=2), "choices=('ln', 'bn'), correction=1"),
        (sn(1, 1, logits=2, running=False), "choices=('in', 'ln'), correction=1"),
    ],
    ids=["1d", "without bn"],
)
def test_other_choices_are_told_by_the_shapes(state, wanted):
    with pytest.raises(RuntimeError, match=re.escape(f"Type {wanted}, as the authors' code has it")):
        create("sn", C).load_state_dict(state)


COMMAND = "load_published(model, path, {!r})"
UNKNOWN = "Entries are missing or wrong, or it is another layer"
REFUSED = {
    "bcn": (["bcn"], bcn(), COMMAND.format("bcn")),
    "bcn, damaged": (["bcn"], {k: t for k, t in bcn().items() if k != "gamma"}, UNKNOWN),
    "asr and afn": (["asr", "afn"], asr(), "load_published(model, path, 'a"),
    "afn with batch statistics": (
        ["afn", "asr"],
        {**asr(), "running_mean": r(C), "running_var": r(C)},
        "load_published(model, path, 'a",
    ),
    "cn": (["cn"], cn(), COMMAND.format("cn")),
    "cn as a table": (["cn"], {"means": r(3, C), "variances": r(3, C)}, UNKNOWN),
    "sparse sn": (["sn"], {**sn(1, 1), **SPARSE}, COMMAND.format("sn")),
}


@pytest.mark.parametrize("key", sorted(normalizers()))
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_load_is_named_in_every_layer(case, key):
    owners, state, remedy = REFUSED[case]
    layer = create(key, C, **({"num_groups": 2} if key == "gn" else {}))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"^0 is {type(layer).__name__}, and the file holds") as error:
        nn.Sequential(layer).load_state_dict({f"0.{name}": t for name, t in state.items()})
    said = str(error.value)
    named = re.search(r"authors' code of (.*?) writes it", said)[1]
    assert set(re.findall(r"'(\w+)'", named)) == set(owners)
    assert remedy in said
    assert "GroupNorm" not in said.replace(type(layer).__name__, "")
    assert ("lightning-norm convert FILE --norm" in said) == (remedy != UNKNOWN)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_names_of_no_normalizer_are_no_group_norm():
    for key in ("sn", "cn", "bnet"):
        with pytest.raises(RuntimeError, match="names of no normalizer of this package"):
            create(key, C).load_state_dict({"bn.scale": r(C), "conv.weight": r(C, 1, 3, 3)})
