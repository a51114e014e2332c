import asyncio
import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_norm import create, paused_statistics, swap
from lightning_norm.testing.ranks import run_ranks

X = torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def layers():
    """Torch's own layers, and those of this package that use their running statistics in training."""
    ubn = create("ubn", 4, threshold=-0.9, min_updates=0)
    gate = create("ubn", 4, threshold=-0.9, min_updates=0, mode="gate")
    cn = create("cn", 4, context="gate", missing="posterior")
    ours = [create("dbn", 4), create("dbn", 4, power=0.5), ubn, gate, cn, create("bn", 4, momentum=None)]
    torchs = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None)]
    return [*ours, *torchs, nn.InstanceNorm2d(4, affine=True, track_running_stats=True)]


def state(model):
    return {n: t.clone() for n, t in model.named_buffers()}


def stood_still(model, before):
    return all(torch.equal(t, before[n]) for n, t in model.named_buffers())


@pytest.mark.parametrize("i", range(len(layers())))
def test_output_as_without_and_nothing_moves(i):
    layer = layers()[i]
    layer(X + 1)
    before, twin = state(layer), copy.deepcopy(layer)
    with paused_statistics(layer):
        y = layer(X)
        y.square().sum().backward()
    assert stood_still(layer, before)
    torch.testing.assert_close(y, twin(X))  # a paused dbn takes another way, which rounds otherwise
    assert not stood_still(twin, before)
    layer(X)
    assert torch.equal(layer(X), twin(X))


def network(norm=None):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    if norm:
        swap(model, norm, include=["1"])
    return model


def test_blocks_are_nested_and_end_with_an_exception():
    model = network("sn")
    before = state(model)
    with paused_statistics(model):
        with pytest.raises(ValueError, match="num_features=4"), paused_statistics(model[1:]):
            model[1](X[:, :3])
        model(X)
    assert stood_still(model, before)
    assert (model[1]._statistics_paused, model[3].track_running_stats) == (False, True)
    assert not model[3]._forward_hooks
    assert not model[3]._forward_pre_hooks
    model(X)
    assert int(model[1].num_batches_tracked) == int(model[3].num_batches_tracked) == 1


def test_a_layer_that_fails_in_its_forward_pass_can_go_on():
    """The hook that lets one thread at a time through must not stay closed."""
    model = nn.BatchNorm2d(4)
    with paused_statistics(model):
        with pytest.raises(ValueError, match="4D"):
            model(X[0, 0])
        model(X)
        other = threading.Thread(target=model, args=(X,))
        other.start()
        other.join()
    assert int(model.num_batches_tracked) == 1


def test_another_thread_moves_what_this_one_has_paused():
    model = network("sn")
    inside, done = threading.Event(), threading.Event()

    def train():
        inside.wait()
        model(X)
        done.set()

    thread = threading.Thread(target=train)
    thread.start()
    with paused_statistics(model):
        model(X)
        assert int(model[1].num_batches_tracked) == 0
        inside.set()
        done.wait()
        model(X)
    thread.join()
    assert int(model[1].num_batches_tracked) == int(model[3].num_batches_tracked) == 1


def test_two_threads_pause_and_end_in_any_order():
    model = network("sn")
    first, second = paused_statistics(model), paused_statistics(model)
    with first:
        opened, close = threading.Event(), threading.Event()

        def other():
            with second:
                opened.set()
                close.wait()
                model(X)

        thread = threading.Thread(target=other)
        thread.start()
        opened.wait()
    model(X)
    close.set()
    thread.join()
    assert int(model[1].num_batches_tracked) == int(model[3].num_batches_tracked) == 1
    assert not model[3]._forward_hooks


def test_many_threads():
    model = network("sn")

    def work(pause):
        for _ in range(10):
            if pause:
                with paused_statistics(model):
                    model(X)
            else:
                model(X)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert int(model[3].num_batches_tracked) == 20
    assert model[3].track_running_stats
    assert not model[1]._statistics_paused


