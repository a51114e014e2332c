"""Checks: what a class declares of itself is what it does."""

from __future__ import annotations

import copy
import inspect
import math
import re

import torch
from torch import Tensor, nn

from lightning_norm.layers.base import Normalizer
from lightning_norm.surgery.harden import harden
from lightning_norm.surgery.recalibrate import recalibrate
from lightning_norm.testing.kit import (
    C,
    Make,
    built,
    check,
    distance,
    features,
    noise,
    refused,
    same,
    seeded,
    statistics,
)


@check
def train_uses_batch_stats(make: Make) -> None:
    """In training, a sample depends on its batch mates if and only if ``train_uses_batch_stats`` is declared."""
    layer = built(make, torch.float64)
    x = features(5, C, 7, 3, dtype=torch.float64)
    others = torch.cat([x[:1], features(4, C, 7, 3, seed=9, dtype=torch.float64) * 3])
    # A layer for each input, because the first forward moves what the second would see.
    apart = distance(*(built(make, torch.float64)(t)[:1] for t in (x, others)))
    assert (apart > 1e-6) == layer.train_uses_batch_stats, (
        f"train_uses_batch_stats={layer.train_uses_batch_stats}, but other batch mates move the output by {apart:.1e}"
    )


@check
def eval_uses_input_stats(make: Make) -> None:
    """In evaluation, a pixel depends on far ones of its sample if and only if ``eval_uses_input_stats`` is declared."""
    layer = built(make, torch.float64).eval()
    x = features(5, C, 7, 3, dtype=torch.float64)
    other = x.clone()
    # Out of the reach of a 9 x 9 kernel, which may look at near pixels and still be a fixed map.
    other[:, :, 5:] += noise(5, C, 2, 3, seed=9, dtype=torch.float64)
    apart = distance(*(layer(t)[:, :, 0] for t in (x, other)))
    assert (apart > 1e-6) == layer.eval_uses_input_stats, (
        f"eval_uses_input_stats={layer.eval_uses_input_stats}, but far pixels move the output by {apart:.1e}"
    )


@check
def evaluation_ignores_batch_mates(make: Make) -> None:
    """In evaluation, each sample's output is the same alone, among others, and among wild others."""
    layer = built(make, torch.float64).eval()
    x = features(5, C, 7, 3, dtype=torch.float64)
    # A sum over the batch that is divided out again would pass with mates of the same size.
    wild = torch.cat([x[:1], 100 * features(4, C, 7, 3, seed=9, dtype=torch.float64)])
    together = layer(x)
    same(torch.cat([layer(x[i : i + 1]) for i in range(5)]), together, 1e-12, "samples one by one")
    same(layer(wild)[:1], together[:1], 1e-12, "a sample among others")


@check
def choice_is_what_it_computes(make: Make) -> None:
    """Where ``choice`` names a plain normalizer, with all weight on it, ``harden`` keeps what evaluation computes."""
    layer = make(C)
    model, choice = nn.Sequential(layer).double(), layer.choice(1.0)
    if choice is None or not choice.norm or choice.why:  # which says how the two differ
        return
    x = features(5, C, 7, 3, dtype=torch.float64)
    model(x)
    before = model.eval()(x)
    assert len(harden(model, x, threshold=1.0)) == 1, f"choice says {choice}, and harden leaves the layer"
    same(model(x), before, 1e-12, f"{choice.norm}, which the weights chose,")


@check
def extra_parameters(make: Make) -> None:
    """``extra_parameters`` lists each parameter beside weight and bias, its size in terms of C and the arguments."""
    layer = make(C)
    # Elements and not shapes, for the sizes are what the report of a swap and the cards say.
    actual = {name: p.numel() for name, p in layer.named_parameters() if name not in ("weight", "bias")}
    # The declared sizes are expressions such as "max(1, C//2)": only these words and arithmetic are evaluated.
    known = {
        "C": C,
        **{
            name: getattr(layer, name)
            for name in getattr(layer, "repr_arguments", ())
            if isinstance(getattr(layer, name), int)
        },
    }
    words = "|".join(("max", "min", *known))
    for name, count in type(layer).extra_parameters.items():
        assert re.fullmatch(rf"(?:\b(?:{words})\b|[\d\s+*/(),-])+", count), (
            f"extra_parameters[{name!r}] = {count!r} is not an expression in {', '.join(known)}"
        )
    declared = {
        name: int(eval(count, dict(known))) for name, count in type(layer).extra_parameters.items()
    }  # checked above
    assert actual == declared, f"parameters beside weight and bias: {actual}; declared for C = {C}: {declared}"
    for name in ("weight", "bias"):
        p = getattr(layer, name)
        assert p is None or p.shape[-1] == C, f"{name} has the shape {tuple(p.shape)}, expected (..., {C})"


