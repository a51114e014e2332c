"""Luo et al. 2021 (arXiv 1806.10779) equations (2) to (5); Shao et al. 2019 (arXiv 1903.03793), sparsestmax."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_norm import SwitchableNorm
from tests.normalizers.paper import agrees, along, data, shaken
from tests.ops.test_sparsestmax import recursive

SHAPES = [(5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]
SUBSETS = [c for k in (1, 2, 3, 4) for c in itertools.combinations(("in", "ln", "bn", "gn"), k)]
GROUPS = 3


def moments(x, kind, running=None):
    """Biased mean and variance in x's number of dimensions."""
    if kind == "bn" and running:
        return tuple(along(t, x) for t in running)
    if kind == "gn":
        n, c, *rest = x.shape
        grouped = x.reshape(n, GROUPS, c // GROUPS, *rest)
        dims = list(range(2, grouped.dim()))
        stats = (grouped.mean(dims, keepdim=True), grouped.var(dims, unbiased=False, keepdim=True))
        return tuple(t.expand(n, GROUPS, c // GROUPS, *[1] * len(rest)).reshape(n, c, *[1] * len(rest)) for t in stats)
    spatial = list(range(2, x.dim()))
    dims = {"in": spatial, "ln": [1, *spatial], "bn": [0, *spatial]}[kind]
    return x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)


def paper(choices=("in", "ln", "bn"), running=None, eps=1e-5):
    def reference(x, p):
        w, v = torch.softmax(p["mean_weight"], 0), torch.softmax(p["var_weight"], 0)
        stats = [moments(x, k, running) for k in choices]
        mean = sum(w[i] * m for i, (m, _) in enumerate(stats))
        var = sum(v[i] * s for i, (_, s) in enumerate(stats))
        return along(p["weight"], x) * (x - mean) / torch.sqrt(var + eps) + along(p["bias"], x)

    return reference


def authors(x, p, running=None, eps=1e-5):
    """The authors' estimator: unbiased within each sample and channel, then E[x^2] formulas around it."""
    n, c = x.shape[:2]
    flat = x.reshape(n, c, -1)
    mean_in, var_in = flat.mean(-1, keepdim=True), flat.var(-1, keepdim=True)
    square = var_in + mean_in**2
    mean_ln, mean_bn = mean_in.mean(1, keepdim=True), mean_in.mean(0, keepdim=True)
    var_ln, var_bn = square.mean(1, keepdim=True) - mean_ln**2, square.mean(0, keepdim=True) - mean_bn**2
    running_target = mean_bn.flatten(), var_bn.flatten()
    if running:
        mean_bn, var_bn = (t.reshape(1, c, 1) for t in running)
    w, v = torch.softmax(p["mean_weight"], 0), torch.softmax(p["var_weight"], 0)
    mean = w[0] * mean_in + w[1] * mean_ln + w[2] * mean_bn
    var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
    y = ((flat - mean) / (var + eps).sqrt()).reshape(x.shape)
    return along(p["weight"], x) * y + along(p["bias"], x), running_target


def authors_1d(x, p, eps=1e-5):
    """Their layer for (N, C): layer and batch statistics, both unbiased."""
    mean_ln, var_ln = x.mean(1, keepdim=True), x.var(1, keepdim=True)
    mean_bn, var_bn = x.mean(0, keepdim=True), x.var(0, keepdim=True)
    w, v = torch.softmax(p["mean_weight"], 0), torch.softmax(p["var_weight"], 0)
    mean, var = w[0] * mean_ln + w[1] * mean_bn, v[0] * var_ln + v[1] * var_bn
    return p["weight"] * (x - mean) / (var + eps).sqrt() + p["bias"], (mean_bn.flatten(), var_bn.flatten())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choices", SUBSETS, ids="-".join)
def test_equation(shape, choices):
    agrees(shaken(SwitchableNorm(6, choices=choices, num_groups=GROUPS)), paper(choices), data(*shape))


@pytest.mark.parametrize("choices", [("bn", "in", "ln"), ("gn", "bn")])
def test_order_of_the_weights_is_the_order_of_the_choices(choices):
    layer = shaken(SwitchableNorm(6, choices=choices, num_groups=GROUPS, eps=0.2))
    agrees(layer, paper(choices, eps=0.2), data(5, 6, 7, 3))
    names = [k for k in layer.monitor() if k.startswith("mean_")]
    assert names == [f"mean_{k}" for k in choices]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("choices", [("in", "ln", "bn"), ("bn",), ("in", "ln"), ("ln", "gn")])
def test_evaluation(shape, choices):
    layer = shaken(SwitchableNorm(6, choices=choices, num_groups=GROUPS)).eval()
    running = (layer.running_mean, layer.running_var) if "bn" in choices else None
    agrees(layer, paper(choices, running), data(*shape))


def test_running_statistics_are_batch_norms():
    ours, theirs = SwitchableNorm(6, momentum=0.3).double(), nn.BatchNorm2d(6, momentum=0.3).double()
    for seed in range(3):
        ours(data(5, 6, 7, 3, seed=seed)), theirs(data(5, 6, 7, 3, seed=seed))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("shape", SHAPES)
def test_correction_is_the_authors_estimator(shape):
    layer = shaken(SwitchableNorm(6, correction=1, momentum=0.3))
    before = layer.running_mean.clone(), layer.running_var.clone()
    x = data(*shape)
    agrees(layer, lambda x, p: authors(x, p)[0], x)
    seen = authors(x, dict(layer.named_parameters()))[1]
    for name, old, new in zip(("running_mean", "running_var"), before, seen, strict=True):
        torch.testing.assert_close(getattr(layer, name), 0.7 * old + 0.3 * new, rtol=1e-10, atol=1e-10)
    running = layer.running_mean.clone(), layer.running_var.clone()
    agrees(layer.eval(), lambda x, p: authors(x, p, running)[0], x)


def test_correction_in_one_dimension():
    layer = shaken(SwitchableNorm(6, choices=("ln", "bn"), correction=1, momentum=0.3))
    before = layer.running_mean.clone(), layer.running_var.clone()
    x = data(5, 6)
    agrees(layer, lambda x, p: authors_1d(x, p)[0], x)
    seen = authors_1d(x, dict(layer.named_parameters()))[1]
    for name, old, new in zip(("running_mean", "running_var"), before, seen, strict=True):
        torch.testing.assert_close(getattr(layer, name), 0.7 * old + 0.3 * new, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["in", "ln", "bn", "gn"])
@pytest.mark.parametrize("training", [True, False])
def test_one_hot(kind, training):
    choices = ("in", "ln", "bn", "gn")
    layer = shaken(SwitchableNorm(6, choices=choices, num_groups=GROUPS)).train(training)
    with torch.no_grad():
        for logits in (layer.mean_weight, layer.var_weight):
            logits.copy_(torch.where(torch.arange(4) == choices.index(kind), 0.0, -1e4))
    x = data(5, 6, 7, 3)
    expected = {
        "in": lambda: F.instance_norm(x, weight=layer.weight, bias=layer.bias),
        "ln": lambda: F.group_norm(x, 1, layer.weight, layer.bias),
        "gn": lambda: F.group_norm(x, GROUPS, layer.weight, layer.bias),
        "bn": lambda: F.batch_norm(
            x, layer.running_mean.clone(), layer.running_var.clone(), layer.weight, layer.bias, training
        ),
    }[kind]()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_without_a_second_element_instance_statistics_leave(shape, training):
    layer = shaken(SwitchableNorm(6)).train(training)
    running = None if training else (layer.running_mean, layer.running_var)

    def reference(x, p):
        rest = {**p, "mean_weight": p["mean_weight"][1:], "var_weight": p["var_weight"][1:]}
        return paper(("ln", "bn"), running)(x, rest)

    agrees(layer, reference, data(*shape))


def test_where_no_further_sample_would_help_larger_maps_are_advised():
    with pytest.raises(ValueError, match="Use larger feature maps"):
        SwitchableNorm(6, choices=("in",))(data(5, 6, 1, 1).float())
    with pytest.raises(ValueError, match="Use a larger batch"):
        SwitchableNorm(6)(data(1, 6, 1, 1).float())


def test_starts_at_equal_weights_and_adds_six_numbers():
    layer = SwitchableNorm(6)
    assert sum(p.numel() for p in layer.parameters()) == 2 * 6 + 6
    for w in layer.importance().values():
        torch.testing.assert_close(w, torch.full((3,), 1 / 3))
    assert torch.equal(layer.running_var, torch.ones(6))  # the authors start it at 0


@pytest.mark.parametrize(("ones", "choices"), [((1, 1), None), ((), ("ln", "bn")), ((1, 1, 1), None)])
def test_authors_checkpoint_loads(ones, choices):
    """Keys and shapes of the published files; there is no num_batches_tracked."""
    choices = choices or ("in", "ln", "bn")
    g = torch.Generator().manual_seed(0)
    state = {
        "0.weight": torch.randn(1, 6, *ones, generator=g),
        "0.bias": torch.randn(1, 6, *ones, generator=g),
        "0.mean_weight": torch.randn(len(choices), generator=g),
        "0.var_weight": torch.randn(len(choices), generator=g),
        "0.running_mean": torch.randn(1, 6, *([1] if ones else []), generator=g),
        "0.running_var": torch.rand(1, 6, *([1] if ones else []), generator=g),
    }
    network = nn.Sequential(SwitchableNorm(6, choices=choices, correction=1))
    network.load_state_dict(dict(state), strict=True)
    for name, value in state.items():
        assert torch.equal(network.state_dict()[name].flatten(), value.flatten()), name
    x = data(5, 6, *[4] * len(ones)).float()
    if ones:
        p = {k[2:]: v.flatten() for k, v in state.items()}
        expected, _ = authors(x, p, (p["running_mean"], p["running_var"]))
        torch.testing.assert_close(network.eval()(x), expected, rtol=1e-4, atol=1e-4)  # float32, E[x^2] - E[x]^2
    network.train()(x)


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_choices_is_named(count):
    state = SwitchableNorm(6).state_dict()
    state["mean_weight"] = state["var_weight"] = torch.ones(count)
    with pytest.raises(
        RuntimeError, match=rf"mean_weight \({count},\).*Type choices=.*in place of \('in', 'ln', 'bn'\)"
    ):
        SwitchableNorm(6).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"choices": ()}, "choices"),
        ({"choices": ("in", "in")}, "distinct"),
        ({"choices": ("in", "xn")}, "xn"),
        ({"correction": 2}, "correction"),
        ({"choices": ("gn",), "num_groups": 4}, "num_groups"),
        ({"radius": 1.5}, "radius"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said):
        SwitchableNorm(6, **arguments)


