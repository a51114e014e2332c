"""A NaN comes out wherever it comes out of the equations in PyTorch: no kernel makes a number of it.

A kernel may spread it further, as a product with zero does, but never into another buffer.
"""

import copy
import importlib

import pytest
import torch

import lightning_norm
from lightning_norm.ops.fused import recorded
from lightning_norm.testing.kit import built, features, noise, seeded, step

FAST = [("dbn", {}), ("cn", {})]
MORE = [(key, {}) for key in lightning_norm.normalizers() if (key, {}) not in FAST]
MORE += [("dbn", {"average": "var"}), ("dbn", {"power": 2.5}), ("ubn", {"threshold": 0.1, "min_updates": 0})]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


def tensors_of(layer):
    """Names of what may hold a NaN: parameters, running statistics, scheduled values of what is seen in training."""
    floats = [name for name, b in layer.named_buffers() if b.is_floating_point() and b.dim() and name != "gap"]
    return ["x", *dict(layer.named_parameters()), *floats]


@pytest.mark.parametrize(("key", "options"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_nan_in_any_tensor(key, options):
    def make(c, **more):
        return lightning_norm.create(key, c, **{**lightning_norm.normalizers()[key].test_arguments, **options, **more})

    plain, dy = seeded(built, make), noise(3, 6, 3, 2, seed=7)
    seen = 0
    for name in tensors_of(plain):
        eager = copy.deepcopy(plain)
        x = features(3, 6, 3, 2)
        tensor = x if name == "x" else eager.state_dict(keep_vars=True)[name]
        tensor.data.view(-1)[-1] = float("nan")
        # In training but for what evaluation alone reads.
        eager.train(name not in plain._buffers or plain.train_uses_running_stats)
        kernels = copy.deepcopy(eager)
        eager.backend, kernels.backend = "eager", "triton"
        got, want = step(kernels, x, dy), step(eager, x, dy)
        buffers = zip(kernels.named_buffers(), eager.named_buffers(), strict=True)
        pairs = {"y": (got.y, want.y), "dx": (got.dx, want.dx)}
        pairs |= {f"gradient of {n}": (got.grads[n], want.grads[n]) for n in want.grads}
        for what, (a, b) in pairs.items():
            assert not (b.isnan() & ~a.isnan()).any(), f"NaN in {name}: {what} is a number"
        for (what, a), (_, b) in buffers:
            assert torch.equal(a.isnan(), b.isnan()), f"NaN in {name}: buffer {what} differs"
        seen += bool(want.y.isnan().any())
    assert seen


@pytest.mark.parametrize(("key", "module"), [("dbn", "per_channel"), ("afn", "encoder_decoder")])
def test_the_gradient_of_a_nan_variance_is_nan(key, module, monkeypatch):
    """By itself, and not through a mean or a scale that is NaN as well."""
    launch = importlib.import_module(f"lightning_norm.kernels.{module}.launch")
    slopes, original = [], launch.input_gradients

    def look(dy, x, affine, dx_affine, *rest):
        slopes.append(dx_affine[1].clone())
        return original(dy, x, affine, dx_affine, *rest)

    # A recorded launch runs after its launch code, an operator within it.
    monkeypatch.setattr(recorded, "can_record", lambda *args: False)
    monkeypatch.setattr(launch, "input_gradients", look)
    layer, x = lightning_norm.create(key, 6), features(3, 6, 3, 2)
    layer.backend = "triton"
    x[0, 1, 0, 0] = float("nan")
    step(layer, x, noise(3, 6, 3, 2, seed=7))
    assert slopes[-1][:, 1].isnan().all()
