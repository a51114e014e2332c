"""Tracing and transforms, beyond the checks that every normalizer passes with its default arguments."""

import functools
import io
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.feature_extraction import create_feature_extractor

import lightning_norm
from lightning_norm import normalizers
from lightning_norm.layers.scheduled import _is_shared
from lightning_norm.ops import torch_private
from lightning_norm.ops.sync import Ranks
from lightning_norm.testing import checks

# Every torch.jit function says that it is deprecated, and forward-mode AD calls one.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
TRANSFORMS = [name for name, fn in checks().items() if fn.__module__ == "lightning_norm.testing.transforms"]
# What the layers can do beside their defaults and takes other lines of code.
VARIANTS = {
    "bn without statistics": ("bn", {"track_running_stats": False}),
    "bn, average of all batches": ("bn", {"momentum": None}),
    "bn not affine": ("bn", {"affine": False}),
    "sn of groups, authors' variances": ("sn", {"choices": ("in", "gn", "bn"), "num_groups": 3, "correction": 1}),
    "sn sparse": ("sn", {"sparse": True, "radius": 0.4}),
    "ubn with a threshold": ("ubn", {"threshold": 0.2, "min_updates": 0}),
    "ubn renormalized": ("ubn", {"threshold": -1.0, "min_updates": 0, "condensed_grad": "renorm"}),
    "ubn gated": ("ubn", {"threshold": 0.2, "min_updates": 0, "mode": "gate"}),
    "dbn by powers": ("dbn", {"power": 2.0}),
    "dbn renormalized": ("dbn", {"stat_grad": "renorm", "eval_momentum": 0.1}),
    "dbn beside the batch": ("dbn", {"train_stats": "batch", "init": "zero_one"}),
    "dbn without gradient": ("dbn", {"stat_grad": "none", "average": "var"}),
    "cn with a posterior": ("cn", {"context": "gate", "missing": "posterior"}),
    "cn scaled by priors": ("cn", {"context": "gate", "prior_scale": True}),
    "bnet of one dimension": ("bnet", {"spatial_dims": 1}),
    "bnet of three dimensions": ("bnet", {"spatial_dims": 3}),
    "rbn as published": ("rbn", {"gate_init": "paper"}),
    "bcn of a sigmoid": ("bcn", {"constraint": "sigmoid"}),
}


class Net(LightningModule):
    def __init__(self, key, **arguments):
        super().__init__()
        cls = normalizers()[key]
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = cls(6, **{**cls.test_arguments, **arguments})
        self.example_input_array = torch.randn(2, 3, 8, 8)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture(params=normalizers())
def net(request):
    return Net(request.param)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_arguments(variant, name):
    key, arguments = VARIANTS[variant]
    checks()[name](functools.partial(normalizers()[key], **arguments))


@pytest.mark.filterwarnings("ignore")
def test_a_fit_that_logs_the_graph(net, tmp_path):
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    trainer = Trainer(
        default_root_dir=tmp_path, logger=logger, max_steps=2, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, DataLoader(TensorDataset(torch.randn(8, 3, 8, 8)), batch_size=4))
    logger.finalize("success")
    events = [path for path in tmp_path.rglob("events*") if b"norm" in path.read_bytes()]
    assert trainer.global_step == 2
    assert events


@pytest.mark.filterwarnings("ignore:.LightningModule.to_torchscript. has been deprecated")
def test_lightning_s_to_torchscript(net):
    net.eval()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.save(net.to_torchscript(method="trace"), file)
    file.seek(0)
    x = torch.randn(5, 3, 12, 10)
    torch.testing.assert_close(torch.jit.load(file)(x), net(x), rtol=1e-5, atol=1e-5)


def test_script_says_what_to_type(net):
    name = type(net.norm).__name__
    with pytest.raises(NotImplementedError, match=rf"{name}: torch.jit.script .* torch.jit.trace.*to_plain"):
        torch.jit.script(nn.Sequential(nn.Conv2d(3, 6, 3), net.norm))
    example = torch.randn(2, 3, 8, 8)
    network = nn.Sequential(net.conv, net.norm).eval()
    scripted = torch.jit.script(nn.Sequential(torch.jit.trace(network, example)))
    torch.testing.assert_close(scripted(example), network(example))


