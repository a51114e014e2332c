"""How a layer deep inside a model hears of the contexts, and what it says when it does not."""

import asyncio
import concurrent.futures
import contextvars
import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_norm import BatchNorm, ContextNorm, contexts, fit_contexts, swap
from lightning_norm.ops import compiled
from lightning_norm.ops.torch_private import TRACES_CONTEXT_VARIABLES
from lightning_norm.testing.ranks import run_ranks


def network(context="ids", **arguments):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    )
    for seed in range(3):
        model(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 1)
    report = swap(model, "cn", norm_args={"context": context, **arguments})
    return model, report


def images(n=12, seed=0):
    """Three kinds: dark, bright and contrasty."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.arange(n) % 3
    level = torch.tensor([-2.0, 2.0, 0.0])[kinds].reshape(-1, 1, 1, 1)
    size = torch.tensor([0.5, 0.5, 3.0])[kinds].reshape(-1, 1, 1, 1)
    return torch.randn(n, 3, 8, 8, generator=g) * size + level, kinds


class TestGiven:
    def test_reach_every_layer_and_end_with_the_block(self):
        model, _ = network()
        x, ids = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
        with contexts(model, ids):
            assert torch.equal(model[1].contexts.responsibilities, nn.functional.one_hot(ids, 3).float())
            assert model[4].contexts.responsibilities is not None
            model(x)
            with contexts(model[1], ids.flip(0)):
                assert model[1].contexts.responsibilities[0, 2] == 1
            assert model[1].contexts.responsibilities[0, 0] == 1
        assert model[1].contexts.responsibilities is model[4].contexts.responsibilities is None
        with pytest.raises(ZeroDivisionError), contexts(model, ids):
            raise ZeroDivisionError
        assert model[1].contexts.responsibilities is None

    def test_hard_ids_are_probabilities_of_one(self):
        model, _ = network()
        x, ids = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
        twin = copy.deepcopy(model)
        with contexts(model, ids):
            a = model(x)
        with contexts(twin, nn.functional.one_hot(ids, 3).double()):
            b = twin(x)
        assert torch.equal(a, b)

    def test_views_repeat_them(self):
        model, _ = network()
        ids = torch.tensor([0, 1, 2])
        with contexts(model, ids, views=2):
            model(torch.randn(6, 3, 8, 8))
            assert model[1].contexts.responsibilities.argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
        with pytest.raises(ValueError, match="views must be a positive int, got 0"), contexts(model, ids, views=0):
            pass

    def test_gradients_reach_learned_probabilities(self):
        model, _ = network()
        logits = torch.randn(6, 3, requires_grad=True)
        with contexts(model, logits.softmax(1)):
            model(torch.randn(6, 3, 8, 8)).square().sum().backward()
        assert logits.grad.abs().min() > 0

    def test_different_numbers_of_contexts(self):
        model, _ = network()
        model[4] = ContextNorm(6, num_contexts=5, context="ids")
        with contexts(model, torch.tensor([2, 0])):
            assert model[1].contexts.responsibilities.shape == (2, 3)
            assert model[4].contexts.responsibilities.shape == (2, 5)


class TestRefused:
    @pytest.mark.parametrize(
        ("ids", "error", "says"),
        [
            (torch.tensor([0, 3, 1]), ValueError, r"'1' with num_contexts=3 must lie in \[0, 2\], got 0 to 3"),
            (torch.tensor([0, -1, 1]), ValueError, r"got -1 to 1"),
            (torch.eye(3, dtype=torch.long), ValueError, r"shape \(N,\), got \(3, 3\). Type ids.float\(\)"),
            (torch.tensor([[0], [1], [2]]), ValueError, r"shape \(N,\), got \(3, 1\). Type ids.flatten\(\)"),
            (torch.rand(3, 2), ValueError, r"probabilities \(N, 3\) or integers \(N,\), got torch.float32 \(3, 2\)"),
            (torch.ones(3, 3), ValueError, "each row must sum to 1"),
            (torch.tensor([[2.0, -1.0, 0.0]]), ValueError, "at least 0"),
            (torch.full((3, 3), float("nan")), ValueError, "at least 0"),
            (torch.tensor([True, False]), TypeError, "integers .* got torch.bool"),
            ([0, 1, 2], TypeError, "got list"),
        ],
    )
    def test_wrong_contexts(self, ids, error, says):
        with pytest.raises(error, match=says), contexts(network()[0], ids):
            pass

    def test_of_another_batch(self):
        model, _ = network()
        with (
            contexts(model, torch.tensor([0, 1, 2])),
            pytest.raises(ValueError, match=r"'1' .* contexts for 6 samples, got 3: .* views=m"),
        ):
            model(torch.randn(6, 3, 8, 8))

    def test_none_in_training_names_the_layer(self):
        model, _ = network()
        with pytest.raises(RuntimeError, match=r"ContextNorm '1' \(context='ids'\) was run without contexts. Add Norm"):
            model(torch.randn(6, 3, 8, 8))
        with pytest.raises(RuntimeError, match=r"^ContextNorm \(context='input'\) was run"):
            ContextNorm(6)(torch.randn(6, 6, 3))

    def test_a_model_that_takes_none(self):
        with pytest.raises(ValueError, match="no layer takes ids: the model has no ContextNorm"):
            contexts(nn.ReLU(), torch.tensor([0])).__enter__()
        model, _ = network("gate")
        with pytest.raises(ValueError, match=r"has context='gate'. Swap with norm_args=\{'context': 'input'\}"):
            contexts(model, images=torch.randn(2, 3, 4, 4)).__enter__()
        with pytest.raises(ValueError, match="one of the two"):
            contexts(model).__enter__()

    def test_reentrant_checkpointing_keeps_nothing_and_is_refused(self):
        model, _ = network()
        x = torch.randn(6, 3, 8, 8, requires_grad=True)
        for inside in (True, False):
            with contexts(model, torch.arange(6) % 3):
                model(x)  # a graph of the same layer that is alive must not stand in for it
                y = checkpoint(model, x, use_reentrant=True)
                if inside:
                    with pytest.raises(RuntimeError, match=r"'1' .* activation checkpointing .*'context': 'gate'"):
                        y.sum().backward()
            if not inside:
                with pytest.raises(RuntimeError, match=r"'1' .* activation checkpointing"):
                    y.sum().backward()

    @pytest.mark.parametrize("thread", [False, True])
    def test_checkpointing_runs_again_with_the_contexts_of_the_forward(self, thread):
        """Outside of the block, inside of another one, and in another thread, as autograd's own on a GPU."""
        grads = []
        for run in (lambda f, t: f(t), lambda f, t: checkpoint(f, t, use_reentrant=False)):
            model, _ = network()
            x = torch.arange(6 * 3 * 64.0).sin().view(6, 3, 8, 8).requires_grad_()
            with contexts(model, torch.arange(6) % 3):
                loss = run(model, x).square().sum()
            with contexts(model, torch.zeros(6).long()):
                if thread:
                    worker = threading.Thread(target=loss.backward)
                    worker.start()
                    worker.join()
                else:
                    loss.backward()
            grads.append([x.grad, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(grads[0], grads[1])

    def test_checkpointing_of_two_batches_at_once_is_refused_unless_they_are_alike(self):
        model, _ = network()
        x = torch.randn(6, 3, 8, 8, requires_grad=True)
        for second in (torch.arange(6) % 3, torch.zeros(6).long()):
            losses = []
            for ids in (torch.arange(6) % 3, second):
                with contexts(model, ids):
                    losses.append(checkpoint(model, x, use_reentrant=False).sum())
            if second.any():
                sum(losses).backward()
            else:
                with pytest.raises(RuntimeError, match="the graphs of several batches are alive"):
                    sum(losses).backward()
            del losses

    def test_activation_checkpointing_with_the_gate(self):
        model, _ = network("gate")
        twin, x, dy = copy.deepcopy(model), torch.randn(6, 3, 8, 8), torch.randn(6, 6, 4, 4)
        grads = []
        for net, run in ((model, lambda f, t: checkpoint(f, t, use_reentrant=False)), (twin, lambda f, t: f(t))):
            run(net, x).backward(dy)
            grads.append([p.grad for p in net.parameters()])
        torch.testing.assert_close(grads[0], grads[1])


class TestInput:
    def test_finds_the_kinds_of_images(self):
        model, _ = network("input")
        train, kinds = images(60)
        fit_contexts(model, train)
        assert torch.equal(model[1].centroids, model[4].centroids)
        new, expected = images(12, seed=1)
        with contexts(model, images=new):
            got = model[1].contexts.responsibilities.argmax(1)
        for kind in range(3):  # the same images together; the numbers are the clusters', by size
            assert len(set(got[expected == kind].tolist())) == 1
        assert len(set(got.tolist())) == 3
        assert len(kinds) == 60

    def test_before_the_fit_they_are_missing(self):
        model, _ = network("input")
        x = images()[0]
        with contexts(model, images=x), pytest.raises(RuntimeError, match="call fit_contexts"):
            model(x)
        plain = model.eval()(x)
        with contexts(model, images=x):
            assert torch.equal(model(x), plain)

    def test_centroids_travel_with_the_checkpoint(self, tmp_path):
        model, _ = network("input")
        fit_contexts(model, images(60)[0])
        torch.save(model.state_dict(), tmp_path / "model.pt")
        other, _ = network("input")
        other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        x = images(seed=2)[0]
        outputs = []
        for net in (model.eval(), other.eval()):
            with contexts(net, images=x):
                outputs.append(net(x))
        assert torch.equal(*outputs)
        assert model.half()[1].centroids.dtype == torch.float32

    def test_is_fitted_once(self):
        model, _ = network("input")
        fit_contexts(model, images(60)[0])
        before = model[1].centroids.clone()
        fit_contexts(model, images(60, seed=5)[0] * 3)
        assert torch.equal(model[1].centroids, before)


class TestCopies:
    def test_hear_what_the_original_hears_and_have_their_own_centroids(self):
        model, _ = network()
        average = copy.deepcopy(model)
        with contexts(model, torch.arange(6) % 3):
            average(torch.randn(6, 3, 8, 8))
        assert not torch.equal(average[1].running_mean, model[1].running_mean)
        fold, _ = network("input")
        other = copy.deepcopy(fold)
        fit_contexts(fold, images(30)[0])
        assert not other[1].is_fitted()

    def test_a_pickled_layer_knows_its_name_and_no_batch(self):
        model, _ = network()
        with contexts(model, torch.arange(6) % 3):
            twin = pickle.loads(pickle.dumps(model))
        assert twin[4].contexts.name == "4"
        assert twin[4].contexts.responsibilities is None


class TestSwap:
    @pytest.mark.parametrize("context", ["input", "ids", "gate"])
    def test_preserves_evaluation_and_gives_everything_back(self, context):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).double()
        model(torch.randn(8, 3, 8, 8).double())
        before, x = copy.deepcopy(model), torch.randn(4, 3, 8, 8).double()
        report = swap(model, "cn", norm_args={"context": context})
        row = report.layers[0]
        assert row.preserves_eval
        assert row.converted == ["weight", "bias", "running_mean", "running_var"]
        gate = {"gate_weight": 18, "gate_bias": 3} if context == "gate" else {}
        assert (row.added, row.removed) == ({"weight": 18, "bias": 18, **gate}, 12)
        assert report.total_after == sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(model.eval()(x), before.eval()(x), rtol=1e-14, atol=1e-14)
        if context == "ids":
            with contexts(model, torch.tensor([0, 2, 1, 1])):
                torch.testing.assert_close(model(x), before(x), rtol=1e-14, atol=1e-14)
        report.undo()
        assert all(torch.equal(v, before.state_dict()[k]) for k, v in model.state_dict().items())

    def test_undo_after_training_gives_the_pooled_layer(self):
        model, report = network()
        x, optimizer = torch.randn(12, 3, 8, 8), torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            with contexts(model, torch.tensor([0] * 6 + [1] * 4 + [2] * 2)):
                model(x * 2 + 1).square().mean().backward()
            optimizer.step()
        expected = model.eval()(x)
        report.undo()
        assert type(model[1]) is nn.BatchNorm2d
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-5)

    def test_on_to_another_normalizer_takes_the_pooled_values(self):
        model, _ = network()
        with contexts(model, torch.arange(12) % 3):
            model(torch.randn(12, 3, 8, 8) * 3)
        x = torch.randn(4, 3, 8, 8)
        expected = model.eval()(x)
        swap(model, "bn", source="cn")
        assert type(model[1]) is BatchNorm
        assert model[1].weight.shape == (6,)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    def test_on_to_contexts_of_another_kind(self):
        model, _ = network()
        with contexts(model, torch.arange(12) % 3):
            model(torch.randn(12, 3, 8, 8) * 3)
        rows = model[1].running_mean.clone()
        swap(model, "cn", source="cn", norm_args={"context": "gate"})
        assert torch.equal(model[1].running_mean, rows)
        with pytest.raises(ValueError, match="cannot turn 3 contexts into 5"):
            swap(model, "cn", source="cn", norm_args={"num_contexts": 5})
        assert model[1].num_contexts == 3

    def test_a_frozen_weight_stays_frozen(self):
        model = nn.Sequential(nn.BatchNorm2d(6))
        model[0].weight.requires_grad_(False)
        swap(model, "cn")
        assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (False, True)

    def test_a_cast_and_the_meta_device_are_undone(self):
        for cast in (nn.Module.bfloat16, lambda m: m.to("meta")):
            model, report = network("input")
            cast(model)
            report.undo()
            plain = cast(nn.BatchNorm2d(6)).state_dict()
            assert {k: (v.dtype, v.device, v.shape) for k, v in model[1].state_dict().items()} == {
                k: (v.dtype, v.device, v.shape) for k, v in plain.items()
            }

    def test_checkpoint_with_other_contexts(self):
        with pytest.raises(RuntimeError, match="has 5 contexts, this ContextNorm 3. Type num_contexts=5"):
            ContextNorm(6).load_state_dict(ContextNorm(6, num_contexts=5).state_dict())

    @pytest.mark.parametrize("context", ["input", "ids"])
    def test_a_plain_batch_norms_checkpoint(self, context):
        bn = nn.BatchNorm2d(6)
        bn(torch.randn(8, 6, 3, 3) + 1)
        layer = ContextNorm(6, context=context, missing="posterior")
        layer.load_state_dict(bn.state_dict(), strict=True)
        x = torch.randn(4, 6, 3, 3)
        torch.testing.assert_close(layer.eval()(x), bn.eval()(x), rtol=1e-5, atol=1e-5)