def test_zero_weight():
    layer = SwitchableNorm(6, zero_weight=True)
    assert not layer.weight.any()
    assert not layer(data(5, 6, 7, 3).float()).any()
    layer.weight.data.fill_(2.0)
    layer.reset_parameters()
    assert not layer.weight.any()
    with pytest.raises(ValueError, match="zero_weight=True would overwrite"):
        layer.take_from(nn.BatchNorm2d(6))


# --- sparse ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.0, 0.3, 0.6, 1.0])
def test_sparse_layer(radius):
    layer = shaken(SwitchableNorm(6, sparse=True, radius=radius))
    w, v = (recursive(t.detach().numpy(), radius) for t in (layer.mean_weight, layer.var_weight))
    x = data(5, 6, 7, 3)
    stats = [moments(x, k) for k in ("in", "ln", "bn")]
    mean, var = (sum(a[i] * s[j] for i, s in enumerate(stats)) for j, a in enumerate((w, v)))
    expected = along(layer.weight, x) * (x - mean) / (var + 1e-5).sqrt() + along(layer.bias, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    for got, want in zip(layer.importance().values(), (w, v), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(want), rtol=1e-9, atol=1e-9)
    layer.radius = 1.0
    assert sorted(layer.importance()["mean"].tolist()) == [0, 0, 1]


@pytest.mark.parametrize("radius", [0.0, 0.5, 1.0])
def test_sparse_layer_at_its_start(radius):
    layer = SwitchableNorm(6, sparse=True, radius=radius).double()
    x = data(5, 6, 7, 3).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, SwitchableNorm(6).double()(x))
    grads = torch.autograd.grad(y, [x, *layer.parameters()], data(5, 6, 7, 3, seed=1))
    assert all(g.isfinite().all() for g in grads)


