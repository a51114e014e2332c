"""A file of one normalizer in a layer of another: refused, told, or evaluated as it was. All pairs of the registry."""

import io
import warnings

import pytest
import torch

import lightning_norm

ARGUMENTS = {
    "cn": [{"context": "gate"}, {"context": "ids"}],
    "bnet": [{}, {"statistics": "sn"}, {"statistics": "in"}],
    "gn": [{"num_groups": 4}, {"num_groups": 1}],
    "sn": [{}, {"choices": ["in", "bn"]}, {"choices": ["ln", "bn"]}, {"correction": 1}, {"sparse": True}],
    "bcn": [{}, {"constraint": "clamp"}],
    "rbn": [{}, {"gate_init": "paper"}],
    "ubn": [{}, {"gate_init": "paper"}],
    "afn": [{}, {"track_running_stats": False}],
    "dbn": [{}, {"average": "var"}],
    "brn": [{}, {"average": "var"}],
    "ibn": [{}, {"ratio": 0.25}],
}
CASES = [(key, arguments) for key in lightning_norm.normalizers() for arguments in ARGUMENTS.get(key, [{}])]
TAKEN = {"bn"}
"""Whose file every method takes, as a swap takes the layer."""


def trained(key, arguments):
    """A layer whose tensors are all away from their start."""
    torch.manual_seed(1)
    layer = lightning_norm.create(key, 8, **arguments)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for name, b in layer.named_buffers():
            if name.startswith("running"):
                b.add_(0.5 * torch.rand_like(b))
            elif name == "num_batches_tracked":
                b.fill_(7)
    return layer.eval()


def evaluated(layer):
    torch.manual_seed(2)
    with torch.no_grad():
        return layer.eval()(torch.randn(4, 8, 5, 5))


@pytest.fixture(scope="module")
def files():
    """What each case evaluates to, and its file, written and read."""
    made = []
    for case in CASES:
        layer, file = trained(*case), io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        made.append((case, evaluated(layer), torch.load(file, weights_only=True)))
    return made


@pytest.mark.parametrize(("key", "arguments"), CASES)
def test_nothing_is_loaded_in_silence_and_evaluated_otherwise(files, key, arguments):
    silent, loaded = [], []
    for case, wanted, state in files:
        layer = lightning_norm.create(key, 8, **arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                layer.load_state_dict(state)
            except RuntimeError:
                continue
        loaded.append(case)
        equal = torch.allclose(evaluated(layer), wanted, rtol=1e-4, atol=1e-4)
        if not (equal or caught or case[0] in TAKEN):
            silent.append(case)
        if case == (key, arguments):
            assert equal
            assert not caught
    assert silent == []
    assert (key, arguments) in loaded


def test_what_is_told():
    state = lightning_norm.create("gn", 8, num_groups=4).state_dict()
    with pytest.warns(lightning_norm.OtherFileWarning, match="are of 'gn', num_groups=4 and these of 'in'"):
        lightning_norm.create("in", 8).load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lightning_norm.create("ln", 8).load_state_dict(lightning_norm.create("gn", 8, num_groups=1).state_dict())
        # Without metadata, as in a safetensors file, there is nothing to compare.
        lightning_norm.create("in", 8).load_state_dict({**state})
