"""Checks: checkpoints, copies, pickle, repr."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn

from lightning_norm.layers.base import Normalizer
from lightning_norm.testing.kit import C, Make, built, check, features, noise, same, same_step, step


def trained(make: Make) -> Normalizer:
    """Return a layer after two steps with a graph behind its input."""
    layer = built(make)
    for seed in (1, 2):
        # A non-leaf tensor in a buffer or an attribute makes a copy fail, so there has to be a graph.
        layer(features(5, C, 7, 3, seed=seed).requires_grad_() * 2).mean().backward()
    return layer


def agree(a: Normalizer, b: Normalizer, what: str) -> None:
    """Assert that two layers evaluate and train alike, bit by bit."""
    x, dy = features(5, C, 7, 3, seed=3), noise(5, C, 7, 3, seed=7)
    for training in (False, True):
        same_step(step(a.train(training), x, dy), step(b.train(training), x, dy), 0.0, f"{what}, training={training}")
    for (name, u), (_, v) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        same(u, v, 0.0, f"{what}, {name}")


@check
def state_dict_round_trip(make: Make) -> None:
    """A state_dict loads strictly, through a file with ``weights_only=True``, and restores the layer."""
    layer, fresh = trained(make), make(C)
    # Through a file, for ``weights_only=True`` refuses anything but tensors and plain types.
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    agree(layer, fresh, "loaded")


@check
def state_dict_is_strict(make: Make) -> None:
    """A missing weight and a foreign key are errors."""
    layer = make(C)
    for change in ("missing", "unexpected"):
        state = layer.state_dict()
        if change == "missing":
            if layer.weight is None:
                continue
            del state["weight"]
        else:
            state["nonsense"] = torch.zeros(1)
        try:
            make(C).load_state_dict(state, strict=True)
        except RuntimeError:
            continue
        raise AssertionError(f"a state_dict with a {change} key was loaded strictly")


@check
def loads_batch_norm(make: Make) -> None:
    """A plain nn.BatchNorm2d's state_dict loads strictly: what it holds moves in, the rest keeps its start."""
    bn = nn.BatchNorm2d(C)
    bn(features(5, C, 7, 3))
    with torch.no_grad():
        for i, p in enumerate(bn.parameters()):
            p.add_(0.3 * noise(C, seed=600 + i))
    layer = make(C)
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    saved = bn.state_dict()
    layer.load_state_dict(saved, strict=True)
    # A loading hook that renames in place would change the user's own dictionary.
    assert set(saved) == set(bn.state_dict()), "loading changed the caller's state_dict"
    loaded = layer.state_dict()
    for name in loaded:
        if name in saved and name not in layer.translated_tensors:
            same(loaded[name], saved[name], 0.0, f"{name} of the BatchNorm")
        # A translated tensor may be made of the BatchNorm's.
        elif name in start and not layer.translated_tensors:
            same(loaded[name], start[name], 0.0, f"{name}, absent from the BatchNorm,")
    if layer.preserves_eval:
        x = features(4, C, 7, 3, seed=9)
        same(layer.eval()(x), bn.eval()(x), 1e-5, "loaded from a BatchNorm, evaluation")


@check
def deepcopy_and_pickle(make: Make) -> None:
    """A layer can be copied and pickled after a training step, graph and all, and the copy is independent."""
    layer = trained(make)
    for what, twin in (("deepcopy", copy.deepcopy(layer)), ("pickle", pickle.loads(pickle.dumps(layer)))):
        agree(copy.deepcopy(layer), twin, what)
        for (name, a), (_, b) in zip(layer.named_parameters(), twin.named_parameters(), strict=True):
            # An average of weights is such a copy, and would follow the original in silence.
            assert a.data_ptr() != b.data_ptr(), f"{what} shares {name} with the original"
        for name in type(layer).ranges:
            value = getattr(layer, f"_{name}")
            assert value is None or value is not getattr(twin, f"_{name}"), f"{what} shares {name} with the original"
            assert getattr(twin, name) == getattr(layer, name), f"{what} lost {name}"


@check
def shows_itself(make: Make) -> None:
    """``repr`` names the class, the channels and the arguments."""
    layer = make(C)
    shown = repr(layer)
    for word in (type(layer).__name__, str(C), "eps="):
        assert word in shown, f"repr has no {word!r}: {shown}"
    assert "\n" not in shown, f"repr takes more than a line: {shown}"


@check
def monitored(make: Make) -> None:
    """``monitor()`` gives finite 0-dim tensors without a graph."""
    for name, value in built(make).monitor().items():
        assert value.dim() == 0, f"monitor()[{name!r}] has the shape {tuple(value.shape)}"
        assert not value.requires_grad, f"monitor()[{name!r}] holds a graph"
        assert bool(value.isfinite()), f"monitor()[{name!r}] is {value}"


@check
def meta_and_arguments(make: Make) -> None:
    """Builds on the meta device, in a dtype that is asked for, and without parameters."""
    meta = make(C, device="meta")
    assert all(p.is_meta for p in meta.parameters()), "device='meta' left parameters elsewhere"
    for dtype in (torch.float64, torch.bfloat16):
        wrong = {name: p.dtype for name, p in make(C, dtype=dtype).named_parameters() if p.dtype != dtype}
        assert not wrong, f"dtype={dtype} gave {wrong}"
    plain = make(C, affine=False)
    assert plain.weight is None, "affine=False left a weight"
    assert plain.bias is None, "affine=False left a bias"
    assert "weight" not in plain.state_dict(), "affine=False saves a weight"
    if dict(plain.named_parameters()).keys() == dict(make(C).named_parameters()).keys() - {"weight", "bias"}:
        x, dy = features(5, C, 7, 3, dtype=torch.float64), noise(5, C, 7, 3, seed=7, dtype=torch.float64)
        a, b = step(plain.double(), x, dy), step(make(C).double(), x, dy)
        same(a.y, b.y, 1e-12, "affine=False against weight 1 and bias 0, output")
        same(a.dx, b.dx, 1e-12, "affine=False against weight 1 and bias 0, input gradient")