@check
def preserves_eval(make: Make) -> None:
    """Made from a trained BatchNorm, the layer evaluates to what that did if and only if it says so."""
    # Neither parameters nor running statistics at their starts: there, too many wrong layers would agree.
    bn = nn.BatchNorm2d(C).double()
    for seed in (1, 2, 3):
        bn(features(5, C, 7, 3, seed=seed, dtype=torch.float64))
    with torch.no_grad():
        for i, p in enumerate(bn.parameters()):
            p.add_(0.3 * noise(C, seed=500 + i, dtype=torch.float64))
    layer = make(C).double()
    # As a swap does it; whether a checkpoint loads to the same is another check.
    layer.take_from(bn)
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        assert parameter is None or name in layer.translated_tensors or parameter is getattr(bn, name), (
            f"{name} was copied, not moved: an optimizer still holds the old one"
        )
    x = features(4, C, 7, 3, seed=9, dtype=torch.float64)
    apart = distance(layer.eval()(x), bn.eval()(x))
    keeps = layer.preserves_eval
    assert (apart < 1e-12) == keeps, (
        f"preserves_eval={keeps}, and evaluation differs by {apart:.1e} from that of the BatchNorm that the layer was "
        f"made from: declare preserves_eval = {apart < 1e-12}"
    )


@check
def paper_and_docs(make: Make) -> None:
    """A registered class names its paper, and its docstring holds the equation and an example."""
    cls = type(make(C))
    if not cls.key:
        return
    assert cls.registry[cls.key] is cls, f"{cls.key!r} is {cls.registry[cls.key]} in the registry"
    assert cls.paper is not None, f"{cls.__name__}.paper is missing"
    for part in (".. math::", ">>> ", "Args:"):
        assert part in (cls.__doc__ or ""), f"the docstring of {cls.__name__} has no {part!r}"


def variants(make: Make, name: str, value: float) -> list[Normalizer]:
    """Return the layer with ``name`` set, as made by default and with each boolean argument the other way round."""
    flags: dict[str, bool] = {}
    for cls in type(make(C)).__mro__[:-1]:
        arguments = inspect.signature(cls).parameters.values()
        flags.update({a.name: not a.default for a in arguments if isinstance(a.default, bool) and a.name not in flags})
    layers = []
    for other in ({}, *({k: v} for k, v in flags.items())):
        try:
            layers.append(built(lambda c, o=other: make(c, **{name: value, **o}), torch.float64))
        except (TypeError, ValueError):
            # The class does not take this argument, or not beside the other.
            continue
    return layers


@check
def scheduled(make: Make) -> None:
    """Every ``Scheduled`` argument has an effect, however set; refuses bad values; is saved if evaluation reads it."""

    def outcome(layer: Normalizer) -> Tensor:
        x = features(5, C, 7, 3, dtype=torch.float64)
        # Twice, for the first batch may be copied whatever its weight; seeded, so that layers with dropout draw alike.
        seeded(layer.train(), 2 * x + 1)
        trained = seeded(layer, x)
        parts = [trained, *(v.double() for v in statistics(layer).values()), layer.eval()(x)]
        return torch.cat([part.detach().flatten() for part in parts])

    for name, span in type(make(C)).ranges.items():
        # A range without end has its effect near its beginning.
        width = span.high - span.low if math.isfinite(span.high) else 0.1
        low, high = (span.low + fraction * width for fraction in (0.3, 0.6))
        pairs = list(zip(variants(make, name, low), variants(make, name, high), strict=True))
        if not pairs:
            # The argument is inherited, and this class refuses it.
            continue
        effects = []
        for at_low, at_high in pairs:
            assert getattr(at_low, name) == low, f"{name}={low} reads back as {getattr(at_low, name)}"
            expected = outcome(at_high)
            setattr(at_low, name, high)
            assigned = outcome(at_low)
            same(assigned, expected, 1e-12, f"{name}: assigned and constructed")
            effects.append(name)
        # New layers, for the ones above have moved their running statistics.
        fresh = zip(variants(make, name, low), variants(make, name, high), strict=True)
        moved = [distance(outcome(a), outcome(b)) for a, b in fresh]
        assert max(moved) > 1e-6, (
            f"{name} has no effect at {low} against {high}, whatever flag is set: let __init__ refuse it, as a layer "
            "without running statistics refuses momentum, or name it in without_effect()"
        )
        layer = make(C)
        # ``None`` is a value like any other where the signature allows it.
        nothing = () if span.optional else (None,)
        beyond = (span.high + 0.1,) if math.isfinite(span.high) else ()
        for bad in (span.low - 0.1, *beyond, float("nan"), "x", *nothing):
            before = getattr(layer, name)
            with refused(ValueError, f"{name} = {bad!r}", name, str(bad)):
                setattr(layer, name, bad)
            assert getattr(layer, name) == before, f"{name} changed although {bad!r} was refused"
        saved = f"_{name}" in layer.state_dict()
        assert not (saved and span.training_only), f"{name} is saved, but declared Scheduled(..., training_only=True)"
        # Made with a value, for the argument may decide which buffers there are.
        layer = variants(make, name, low)[0].eval()
        x = features(5, C, 7, 3, dtype=torch.float64)
        outputs = []
        for value in (low, high):
            setattr(layer, name, value)
            outputs.append(layer(x))
        assert saved or distance(*outputs) == 0, (
            f"evaluation reads {name}, and no checkpoint holds it: leave out training_only=True, and name it in "
            "without_effect() only where it has no effect"
        )


