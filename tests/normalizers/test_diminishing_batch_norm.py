"""Ma and Klabjan 2024: algorithm 1 with minibatch statistics, and what it leaves open."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

from lightning_norm import BatchNorm, DiminishingBatchNorm, recalibrate, swap
from lightning_norm.testing import checks
from tests.normalizers.paper import agrees, along, data, same_as_torch, shaken

SHAPES = [(5, 6), (5, 6, 7), (5, 6, 7, 3), (3, 6, 2, 5, 3)]
F64 = torch.float64


def whole(x):
    dims = [d for d in range(x.dim()) if d != 1]
    mean = x.mean(dims)
    return mean, ((x - along(mean, x)) ** 2).mean(dims)


def paper(alpha, old=None, average="std", stat_grad="batch", eps=1e-5):
    """Normalize by alpha * (mu_B, sigma_B) + (1 - alpha) * old; the whole batch's own at alpha = 1."""

    def reference(x, p):
        mean, spread = whole(x)
        spread = spread.sqrt() if average == "std" else spread
        if stat_grad == "none":
            mean, spread = mean.detach(), spread.detach()
        if old:
            mean, spread = alpha * mean + (1 - alpha) * old[0], alpha * spread + (1 - alpha) * old[1]
        scale = spread + eps if average == "std" else (spread + eps).sqrt()
        return along(p["weight"], x) * (x - along(mean, x)) / along(scale, x) + along(p["bias"], x)

    return reference


def stored(layer):
    return tuple(layer._buffers[name].clone() for name in layer.running_names)


@pytest.mark.parametrize("stat_grad", ["batch", "none"])
@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("alpha", [1.0, 0.25, 0.001, 0.0])
def test_equation(alpha, average, stat_grad):
    for shape in SHAPES if alpha == 0.25 else SHAPES[2:3]:
        layer = shaken(DiminishingBatchNorm(6, alpha=alpha, average=average, stat_grad=stat_grad, eps=1e-3))
        agrees(layer, paper(alpha, stored(layer), average, stat_grad, 1e-3), data(*shape))


@pytest.mark.parametrize("average", ["std", "var"])
def test_evaluation_and_training_use_the_same_running_statistics(average):
    layer = shaken(DiminishingBatchNorm(6, average=average))
    x = data(5, 6, 7, 3)
    y = layer(x)
    torch.testing.assert_close(layer.eval()(x), y, rtol=1e-12, atol=1e-12)
    agrees(layer, paper(0.0, stored(layer), average), data(5, 6, 7, 3, seed=1))


@pytest.mark.parametrize("power", [1.0, 2.001])
@pytest.mark.parametrize("average", ["std", "var"])
def test_steps_of_the_algorithm(average, power):
    layer = DiminishingBatchNorm(6, power=power, average=average, stat_grad="batch").double()
    running = (torch.zeros(6, dtype=F64), torch.ones(6, dtype=F64))
    for m in range(1, 6):
        x = data(5, 6, 7, 3, seed=m)
        agrees(copy.deepcopy(layer), paper(m**-power, running, average), x)
        layer(x)
        new = whole(x) if average == "var" else (whole(x)[0], whole(x)[1].sqrt())
        running = tuple(m**-power * n + (1 - m**-power) * old for n, old in zip(new, running, strict=True))
        torch.testing.assert_close(stored(layer), running, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.monitor()["alpha"], torch.tensor(m**-power, dtype=F64))
    assert layer.updates == 5


def test_one_over_m_is_the_mean_of_the_batch_statistics():
    layer = DiminishingBatchNorm(6, power=1).double()
    batches = [data(5, 6, 7, 3, seed=seed) for seed in range(7)]
    for x in batches:
        layer(x)
    means, variances = zip(*(whole(x) for x in batches), strict=True)
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(layer.running_std, torch.stack(variances).sqrt().mean(0))