def test_changing_contexts_compile_nothing_anew(monkeypatch):
    monkeypatch.setattr(compiled, "_graphs", {})
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: real(f, backend="eager", **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, twin = network()[0], network()[0]
    for layer in (model[1], model[4]):
        layer.compile()
    seen = []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        x, ids = torch.randn(12, 3, 8, 8, generator=g), torch.randint(3, (12,), generator=g)
        outputs = []
        for net in (model, twin):
            with contexts(net, ids):
                outputs.append(net(x))
        torch.testing.assert_close(*outputs)
        seen.append((compiled.graphs(), torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    # One per shape, in parts where torch reads what layers are told between graphs.
    assert seen == ([(2, 2)] if TRACES_CONTEXT_VARIABLES else seen[:1]) * 6


def ranks(rank, x, dy, ids, split):
    layer = ContextNorm(6, context="ids").double()
    part = [t.split(split)[rank].clone() for t in (x, dy, ids)]
    part[0].requires_grad_()
    with contexts(layer, part[2]):
        y = layer(part[0])
    grads = torch.autograd.grad(y, [part[0], layer.weight, layer.bias], part[1])
    if torch.distributed.is_initialized():  # a parameter without a gradient would stop the second step
        wrapped = nn.parallel.DistributedDataParallel(ContextNorm(6, context="ids").double())
        for _ in range(2):
            with contexts(wrapped, part[2]):
                wrapped(part[0]).square().sum().backward()
        assert wrapped.module.weight.grad[1].abs().min() > 0
    return y.detach(), grads, layer.running_mean, layer.prior


def test_two_ranks_with_a_context_on_one_or_on_neither():
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(10, 6, 5, generator=g, dtype=torch.float64) for _ in range(2))
    ids = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 0])  # 1 on the second rank alone, 2 nowhere
    one = ranks(0, x, dy, ids, [10])
    two = run_ranks(ranks, 2, x, dy, ids, [4, 6])
    torch.testing.assert_close(torch.cat([r[0] for r in two]), one[0])
    torch.testing.assert_close(torch.cat([r[1][0] for r in two]), one[1][0])
    for i in (1, 2):
        torch.testing.assert_close(two[0][1][i] + two[1][1][i], one[1][i])
    for r in two:
        torch.testing.assert_close(r[2:], one[2:])


