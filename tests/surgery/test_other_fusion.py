"""Other libraries' fusion of a BatchNorm into a convolution: right where a layer is one, and otherwise an error."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import lightning_norm
from lightning_norm import normalizers, swap
from lightning_norm.errors import FusionError

ARGUMENTS = {"cn": {"context": "ids"}, "gn": {"num_groups": 2}}
CASES = [(key, ARGUMENTS.get(key)) for key in sorted(normalizers())]
CASES += [
    ("cn", {"context": "gate"}),
    ("sn", {"choices": ["bn"]}),
    ("dbn", {"average": "var"}),
    ("bn", {"affine": False}),
]
CASES += [("bn", {"track_running_stats": False}), ("in", {"track_running_stats": True}), ("rbn", {"rectify": []})]


def yolo(conv, bn):
    """What ultralytics does in ``fuse_conv_and_bn``, written anew."""
    scale = torch.diag(bn.weight.div(torch.sqrt(bn.eps + bn.running_var)))
    bias = bn.bias - bn.weight.mul(bn.running_mean).div(torch.sqrt(bn.running_var + bn.eps))
    fused = nn.Conv2d(3, 6, 3)
    fused.weight.data = torch.mm(scale, conv.weight.flatten(1)).view_as(conv.weight)
    fused.bias.data = torch.mm(scale, conv.bias[:, None])[:, 0] + bias
    return fused


class RepVGG(nn.Module):
    """The block whose ``get_equivalent_kernel_bias`` RepVGG, MobileOne and their descendants have, written anew."""

    def __init__(self, conv, bn):
        super().__init__()
        self.conv, self.bn = conv, bn

    def get_equivalent_kernel_bias(self):
        std = (self.bn.running_var + self.bn.eps).sqrt()
        t = (self.bn.weight / std).reshape(-1, 1, 1, 1)
        return self.conv.weight * t, self.bn.bias + (self.conv.bias - self.bn.running_mean) * self.bn.weight / std


def repvgg(conv, bn):
    fused = nn.Conv2d(3, 6, 3)
    fused.weight.data, fused.bias.data = RepVGG(conv, bn).get_equivalent_kernel_bias()
    return fused


class ConvNorm(nn.Sequential):
    """The parent with a ``fuse`` of its own that timm's LeViT and TinyViT have, written anew."""

    @torch.no_grad()
    def fuse(self):
        c, bn = self._modules.values()
        w = bn.weight / (bn.running_var + bn.eps) ** 0.5
        fused = nn.Conv2d(3, 6, 3)
        fused.weight.copy_(c.weight * w[:, None, None, None])
        fused.bias.copy_(bn.bias + (c.bias - bn.running_mean) * bn.weight / (bn.running_var + bn.eps) ** 0.5)
        return fused


def reparameterize(conv, bn):
    """What timm's ``reparameterize_model`` does with each module that has ``fuse``."""
    parent = nn.Sequential(ConvNorm(conv, bn))
    for name, child in parent.named_children():
        setattr(parent, name, child.fuse())
    return parent


def functional(conv, bn):
    """The layer's tensors in torch's function, which is a BatchNorm by itself."""

    def run(x):
        mean, var = bn.running_mean, bn.running_var
        return nn.functional.batch_norm(conv(x), mean, var, bn.weight, bn.bias, False, 0.1, bn.eps)

    return run


TOOLS = [fuse_conv_bn_eval, yolo, repvgg, reparameterize, functional]


def trained(key, arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    swap(model, key, norm_args=arguments)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        with (
            lightning_norm.contexts(model, torch.arange(4) % 3)
            if arguments == {"context": "ids"}
            else torch.enable_grad()
        ):
            model(torch.randn(4, 3, 9, 9) + 1).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            [p.add_(0.05 * torch.randn_like(p)) for p in model.parameters()]
    return model.eval()


@pytest.mark.filterwarnings("ignore::lightning_norm.errors.ParameterGrowthWarning")
@pytest.mark.parametrize("tool", TOOLS, ids=lambda t: t.__name__)
@pytest.mark.parametrize(("key", "arguments"), CASES, ids=str)
def test_right_or_an_error(key, arguments, tool):
    model, x = trained(key, arguments), torch.randn(4, 3, 9, 9)
    expected = model(x)
    layer = model[1]
    has_all = all(getattr(layer, n, None) is not None for n in ("weight", "bias", "running_mean", "running_var"))
    try:
        fused = tool(copy.deepcopy(model[0]), layer)(x)
    except FusionError as error:
        assert "lightning_norm.fold" in str(error)  # noqa: PT017
    except (AssertionError, AttributeError, TypeError):
        assert not has_all  # torch's own layer without them fails in the same way
    else:
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    report = lightning_norm.fold(model, x)  # what the message says
    assert len(report.layers) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["sn", "rbn", "ubn", "afn", "brn", "dbn"])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda t: t.__name__)
@pytest.mark.filterwarnings("ignore::lightning_norm.errors.ParameterGrowthWarning")
def test_the_silent_ones_say_what_to_type(key, tool):
    model = trained(key, None)
    with pytest.raises(FusionError, match=r"reads eps and running_var of .* Use lightning_norm\.fold"):
        tool(model[0], model[1])(torch.randn(4, 3, 9, 9))


@pytest.mark.parametrize("key", ["bn", "bcn"])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda t: t.__name__)
def test_a_layer_that_is_a_batch_norm_is_fused(key, tool):
    model, x = trained(key, None), torch.randn(4, 3, 9, 9)
    if key == "bcn":
        model[1].iota.data.fill_(1)
    torch.testing.assert_close(tool(copy.deepcopy(model[0]), model[1])(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["brn", "dbn"])
def test_a_layer_that_keeps_no_variance_has_no_attribute_of_that_name(key):
    layer = trained(key, None)[1]

    def asks(bn):
        return bn.eps, getattr(bn, "running_var", None), hasattr(bn, "running_var")

    assert asks(layer) == (layer._eps, None, False)
    with pytest.raises(AttributeError, match="running_var"):
        layer.running_var  # noqa: B018
    layer = trained(key, {"average": "var"})[1]
    assert layer.running_var is dict(layer.named_buffers())["running_var"]
    layer.running_var = torch.ones(6)
    assert torch.equal(layer.state_dict()["running_var"], torch.ones(6))


def test_reading_by_itself_stays_harmless():
    """Loggers, weight-decay code and copies read one or the other, and a class of the user's both in its equations."""
    layer = trained("sn", None)[1]
    eps = layer.eps
    assert eps == 1e-5
    assert {name: getattr(layer, name) for name in ("eps", "running_" + "var")}["eps"] == eps
    assert copy.deepcopy(layer).eps == pickle.loads(pickle.dumps(layer)).eps == eps
    assert f"eps={eps}" in repr(layer)
    layer.eps = 1e-3
    assert (layer.eps, layer._eps) == (1e-3, 1e-3)

    class Mine(lightning_norm.MomentNorm):
        def algebra(self, m):
            b = self.track(m.over_batch())
            scale = (b.var + self.eps).rsqrt() * (1 + self.running_var.mean() * 0)
            return lightning_norm.Affine(m.mean, scale, self.bias)

    assert Mine(6)(torch.randn(4, 6, 3, 3)).isfinite().all()