def test_first_batch_is_copied_whatever_alpha():
    layer = DiminishingBatchNorm(6, alpha=0.001).double()
    bad = data(5, 6, 7, 3, seed=3)
    bad[0, 0] = torch.nan
    layer(bad)
    assert (layer.updates, layer.skipped_updates) == (0, 1)
    x = data(5, 6, 7, 3)
    agrees(copy.deepcopy(layer), paper(1.0), x)
    layer(x)
    torch.testing.assert_close(stored(layer), (whole(x)[0], whole(x)[1].sqrt()))
    other = data(5, 6, 7, 3, seed=1)
    layer(other)
    torch.testing.assert_close(layer.running_mean, 0.999 * whole(x)[0] + 0.001 * whole(other)[0])


def trained(counted=True):
    bn = nn.BatchNorm2d(6, momentum=1.0)
    bn(data(5, 6, 7, 3, seed=8).float())
    if not counted:  # as in old torchvision checkpoints
        bn.num_batches_tracked.zero_()
    return bn


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("way", ["swap", "load"])
def test_statistics_that_moved_in_count_as_the_first_batch(way, average, counted):
    bn = trained(counted)
    arguments = {"power": 2.0, "average": average}
    model = nn.Sequential(copy.deepcopy(bn))
    if way == "swap":
        report = swap(model, "dbn", norm_args=arguments)
        assert report.layers[0].preserves_eval
        assert report.layers[0].converted == (["running_var"] if average == "std" else [])
    else:
        model = nn.Sequential(DiminishingBatchNorm(6, **arguments))
        model[0].load_state_dict(bn.state_dict())
    x = data(4, 6, 7, 3, seed=9).float()
    torch.testing.assert_close(model.eval()(x), bn.eval()(x))
    before = model[0].running_mean.clone()
    model.train()(x)
    torch.testing.assert_close(model[0].running_mean, 0.75 * before + 0.25 * x.mean((0, 2, 3)))
    assert model[0].updates == 2


def test_a_swapped_fresh_batch_norm_is_fresh():
    model = nn.Sequential(nn.BatchNorm2d(6))
    swap(model, "dbn", norm_args={"alpha": 0.001})
    x = data(5, 6, 7, 3).float()
    torch.testing.assert_close(model(x), nn.BatchNorm2d(6)(x), rtol=1e-3, atol=1e-3)  # eps beside the root


@pytest.mark.parametrize("shape", SHAPES)
def test_alpha_one_of_variances_is_batch_norm(shape):
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    ours, theirs = (shaken(layer) for layer in (DiminishingBatchNorm(6, alpha=1, average="var"), BatchNorm(6)))
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.copy_(p)
    torch_layer = kinds[len(shape)](6).double()
    torch_layer.load_state_dict(theirs.state_dict())
    x, dy = data(*shape), data(*shape, seed=1)
    results = []
    for layer in (ours, torch_layer):
        a = x.clone().requires_grad_()
        y = layer(a)
        results.append((y, *torch.autograd.grad(y, [a, *layer.parameters()], dy)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    same_as_torch(BatchNorm(6), kinds[len(shape)](6), shape)  # and that is the baseline of the package


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_gradients_are_finite_where_a_channel_is_constant(alpha, average, dtype):
    layer = DiminishingBatchNorm(6, alpha=alpha, average=average)
    for seed in range(3):
        x = data(5, 6, 7, 3, seed=seed).to(dtype)
        x[:, 1], x[:, 2] = 0.0, 4.0
        x.requires_grad_()
        y = layer(x)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], data(5, 6, 7, 3, seed=9).to(dtype) / 1e3)
        assert all(g.isfinite().all() for g in (y, *grads))
        assert grads[0][:, 0].abs().max() > 0
    assert all(b.isfinite().all() for b in layer.buffers())


def test_running_buffers_are_never_in_the_graph():
    layer = DiminishingBatchNorm(6)
    x = data(5, 6, 7, 3).float().requires_grad_()
    for _ in range(3):
        x = layer(x * 2)
    x.square().sum().backward()  # through three updates of the same buffers
    assert not any(b.requires_grad or b.grad_fn for b in layer.buffers())


