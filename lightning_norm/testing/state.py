"""Checks: checkpoints, copies, pickle, repr."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import random
from typing import Any

import torch
from torch import nn

from lightning_norm.layers.base import Normalizer
from lightning_norm.layers.scheduled import saved_values
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
def evaluation_is_saved(make: Make) -> None:
    """Whatever evaluation reads is in the state_dict: parameters, buffers, scheduled values; a plain dict holds it all.

    Files without scheduled values, as written before one was declared, load as they are.
    """
    layer, x = trained(make), features(4, C, 7, 3, seed=9)
    with torch.no_grad():
        for name, t in layer.named_buffers():
            if t.is_floating_point() and name[1:] not in layer.ranges:
                t.add_(0.2 * noise(*t.shape, seed=11).abs().to(t.dtype))
    for name, span in layer.ranges.items():
        try:
            setattr(layer, name, max(span.low, 0) + 0.7 * (min(span.high, 1) - max(span.low, 0)))
        except ValueError:
            continue  # this layer has none
    file = io.BytesIO()
    torch.save(dict(layer.state_dict()), file)
    for assign in (False, True):
        file.seek(0)
        fresh, state = make(C), torch.load(file, weights_only=True)
        fresh.load_state_dict(state, assign=assign)
        same(fresh.eval()(x), layer.eval()(x), 0.0, f"loaded with assign={assign}, evaluation")
        for name, value in saved_values(layer).items():
            assert getattr(fresh, name) == value, f"{name} = {value} is {getattr(fresh, name)} after loading"
        make(C).load_state_dict({n: t for n, t in state.items() if n[1:] not in layer.ranges}, assign=assign)
        behind = copy.deepcopy(layer)
        for name in saved_values(layer):
            setattr(behind, name, max(layer.ranges[name].low, 0))
        averaged = torch.optim.swa_utils.AveragedModel(behind)
        averaged.update_parameters(layer)
        for name, value in saved_values(layer).items():
            assert getattr(averaged.module, name) == value, f"AveragedModel: {name} is {getattr(averaged.module, name)}"


@check
def loads_in_part(make: Make) -> None:
    """With ``strict=False`` any part of a state_dict loads: what is in it arrives, and the rest counts as missing."""
    saved = trained(make).state_dict()
    names, chosen = list(saved), random.Random(0)
    for _ in range(60):
        part = [name for name in names if chosen.random() < 0.5]
        layer = make(C)
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        result = layer.load_state_dict({name: saved[name] for name in part}, strict=False)
        # As in torch, a file without metadata may lack the number of batches.
        missing = {*names} - {*part, "num_batches_tracked"}
        assert {*result.missing_keys} - {"num_batches_tracked"} == missing, f"{part}: {result.missing_keys} missing"
        assert not result.unexpected_keys, f"{part}: {result.unexpected_keys} unexpected"
        for name, value in layer.state_dict().items():
            same(value, saved[name] if name in part else before[name], 0.0, f"{name}, of {part}")


@check
def without_bias(make: Make) -> None:
    """``bias=False`` leaves out the bias alone; without a bias or a weight it is as with 0 or 1."""
    x, dy = features(5, C, 7, 3, dtype=torch.float64), noise(5, C, 7, 3, seed=7, dtype=torch.float64)
    for name, neutral in (("bias", 0.0), ("weight", 1.0)):
        full = built(make, torch.float64)
        if getattr(full, name) is None:
            continue
        lacking = copy.deepcopy(full)
        if name == "bias":
            lacking = make(C, bias=False).double()
            assert lacking.bias is None, "bias=False left a bias"
            assert (lacking.weight is None) == (full.weight is None), "bias=False took the weight as well"
            lacking.load_state_dict({n: t for n, t in full.state_dict().items() if n != "bias"}, strict=True)
        setattr(lacking, name, None)
        with torch.no_grad():
            full.get_parameter(name).fill_(neutral)
        for training in (True, False):
            a, b = (step(layer.train(training), x, dy) for layer in (lacking, full))
            same(a.y, b.y, 1e-12, f"without {name}, training={training}, output")
            same(a.dx, b.dx, 1e-12, f"without {name}, training={training}, input gradient")
            for other, grad in a.grads.items():
                same(grad, b.grads[other], 1e-12, f"without {name}, training={training}, gradient of {other}")
        source = nn.BatchNorm2d(C).double()
        setattr(source, name, None)
        taken = make(C).double()
        taken.take_from(source)
        translated = {t.target for t in taken._translations if t.source == name}
        assert getattr(taken, name) is None or name in translated, f"take_from made up a {name}"
        plain = taken.plain(4)
        other = {"weight": "bias", "bias": "weight"}[name]
        if plain is not None and getattr(taken, other) is not None and getattr(plain, other) is getattr(taken, other):
            assert getattr(plain, name) is None, f"plain() made up a {name}"


@check
def made_and_moved_as_torchs(make: Make) -> None:
    """``torch.nn.utils.skip_init``, ``share_memory``, and ``load_state_dict(assign=True)`` on the meta device."""
    layer, x = trained(make), features(4, C, 7, 3, seed=9)
    made = make.args[0] if isinstance(make, functools.partial) else make
    keywords = getattr(made, "keywords", {})
    empty = torch.nn.utils.skip_init(type(layer), C, **keywords)  # type: ignore[no-untyped-call]
    empty.load_state_dict(layer.state_dict())
    agree(copy.deepcopy(layer), empty, "skip_init")
    layer.share_memory()
    tensors: list[tuple[str, Any]] = [*layer.named_parameters(), *layer.named_buffers()]
    unshared = [name for name, t in tensors if not t.is_shared()]
    assert not unshared, f"share_memory() left out {unshared}"
    meta = make(C, device="meta")
    meta.load_state_dict(layer.state_dict(), assign=True)
    left = [name for name, t in (*meta.named_parameters(), *meta.named_buffers()) if t.is_meta]
    assert not left, f"assign=True left {left} on the meta device"
    same(meta.eval()(x), layer.eval()(x), 0.0, "assign=True from the meta device, evaluation")


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
    """``monitor()`` gives 0-dim tensors without a graph, finite after a training step; NaN was never measured."""
    layer = built(make)
    before = layer.monitor()
    step(layer, features(5, C, 7, 3), noise(5, C, 7, 3, seed=7))
    after = layer.monitor()
    assert before.keys() == after.keys(), f"monitor() has {list(before)} before a step and {list(after)} after it"
    for name, value in (*before.items(), *after.items()):
        assert value.dim() == 0, f"monitor()[{name!r}] has the shape {tuple(value.shape)}"
        assert not value.requires_grad, f"monitor()[{name!r}] holds a graph"
    for name, value in after.items():
        assert bool(value.isfinite()), f"monitor()[{name!r}] is {value}"


@check
def meta_and_arguments(make: Make) -> None:
    """Builds on the meta device, in a dtype that is asked for, and without parameters."""
    for arguments in ({}, {"affine": False}):
        meta = make(C, device="meta", **arguments)
        left = [name for name, t in (*meta.named_parameters(), *meta.named_buffers()) if not t.is_meta]
        assert not left, f"device='meta' left {left} elsewhere, with {arguments}"
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
