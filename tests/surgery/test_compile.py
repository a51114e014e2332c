"""A network holds more shapes than torch.compile's recompile limit: nothing may fall back, and nothing silently."""

import pytest
import torch
import torchvision

from lightning_norm import swap
from lightning_norm.layers.base import Normalizer
from lightning_norm.ops import compiled


def shapes_met(model, x):
    """(class, shape) of every normalizer's input in one forward pass."""
    met = []
    layers = [m for m in model.modules() if isinstance(m, Normalizer)]
    handles = [
        m.register_forward_pre_hook(lambda m, a: met.append((m.num_features, tuple(a[0].shape)))) for m in layers
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return met


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("arch", "backend"), [("resnet50", "inductor"), ("densenet121", "eager")])
def test_every_shape_has_its_graph(arch, backend, monkeypatch):
    """fullgraph=True makes torch raise at its limit of 8 variants; one graph per shape never gets there.

    densenet121 has 121 layers of almost as many shapes, which takes Inductor minutes; the limit is met before Inductor.
    """
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: real(f, backend=backend, **kwargs))
    torch._dynamo.reset()
    compiled._graphs.clear()
    compiled._shapes.clear()
    models = [torchvision.models.get_model(arch, num_classes=4).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    swap(models[0], "sn")
    swap(models[1], "sn", compile=True)
    x = torch.randn(2, 3, 64, 64).double()
    met = shapes_met(models[0].train(), x)
    limit = torch._dynamo.config.recompile_limit
    assert len(set(met)) > limit, "the test needs a network with more shapes than the limit"
    models[0].load_state_dict(models[1].state_dict())
    torch._dynamo.utils.counters.clear()
    graphs = compiled.graphs()
    outputs = [model.train()(x) for model in models]
    assert compiled.graphs() - graphs == len(set(met))  # one per shape, shared by the layers that agree
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(
        set(met)
    )  # and each was traced once: no recompile
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)  # 1e-16 per layer, grown by 121 of them
    gradients = [
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in zip(outputs, models, strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-10


def test_layers_of_one_shape_share_a_graph_and_modes_do_not():
    torch._dynamo.reset()
    model = torch.nn.Sequential(*(torch.nn.BatchNorm2d(5) for _ in range(6)))
    swap(model, "bn", compile=True)
    before = compiled.graphs()
    x = torch.randn(3, 5, 4, 4)
    model(x)
    assert compiled.graphs() - before == 2  # the first layer's input needs no gradient, the others' does
    model.eval()
    model(x)
    assert compiled.graphs() - before == 4
