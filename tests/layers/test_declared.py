"""Declarations of a normalizer's class: none is set on an instance, and each can be read on both."""

import inspect

import pytest
import torch
from torch import nn

from lightning_norm import create, normalizers

OTHERS = [
    *[("bnet", {"statistics": statistics}) for statistics in ("bn", "in", "sn")],
    *[("cn", {"context": context}) for context in ("ids", "gate", "input")],
    ("cn", {"context": "ids", "missing": "posterior"}),
]
LAYERS = [*((key, cls.test_arguments) for key, cls in normalizers().items()), *OTHERS]


@pytest.mark.parametrize(("key", "arguments"), LAYERS)
def test_no_class_attribute_is_set_on_an_instance(key, arguments):
    layer = create(key, 6, **arguments)
    declared = {
        name
        for cls in type(layer).__mro__
        for name, annotation in inspect.get_annotations(cls).items()
        if "ClassVar" in str(annotation)
    }
    assert declared & vars(layer).keys() == set()
    extra = {name for name, _ in layer.named_parameters()} - {"weight", "bias"}
    assert extra <= layer.extra_parameters.keys()


@pytest.mark.parametrize("statistics", ["bn", "in", "sn"])
def test_arguments_decide_on_the_layer_and_defaults_on_the_class(statistics):
    layer = create("bnet", 6, statistics=statistics)
    assert (layer.train_uses_batch_stats, layer.eval_uses_input_stats) == (statistics != "in", statistics != "bn")
    assert (type(layer).train_uses_batch_stats, type(layer).eval_uses_input_stats) == (True, False)


def test_a_graph_reads_them():
    layer = create("bnet", 6, statistics="in")
    x = torch.randn(2, 6, 4, 4)
    compiled = torch.compile(nn.Sequential(layer), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
