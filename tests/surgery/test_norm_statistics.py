"""norm_statistics: taken out, put back, and averaged as if one client had seen all samples."""

import copy

import pytest
import torch
from torch import nn

from lightning_norm import norm_statistics, normalizers, swap

C, F64 = 6, torch.float64
SHARES = (5, 2, 9)


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SHARES), C, 4, 3, generator=g, dtype=F64)
    return x + 3 * torch.arange(sum(SHARES), dtype=F64).reshape(-1, 1, 1, 1)


def built(key):
    torch.manual_seed(0)
    cls = normalizers()[key]
    track = {"track_running_stats": True} if key == "in" else {}
    momentum = {} if key == "dbn" else {"momentum": 1.0}
    return cls(C, **{**cls.test_arguments, **track, **momentum}).double()


TRACKED = [key for key in normalizers() if normalizers()[key].train_uses_batch_stats or key == "in"]
EXACT = [key for key in TRACKED if key not in ("ubn", "rbn", "cn")]


@pytest.mark.parametrize("key", TRACKED)
def test_taken_out_and_put_back(key):
    model = nn.Sequential(nn.Conv2d(C, C, 1).double(), built(key))
    stored = norm_statistics(model)
    before = stored.take()
    assert {"1.num_batches_tracked", *(f"1.{n}" for n in model[1].running_names)} <= set(before)
    assert not any(isinstance(t, nn.Parameter) for t in stored.values())
    expected = model.eval()(data())
    model.train()(data())
    assert not torch.equal(before[f"1.{model[1].running_names[0]}"], stored[f"1.{model[1].running_names[0]}"])
    stored.put(before)
    torch.testing.assert_close(model.eval()(data()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("key", EXACT)
def test_averages_are_the_statistics_of_all_samples(key):
    """Each client's one batch replaces its statistics, so that the truth is known."""
    clients, parts = [built(key) for _ in SHARES], data().split(SHARES)
    for client, part in zip(clients, parts, strict=True):
        client(part)
    stored = norm_statistics(clients[0])
    average = stored.average([norm_statistics(c).take() for c in clients], SHARES)
    one = built(key)
    one(data())
    second = one.running_names[1]
    assert torch.allclose(average["running_mean"], one.running_mean, rtol=1e-12)
    # running variances are unbiased, and n / (n - 1) of 24 elements is 4 % above 1
    assert torch.allclose(average[second], getattr(one, second), rtol=1e-9 if key == "dbn" else 0.05)
    assert not torch.allclose(average[second], sum(getattr(c, second) for c in clients) / 3, rtol=0.1) or key == "in"
    assert int(average["num_batches_tracked"]) == 1


class TestContexts:
    def test_each_context_counts_by_its_samples(self):
        clients = [normalizers()["cn"](2, num_contexts=2).double() for _ in range(2)]
        with torch.no_grad():
            for client, prior, mean in zip(clients, ((1.0, 0.0), (0.5, 0.5)), ((1.0, 77.0), (4.0, 7.0)), strict=True):
                client.prior.copy_(torch.tensor(prior))
                client.running_mean.copy_(torch.tensor(mean).unsqueeze(1).expand(2, 2))
        average = norm_statistics(clients[0]).average([norm_statistics(c).take() for c in clients], [10, 20])
        assert average["running_mean"][:, 0].tolist() == [2.5, 7.0]
        assert torch.allclose(average["prior"], torch.tensor([2 / 3, 1 / 3], dtype=F64))
        assert torch.allclose(average["running_var"][0], torch.tensor(1 + 2.25, dtype=F64))

    def test_contexts_that_were_fitted_apart_do_not_mean_the_same(self):
        clients = [normalizers()["cn"](2, num_contexts=2, context="input") for _ in range(2)]
        stored = [norm_statistics(c).take() for c in clients]
        name = next(n for n, kind in norm_statistics(clients[0]).kinds.items() if kind == "fitted")
        stored[1][name] = stored[1][name] + 1
        with pytest.raises(ValueError, match=r"differs between clients.*Fit it once"):
            norm_statistics(clients[0]).average(stored, [1, 1])


class TestFedBN:
    def test_what_is_personal_and_what_is_sent(self):
        model = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.GroupNorm(2, C), nn.BatchNorm2d(C))
        swap(model, "sn", include=["3"])
        stored = norm_statistics(model, personal=True)
        sent = stored.others(model.state_dict())
        assert list(sent) == ["0.weight", "0.bias"]
        assert {**stored.take(), **sent}.keys() == model.state_dict().keys()
        assert stored.kinds["3.mean_weight"] == stored.kinds["2.weight"] == "parameter"
        assert "running_var" in str(stored)
        assert "law" not in repr(stored)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[3].mean_weight.add_(3)
        average = stored.average([stored.take(), norm_statistics(other, personal=True).take()], [1, 2])
        torch.testing.assert_close(average["3.mean_weight"], model[3].mean_weight.detach() + 2)

    def test_names_do_not_depend_on_wrappers(self):
        model = nn.Sequential(nn.BatchNorm2d(C))
        assert list(norm_statistics(nn.DataParallel(model))) == list(norm_statistics(model))
        assert list(norm_statistics(torch.compile(model))) == list(norm_statistics(model))
        layer = nn.BatchNorm2d(C)
        shared = nn.Sequential(layer, layer)
        assert len(norm_statistics(shared)) == 3

    def test_what_does_not_fit_is_refused_and_nothing_written(self):
        model = nn.Sequential(nn.BatchNorm2d(C), nn.BatchNorm2d(2))
        stored = norm_statistics(model)
        taken = {name: t + 1 for name, t in stored.take().items()}
        with pytest.raises(ValueError, match=r"1 tensor of this model is missing, the first: '1.running_var'"):
            stored.put({n: t for n, t in taken.items() if n != "1.running_var"})
        with pytest.raises(ValueError, match="no 'extra' among its statistics"):
            stored.put({**taken, "extra": torch.ones(1)})
        with pytest.raises(ValueError, match=r"1.running_mean is \(3,\), and \(2,\) in this model"):
            stored.put({**taken, "1.running_mean": torch.ones(3)})
        assert not model[0].running_mean.any()
        for counts in ([1], [0, 0], [-1, 2], [float("nan"), 1]):
            with pytest.raises(ValueError, match="average: "):
                stored.average([taken, taken], counts)
        with pytest.raises(ValueError, match="client 1: 6 tensors of this model are missing"):
            stored.average([taken, {}], [1, 1])


@pytest.mark.parametrize("others", [(torch.bfloat16, F64), (torch.int64, torch.int64), (torch.float16, torch.int64)])
def test_clients_of_other_dtypes_lose_no_digit(others):
    stored = norm_statistics(nn.Sequential(nn.BatchNorm2d(C)))
    clients = [
        {n: t + i if n.endswith("tracked") else (t + i).to(d) for n, t in stored.take().items()}
        for i, d in enumerate(others)
    ]
    mean = stored.average(clients, [1, 1])
    assert mean["0.running_mean"].dtype == (F64 if F64 in others else torch.float32)
    torch.testing.assert_close(mean["0.running_mean"].float(), torch.full((C,), 0.5))
    torch.testing.assert_close(mean["0.running_var"].float(), torch.full((C,), 1.75))
    assert mean["0.num_batches_tracked"].dtype == torch.int64
    assert mean["0.num_batches_tracked"] == 1
