"""Statistics of the positions that count: against formulas on the unpadded samples, one by one, in float64."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_norm import MaskError, create, masks, normalizers, swap
from lightning_norm.layers.special_calls import resized
from lightning_norm.testing.kit import built, distance, features, noise
from lightning_norm.testing.masks import statistics_move_once

LENGTHS = (9, 4, 1, 0, 6)
C = 6


def ragged(dtype=torch.float64, offset=0.0):
    x = features(len(LENGTHS), C, max(LENGTHS) + 2, dtype=torch.float64) + offset
    for sample, n in zip(x, LENGTHS, strict=True):
        sample[:, n:] = torch.nan
    return x.to(dtype)


def layer_of(key, **arguments):
    cls = normalizers()[key]
    return built(lambda c, **kw: cls(c, **{**cls.test_arguments, **arguments, **kw}), torch.float64)


def packed(x):
    """All positions that count, as one sample of them: (1, C, sum of lengths)."""
    return torch.cat([sample[:, :n] for sample, n in zip(x, LENGTHS, strict=True)], 1).unsqueeze(0)


@pytest.mark.parametrize("key", ["bn", "dbn", "bnet"])
def test_the_batch_is_that_of_all_positions_that_count(key):
    """Values, gradients and running statistics; each sample weighs by its length."""
    arguments = {"kernel_size": 1} if key == "bnet" else {}
    layer, plain = layer_of(key, **arguments), layer_of(key, **arguments)
    x, dy = ragged().requires_grad_(), noise(len(LENGTHS), C, max(LENGTHS) + 2, seed=3, dtype=torch.float64)
    leaf = packed(x).detach().requires_grad_()
    y, expected = layer(x, mask=torch.tensor(LENGTHS)), plain(leaf)
    assert distance(packed(y), expected) < 1e-12
    y.backward(dy)
    expected.backward(packed(dy))
    assert distance(packed(x.grad), leaf.grad) < 1e-11
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        assert distance(a.grad, b.grad) < 1e-11
    for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
        assert distance(a, b) < 1e-12


@pytest.mark.parametrize("key", ["in", "ln", "gn", "asr"])
def test_a_sample_is_as_it_is_alone(key):
    layer = layer_of(key)
    x = ragged().requires_grad_()
    y = layer(x, mask=torch.tensor(LENGTHS))
    for sample, got, n in zip(x.detach(), y, LENGTHS, strict=True):
        # One element of a channel alone has no instance statistics, and torch refuses it.
        if n > 1:
            assert distance(got[:, :n], layer(sample[:, :n].unsqueeze(0))[0]) < 1e-12
        assert not got[:, n:].any()


def moments(x):
    """Mean, variance and length of each sample that is not empty, by formulas on the sample alone."""
    samples = [(sample[:, :n], n) for sample, n in zip(x, LENGTHS, strict=True)]
    return samples, packed(x)[0].mean(1), packed(x)[0].var(1, correction=0)


def test_sn_mixes_what_each_sample_has():
    """A sample with one position has no instance statistics, and the softmax is taken over the others."""
    layer, x = layer_of("sn"), ragged()
    y = layer(x, mask=torch.tensor(LENGTHS))
    samples, bn_mean, bn_var = moments(x)
    for got, (sample, n) in zip(y, samples, strict=True):
        if n == 0:
            continue
        custom = (sample.mean(1), sample.var(1, correction=0))
        all_channels = (sample.mean(), sample.var(correction=0))
        drop = torch.tensor([n == 1, False, False])
        w, v = (t.double().masked_fill(drop, -math.inf).softmax(0) for t in (layer.mean_weight, layer.var_weight))
        mean = w[0] * custom[0] + w[1] * all_channels[0] + w[2] * bn_mean
        var = v[0] * custom[1] + v[1] * all_channels[1] + v[2] * bn_var
        expected = (sample.T - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias
        assert distance(got[:, :n].T, expected) < 1e-12


def test_rbn_and_bcn_on_ragged_samples():
    rbn, bcn, x = layer_of("rbn"), layer_of("bcn"), ragged()
    by_rbn, by_bcn = (layer(x, mask=torch.tensor(LENGTHS)) for layer in (rbn, bcn))
    samples, bn_mean, bn_var = moments(x)
    centered = [s + rbn.center_weight[:, None] * s.mean(1, keepdim=True) for s, n in samples if n]
    whole = torch.cat(centered, 1)
    gate_at_start = torch.tensor(1.0).double().sigmoid()
    for i, (x_c, (sample, n)) in enumerate(zip(centered, [s for s in samples if s[1]], strict=True)):
        i = [j for j, length in enumerate(LENGTHS) if length][i]
        x_s = (x_c - whole.mean(1)[:, None]) / (whole.var(1, correction=0)[:, None] + rbn.eps).sqrt()
        gate = (rbn.scale_weight * x_s.mean(1) + rbn.scale_bias).sigmoid() / gate_at_start
        expected = (rbn.weight * gate)[:, None] * x_s + rbn.bias[:, None]
        assert distance(by_rbn[i, :, :n], expected) < 1e-12
        batch = (sample.T - bn_mean) / (bn_var + bcn.eps).sqrt()
        layer = (sample.T - sample.mean()) / (sample.var(correction=0) + bcn.eps).sqrt()
        expected = (bcn.iota * batch + (1 - bcn.iota) * layer) * bcn.weight + bcn.bias
        assert distance(by_bcn[i, :, :n].T, expected) < 1e-12


def test_instance_norm_averages_over_samples_that_have_positions():
    layer, x = layer_of("in", track_running_stats=True, momentum=1.0), ragged()
    layer(x, mask=torch.tensor(LENGTHS))
    samples, _, _ = moments(x)
    means = torch.stack([s.mean(1) for s, n in samples if n])
    assert distance(layer.running_mean, means.mean(0)) < 1e-12


def test_gradients_are_exact():
    mask = torch.tensor(LENGTHS)
    for key in ("bn", "sn", "cn", "afn", "bnet"):
        layer = layer_of(key, track_running_stats=False) if key != "bnet" else layer_of(key)
        x = torch.nan_to_num(ragged()).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, layer=layer: layer(x, mask=mask), (x,), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_means_keep_their_digits(dtype):
    """At a mean of 1000 times the deviation, and in half precision, the error is that of the layer without a mask."""
    exact, layer = create("bn", C).double(), create("bn", C)
    offset = 1000.0 if dtype == torch.float32 else 4.0
    x = ragged(dtype, offset)
    expected = exact(packed(x).double())
    got = packed(layer(x, mask=torch.tensor(LENGTHS)))
    plain = create("bn", C)(packed(x))
    assert got.dtype == dtype
    assert distance(got, expected) <= 2 * distance(plain, expected) + 1e-6


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_shapes_of_masks(channel_dim):
    """(N, *), with an axis for the channels, 0 and 1 of any dtype, whole samples, lengths along the last axis."""
    x = features(4, C, 3, 5, dtype=torch.float64)
    x = x.movedim(1, -1) if channel_dim == -1 else x
    layer = create("bn", C, channel_dim=channel_dim).double()
    mask = torch.arange(5).expand(4, 3, 5) < torch.tensor([5, 2, 0, 3]).view(4, 1, 1)
    expected = layer(x, mask=mask)
    axis = 1 if channel_dim == 1 else -1
    for other in (mask.unsqueeze(axis), mask.float(), mask.long(), torch.tensor([5, 2, 0, 3])):
        assert torch.equal(layer(x, mask=other), expected)
    samples = torch.tensor([True, False, True, True])
    assert torch.equal(layer(x, mask=samples), layer(x, mask=samples.view(4, 1, 1).expand(4, 3, 5)))
    vectors = features(4, C, dtype=torch.float64)
    assert (
        distance(create("bn", C).double()(vectors, mask=samples)[samples], create("bn", C).double()(vectors[samples]))
        < 1e-12
    )


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(4, 7, dtype=torch.bool), r"\(4, 5\) or lengths \(4,\), got \(4, 7\)"),
        (torch.ones(3, 5, dtype=torch.bool), r"got \(3, 5\)"),
        (torch.tensor([1, 6, 2, 3]), r"lengths must lie in \[0, 5\].* 1 to 6"),
        (torch.full((4, 5), 0.5), "other values"),
        ([1, 2, 3, 4], "got list"),
    ],
)
def test_masks_that_do_not_fit(mask, says):
    with pytest.raises(MaskError, match=says):
        create("bn", C)(torch.randn(4, C, 5), mask=mask)


def test_the_kernels_by_name_take_no_mask():
    layer = create("bn", C)
    layer.backend = "triton"
    with pytest.raises(RuntimeError, match="triton.* cannot take a mask"):
        layer(torch.randn(4, C, 5), mask=torch.tensor([5, 2, 1, 3]))


def test_a_window_of_accumulation_weighs_by_counts():
    from lightning_norm.layers.running_stats import close_window, open_window

    windowed, plain = create("bn", C).double(), create("bn", C).double()
    open_window(windowed)
    x = ragged()
    for part in (slice(0, 2), slice(2, 5)):
        windowed(x[part], mask=torch.tensor(LENGTHS[part]))
    close_window(windowed)
    plain(packed(x))
    assert distance(windowed.running_mean, plain.running_mean) < 1e-12
    assert distance(windowed.running_var, plain.running_var) < 1e-12


class TestMasks:
    """``masks(model, mask)``: every layer takes the mask at the size of its own map."""

    def network(self, key="bn"):
        torch.manual_seed(0)
        return swap_into(
            nn.Sequential(
                nn.Conv1d(3, C, 3, padding=1),
                nn.BatchNorm1d(C),
                nn.ReLU(),
                nn.Conv1d(C, C, 3, stride=2, padding=1),
                nn.BatchNorm1d(C),
                nn.ReLU(),
            ),
            key,
        )

    @pytest.mark.parametrize("key", ["bn", "sn", "bnet"])
    def test_a_convolutional_network_does_not_see_the_padding(self, key):
        """Outputs of 0 in the padding are what a convolution puts around the signal by itself."""
        plain, padded = self.network(key), self.network(key)
        x = features(4, 3, 9, dtype=torch.float64)
        more = torch.cat([x, torch.zeros(4, 3, 5, dtype=torch.float64)], 2)
        y = plain(x)
        with masks(padded, torch.full((4,), 9), size=14):
            got = padded(more)
        assert distance(got[..., : y.shape[-1]], y) < 1e-12
        assert not got[..., y.shape[-1] :].any()
        for a, b in zip(padded.buffers(), plain.buffers(), strict=True):
            assert distance(a, b) < 1e-12

    def test_the_mask_ends_with_the_block(self):
        model, x = self.network().eval(), torch.randn(2, 3, 8).double()
        expected = model(x)
        with masks(model, torch.tensor([8, 2])):
            assert not torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_runs_again_with_the_mask_of_the_forward(self, reentrant):
        x = features(4, 3, 8, dtype=torch.float64)
        grads = []
        for run in (lambda f, t: f(t), lambda f, t: checkpoint(f, t, use_reentrant=reentrant)):
            model, leaf = self.network(), x.clone().requires_grad_()
            with masks(model, torch.tensor([8, 5, 2, 7])):
                loss = run(model, leaf).square().sum()
                if reentrant:
                    loss.backward()
            if not reentrant:
                loss.backward()
            grads.append([leaf.grad, *(p.grad for p in model.parameters()), *model.buffers()])
        for a, b in zip(*grads, strict=True):
            assert distance(a, b) < 1e-12

    def test_reentrant_checkpointing_outside_of_the_block_is_refused(self):
        model = self.network()
        with masks(model, torch.tensor([8, 5])):
            y = checkpoint(model, torch.randn(2, 3, 8, requires_grad=True).double(), use_reentrant=True)
        with pytest.raises(MaskError, match=r"'1' was run again in a backward pass.* layer\(x, mask=mask\)"):
            y.sum().backward()

    def test_what_has_no_layer_or_a_mask_of_the_wrong_kind(self):
        with pytest.raises(MaskError, match="has no normalizer"):
            masks(nn.Sequential(nn.Linear(3, 3)), torch.ones(2)).__enter__()
        with pytest.raises(MaskError, match="got list"):
            masks(self.network(), [1, 2]).__enter__()

    def test_torchs_own_layers_are_told_of(self):
        model = nn.Sequential(create("bn", 3), nn.BatchNorm1d(3))
        with pytest.warns(UserWarning, match="read by 1 normalization layer .first: 1"):
            masks(model, torch.ones(2, 4)).__enter__()


def swap_into(model, key):
    if key != "bn":
        swap(model, key, norm_args={"spatial_dims": 1} if key == "bnet" else None)
    else:
        swap(model, key)
    return model.double()


@pytest.mark.parametrize(("size", "maps"), [(224, (112, 56, 28, 14, 7)), (225, (113, 57, 29, 15, 8)), (7, (4, 2, 1))])
def test_strided_maps_have_as_many_positions_as_the_signal_alone(size, maps):
    for length in (1, 2, size // 2, size - 1, size):
        alone = length
        for n in maps:
            alone = (alone + 1) // 2  # as a convolution of stride 2 makes of the signal alone
            assert int(resized(torch.arange(size)[None] < length, (n,), "").sum()) == alone


def test_a_mask_finds_its_place_in_maps_of_other_axes():
    mask = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(resized(mask, (24,), ""), mask.flatten(1))  # tokens of an image
    assert torch.equal(resized(mask, (), ""), mask.flatten(1).any(1))
    lengths = torch.arange(6)[None] < torch.tensor([[2], [6], [0]])
    assert torch.equal(resized(lengths, (4, 3), ""), lengths[:, None, ::2])
    with pytest.raises(MaskError, match="no place in a map"):
        resized(mask, (7,), "")


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("ubn", {"threshold": -1.0, "min_updates": 0}),
        ("ubn", {"threshold": 0.0, "min_updates": 1, "condensed_grad": "renorm"}),
        ("cn", {"context": "gate", "prior_scale": True}),
        ("dbn", {"power": 1.5}),
        ("bn", {"momentum": None}),
    ],
)
def test_methods_that_follow_their_running_statistics_begin_a_second_run_alike(key, arguments):
    cls = normalizers()[key]
    statistics_move_once(lambda c, **more: cls(c, **arguments, **more))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 3e38, 1e20])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("key", ["sn", "rbn"])
def test_padding_may_hold_anything(key, memory_format, garbage):
    """In x and in the gradient of y, in float32, where a large number overflows in a product."""
    mask = torch.arange(8).expand(3, 4, 8) < torch.tensor([8, 5, 0]).view(3, 1, 1)
    x, dy = (noise(3, C, 4, 8, seed=seed).to(memory_format=memory_format) for seed in (1, 2))
    steps = []
    for padding in (0.0, garbage):
        layer = create(key, C)
        torch.nn.init.constant_(layer.weight, 5.0)
        leaf = torch.where(mask.unsqueeze(1), x, padding).requires_grad_()
        y = layer(leaf, mask=mask)
        y.backward(torch.where(mask.unsqueeze(1), dy, padding))
        steps.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    assert torch.equal(steps[1][0].isfinite().all(), torch.tensor(True))
    for got, expected in zip(steps[1], steps[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_a_mask_keeps_x_alone_for_the_backward_pass():
    x, remaining = noise(8, C, 16, 16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: remaining.append(t) or t, lambda t: t):
        create("bn", C)(x, mask=torch.full((8,), 9))
    assert {t.data_ptr() for t in remaining if t.numel() == x.numel()} == {x.data_ptr()}