class TestClippedGradients:
    """``clip_grad`` scales the gradients of the two importance weights, and of nothing else."""

    @staticmethod
    def gradients(layer, x):
        a = x.clone().requires_grad_()
        y = layer(a)
        names = [name for name, _ in layer.named_parameters()]
        dy = torch.ones_like(y) * torch.arange(y.shape[1]).reshape(1, -1, 1, 1) * x
        return y, dict(zip(["x", *names], torch.autograd.grad(y, [a, *layer.parameters()], dy), strict=True))

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("sparse", [True, False])
    def test_value(self, sparse, compiled):
        free = SwitchableNorm(6, sparse=sparse, radius=0.3).double()
        with torch.no_grad():
            free.mean_weight.copy_(torch.tensor([0.9, 1.0, 1.2]))
            free.var_weight.copy_(torch.tensor([1.1, 0.9, 1.0]))
        x = data(5, 6, 7, 3)
        y, expected = self.gradients(copy.deepcopy(free), x)
        limit = float(expected["mean_weight"].norm()) / 2
        clipped = SwitchableNorm(6, sparse=sparse, radius=0.3, clip_grad=limit).double()
        clipped.load_state_dict(free.state_dict())
        call = torch.compile(clipped, backend="aot_eager", fullgraph=True) if compiled else clipped
        a = x.clone().requires_grad_()
        z = call(a)
        dy = torch.ones_like(z) * torch.arange(z.shape[1]).reshape(1, -1, 1, 1) * x
        names = [name for name, _ in clipped.named_parameters()]
        got = dict(zip(["x", *names], torch.autograd.grad(z, [a, *clipped.parameters()], dy), strict=True))
        torch.testing.assert_close(z, y)
        for name, g in expected.items():
            factor = min(1.0, limit / float(g.norm())) if name in ("mean_weight", "var_weight") else 1.0
            torch.testing.assert_close(got[name], factor * g, msg=name)
        torch.testing.assert_close(float(got["mean_weight"].norm()), limit)

    def test_refuses(self):
        with pytest.raises(ValueError, match="clip_grad must be a number > 0"):
            SwitchableNorm(6, clip_grad=0.0)


