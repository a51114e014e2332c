"""Wang et al. 2023: the condensation threshold and the rectifications, as this package reads them."""

import copy
import functools
import io
import itertools
import sys

import pytest
import torch
from torch import nn

from lightning_norm import UnifiedBatchNorm, swap
from lightning_norm.testing import checks
from lightning_norm.testing.ranks import run_ranks
from tests.normalizers.paper import agrees, along, data, shaken

SHAPES = [(5, 6), (5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]
PARTS = ("center", "scale", "affine")
RECTIFY = [c for k in range(4) for c in itertools.combinations(PARTS, k)]
SIGMOID = {1: 0.7310585786300049, -1: 0.2689414213699951}
NOW = {"min_updates": 0}


def cosine(x):
    """The mean over all pairs, from the Gram matrix."""
    u = nn.functional.normalize(x.flatten(1), dim=1, eps=1e-300)
    u = u[x.flatten(1).norm(dim=1) > 0]
    gram = u @ u.t()
    return ((gram.sum() - gram.diagonal().sum()) / (len(u) * (len(u) - 1))).item()


def condensed(*shape, seed=0):
    """A batch of samples that are almost the same."""
    return data(*shape, seed=seed)[:1] * torch.rand(shape[0], *[1] * (len(shape) - 1)).add(1) + 0.1 * data(*shape)


def pooled(x):
    return x.mean(tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x


def renormalized(x, running, eps, most=3.0, off=5.0):
    """Ioffe 2017: the batch's own statistics, with r and d as constants."""
    b = [d for d in range(x.dim()) if d != 1]
    mean, sd = x.mean(b), torch.sqrt(x.var(b, unbiased=False) + eps)
    with torch.no_grad():
        sd_r = torch.sqrt(running[1] + eps)
        r, d = (sd / sd_r).clamp(1 / most, most), ((mean - running[0]) / sd_r).clamp(-off, off)
    return (x - along(mean, x)) / along(sd, x) * along(r, x) + along(d, x)


def paper(rectify=PARTS, gate_init="unit", running=None, eps=1e-5, renorm=False):
    def reference(x, p):
        def gate(part, k, start):
            g = torch.sigmoid(along(p[f"{part}_weight"], x) * k + along(p[f"{part}_bias"], x))
            return g / SIGMOID[start] if gate_init == "unit" else g

        gamma = along(p["weight"], x)
        if "affine" in rectify:
            gamma = gamma * gate("affine", pooled(x), -1)
        if "center" in rectify:
            x = x + along(p["center_weight"], x) * pooled(x)
        b = [d for d in range(x.dim()) if d != 1]
        mean, var = running or (x.mean(b), x.var(b, unbiased=False))
        s = (x - along(mean, x)) / torch.sqrt(along(var, x) + eps)
        if renorm:
            s = renormalized(x, running, eps)
        if "scale" in rectify:
            s = s * gate("scale", pooled(s), 1)
        return gamma * s + along(p["bias"], x)

    return reference


def running(layer):
    return layer.running_mean.clone(), layer.running_var.clone()


@pytest.mark.parametrize(("rectify", "gate_init"), list(itertools.product(RECTIFY, ["unit", "paper"])))
def test_equation(rectify, gate_init):
    for shape in SHAPES if rectify == PARTS else SHAPES[::2]:
        layer = shaken(UnifiedBatchNorm(6, rectify=rectify, gate_init=gate_init))
        assert len(list(layer.parameters())) == 2 + sum({"center": 1}.get(part, 2) for part in rectify)
        agrees(layer, paper(rectify, gate_init), data(*shape))
        agrees(layer.eval(), paper(rectify, gate_init, running(layer)), data(*shape, seed=1))


@pytest.mark.parametrize("mode", ["switch", "gate"])
@pytest.mark.parametrize("rectify", RECTIFY)
def test_a_condensed_batch_does_not_move_the_statistics(rectify, mode):
    for shape in SHAPES:
        x = condensed(*shape)
        assert cosine(x) > 0.5 > cosine(data(*shape))
        layer = shaken(UnifiedBatchNorm(6, threshold=0.5, mode=mode, rectify=rectify, **NOW))
        before = running(layer)
        agrees(layer, paper(rectify, running=before if mode == "switch" else None), x)
        assert all(torch.equal(a, b) for a, b in zip(running(layer), before, strict=True))
        assert (layer.num_batches_tracked, layer.skipped, layer.measured, layer.skipped_updates) == (0, 1, 1, 0)
        agrees(layer, paper(rectify), data(*shape))
        assert not torch.equal(running(layer)[0], before[0])
        assert (layer.num_batches_tracked, layer.skipped, layer.measured) == (1, 1, 2)
        torch.testing.assert_close(layer.monitor()["skipped"], torch.tensor(0.5))


@pytest.mark.parametrize("rectify", RECTIFY)
@pytest.mark.parametrize("size", [1.0, 0.02, 50.0])
def test_a_condensed_batch_with_the_gradient_of_its_own_statistics(rectify, size):
    x = condensed(5, 6, 7, 3) * size  # 0.02 and 50 are beyond the limits
    layer = shaken(UnifiedBatchNorm(6, threshold=0.5, condensed_grad="renorm", rectify=rectify, **NOW))
    before = running(layer)
    agrees(layer, paper(rectify, running=before, renorm=True), x)
    assert all(torch.equal(a, b) for a, b in zip(running(layer), before, strict=True))
    agrees(layer, paper(rectify), data(5, 6, 7, 3))


def test_within_the_limits_the_value_is_that_of_the_running_statistics():
    x = data(5, 6, 7, 3)
    layers = [UnifiedBatchNorm(6, threshold=-1.0, condensed_grad=g, **NOW).double() for g in ("detach", "renorm")]
    for layer in layers:
        layer.running_mean.copy_(x.mean((0, 2, 3)) + 0.5)
        layer.running_var.copy_(x.var((0, 2, 3)) * 2)
    torch.testing.assert_close(layers[0](x), layers[1](x), rtol=1e-12, atol=1e-12)
    assert [layer.skipped for layer in layers] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_condensation_is_the_mean_pairwise_cosine_of_the_input(shape, dtype):
    layer = UnifiedBatchNorm(6, threshold=1.0).to(torch.promote_types(dtype, torch.float32))
    for seed, size in itertools.product(range(2), (1.0, 300.0)):
        x = (data(*shape, seed=seed) * size).to(dtype)
        for passed in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat_interleave(2, 0)[::2]):
            layer(passed)
            assert layer.condensation.item() == pytest.approx(cosine(x.double()), abs=1e-6)
        if x.dim() == 4:
            layer(x.contiguous(memory_format=torch.channels_last))
            assert layer.condensation.item() == pytest.approx(cosine(x.double()), abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert layer.condensation.item() == pytest.approx(cosine(x.double()), abs=1e-6)


def test_condensation_of_tokens_and_at_large_means():
    layer = UnifiedBatchNorm(6, threshold=1.0, channel_dim=-1)
    layer(data(5, 7, 6).float())
    assert layer.condensation.item() == pytest.approx(cosine(data(5, 7, 6)), abs=1e-6)
    layer(data(5, 7, 6).float() + 100)
    assert layer.condensation.item() == pytest.approx(cosine(data(5, 7, 6).float().double() + 100), abs=1e-6)


def test_zero_samples_do_not_count_and_fewer_than_two_others_are_not_condensed():
    layer = UnifiedBatchNorm(6, threshold=-1.0, **NOW).double()
    x = data(5, 6, 7, 3)
    x[1] = x[3] = 0
    layer(x)
    assert layer.condensation.item() == pytest.approx(cosine(x), abs=1e-6)
    assert layer.skipped == 1  # above -1, as any three samples that are not opposed
    last = layer.condensation.clone()
    x[0] = x[2] = 0  # one is left
    for few in (x, x[:4], x[4:]):  # one, none, N = 1
        updates = layer.num_batches_tracked.clone()
        layer(few)
        assert layer.num_batches_tracked == updates + 1
        assert torch.equal(layer.condensation, last)
    assert (layer.skipped, layer.measured) == (1, 1)


def test_without_threshold_or_in_evaluation_nothing_is_measured(monkeypatch):
    def never(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(sys.modules[UnifiedBatchNorm.__module__], "condensation", never)
    x = data(5, 6, 7, 3).float()
    layer = UnifiedBatchNorm(6)
    layer(x)
    layer.threshold = 0.5
    layer.eval()(x)
    with pytest.raises(AssertionError, match="measured"):
        layer.train()(x)
    layer.threshold = None
    layer(x)
    assert "condensation" not in layer.monitor()


def test_warm_up_and_lock_protection():
    """A network that starts condensed must not normalize by (0, 1) for ever."""
    layer = UnifiedBatchNorm(6, threshold=0.5, min_updates=2, max_skip=3).double()
    x = condensed(5, 6, 7, 3)
    moved = []
    for _ in range(11):
        before = layer.running_mean.clone()
        layer(x)
        moved.append(not torch.equal(before, layer.running_mean))
    assert moved == [True, True, False, False, False, True, False, False, False, True, False]
    assert (layer.num_batches_tracked, layer.skipped, layer.skipped_in_a_row) == (4, 7, 1)


def test_statistics_that_moved_in_need_no_warm_up():
    bn = nn.BatchNorm2d(6)
    bn.num_batches_tracked += 100
    model = nn.Sequential(bn)
    swap(model, "ubn", norm_args={"threshold": 0.5})
    model(condensed(5, 6, 7, 3).float())
    assert model[0].skipped == 1


def test_a_resumed_run_is_the_same_run():
    first, second = (UnifiedBatchNorm(6, threshold=0.5, min_updates=1, max_skip=2) for _ in range(2))
    x = condensed(5, 6, 7, 3).float()
    for _ in range(3):
        first(x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        assert torch.equal(first(x), second(x))
        assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_nan_is_not_condensed_but_skipped():
    layer = UnifiedBatchNorm(6, threshold=-1.0, **NOW)
    x = data(5, 6, 7, 3).float()
    x[0, 0] = torch.nan
    layer(x)
    assert (layer.skipped, layer.skipped_updates, layer.num_batches_tracked) == (0, 1, 0)
    assert torch.equal(layer.running_mean, torch.zeros(6))


def test_starts_as_batch_norm_or_at_a_fifth():
    x = data(5, 6, 7, 3)
    for training in (True, False):
        expected = nn.BatchNorm2d(6).double().train(training)(x)
        unit, other = (UnifiedBatchNorm(6, gate_init=g).double().train(training) for g in ("unit", "paper"))
        torch.testing.assert_close(unit(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other(x), SIGMOID[1] * SIGMOID[-1] * expected, rtol=1e-12, atol=1e-12)
    assert unit.preserves_eval
    assert not other.preserves_eval
    assert UnifiedBatchNorm(6, rectify=["center"], gate_init="paper").preserves_eval


def steps(rank, layer, batches):
    for x in batches:
        layer(x.split([3, 0, 2] if len(x) == 5 else [1, 1, 0])[rank])
    return {name: b.clone() for name, b in layer.named_buffers()}


def test_every_rank_takes_the_branch_of_the_whole_batch():
    """Uneven and empty ranks, memory formats that differ, samples alike within each rank and opposed between them."""
    x = condensed(5, 6, 7, 3)
    opposed = torch.cat([x[:3], -x[3:]])
    assert cosine(x) > 0.5 > cosine(opposed)
    pair = data(2, 6, 7, 3)
    batches = [opposed, x, x.contiguous(memory_format=torch.channels_last), pair, torch.cat([pair[:1], 2 * pair[:1]])]
    layer = shaken(UnifiedBatchNorm(6, threshold=0.5, **NOW))
    whole = copy.deepcopy(layer)
    ranks = run_ranks(steps, 3, layer, batches)
    for batch in batches:
        whole(batch)
    assert (whole.skipped, whole.measured) == (3, 5)
    for stored in ranks:
        assert stored.keys() == dict(whole.named_buffers()).keys()
        for name, b in whole.named_buffers():
            torch.testing.assert_close(stored[name], b, rtol=1e-10, atol=1e-10, msg=name)
            assert torch.equal(stored[name], ranks[0][name])


def test_compiled_steps():
    """Warm-up, a step that skips, one that must not, one that skips: values, gradients and buffers as in eager mode."""
    eager, compiled = (UnifiedBatchNorm(6, threshold=0.5, min_updates=1, max_skip=1) for _ in range(2))
    partitioned = torch.compile(compiled, backend="aot_eager_decomp_partition", fullgraph=True)
    for i in range(4):
        x, dy = condensed(5, 6, 7, 3, seed=i).float().requires_grad_(), data(5, 6, 7, 3, seed=9).float()
        results = []
        for layer, call in ((eager, eager), (compiled, partitioned)):
            y = call(x)
            results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], dy), *layer.buffers()))
        for got, expected in zip(*([t.double() for t in ts] for ts in results), strict=True):
            assert (got - expected).norm() <= 3e-6 * expected.norm() + 3e-6
    assert (eager.num_batches_tracked, eager.skipped) == (2, 2)


@pytest.mark.parametrize("last", [False, True])
def test_compiled_for_maps_of_any_size(last):
    eager, compiled = (UnifiedBatchNorm(6, threshold=0.5) for _ in range(2))
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (3, 4, 5):
        x = data(5, 6, 7, size).float()
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        torch.testing.assert_close(graph(x), eager(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"threshold": 1.5}, "threshold must lie in"),
        ({"threshold": 0.5, "track_running_stats": False}, "this layer keeps none"),
        ({"mode": "both"}, "'both'"),
        ({"min_updates": -1}, "min_updates must be an int >= 0"),
        ({"max_skip": 0}, "max_skip must be an int >= 1"),
        ({"rectify": ["center", "bias"]}, "bias"),
        ({"gate_init": None}, "gate_init"),
    ],
)
def test_refuses(arguments, word):
    with pytest.raises(ValueError, match=word):
        UnifiedBatchNorm(6, **arguments)


FEW = [
    "formats_agree",
    "tokens_agree",
    "gradcheck",
    "saves_only_the_input",
    "statistics_hold_no_graph",
    "half_inputs",
    "autocast_changes_nothing",
    "nan_does_not_poison",
    "small_inputs",
    "empty_batch",
    "evaluation_ignores_batch_mates",
    "state_dict_round_trip",
    "loads_batch_norm",
    "deepcopy_and_pickle",
    "monitored",
    "exports",
]


@pytest.mark.parametrize("name", FEW)
def test_conforms_while_it_measures(name):
    checks()[name](functools.partial(UnifiedBatchNorm, threshold=1.0, **NOW))