class TestTasks:
    """What is told belongs to the thread or the async task that told it."""

    def layer(self):
        torch.manual_seed(0)
        layer = ContextNorm(4, context="ids", num_contexts=3)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(12.0).view(3, 4))
        layer.eval()
        x = torch.ones(4, 4, 3, 3) * 2
        expected = []
        for k in range(3):
            with contexts(layer, torch.full((4,), k)):
                expected.append(layer(x))
        return layer, x, expected

    def test_threads(self):
        layer, x, expected = self.layer()
        barrier, wrong = threading.Barrier(3), []

        def work(k):
            for _ in range(50):
                with contexts(layer, torch.full((4,), k)):
                    barrier.wait()  # all three are inside of their blocks
                    wrong.append(not torch.equal(layer(x), expected[k]))
                    barrier.wait()
            wrong.append(layer.contexts.responsibilities is not None)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert wrong == [False] * 153

    def test_a_thread_that_was_told_nothing_hears_nothing(self):
        layer, _, _ = self.layer()
        heard = []
        with contexts(layer, torch.zeros(4).long()):
            thread = threading.Thread(target=lambda: heard.append(layer.contexts.responsibilities))
            thread.start()
            thread.join()
        assert heard == [None]

    def test_async_tasks_and_the_threads_that_they_wait_for(self):
        layer, x, expected = self.layer()

        async def work(k):
            good = []
            for _ in range(20):
                with contexts(layer, torch.full((4,), k)):
                    await asyncio.sleep(0)
                    good.append(torch.equal(layer(x), expected[k]))
                    good.append(torch.equal(await asyncio.to_thread(layer, x), expected[k]))
                good.append(layer.contexts.responsibilities is None)
            return all(good)

        async def main():
            return await asyncio.gather(*(work(k % 3) for k in range(9)))

        assert asyncio.run(main()) == [True] * 9

    def test_a_task_that_outlives_the_block_keeps_what_it_was_started_with(self):
        layer, x, expected = self.layer()

        async def work():
            await asyncio.sleep(0.01)
            return layer(x)

        async def main():
            with contexts(layer, torch.full((4,), 2)):
                task = asyncio.create_task(work())
                await asyncio.sleep(0)
            with contexts(layer, torch.zeros(4).long()):
                return await task

        assert torch.equal(asyncio.run(main()), expected[2])

    def test_blocks_may_be_left_in_any_order(self):
        layer, _, _ = self.layer()
        first, second = contexts(layer, torch.zeros(4).long()), contexts(layer, torch.ones(4).long())
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert layer.contexts.responsibilities.argmax(1).tolist() == [1] * 4
        second.__exit__(None, None, None)
        assert layer.contexts.responsibilities is None

    def test_loader_threads_of_a_task_and_copies_hear_the_same(self):
        layer, x, expected = self.layer()
        average = copy.deepcopy(layer)
        with contexts(layer, torch.full((4,), 1)):
            assert torch.equal(average(x), expected[1])
            context = contextvars.copy_context()
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(context.run, layer, x).result(), expected[1])
            data = torch.utils.data.DataLoader(range(4), num_workers=1, pin_memory=False)
            assert [torch.equal(layer(x), expected[1]) for _ in data] == [True] * 4

    def test_one_graph_serves_all_contexts(self):
        layer, x, expected = self.layer()
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=TRACES_CONTEXT_VARIABLES)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for k in (1, 2, 0):
                with contexts(layer, torch.full((4,), k)):
                    assert torch.equal(compiled(x), expected[k])


@pytest.mark.parametrize(
    "ids", [[0, 1, 1, 0], (0, 1, 1, 0), torch.tensor([0, 1, 1, 0]).numpy(), torch.tensor([0, 1, 1, 0]).bool()]
)
def test_ids_that_are_no_tensor_of_integers_say_what_to_type(ids):
    model = nn.Sequential(ContextNorm(6, context="ids", num_contexts=2)).eval()
    with pytest.raises(TypeError, match="must be a tensor of integers") as told, contexts(model, ids):
        pass
    with contexts(model, eval(str(told.value).partition(" Type ")[2].rstrip("."), {"torch": torch, "ids": ids})):
        assert model(torch.randn(4, 6, 3, 3)).shape == (4, 6, 3, 3)
