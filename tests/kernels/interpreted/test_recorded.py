"""Calls that are replayed from a recording compute what a first call does, whatever tensors they come with."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_norm
from lightning_norm.kernels import launcher
from lightning_norm.layers import fused_specs
from lightning_norm.layers.fused_specs import SPECS
from lightning_norm.testing.kit import features, noise, statistics, step

KEYS = [("bn", {}), ("sn", {}), ("rbn", {}), ("cn", {"context": "gate"}), ("asr", {}), ("bnet", {}), ("ibn", {})]
STRIDED = [("dbn", {}), ("bcn", {}), ("afn", {"dropout": 0.0}), ("ubn", {})]


def pair(key, arguments, channels=6):
    """A layer on the kernels and the same in float64 on plain PyTorch, everything moved from its start."""
    layer = lightning_norm.create(key, channels, **arguments)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.add_(0.2 * noise(*p.shape, seed=300 + i))
    exact = copy.deepcopy(layer).double()
    layer.backend, exact.backend = "triton", "eager"
    return layer, exact


def compare(ours, exact, x, dy, tolerance=5e-6):
    a, b = step(ours, x, dy), step(exact, x.double(), dy.double())
    got = {"y": a.y, "dx": a.dx, **a.grads, **statistics(ours)}
    for name, t in {"y": b.y, "dx": b.dx, **b.grads, **statistics(exact)}.items():
        error = (got[name].double() - t.double()).norm() / t.double().norm().clamp_min(0.1)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("key", "arguments"), KEYS, ids=str)
def test_a_second_call_with_other_tensors(key, arguments):
    ours, exact = pair(key, arguments)
    compare(ours, exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))
    plans = len(launcher._plans)
    for seed in (8, 9):
        compare(ours, exact, features(4, 6, 5, 3) + noise(4, 6, 5, 3, seed=seed), noise(4, 6, 5, 3, seed=seed + 10))
    assert len(launcher._plans) == plans
    # Another layer of the same kind uses the same plans.
    other, other_exact = pair(key, arguments)
    compare(other, other_exact, features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7))
    assert len(launcher._plans) == plans


def test_an_input_that_begins_anywhere_and_one_that_is_its_own_residual():
    ours, exact = pair("bn", {})
    for start in (0, 1, 4, 1):
        x = features(1, 6, 100, 3).flatten()[start : start + 4 * 6 * 15].view(4, 6, 5, 3)
        compare(ours, exact, x, noise(4, 6, 5, 3, seed=7))
    x, other = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=4)
    for residual in (x, other, x):
        y = ours(x, activation="relu", residual=residual)
        torch.testing.assert_close(y, exact(x.double(), activation="relu", residual=residual.double()).float())


def test_what_changes_a_layer_is_seen():
    """Its tensors, attributes and mode: none of them may be those of the recorded call."""
    ours, exact = pair("sn", {})
    x, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)

    def both(change):
        for layer in (ours, exact):
            change(layer)
        compare(ours, exact, x, dy)
        compare(ours, exact, x, dy)

    both(lambda layer: None)
    assert SPECS in vars(ours)
    both(lambda layer: setattr(layer, "eps", 0.5))
    both(lambda layer: layer.eval())
    both(lambda layer: layer.train())
    both(lambda layer: setattr(layer, "momentum", 0.7))
    both(lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.full_like(layer.weight, 3.0))))
    both(lambda layer: layer._parameters.update(bias=torch.nn.Parameter(torch.full_like(layer.bias, 2.0))))
    both(lambda layer: setattr(layer, "correction", 1))
    tensors = {"weight": torch.full((6,), 5.0), "bias": torch.zeros(6)}
    y = torch.func.functional_call(ours, tensors, x)
    want = torch.func.functional_call(exact, {k: t.double() for k, t in tensors.items()}, x.double())
    torch.testing.assert_close(y, want.float())


def test_a_layer_in_half_precision_after_one_in_single():
    ours, exact = pair("bn", {})
    x, dy = features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)
    compare(ours, exact, x, dy)
    compare(ours, exact, x, dy)
    ours.half()
    exact.load_state_dict(ours.state_dict())
    compare(ours, exact, x.half(), dy.half(), 2e-3)
    assert step(ours, x.half(), dy.half()).grads["weight"].dtype == torch.float16


def test_copies_and_files_of_a_layer_begin_without_recordings():
    ours, _ = pair("bn", {})
    x = features(4, 6, 5, 3)
    ours(x)
    assert vars(ours)[SPECS]
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert not vars(other)[SPECS]
        exact = copy.deepcopy(other).double()
        exact.backend = "eager"
        compare(other, exact, x, noise(4, 6, 5, 3, seed=7))


def test_operators_are_seen_by_who_watches():
    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    ours, _ = pair("bn", {})
    x = features(4, 6, 5, 3)
    y = ours(x)
    with Watch():
        again = ours(x)
    assert torch.equal(y, again)
    assert any("mixture_affine" in name for name in names)


def test_no_more_plans_than_the_limit(monkeypatch):
    monkeypatch.setattr(launcher, "LIMIT", len(launcher._plans) + 2)
    ours, exact = pair("in", {})
    for width in range(2, 8):
        compare(ours, exact, features(2, 6, 3, width), noise(2, 6, 3, width, seed=7))
        assert len(launcher._plans) <= launcher.LIMIT


@pytest.mark.parametrize(("key", "arguments"), KEYS, ids=str)
def test_launch_code_only_allocates_and_launches(key, arguments, monkeypatch):
    """What else it did would be done at the first call and at no later one."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            name, view = func.overloadpacket.__name__, all(r.alias_info for r in func._schema.returns)
            empty = isinstance(out, torch.Tensor) and out.numel() == 0
            assert view or empty or name in ("empty", "empty_like", "new_empty", "detach"), name
            return out

    record, seen = launcher.record, []

    def watched(inputs, call):
        def watched_call(*custom):
            with Nothing():
                return call(*custom)

        seen.append(inputs)
        return record(inputs, watched_call)

    monkeypatch.setattr(launcher, "_plans", {})
    monkeypatch.setattr(launcher, "record", watched)
    ours, exact = pair(key, arguments)
    for x, dy in ((features(4, 6, 5, 3), noise(4, 6, 5, 3, seed=7)), (features(2, 6, 33, 70), noise(2, 6, 33, 70))):
        compare(ours, exact, x, dy, 2e-5)
    layer = pair(key, arguments)[0]
    x = features(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    layer(x, "relu", noise(4, 6, 5, 3, seed=4)).sum().backward()
    assert len(seen) == 6


@pytest.mark.parametrize(("key", "arguments"), [c for c in KEYS if c[0] not in ("in", "asr")], ids=str)
def test_running_statistics_count_as_written_to(key, arguments):
    layer, _ = pair(key, arguments)
    x, w = features(4, 6, 5, 3), torch.ones(6, requires_grad=True)
    layer(x)
    y = (layer.get_buffer(layer.running_names[0]) * w).sum()
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(("key", "arguments"), [*KEYS, *STRIDED], ids=str)
def test_parameters_with_strides(key, arguments):
    """Set, or as functional_call brings them: a column of a matrix, or one number for all channels."""
    ours, exact = pair(key, arguments)
    x = features(4, 6, 5, 3)
    ours(x)
    tensors = {name: torch.stack([p.detach() + 0.1, p.detach()], -1)[..., 0] for name, p in ours.named_parameters()}
    tensors |= {"bias": torch.full((1,), 0.5).expand(6)}
    want = torch.func.functional_call(exact, {k: t.double() for k, t in tensors.items()}, x.double())
    torch.testing.assert_close(torch.func.functional_call(ours, tensors, x), want.float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.data = tensors[name]
    for name in ("running_mean", "running_var"):  # as functional_call found them
        if ours._buffers.get(name) is not None:
            ours._buffers[name].copy_(torch.stack([exact._buffers[name].float()], -1)[..., 0])
    torch.testing.assert_close(ours.eval()(x), exact_with(exact, tensors)(x.double()).float(), rtol=1e-4, atol=1e-5)


def exact_with(exact, tensors):
    with torch.no_grad():
        for name, p in exact.named_parameters():
            p.copy_(tensors[name])
    return exact.eval()


def test_a_tensor_on_another_device_is_refused_before_a_kernel_reads_its_address():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(6, device="cuda")
    with pytest.raises(RuntimeError, match=r"device of its input, cpu, got one on cuda:0.*layer\.to\('cpu'\)"):
        launcher.key_of("kind", (torch.ones(2, 6), weight))


def test_a_dropout_that_was_written_to_its_tensor():
    """As an average of models or another process writes it; with a dropout of 0 nothing is drawn."""
    layer, _ = pair("afn", {"dropout": 0.0})
    x = features(4, 6, 5, 3)
    y = layer(x)
    assert torch.equal(layer(x), y)
    layer.scheduled("dropout").fill_(0.9)
    assert not torch.equal(layer(x), y)


@pytest.mark.parametrize(("key", "arguments"), KEYS, ids=str)
def test_a_layer_goes_with_its_last_reference(key, arguments):
    """No cycle of references, which would hold memory of the device until Python looks for one."""
    layer, _ = pair(key, arguments)
    for _ in range(2):
        layer(features(4, 6, 5, 3).requires_grad_()).sum().backward()
    assert vars(layer)[SPECS]
    tensors = [weakref.ref(t) for t in (*layer.parameters(), *layer.buffers())]
    gc.disable()
    try:
        del layer
        assert [t() for t in tensors] == [None] * len(tensors)
    finally:
        gc.enable()


def test_constants_of_a_description_are_remembered_and_follow_the_layer():
    """ibn's: which channels have the batch's statistics."""
    layer, other = (lightning_norm.create("ibn", 6) for _ in range(2))
    for one in (layer, other):
        one.backend = "triton"
    x = noise(3, 6, 4, 5)
    layer(x)
    (known,) = vars(layer)[fused_specs.SPECS].values()
    layer(x)
    other(x)
    assert [k.spec for k in vars(layer)[fused_specs.SPECS].values()] == [known.spec]
    assert next(iter(vars(other)[fused_specs.SPECS].values())).spec.w is known.spec.w  # one for all such layers
    key = next(iter(vars(layer)[fused_specs.SPECS]))
    assert fused_specs._remembered(layer, key) is known.spec
    # A layer that moves to another device keeps its parameters, as objects, and the constant stays behind.
    vars(layer)[fused_specs.SPECS][key] = known._replace(device=torch.device("meta"))
    assert fused_specs._remembered(layer, key) is None


def test_constants_made_while_somebody_watches_are_not_kept():
    with FakeTensorMode():
        fused_specs.constant("of a test", torch.device("cpu"), lambda where: torch.zeros(2, device=where))
    assert type(fused_specs.constant("of a test", torch.device("cpu"), torch.zeros(2).to)) is torch.Tensor
