"""A ``fused_spec`` holds for exactly the class that defines it: whatever a subclass changes, the kernels are left."""

import copy
import functools
import inspect
import sys
from unittest import mock

import pytest
from torch import nn

from lightning_norm import BatchNorm, SwitchableNorm, create, normalizers
from lightning_norm.layers.base import MomentNorm
from lightning_norm.layers.elementwise import run_on_kernels
from lightning_norm.layers.fused_specs import spec_of
from lightning_norm.ops import eager
from lightning_norm.ops.normalize import run
from lightning_norm.testing.kit import features

KEYS = [
    key
    for key, cls in normalizers().items()
    # Without a description there is nothing that could hold for too much.
    if cls.__module__.startswith("lightning_norm.") and cls.fused_spec is not MomentNorm.fused_spec
]
MORE = {"sn": {"sparse": True}, "ubn": {"threshold": 0.0, "min_updates": 0}, "cn": {"context": "gate"}}
"""Arguments with which more of a class's methods are called."""


def as_on_an_accelerator():
    """On the CPU some layers take functions of torch's, and never come to the kernels or their algebra."""
    return mock.patch.object(eager, "may_read_back", return_value=False)


def arguments(key):
    return {**normalizers()[key].test_arguments, **MORE.get(key, {})}


def methods_called(key):
    """Names of the overridable methods of a class that a training and an evaluation forward call, without hooks."""
    layer, names = create(key, 6, **arguments(key)), set()
    functions = {
        inspect.unwrap(method).__code__: name
        for name in dir(type(layer))
        if not hasattr(nn.Module, name)
        for cls in type(layer).__mro__
        if inspect.isfunction(method := vars(cls).get(name))
    }

    def see(frame, event, argument):
        if event == "call" and frame.f_code in functions and isinstance(frame.f_locals.get("self"), MomentNorm):
            names.add(functions[frame.f_code])

    x = features(4, 6, 5, 3)
    sys.setprofile(see)
    try:
        layer(x)
        with as_on_an_accelerator():
            layer(x)
            layer.eval()(x)
    finally:
        sys.setprofile(None)
    return names


def descriptions(layer):
    """What a training and an evaluation forward hand on as the description for the kernels."""
    passed = []

    def see(frame, event, argument):
        if event == "call" and frame.f_code is run.__code__:
            passed.append(frame.f_locals["call"].fused_spec)
        if event == "call" and frame.f_code is run_on_kernels.__code__:
            passed.append(frame.f_locals["fused_spec"])

    sys.setprofile(see)
    try:
        for training in (True, False):
            layer.train(training)(features(4, 6, 5, 3))
    finally:
        sys.setprofile(None)
    assert passed
    return passed


def leaves_the_kernels(layer):
    return all(description is None for description in descriptions(layer))


def asks_for_its_description(layer):
    with as_on_an_accelerator():
        asked = descriptions(layer)
    return all(isinstance(d, functools.partial) and d.func is spec_of and d.args == (layer,) for d in asked)


def override(cls, name):
    """A subclass whose method does the same, which nobody can tell from one that does something else."""
    method = inspect.getattr_static(cls, name)

    def changed(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return type(f"Changed{cls.__name__}", (cls,), {name: changed})


CASES = [(key, name) for key in KEYS for name in sorted(methods_called(key) - {"fused_spec"})]


def test_the_trace_sees_the_methods_of_an_algebra():
    names = {name for key, name in CASES if key == "sn"}
    assert {"algebra", "_statistic", "weights", "track", "running", "running_target", "standardize"} <= names


@pytest.mark.parametrize("key", KEYS)
def test_the_class_itself_has_a_description(key):
    assert asks_for_its_description(create(key, 6, **arguments(key)))


@pytest.mark.parametrize(("key", "name"), CASES)
def test_a_subclass_that_overrides_a_method_leaves_the_kernels(key, name):
    assert leaves_the_kernels(override(normalizers()[key], name)(6, **arguments(key)))


@pytest.mark.parametrize(("key", "name"), CASES)
def test_an_instance_whose_method_is_replaced_leaves_the_kernels_until_it_is_put_back(key, name):
    layer = create(key, 6, **arguments(key))
    setattr(layer, name, getattr(layer, name))
    assert leaves_the_kernels(layer)
    delattr(layer, name)
    assert asks_for_its_description(layer)


def test_so_does_the_copy_of_such_an_instance():
    layer = BatchNorm(6)
    layer.standardize = BatchNorm(6).standardize
    assert leaves_the_kernels(copy.deepcopy(layer))


class Halved(SwitchableNorm):
    def _statistic(self, k, m):
        s = super()._statistic(k, m)
        return type(s)(s.mean / 2, s.var, s.count, s.ranks)


class OptedIn(Halved):
    fused_spec = SwitchableNorm.fused_spec


def test_a_subclass_opts_in_by_one_line():
    assert leaves_the_kernels(Halved(6))
    assert asks_for_its_description(OptedIn(6))
    assert leaves_the_kernels(type("Below", (OptedIn,), {})(6))


def test_other_attributes_change_nothing():
    layer = BatchNorm(6)
    layer.note, layer.forward = "mine", layer.forward
    layer.register_forward_hook(lambda module, inputs, output: output)
    assert asks_for_its_description(layer)


NUMBERS = [1.0]


class OfANumber(SwitchableNorm):
    def fused_spec(self, layout):
        return NUMBERS[0], layout.shape


def test_a_description_of_somebody_else_is_asked_for_at_each_call():
    """Nobody knows what it looks at; those of this package are remembered."""
    assert OfANumber(6).fused_spec_varies
    assert not SwitchableNorm(6).fused_spec_varies
    names = {"fused_spec": OfANumber.fused_spec, "fused_spec_varies": False}
    assert not type("Says", (OfANumber,), names)(6).fused_spec_varies