@pytest.mark.filterwarnings("ignore")
def test_onnx_by_tracing(net):
    onnx = pytest.importorskip("onnx")
    file = io.BytesIO()
    axes = {"x": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(net.eval(), (net.example_input_array,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    graph = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(graph)
    reference = pytest.importorskip("onnx.reference").ReferenceEvaluator(graph)
    x = torch.randn(3, 3, 9, 7)
    (y,) = reference.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=1e-4, atol=1e-5)


def test_torchvision_s_feature_extractor(net):
    extractor = create_feature_extractor(net.eval(), {"norm": "features"})
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(extractor(x)["features"], net.norm(net.conv(x)))


def test_torch_fx_keeps_activation_and_residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = lightning_norm.BatchNorm(6)

        def forward(self, x):
            return self.norm(x, "relu", x * 2)

    block, x = Block().eval(), torch.randn(2, 6, 4, 4)
    assert torch.equal(torch.fx.symbolic_trace(block)(x), block(x))


def test_torch_fx_of_a_layer_alone():
    with pytest.raises(ValueError, match=r"BatchNorm is a leaf for torch.fx.*nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(lightning_norm.BatchNorm(6))


def test_a_layer_that_compiles_itself_is_traced_too():
    layer, x = lightning_norm.BatchNorm(6), torch.randn(4, 6, 5, 5)
    layer.compile()
    traced = torch.jit.trace(nn.Sequential(layer).eval(), x)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch.func.vmap(layer)(x[None]).shape == (1, *x.shape)


@pytest.mark.parametrize("key", normalizers())
def test_export_with_any_height_and_width(key):
    dim = torch.export.Dim.DYNAMIC
    net = Net(key).eval()
    program = torch.export.export(net, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: dim, 2: dim, 3: dim},))
    x = torch.randn(7, 3, 11, 9)
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", normalizers())
def test_torch_s_gradcheck_with_all_its_options(key):
    cls = normalizers()[key]
    layer = cls(6, **cls.test_arguments).double().eval()
    x = torch.randn(2, 6, 2, 2, dtype=torch.double, requires_grad=True)
    options = dict.fromkeys(("check_batched_grad", "check_forward_ad", "check_batched_forward_grad"), True)
    assert torch.autograd.gradcheck(layer, x, **options, fast_mode=True)


def test_ranks_cannot_meet_inside_of_a_transform():
    with pytest.raises(RuntimeError, match=r"SyncBatchNorm cannot either.*sync=False"):
        torch.func.grad(lambda x: Ranks("none").sum(x).sum())(torch.ones(2))


def test_a_counter_that_no_file_holds_need_not_be_passed_in():
    layer = lightning_norm.BatchNorm(6)
    state = {name: value.clone() for name, value in layer.state_dict().items()}

    def loss(state, x):
        return torch.func.functional_call(layer, state, (x,)).square().sum()

    floating = {name: t for name, t in state.items() if name in ("weight", "bias")}
    buffers = {name: t for name, t in state.items() if name not in floating}
    torch.func.grad(lambda p, b, x: loss({**p, **b}, x))(floating, buffers, torch.randn(4, 6, 3, 3))
    assert buffers["num_batches_tracked"] == 1
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("key", ["bn", "afn"])
def test_an_ordinary_call_is_not_a_transform(key, monkeypatch):
    seen = []
    is_transformed = torch_private.is_transformed
    monkeypatch.setattr(torch_private, "is_transformed", lambda: seen.append(is_transformed()) or seen[-1])
    net = Net(key)
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    assert seen
    assert not any(seen)


def test_a_stand_in_of_a_transform_is_read_anew():
    """Its id may be that of an earlier one with another value, and it has no storage that could tell."""
    seen = []

    def f(x):
        seen.append(_is_shared(x))
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    assert seen == [True]