def test_compiled_gradients_of_the_first_steps():
    """The backward pass must use the buffers as they were: the first batch is copied, the later ones are mixed."""
    eager, compiled = (DiminishingBatchNorm(6, power=2) for _ in range(2))
    partitioned = torch.compile(compiled, backend="aot_eager_decomp_partition", fullgraph=True)
    for seed in range(3):
        results = []
        for layer, call in ((eager, eager), (compiled, partitioned)):
            x = data(5, 6, 7, 3, seed=seed).float().requires_grad_()
            y = call(x)
            dy = data(5, 6, 7, 3, seed=9).float()
            results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], dy), *layer.buffers()))
        for got, expected in zip(*([t.double() for t in ts] for ts in results), strict=True):
            assert (got - expected).norm() <= 3e-6 * expected.norm() + 3e-6


def test_a_resumed_run_is_the_same_run():
    first, second = DiminishingBatchNorm(6, power=1), DiminishingBatchNorm(6, power=1)
    for seed in range(3):
        first(data(5, 6, 7, 3, seed=seed).float())
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    x = data(5, 6, 7, 3, seed=9).float()
    assert torch.equal(first(x), second(x))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert first.updates == 4


def test_undo_gives_back_what_moved():
    model = nn.Sequential(trained())
    old = copy.deepcopy(model)
    report = swap(model, "dbn")
    report.undo()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in old.state_dict().items())
    report = swap(model, "dbn")
    model.train()(data(5, 6, 7, 3).float())
    x = data(5, 6, 7, 3, seed=2).float()
    expected = model.eval()(x)
    report.undo()
    assert isinstance(model[0], nn.BatchNorm2d)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("target", [{"average": "var"}, {"average": "std"}, "bn"])
def test_from_one_form_to_the_other(target):
    model = nn.Sequential(trained())
    swap(model, "dbn")
    x = data(5, 6, 7, 3, seed=2).float()
    expected = model.train()(x), model.eval()(x)
    if target == "bn":
        swap(model, "bn", source="dbn")
    else:
        swap(model, "dbn", source="dbn", norm_args=target)
        assert model[0].updates == 2
        other = DiminishingBatchNorm(6, **target)
        other.load_state_dict(model[0].state_dict())
        torch.testing.assert_close(other.eval()(x), expected[1])
    torch.testing.assert_close(model.eval()(x), expected[1])


def test_checkpoint_of_the_other_form():
    std, var = DiminishingBatchNorm(6, average="std"), DiminishingBatchNorm(6, average="var")
    x = data(5, 6, 7, 3).float()
    for seed in range(2):
        std(data(5, 6, 7, 3, seed=seed).float())
    var.load_state_dict(std.state_dict())
    torch.testing.assert_close(var.eval()(x), std.eval()(x))
    back = DiminishingBatchNorm(6)
    back.load_state_dict(var.state_dict())
    torch.testing.assert_close(back.running_std, std.running_std)
    assert back.updates == var.updates == 2


def test_without_running_statistics_alpha_is_one():
    layer = DiminishingBatchNorm(6, track_running_stats=False).double()
    agrees(layer, paper(1.0), data(5, 6, 7, 3))
    agrees(layer.eval(), paper(1.0), data(5, 6, 7, 3))
    assert not layer.preserves_eval
    assert layer.monitor() == {}