@check
def running_statistics_as_in_torch(make: Make) -> None:
    """``track_running_stats = False`` at run time only stops updates; without buffers, the input's count."""
    layer, x = built(make), features(5, C, 7, 3)
    if not layer.track_running_stats:
        return
    expected, before = layer.eval()(x), statistics(layer)
    layer.track_running_stats = False
    same(layer(x), expected, 0.0, "evaluation after track_running_stats = False")
    layer.train()(x)
    for name, value in statistics(layer).items():
        assert torch.equal(value, before[name]), f"{name} moved after track_running_stats = False"
    cleared, never = built(make), built(lambda c: make(c, track_running_stats=False))
    for name in (*cleared.running_names, "num_batches_tracked"):
        setattr(cleared, name, None)
    for training in (True, False):
        got, wanted = (seeded(one.train(training), x) for one in (cleared, never))
        same(got, wanted, 1e-6, f"running statistics set to None, training={training}")


@check
def evaluation_form(make: Make) -> None:
    """What ``eval_affine`` and ``plain`` say the layer is in evaluation is what it does, at the start and trained."""
    x = features(4, C, 7, 3, seed=9, dtype=torch.float64)
    # One training step, or the running statistics of a fresh layer would be 0 and 1.
    start = make(C).double()
    start(features(5, C, 7, 3, dtype=torch.float64))
    for layer in (start, built(make, torch.float64)):
        y = layer.eval()(x)
        affine = layer.eval_affine()
        tracks = layer.track_running_stats and not layer.eval_uses_input_stats
        known = affine is not None or layer.plain(4) is not None
        assert known or not tracks, "a fixed map in evaluation, and neither eval_affine() nor plain() gives it"
        if affine is not None:
            center, scale, shift = (t.view(1, C, 1, 1) for t in affine.fields(1, C))
            same(scale * (x - center) + shift, y, 1e-12, "eval_affine(), evaluation")
        plain = layer.plain(4)
        if plain is None:
            assert layer.why_not_plain(4), "plain() gives None and why_not_plain() no reason"
        else:
            same(plain.eval()(x), y, 1e-12, "plain(), evaluation")


@check
def recalibrates(make: Make) -> None:
    """Running statistics re-estimated on two batches are those of both as one, or the class says why they are not."""
    layer = built(make, torch.float64)
    if not layer.track_running_stats or layer.unsupported.recalibration:
        return
    # Batches of unequal size and scale: an average of their variances would be wrong by much.
    parts = [features(n, C, 7, 3, seed=n, dtype=torch.float64) * n for n in (3, 4)]
    whole = copy.deepcopy(layer)
    recalibrate(torch.nn.Sequential(layer), parts)
    recalibrate(torch.nn.Sequential(whole), [torch.cat(parts)])
    for name in layer.running_names:
        got, expected = layer._buffers[name], whole._buffers[name]
        assert got is not None
        assert expected is not None
        same(got, expected, 1e-12, f"{name} of two batches against one")