def paper_of_tokens(choices=("in", "ln", "bn"), weights=torch.softmax, running=None, correction=0, eps=1e-5):
    """The equation on tokens (N, ..., C), with the mean and variance of each token for "ln"."""

    def reference(x, p):
        w, v = weights(p["mean_weight"], 0), weights(p["var_weight"], 0)
        mean = var = 0.0
        for i, k in enumerate(choices):
            if k == "ln":
                m, s = x.mean(-1, keepdim=True), x.var(-1, correction=correction, keepdim=True)
            else:
                m, s = (t.movedim(1, -1) for t in moments(x.movedim(-1, 1), k, running))
            mean, var = mean + w[i] * m, var + v[i] * s
        return p["weight"] * (x - mean) / torch.sqrt(var + eps) + p["bias"]

    return reference


@pytest.mark.parametrize("shape", [(5, 7, 6), (3, 2, 5, 6)])
@pytest.mark.parametrize("choices", [c for c in SUBSETS if "ln" in c], ids="-".join)
def test_equation_of_tokens(shape, choices):
    layer = shaken(SwitchableNorm(6, choices=choices, num_groups=GROUPS, per_token=True, channel_dim=-1))
    agrees(layer, paper_of_tokens(choices), data(*shape))
    running = (layer.running_mean, layer.running_var) if "bn" in choices else None
    agrees(layer.eval(), paper_of_tokens(choices, running=running), data(*shape))