@pytest.mark.parametrize("average", ["std", "var"])
def test_the_gap_is_how_far_the_batch_lies_from_the_running_statistics(average):
    layer = DiminishingBatchNorm(6, alpha=0.5, eps=0.0, average=average).double()
    x = data(5, 6, 7, 3)
    layer(x)
    assert layer.monitor()["gap_mean"] == layer.monitor()["gap_std"] == 0
    layer(x + 2)
    expected = (1 / whole(x)[1].sqrt()).mean()
    torch.testing.assert_close(layer.monitor()["gap_mean"].double(), expected, rtol=1e-6, atol=0)
    assert layer.monitor()["gap_std"] < 1e-6
    layer.reset_running_stats()
    layer(x)
    layer(3 * x)
    running = 2.0 if average == "std" else 5**0.5  # of 1 and 3, or of 1 and 9, in units of the std of x
    expected = torch.tensor((3 - running) / running).double()
    torch.testing.assert_close(layer.monitor()["gap_std"].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"average": "mean"}, "'mean'"),
        ({"stat_grad": True}, "stat_grad"),
        ({"power": 0}, "power must be a number > 0"),
        ({"power": float("nan")}, "power must be"),
        ({"init": "zeros"}, "first_batch"),
        ({"eval_momentum": 1.5}, "eval_momentum must lie in"),
    ],
)
def test_refuses(arguments, word):
    with pytest.raises(ValueError, match=word):
        DiminishingBatchNorm(6, **arguments)


def test_refuses_what_would_have_no_effect():
    with pytest.raises(TypeError, match="momentum"):
        DiminishingBatchNorm(6, momentum=0.1)
    layer = DiminishingBatchNorm(6, power=1)
    with pytest.raises(ValueError, match=r"power=1\.0 rules alpha"):
        layer.alpha = 0.5
    with pytest.raises(ValueError, match="has no momentum"):
        layer.momentum = 0.5
    layer.power = None
    layer.alpha = 0.5
    assert " momentum" not in repr(layer)
    with pytest.raises(TypeError, match="takes no argument 'momentum'"):
        swap(nn.Sequential(nn.BatchNorm2d(6)), "dbn", norm_args={"momentum": 0.1})


READINGS = [
    {"train_stats": "batch"},
    {"train_stats": "batch", "stat_grad": "none"},
    {},
    {"stat_grad": "batch"},
    {"init": "zero_one"},
    {"eval_momentum": 0.1},
    {"train_stats": "batch", "init": "zero_one", "eval_momentum": 0.3},
    {"stat_grad": "batch", "init": "zero_one", "eval_momentum": 0.2},
]


class Reading:
    """Every reading of the paper, one batch after the other, on the whole tensor in float64."""

    def __init__(self, alpha, average, eps, train_stats="running", stat_grad="renorm", init="first_batch",
                 eval_momentum=None):  # fmt: skip
        self.alpha, self.average, self.eps, self.m = alpha, average, eps, 0
        self.train_stats, self.stat_grad, self.init = train_stats, stat_grad, init
        self.eval_momentum = eval_momentum
        self.blend = self.evaluated = (torch.zeros(6, dtype=F64), torch.ones(6, dtype=F64))

    def root(self, spread):
        return spread + self.eps if self.average == "std" else (spread + self.eps).sqrt()

    def batch(self, x):
        self.m += 1
        mean, spread = whole(x)
        custom = (mean, spread.sqrt() if self.average == "std" else spread)
        copied = self.init == "first_batch" and self.m == 1
        alpha = 1.0 if copied else self.alpha(self.m)
        before = self.blend
        self.blend = tuple((alpha * new + (1 - alpha) * old).detach() for new, old in zip(custom, before, strict=True))
        weight = 1.0 if copied or self.eval_momentum is None else self.eval_momentum
        self.evaluated = tuple(
            weight * new + (1 - weight) * old for new, old in zip(self.blend, self.evaluated, strict=True)
        )
        if self.stat_grad == "none":
            custom = tuple(t.detach() for t in custom)
        if self.train_stats == "batch":
            return (x - along(custom[0], x)) / along(self.root(custom[1]), x)
        if self.stat_grad == "renorm":
            plain = (x - along(custom[0], x)) / along(self.root(custom[1]), x)
            ratio = (self.root(custom[1]) / self.root(self.blend[1])).detach()
            return plain * along(ratio, x) + along(((custom[0] - self.blend[0]) / self.root(self.blend[1])).detach(), x)
        mean, spread = (alpha * new + (1 - alpha) * old for new, old in zip(custom, before, strict=True))
        return (x - along(mean, x)) / along(self.root(spread), x)