def test_a_pause_ends_while_other_threads_are_in_a_layer_and_in_front_of_it():
    model, inside, go = network("sn"), threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go.wait()

    model[3].register_forward_pre_hook(wait)

    def end():
        with paused_statistics(model):
            training.start()
            inside.wait()  # the thread is in the layer, and holds it
            waiting.start()

    training, waiting = (threading.Thread(target=model, args=(X,), daemon=True) for _ in range(2))
    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    inside.wait()
    ending.join(0.5)  # by now it waits for the layer
    go.set()
    for thread in (ending, training, waiting):
        thread.join(120)
        assert not thread.is_alive()
    assert int(model[3].num_batches_tracked) == 2
    assert model[3].track_running_stats
    assert not model[3]._forward_hooks


def test_tasks_started_inside_are_paused():
    model = network("sn")

    async def run():
        with paused_statistics(model):
            await asyncio.to_thread(model, X)

    asyncio.run(run())
    assert int(model[1].num_batches_tracked) == int(model[3].num_batches_tracked) == 0


@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole):
    model = network("sn")
    if whole:
        run = torch.compile(model, backend="eager", fullgraph=True)
    else:
        model[1].compile(backend="eager")
        run = model
    run(X)
    before = state(model)
    with paused_statistics(model):
        y = run(X)
        assert stood_still(model, before)
        if not whole:
            other = threading.Thread(target=run, args=(X,))
            other.start()
            other.join()
            assert int(model[1].num_batches_tracked) == 2
    torch.testing.assert_close(run(X), y)
    assert int(model[1].num_batches_tracked) == int(model[3].num_batches_tracked) == (2 if whole else 3)


def test_compiled_and_frozen():
    model, plain = (create("sn", 4) for _ in range(2))
    model.compile(backend="eager")
    for layer in (model, plain):
        layer(X)
        layer.freeze_statistics()
    before = state(model)
    torch.testing.assert_close(model.train()(X), plain.eval()(X))
    assert stood_still(model, before)
    model.freeze_statistics(False)(X)
    assert int(model.num_batches_tracked) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_inside_of_the_block(reentrant):
    model = network("sn")
    x = X.clone().requires_grad_()
    before = state(model)
    with paused_statistics(model):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert stood_still(model, before)


def test_replicas_are_paused():
    model = network("sn")
    with paused_statistics(model):
        replicas = [m._replicate_for_data_parallel() for m in (model[1], model[3])]
    for replica, layer in zip(replicas, (model[1], model[3]), strict=True):
        vars(replica).update(_buffers=dict(layer._buffers), _parameters=dict(layer._parameters))
        before = state(layer)
        threads = [threading.Thread(target=replica, args=(X,))]
        threads[0].start()
        threads[0].join()
        assert stood_still(layer, before)


def _second_pass(rank):
    model = network("sn")
    torch.manual_seed(rank)
    before = state(model)
    with paused_statistics(model):
        y = model[1](torch.randn(2 + rank, 4, 5, 5))
    model[1].freeze_statistics()
    for _ in range(1 + rank):  # frozen, ranks do not wait for each other
        model.train()[1](torch.randn(2, 4, 5, 5))
    return stood_still(model, before), float(y.detach().mean())


def test_ranks():
    assert all(still for still, _ in run_ranks(_second_pass, 2))


def test_sharpness_aware_minimization_equals_a_plain_step_where_the_second_pass_is_at_the_same_weights():
    model, twin = network("rbn"), network("rbn")
    twin.load_state_dict(model.state_dict())
    model(X).square().sum().backward()
    for p in model.parameters():
        p.grad = None
    with paused_statistics(model):
        model(X).square().sum().backward()
    twin(X).square().sum().backward()
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in model.state_dict().items())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_not_a_module():
    with pytest.raises(TypeError, match="expects a torch.nn.Module, got list"), paused_statistics([nn.BatchNorm2d(4)]):
        pass
