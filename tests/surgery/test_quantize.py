"""Static int8 of folded networks, what is said where it cannot be, and timm's protocol."""

import contextlib
from importlib.util import find_spec

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_norm import LeftAloneWarning, QuantizationError, contexts, create, fold, normalizers, quantize, swap
from lightning_norm.demo.job import Digits
from lightning_norm.layers.base import Normalizer

ARGUMENTS = {"gn": {"num_groups": 2}, "cn": {"context": "ids"}}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not replace BatchNorm:UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning"),
]


def network(norm="bn", **arguments):
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(32, 10)),
    )
    swap(model, norm, norm_args={**ARGUMENTS.get(norm, {}), **arguments})
    return model


@pytest.mark.slow  # importing torchao takes longer than the rest
def test_accuracy_of_a_folded_network_moves_by_less_than_a_point():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    data, model = Digits(), network("dbn")
    data.setup()
    parts = data.read()
    x, target = (t.float() / 255 if t.dtype == torch.uint8 else t for t in parts["train"])
    x_test, target_test = (t.float() / 255 if t.dtype == torch.uint8 else t for t in parts["test"])
    target, target_test = target.long(), target_test.long()
    x, x_test = (t.expand(-1, 3, -1, -1) for t in (x, x_test))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(15):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), target[batch]).backward()
            optimizer.step()
    model.eval()

    def accuracy(of):
        with torch.no_grad():
            return (of(x_test).argmax(1) == target_test).float().mean().item()

    before = accuracy(model)
    assert before > 0.9
    fold(model, x[:4])
    int8 = quantize(model, [(x[i : i + 64], 0) for i in range(0, 640, 64)])
    assert abs(accuracy(int8) - before) <= 0.01
    assert accuracy(model) == pytest.approx(before, abs=1e-6)  # the model itself is not changed
    assert "quantize_per_tensor" in int8.code
    assert int8(x[:1]).shape == (1, 10)


@pytest.mark.slow
def test_what_stays_in_float_is_told():
    pytest.importorskip("torchao")
    with pytest.warns(LeftAloneWarning, match=r"1 normalizer stays in float \(first: 1, .*fold\(model"):
        quantize(network("sn"), [torch.randn(4, 3, 8, 8)])


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "name"), [("rbn", "RepresentativeBatchNorm"), ("bn", "BatchNorm")])
def test_what_torchao_cannot_take_is_told_by_its_name(norm, name):
    pytest.importorskip("torchao")
    with (
        pytest.warns(LeftAloneWarning),
        pytest.raises(QuantizationError, match=f"Sequential with {name}"),
    ):
        quantize(network(norm), [torch.randn(4, 3, 8, 8)])


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.ReLU(), [], "batches is empty"),
        (nn.ReLU(), ["image.png"], "got str"),
        (nn.ReLU(), [torch.zeros(2, 3, dtype=torch.int64)], "tensors of floats"),
        (nn.Linear(2, 2).to("meta"), [torch.zeros(2, 2)], r"on meta. Type model.cpu\(\)"),
        pytest.param(
            *(Branching(), [torch.ones(2, 3)], "cannot trace Branching"),
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not find_spec("torchao"), reason="needs lightning-norm[export]"),
            ],
        ),
    ],
)
def test_what_cannot_be_quantized(model, batches, message):
    with pytest.raises(QuantizationError, match=message):
        quantize(model, batches)


@pytest.mark.parametrize("key", normalizers())
def test_switch_to_deploy_is_fuse_in_place(key):
    model, x = network(key), torch.randn(4, 3, 8, 8)
    with contexts(model, torch.tensor([0, 1, 2, 0])) if key == "cn" else contextlib.nullcontext():
        model(x)
    layer, expected = model.eval()[1], model(x)
    fused = type(layer.fuse())
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    for module in model.modules():
        if hasattr(module, "switch_to_deploy"):
            module.switch_to_deploy()
    assert model[1] is layer
    assert type(layer) is fused
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    if not issubclass(fused, Normalizer):
        assert type(layer).__module__.startswith("torch.nn")
        assert "Norm" in repr(layer)


def test_timm_fuses_what_has_a_layer_of_torch():
    model = network("dbn").eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    fused = timm.utils.model.reparameterize_model(model)
    assert not [module for module in fused.modules() if isinstance(module, Normalizer)]
    torch.testing.assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(create("sn", 4).fuse(), Normalizer)