def test_equation_of_tokens_with_sparse_weights():
    layer = shaken(SwitchableNorm(6, sparse=True, radius=0.3, per_token=True, channel_dim=-1))
    paper = paper_of_tokens(weights=lambda logits, _: torch.as_tensor(recursive(logits.detach().numpy(), 0.3)))
    x = data(5, 7, 6)
    # In value alone: the authors' recursion is in numpy, and the gradient of the weights has its tests.
    torch.testing.assert_close(layer(x), paper(x, dict(layer.named_parameters())), rtol=1e-10, atol=1e-10)


def test_correction_of_tokens_is_unbiased_within_each():
    def reference(x, p):
        w, v = torch.softmax(p["mean_weight"], 0), torch.softmax(p["var_weight"], 0)
        mean_in, var_in = x.mean(1, keepdim=True), x.var(1, keepdim=True)
        var_bn = var_in.mean(0, keepdim=True) + mean_in.var(0, correction=0, keepdim=True)
        mean = w[0] * mean_in + w[1] * x.mean(-1, keepdim=True) + w[2] * mean_in.mean(0, keepdim=True)
        var = v[0] * var_in + v[1] * x.var(-1, keepdim=True) + v[2] * var_bn
        return p["weight"] * (x - mean) / torch.sqrt(var + 1e-5) + p["bias"]

    agrees(shaken(SwitchableNorm(6, correction=1, per_token=True, channel_dim=-1)), reference, data(5, 7, 6))


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_a_token_of_its_own_is_a_whole_sample(training, correction):
    options = {"channel_dim": -1, "correction": correction}
    whole = shaken(SwitchableNorm(6, **options)).train(training)
    tokens = shaken(SwitchableNorm(6, per_token=True, **options)).train(training)
    x = data(5, 6)
    torch.testing.assert_close(tokens(x), whole(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tokens.state_dict(), whole.state_dict())


def test_all_weight_on_tokens_is_torchs_layer_norm():
    ours, theirs = SwitchableNorm(6, choices=("ln",), per_token=True, channel_dim=-1), nn.LayerNorm(6)
    x = data(5, 7, 6).float() + 1000
    exact = copy.deepcopy(theirs).double()(x.double()).float()
    assert (ours(x) - exact).abs().max() <= (theirs(x) - exact).abs().max() + 1e-6
    plain = ours.plain(dims=3)
    assert type(plain) is nn.LayerNorm
    assert plain.weight is ours.weight
    assert ours.choice(0.9).norm == ""
    assert "torch.nn.LayerNorm" in ours.choice(0.9).why
    mixed = SwitchableNorm(6, per_token=True, channel_dim=-1)
    assert mixed.plain(dims=3) is None
    assert "each token" in mixed.why_not_plain(dims=3)
    assert SwitchableNorm(6, choices=("ln",), correction=1, per_token=True, channel_dim=-1).plain(dims=3) is None


@pytest.mark.parametrize(
    ("options", "words"), [({}, "channel_dim=-1"), ({"channel_dim": -1, "choices": ("in", "bn")}, '"ln"')]
)
def test_tokens_are_refused_where_there_are_none(options, words):
    with pytest.raises(ValueError, match=words):
        SwitchableNorm(6, per_token=True, **options)
