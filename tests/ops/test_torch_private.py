"""Each private name of torch still exists and means what this package takes it for."""

import ast
import datetime
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lightning_norm
from lightning_norm.ops import torch_private
from lightning_norm.testing.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")


def test_in_backward_pass():
    seen = []

    def fn(x):
        seen.append(torch_private.in_backward_pass())
        return x.exp()

    checkpoint(fn, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_recomputes_saved_tensors():
    for use_reentrant in (False, True):
        seen = []

        def fn(x, seen=seen):
            seen.append(torch_private.in_backward_pass() and torch_private.recomputes_saved_tensors())
            return x.exp()

        checkpoint(fn, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
        assert seen == [False, not use_reentrant]


def timeouts(rank):
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=datetime.timedelta(seconds=77)
    )
    return torch_private.timeout_of(dist.group.WORLD)


def test_timeout_of():
    assert run_ranks(timeouts, 1) == [datetime.timedelta(seconds=77)]


def test_a_constant_is_marked_as_torch_marks_it():
    marked = torch_private.constant_in_graphs(lambda: 1)
    assert vars(marked) == vars(torch.compiler.assume_constant_result(lambda: 1)) != {}


def test_is_transformed_and_watched():
    seen, watched = {}, {}

    def note(name):
        def fn(x):
            seen[name] = torch_private.is_transformed()
            watched[name] = torch_private.watched()
            return x * 2

        return fn

    x = torch.ones(2, 3)
    note("plain")(x)
    with FlopCounterMode(display=False):
        note("counter")(x)
    torch.compile(note("compiled"), backend="eager")(x)
    torch.jit.trace(note("trace"), x, check_trace=False)
    torch.func.vmap(note("vmap"))(x)
    torch.func.grad(lambda x: note("grad")(x).sum())(x)
    torch.func.jvp(note("jvp"), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        note("forward")(x)
    with FakeTensorMode():
        note("fake")(torch.ones(2))
    for mode in ("real", "fake", "symbolic"):
        make_fx(note(mode), tracing_mode=mode)(x)
    make_fx(note("pre-dispatch"), pre_dispatch=True)(x)
    note("after")(x)
    assert [name for name, value in seen.items() if not value] == ["plain", "counter", "compiled", "after"]
    assert [name for name, value in watched.items() if not value] == ["plain", "compiled", "after"]


def test_is_batched():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda g: seen.append(torch_private.is_batched(None, g)))
    torch.autograd.grad(y, x, torch.ones(3, 2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_static_shape_is_no_part_of_a_traced_graph():
    seen = []

    def fn(x):
        seen.append((torch_private.tracing_state() is not None, torch_private.static_shape(x), type(x.shape[0])))
        return x * 2

    graph = torch.jit.trace(fn, torch.ones(2, 3), check_trace=False).graph
    assert seen == [(True, (2, 3), torch.Tensor)]
    assert all(type(size) is int for size in seen[0][1])
    assert "aten::mul" in str(graph)
    assert torch_private.tracing_state() is None


def test_without_gradients_holds_for_tangents_too():
    double = torch_private.without_gradients(lambda x: x * 2)
    x = torch.ones(2, requires_grad=True)
    assert not double(x).requires_grad
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with torch.no_grad():
            assert forward_ad.unpack_dual(dual * 2).tangent is not None
        assert forward_ad.unpack_dual(double(dual)).tangent is None
        assert forward_ad.unpack_dual(dual.detach()).tangent is None


def test_is_captured():
    outside, seen = torch.zeros(2), []
    torch.func.vmap(lambda x: seen.append((torch_private.is_captured(outside), torch_private.is_captured(x))) or x)(
        torch.ones(3)
    )
    assert seen == [(True, False)]
    assert not torch_private.is_captured(outside)


def test_is_proxy():
    seen = []

    class Module(torch.nn.Module):
        def forward(self, x):
            seen.append(torch_private.is_proxy(x))
            return x

    torch.fx.symbolic_trace(Module())(torch.ones(1))
    Module()(torch.ones(1))
    assert seen == [True, False]


def test_settings_of_the_compiler():
    before = torch._dynamo.config.recompile_limit
    with torch_private.recompile_limit(64):
        assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit) == (64, True)
    assert torch._dynamo.config.recompile_limit == before


def test_a_fake_tensor_has_a_shape_and_no_value():
    with torch_private.fake_tensor_mode() as mode:
        assert isinstance(mode, FakeTensorMode)
        assert torch.ones(2, 3).sum(0).shape == (3,)


def test_the_end_of_a_capture():
    assert callable(torch._C._cuda_endAllocateToPool) or not torch.backends.cuda.is_built()


def test_empty_strided():
    cpu, _ = torch_private.empty_strided()
    t = cpu((2, 3), (1, 2), torch.float16)
    assert (t.shape, t.stride(), t.dtype, t.device.type) == ((2, 3), (1, 2), torch.float16, "cpu")
    assert not t.requires_grad


PRIVATE_FILES = {"torch_private.py", "lightning_private.py"}


def private_names(text):
    """Attributes of torch and imports from it, dotted, that have a part with one underscore in front."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        for name in names:
            first, *parts = name.split(".")
            if (
                name.replace(".", "").isidentifier()
                and first in ("torch", "nn")
                and any(re.match(r"_[a-zA-Z]", part) for part in parts)
            ):
                yield name


def test_private_names_of_torch_stand_in_one_file_of_each_room():
    package = Path(lightning_norm.__file__).parent
    rest = {p.relative_to(package): [*private_names(p.read_text())] for p in package.rglob("*.py")}
    assert {str(p): names for p, names in rest.items() if names and p.name not in PRIVATE_FILES} == {}


@pytest.mark.parametrize("line", ["from torch.nn.modules import _x", "torch._C._f()", "y = nn.modules.conv._ConvNd"])
def test_a_private_name_is_seen(line):
    assert [*private_names(line)]