@pytest.mark.parametrize("alpha", [0.3, "1/m"])
@pytest.mark.parametrize("average", ["std", "var"])
@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_readings(reading, average, alpha):
    weight = {"power": 1.0} if alpha == "1/m" else {"alpha": alpha}
    layer = DiminishingBatchNorm(6, **weight, average=average, eps=1e-3, **reading).double()
    with torch.no_grad():
        layer.weight.copy_(data(1, 6)[0])
        layer.bias.copy_(data(1, 6, seed=1)[0])
    paper_reading = Reading((lambda m: 1 / m) if alpha == "1/m" else (lambda m: alpha), average, 1e-3, **reading)

    def trained(x, p):
        return along(p["weight"], x) * paper_reading.batch(x) + along(p["bias"], x)

    for seed in range(4):
        agrees(layer, trained, data(5, 6, 7, 3, seed=seed))
        torch.testing.assert_close(stored(layer), paper_reading.evaluated, rtol=1e-12, atol=1e-12)
    assert (layer.updates, layer.num_batches_tracked) == (4, 4)
    mean, spread = paper_reading.evaluated

    def evaluated(x, p):
        normalized = (x - along(mean, x)) / along(paper_reading.root(spread), x)
        return along(p["weight"], x) * normalized + along(p["bias"], x)

    agrees(layer.eval(), evaluated, data(5, 6, 7, 3, seed=9))


def test_batch_statistics_in_training_are_batch_norm():
    """With variances, BatchNorm's own letter: alpha is its momentum, of the biased variance."""
    ours, theirs = DiminishingBatchNorm(6, train_stats="batch", average="var", alpha=0.1, init="zero_one"), BatchNorm(6)
    ours, theirs = ours.double(), theirs.double()
    for seed in range(3):
        results = []
        for layer in (ours, theirs):
            x = data(5, 6, 7, 3, seed=seed).requires_grad_()
            y = layer(x)
            results.append((y, *torch.autograd.grad(y, [x, *layer.parameters()], data(5, 6, 7, 3, seed=9))))
        torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


def test_renorm_has_the_value_of_the_running_statistics():
    first, second = (shaken(DiminishingBatchNorm(6, stat_grad=how, eps=0.0)) for how in ("batch", "renorm"))
    for seed in range(3):
        x = data(5, 6, 7, 3, seed=seed)
        torch.testing.assert_close(first(x), second(x), rtol=1e-12, atol=1e-12)


def test_an_average_of_the_last_batches_is_what_batch_norm_evaluates_on():
    """Alpha 1 leaves the last batch alone in the running statistics; an average of weight 0.1 is BatchNorm's own."""
    ours = DiminishingBatchNorm(6, alpha=1, average="var", init="zero_one", eval_momentum=0.1).double()
    mean, var = torch.zeros(6, dtype=F64), torch.ones(6, dtype=F64)
    for seed in range(4):
        x = data(5, 6, 7, 3, seed=seed)
        ours(x)
        mean, var = 0.9 * mean + 0.1 * whole(x)[0], 0.9 * var + 0.1 * whole(x)[1]
    torch.testing.assert_close(stored(ours), (mean, var), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.blend_mean, whole(x)[0], rtol=1e-12, atol=1e-12)


