"""Anything where a manifest, a spec, a state_dict or an argument is expected: refused with a type, and nothing changes.

One example of hypothesis is a wrong value, which is put into every place in turn; each place is a case, and the number
of cases is printed. 100 000 of them take less than five minutes of a processor.
"""

import copy
import math
import os
import traceback
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
import torch
import yaml
from hypothesis import strategies as st
from torch import nn

import lightning_norm
from lightning_norm import create, normalizers, swap
from lightning_norm.errors import CheckpointError
from lightning_norm.layers.registry import resolve
from lightning_norm.surgery.manifest import manifest_in, manifest_of, rebuild, rules_of

PACKAGE = str(Path(lightning_norm.__file__).parent)
EACH = int(os.environ.get("FUZZ_CASES", 100_000)) // 4
CASES = dict.fromkeys(("manifest", "spec", "state_dict", "arguments"), EACH)
COUNTS = Counter()
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, 1, -1, 2**31, 2**63, 1e-320, math.nan, math.inf, -0.0, True])
)
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["", "sn", "bn.", "torch.nn.Module", "os.system", "\x00", "no"]))
PLAIN = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS, st.binary(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, st.integers()), inner, max_size=3)
    ),
    max_leaves=4,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*does not replace BatchNorm:UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning"),
    pytest.mark.filterwarnings("ignore::lightning_norm.errors.PublishedFileWarning"),
]


def until(kind):
    """Run examples until there were so many cases."""
    settings = hypothesis.settings(
        max_examples=200,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )

    def decorate(check, *strategies):
        seed = 0
        while COUNTS[kind] < CASES[kind]:
            run = hypothesis.given(*strategies)(check)
            hypothesis.seed(seed)(settings(run))()
            seed += 1
        print(f"{kind}: {COUNTS[kind]} cases")

    return decorate


def typed(error):
    """Whether an error was raised by this package, and not met on the way."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename.startswith(PACKAGE)


def attempt(kind, action, wrong, allowed=(ValueError, TypeError, RuntimeError)):
    """Count a case; return whether it was taken, and fail on an error that nobody has written."""
    COUNTS[kind] += 1
    error = raised(action, allowed)
    assert error is None or typed(error), f"{wrong!r:.300}: {type(error).__name__}: {error} is nobody's message"
    assert error is None or str(error)
    return error is None


def raised(action, allowed):
    """The error of an action, or ``None``."""
    try:
        action()
    except allowed as error:
        return error
    return None


def places(value, path=()):
    """Every place in a nested value, as a path."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from places(value[i], (*path, i))


def put(value, path, wrong):
    """A copy with something else at a place."""
    if not path:
        return wrong
    changed = copy.deepcopy(value)
    holder = changed
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = wrong
    return changed


def network():
    return nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4))


def same_modules(model, modules):
    return list(model.modules()) == modules and type(model[0]) is nn.BatchNorm2d


def test_manifest():
    trained = network()
    swap(trained, "sn", norm_args={"sparse": True})
    manifest = manifest_of(trained)

    def check(wrong):
        for path in places(manifest):
            model = network()
            before = list(model.modules())

            def load(path=path, model=model):
                there = manifest_in({"lightning_norm": put(manifest, path, wrong)}, "the file")
                if there is not None:
                    rules_of(there)
                    rebuild(model, there, "the file")

            taken = attempt("manifest", load, (path, wrong), CheckpointError)
            assert taken or same_modules(model, before), (path, wrong)

    until("manifest")(check, PLAIN)


SPECS = [
    "sn",
    {"class_path": "sn", "init_args": {"sparse": True, "momentum": 0.2}},
    {"class_path": "lightning_norm.UnifiedBatchNorm", "init_args": {"threshold": 0.5, "rectify": ["scale"]}},
]


def test_spec_in_yaml():
    def check(wrong):
        for spec in SPECS:
            for path in places(spec):
                changed = put(spec, path, wrong)
                try:
                    text = yaml.safe_dump(changed)
                    changed = yaml.safe_load(text)
                except yaml.YAMLError:
                    continue  # no YAML at all
                attempt("spec", lambda c=changed: resolve(c), changed)
                model = network()
                before = list(model.modules())
                if not attempt("spec", lambda c=changed, m=model: swap(m, c), changed):
                    assert same_modules(model, before), changed

    until("spec")(check, PLAIN)


TENSORS = st.sampled_from(
    [
        torch.zeros(()),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.complex64),
        torch.zeros(0),
        torch.zeros(3, 4),
        torch.full((4,), torch.nan),
        torch.zeros(4, device="meta"),
        torch.zeros(4).to_sparse(),
        torch.zeros(4, dtype=torch.bool),
        torch.zeros(1, 4, 1, 1),
        nn.Parameter(torch.zeros(2)),
    ]
)


def test_state_dict():
    layers = {
        key: create(key, 4, **({"num_groups": 2} if key == "gn" else {})) for key in normalizers() if key != "ibn"
    }
    states = {key: layer.state_dict() for key, layer in layers.items()}

    def check(wrong):
        for key, layer in layers.items():
            for name in states[key]:
                before = {n: t.clone() for n, t in layer.state_dict().items()}
                changed = states[key].copy()
                changed._metadata = states[key]._metadata
                changed[name] = wrong
                COUNTS["state_dict"] += 1
                # torch gathers what is wrong, and raises once; our own lines are in its message.
                error = raised(lambda m=layer, c=changed: m.load_state_dict(c), (RuntimeError, TypeError))
                assert error is None or str(error), (key, name, wrong)
                after = layer.state_dict()
                assert list(after) == list(before)
                for n, tensor in after.items():
                    assert (tensor.dtype, tensor.shape) == (before[n].dtype, before[n].shape), (key, n)
                layer.load_state_dict(before)

    until("state_dict")(check, st.one_of(TENSORS, PLAIN))


def test_arguments():
    signatures = {key: list(cls.ranges) for key, cls in normalizers().items()}
    common = ("eps", "momentum", "affine", "bias", "channel_dim")
    known = {key: sorted({*common, *cls.repr_arguments, *cls.ranges}) for key, cls in normalizers().items()}

    def check(wrong):
        for key, names in known.items():
            # On no device: 2**31 channels, or contexts, are no mistake, and would fill the memory of the machine.
            attempt("arguments", lambda k=key: create(k, wrong, device="meta"), (key, wrong))
            for name in names:
                options = {"device": "meta", **({"num_groups": 2} if key == "gn" else {})}
                attempt("arguments", lambda k=key, o={**options, name: wrong}: create(k, 4, **o), (key, name, wrong))
            layer = create(key, 4, **({"num_groups": 2} if key == "gn" else {}))
            for name in signatures[key]:
                before = getattr(layer, name)
                if not attempt("arguments", lambda n=name, m=layer: setattr(m, n, wrong), (key, name, wrong)):
                    assert getattr(layer, name) == before, (key, name, wrong)

    until("arguments")(check, PLAIN)
