"""Activation checkpointing: what runs again in the backward pass gives the same values and moves nothing."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_norm.errors import ConflictWarning
from lightning_norm.layers import recomputation
from lightning_norm.normalizers.batch_norm import BatchNorm
from lightning_norm.normalizers.diminishing_batch_norm import DiminishingBatchNorm
from lightning_norm.normalizers.unified_batch_norm import UnifiedBatchNorm


def plainly(function, x, use_reentrant):
    return function(x)


def checkpointed(function, x, use_reentrant):
    return checkpoint(function, x, use_reentrant=use_reentrant)


def outcome(net, job, run, use_reentrant):
    """What a job of forward and backward passes leaves: outputs and gradients of x, of parameters, all buffers."""
    net = copy.deepcopy(net)
    tensors = job(net, lambda x: run(net, x, use_reentrant))
    return [*tensors, *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()]


def batches(n=3):
    return [torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(i)) + i for i in range(n)]


def one_after_the_other(net, run):
    out = []
    for x in batches():
        y = run(x.requires_grad_())
        (y * y.detach().roll(1)).sum().backward()
        out += [y.detach(), x.grad]
    return out


def together(net, run):
    """Three forward passes, whose graphs live at once; the backward passes go the other way."""
    xs = [x.requires_grad_() for x in batches()]
    ys = [run(x) for x in xs]
    for y in reversed(ys):
        (y * y.detach().roll(1)).sum().backward()
    return [y.detach() for y in ys] + [x.grad for x in xs]


def in_one_graph(net, run):
    xs = [x.requires_grad_() for x in batches()]
    ys = [run(x) for x in xs]
    sum((y * y.detach().roll(1)).sum() for y in ys).backward()
    return [y.detach() for y in ys] + [x.grad for x in xs]


def with_evaluation_between(net, run):
    x, other = batches(2)
    y = run(x.requires_grad_())
    with torch.no_grad():
        net(other)  # a pass in training without gradients, as some sample from their networks
        net.eval()(other)
    net.train()
    (y * y.detach().roll(1)).sum().backward()
    return [y.detach(), x.grad]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("job", [one_after_the_other, together, in_one_graph, with_evaluation_between])
@pytest.mark.parametrize("make", [BatchNorm, DiminishingBatchNorm, UnifiedBatchNorm])
def test_the_second_run_is_the_first(make, job, use_reentrant):
    options = {"threshold": 0.1, "min_updates": 1, "max_skip": 1} if make is UnifiedBatchNorm else {}
    net = nn.Sequential(make(6, **options), nn.Conv2d(6, 6, 3), make(6, **options))
    expected, got = (outcome(net, job, run, use_reentrant) for run in (plainly, checkpointed))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Inside of a reentrant first run nothing has gradients, of which torch warns.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_nested(use_reentrant):
    layers = [DiminishingBatchNorm(6), nn.Conv2d(6, 6, 3), DiminishingBatchNorm(6), nn.ReLU()]

    class Inner(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=use_reentrant) if self.inside else super().forward(x)

    net = nn.Sequential(*layers[:2], Inner(*layers[2:]))
    net[2].inside = False
    expected = outcome(net, one_after_the_other, plainly, use_reentrant)
    net[2].inside = True
    got = outcome(net, one_after_the_other, checkpointed, use_reentrant)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_twice_in_one_segment():
    layer = DiminishingBatchNorm(6)
    net = nn.Sequential(layer, nn.Tanh(), layer)
    expected, got = (outcome(net, in_one_graph, run, False) for run in (plainly, checkpointed))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_checkpoint_sequential():
    net = nn.Sequential(*(DiminishingBatchNorm(6) for _ in range(4)))

    def by_two(net, x, use_reentrant):
        return checkpoint_sequential(net, 2, x, use_reentrant=use_reentrant)

    for use_reentrant in (True, False):
        expected, got = (outcome(net, in_one_graph, run, use_reentrant) for run in (plainly, by_two))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_what_is_remembered_goes_with_the_graph():
    layer, x = DiminishingBatchNorm(6), batches(1)[0].requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False)
    assert len(recomputation._with_graph[layer]) == 1
    y.sum().backward()
    del y
    gc.collect()
    assert not recomputation._with_graph[layer]
    with torch.no_grad():
        for _ in range(recomputation.MOST_WITHOUT_GRAPH + 3):
            layer(x)
    assert len(recomputation._without_graph[layer]) == recomputation.MOST_WITHOUT_GRAPH
    before = len(recomputation._without_graph)
    del layer
    gc.collect()
    assert len(recomputation._without_graph) == before - 1


def test_nothing_is_remembered_without_checkpointing():
    layer, x = DiminishingBatchNorm(6), batches(1)[0].requires_grad_()
    layer(x).sum().backward()
    assert layer not in recomputation._with_graph
    assert layer not in recomputation._without_graph


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_accumulation_window_counts_a_batch_once(use_reentrant):
    from lightning_norm.layers.running_stats import close_window, open_window

    running = []
    for run in (plainly, checkpointed):
        layer = BatchNorm(6)
        open_window(layer)
        for x in batches():
            run(layer, x.requires_grad_(), use_reentrant).square().sum().backward()
        close_window(layer)
        running.append(list(layer.buffers()))
    torch.testing.assert_close(*running)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_compiled_layer(use_reentrant):
    layer = DiminishingBatchNorm(6)
    compiled = copy.deepcopy(layer)
    compiled.compile(backend="eager")
    expected = outcome(layer, in_one_graph, plainly, False)
    got = outcome(compiled, in_one_graph, checkpointed, use_reentrant)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [BatchNorm, DiminishingBatchNorm])
def test_a_graph_that_runs_twice_is_told(make, use_reentrant):
    net = nn.Sequential(nn.Conv2d(6, 6, 3), make(6))
    x = batches()[0].requires_grad_()
    torch._dynamo.reset()
    with pytest.warns(ConflictWarning, match="moves the running statistics both times"):
        checkpoint(torch.compile(net, backend="eager"), x, use_reentrant=use_reentrant).sum().backward()


@pytest.mark.filterwarnings("error::lightning_norm.errors.ConflictWarning")
def test_a_graph_that_runs_once_is_not_told():
    net = nn.Sequential(nn.Conv2d(6, 6, 3), BatchNorm(6))
    x = batches()[0].requires_grad_()
    torch._dynamo.reset()
    torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), backend="aot_eager")(x).sum().backward()
    assert net[1].num_batches_tracked == 1
    torch._dynamo.reset()
    with torch.autograd.graph.save_on_cpu():
        torch.compile(net, backend="aot_eager")(x).sum().backward()
    assert net[1].num_batches_tracked == 2