class TestAverageForEvaluation:
    """With ``eval_momentum`` there are two pairs of statistics; every way into and out of the layer knows both."""

    def layer(self, **more):
        return DiminishingBatchNorm(6, alpha=0.5, eval_momentum=0.1, **more)

    @pytest.mark.parametrize("way", ["swap", "load", "swap from dbn", "load from dbn", "load from the other form"])
    def test_ways_in(self, way):
        source, arguments = trained(), {"alpha": 0.5, "eval_momentum": 0.1}
        other = DiminishingBatchNorm(6, average="var" if "form" in way else "std")
        for seed in range(2):
            other(data(5, 6, 7, 3, seed=seed).float())
        source = other if "dbn" in way or "form" in way else source
        model = nn.Sequential(copy.deepcopy(source))
        if way.startswith("swap"):
            swap(model, "dbn", source="dbn" if "dbn" in way else None, norm_args=arguments)
        else:
            model = nn.Sequential(self.layer())
            model[0].load_state_dict(source.state_dict())
        x = data(4, 6, 7, 3, seed=9).float()
        torch.testing.assert_close(model.eval()(x), source.eval()(x))
        before = model[0].running_mean.clone()
        model.train()(x)
        blend = 0.5 * before + 0.5 * x.mean((0, 2, 3))
        torch.testing.assert_close(model[0].blend_mean, blend)
        torch.testing.assert_close(model[0].running_mean, 0.9 * before + 0.1 * blend)

    def test_a_resumed_run_is_the_same_run(self):
        first, second = self.layer(), self.layer()
        for seed in range(3):
            first(data(5, 6, 7, 3, seed=seed).float())
        second.load_state_dict(first.state_dict())
        x = data(5, 6, 7, 3, seed=9).float()
        assert torch.equal(first(x), second(x))
        assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
        other = self.layer(average="var")
        other.load_state_dict(first.state_dict())
        torch.testing.assert_close(other.eval()(x), first.eval()(x))
        torch.testing.assert_close(other.train()(x), first.train()(x), rtol=1e-2, atol=1e-2)  # another average

    def test_swapped_to_the_same_goes_on(self):
        model = nn.Sequential(self.layer())
        for seed in range(3):
            model(data(5, 6, 7, 3, seed=seed).float())
        twin = copy.deepcopy(model)
        swap(model, "dbn", source="dbn", norm_args={"alpha": 0.5, "eval_momentum": 0.1})
        assert model[0] is not twin[0]
        x = data(5, 6, 7, 3, seed=9).float()
        assert torch.equal(model(x), twin(x))
        assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())

    def test_reset_and_casts(self):
        layer = self.layer()
        layer(data(5, 6, 7, 3).float())
        layer.half()
        assert layer.blend_mean.dtype == layer.blend_std.dtype == torch.float32
        layer.reset_running_stats()
        assert (layer.blend_mean == 0).all()
        assert (layer.blend_std == 1).all()

    def test_is_a_schedule(self):
        layer = self.layer()
        layer(data(5, 6, 7, 3).float())
        layer.eval_momentum = 1.0
        layer(data(5, 6, 7, 3, seed=1).float())
        torch.testing.assert_close(layer.running_mean, layer.blend_mean)
        assert "eval_momentum" in DiminishingBatchNorm(6).without_effect()

    def test_refuses(self):
        with pytest.raises(ValueError, match="Build the layer with it"):
            DiminishingBatchNorm(6).eval_momentum = 0.1
        with pytest.raises(ValueError, match="Build the layer with it"):
            self.layer().eval_momentum = None
        with pytest.raises(ValueError, match="keeps none"):
            DiminishingBatchNorm(6, eval_momentum=0.1, track_running_stats=False)


@pytest.mark.parametrize("average", ["std", "var"])
def test_statistics_beside_the_training_can_be_estimated_anew(average):
    """Where training normalizes by the batch, the running statistics are for evaluation alone."""
    layer = DiminishingBatchNorm(6, train_stats="batch", average=average).double()
    batches = [data(5, 6, 7, 3, seed=seed) for seed in range(3)]
    recalibrate(nn.Sequential(layer), batches)
    mean, var = whole(torch.cat(batches))
    torch.testing.assert_close(stored(layer), (mean, var.sqrt() if average == "std" else var))
    with pytest.raises(ValueError, match="what it trains with"):
        recalibrate(nn.Sequential(DiminishingBatchNorm(6)), batches)


OTHERS = [{"average": "var"}, {"power": 1.0, "stat_grad": "batch"}, READINGS[0], READINGS[6], READINGS[7]]
FEW = ["gradcheck", "loads_batch_norm", "preserves_eval", "nan_does_not_poison", "casts_keep_statistics", "exports"]


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("arguments", OTHERS, ids=str)
def test_conforms_with_other_arguments(arguments, name):
    checks()[name](functools.partial(DiminishingBatchNorm, **arguments))
