"""What NormMonitor logs for each normalizer, against the layers themselves."""

import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.nn.functional import cosine_similarity

from lightning_norm import Linear, NoEffectWarning, NormMonitor, NormScheduler, NormSwap, swap
from lightning_norm.normalizers import normalizers
from tests.callbacks.toy import Net, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore::lightning_norm.ParameterGrowthWarning")
GAMMA = {"gamma_condition", "gamma_near_zero"}


class Watched(Net):
    """Keep what the layer gets, and what it held before the last batch."""

    def __init__(self):
        super().__init__()
        self.net[0].register_forward_hook(self.keep)

    def keep(self, _, __, output):
        self.seen, self.buffers_then = output.detach().clone(), {k: v.clone() for k, v in self.net[1].named_buffers()}


def read(logger):
    return EventAccumulator(logger.log_dir, {"scalars": 0, "tensors": 0}).Reload()


def logged(tmp_path, *callbacks, model=None, data=None, epochs=2):
    """Train and return the model, the events, and quantity -> values of the one layer."""
    logger = TensorBoardLogger(tmp_path)
    model = model or Watched()
    trainer(*callbacks, logger=logger, max_epochs=epochs).fit(model, data or loader())
    events = read(logger)
    tags = [tag.split("/") for tag in events.Tags()["scalars"] if tag.startswith("norm/")]
    assert {tag[-1] for tag in tags} == {"net.1"}
    return model, events, {q: [e.value for e in events.Scalars(f"norm/{k}/{q}/net.1")] for _, k, q, _ in tags}


def condensation(x):
    """By the definition: the mean cosine of all pairs of different samples."""
    flat = x.double().flatten(1)
    pairs = cosine_similarity(flat[:, None], flat[None], dim=2)
    n = len(flat)
    return (pairs.sum() - pairs.trace()) / (n * (n - 1))


def number(value):
    return value.item() if isinstance(value, torch.Tensor) else value


def importance(layer, which):
    return dict(zip(layer.choices, layer.get_parameter(f"{which}_weight").softmax(0).tolist(), strict=True))


def gap(model, which):
    """Of the last batch, from what the layer holds after it."""
    layer, x = model.net[1], model.seen
    batch = x.mean((0, 2, 3)) if which == "mean" else x.std((0, 2, 3), correction=0)
    return ((batch - layer.get_buffer(f"running_{which}")).abs() / (layer.running_std + layer.eps)).mean()


CASES = {
    "sn": (
        {},
        {
            f"{w}_{k}": lambda m, w=w, k=k: importance(m.net[1], w)[k]
            for w in ("mean", "var")
            for k in ("in", "ln", "bn")
        },
    ),
    "bcn": (
        {},
        {
            "iota": lambda m: m.net[1].iota.mean(),
            "iota_min": lambda m: m.net[1].iota.min(),
            "iota_max": lambda m: m.net[1].iota.max(),
        },
    ),
    "ubn": (
        {"threshold": -1.0, "min_updates": 2},
        {
            "threshold": lambda m: -1.0,
            "condensation": lambda m: condensation(m.seen),
            "skipped": lambda m: 0.5,  # two of the four batches
            "weight_center": lambda m: m.net[1].center_weight.mean(),
            "weight_scale": lambda m: m.net[1].scale_weight.mean(),
            "weight_affine": lambda m: m.net[1].affine_weight.mean(),
            "gate_scale": lambda m: (m.net[1].scale_bias.sigmoid() / torch.tensor(1.0).sigmoid()).mean(),
            "gate_affine": lambda m: (m.net[1].affine_bias.sigmoid() / torch.tensor(-1.0).sigmoid()).mean(),
        },
    ),
    "rbn": (
        {},
        {
            "weight_center": lambda m: m.net[1].center_weight.mean(),
            "weight_scale": lambda m: m.net[1].scale_weight.mean(),
            "gate_scale": lambda m: (m.net[1].scale_bias.sigmoid() / torch.tensor(1.0).sigmoid()).mean(),
        },
    ),
    "dbn": (
        {"power": 0.5},
        {
            "alpha": lambda m: 4**-0.5,
            "gap_mean": lambda m: gap(m, "mean"),
            "gap_std": lambda m: gap(m, "std"),
        },
    ),
    "afn": (
        {},
        {
            "gate_mu": lambda m: m.net[1].lambda_mu.sigmoid(),
            "gate_sigma": lambda m: m.net[1].lambda_sigma.sigmoid(),
            "gate_beta": lambda m: m.net[1].lambda_beta,
            "gate_gamma": lambda m: m.net[1].lambda_gamma,
        },
    ),
    "asr": (
        {},
        {
            "gate_mu": lambda m: m.net[1].lambda_mu.sigmoid(),
            "gate_sigma": lambda m: m.net[1].lambda_sigma.sigmoid(),
            "gate_beta": lambda m: m.net[1].lambda_beta,
            "gate_gamma": lambda m: m.net[1].lambda_gamma,
        },
    ),
    "cn": (
        {"context": "gate"},
        {
            **{f"prior_{k}": lambda m, k=k: m.net[1].prior[k] for k in range(3)},
            "entropy": lambda m: -(m.net[1].prior * m.net[1].prior.log()).sum(),
        },
    ),
    "bnet": (
        {},
        {
            "off_center": lambda m: 1 - m.net[1].kernel[:, 0, 1, 1].square().sum() / m.net[1].kernel.square().sum(),
            "kernel_norm": lambda m: m.net[1].kernel.flatten(1).norm(dim=1).mean(),
        },
    ),
}
"""Arguments, and a formula for each quantity of those methods whose own tests have none for it."""
OPTIONS = {"in": {"affine": True}, "gn": {"num_groups": 2}}


@pytest.mark.parametrize("key", normalizers())
def test_all_that_a_normalizer_learns_is_logged(key, tmp_path):
    arguments, expected = CASES.get(key, ({}, {}))
    model, _, values = logged(tmp_path, NormSwap(key, {**OPTIONS.get(key, {}), **arguments}), NormMonitor())
    layer = model.net[1]
    if key in CASES:
        assert layer.monitor().keys() <= expected.keys(), "a quantity without a formula"
    else:
        expected = {name: lambda m, name=name: m.net[1].monitor()[name] for name in layer.monitor()}
    assert expected.keys() | (set() if key == "bnet" else GAMMA) <= values.keys()
    running = [name for name in layer.running_names if getattr(layer, name) is not None]
    assert {q for q in values if q.startswith("drift_")} == {name.replace("running", "drift") for name in running}
    for quantity, of_layer in expected.items():
        assert values[quantity][-1] == pytest.approx(number(of_layer(model)), rel=1e-4, abs=1e-6), quantity
    # Nothing is scheduled here, and the ReLU that follows lets no gradient of a tau of 0 pass.
    assert {q for q in expected if len(set(values[q])) == 1} <= {"threshold", "r_max", "d_max", "tau"}


@pytest.mark.parametrize("key", ["bn", "sn", "dbn", "cn"])
def test_the_running_statistics_drift(key, tmp_path):
    model, _, values = logged(tmp_path, NormSwap(key, CASES.get(key, ({}, {}))[0]), NormMonitor())
    layer = model.net[1]
    for which in layer.running_names:
        old, new = model.buffers_then[which], layer.get_buffer(which)
        expected = (new - old).abs().sum() / max(old.abs().sum(), new.abs().sum())
        assert values[which.replace("running", "drift")][-1] == pytest.approx(expected.item(), rel=1e-4)
        assert expected > 1e-3


SCHEDULED = {
    "radius": ("sn", {"sparse": True}, (0.0, 0.8)),
    "momentum": ("bn", {}, (0.1, 0.02)),
    "alpha": ("dbn", {}, (0.25, 0.05)),
    "threshold": ("ubn", {}, (0.5, 0.9)),
    "dropout": ("afn", {}, (0.3, 0.0)),
}


@pytest.mark.parametrize("first", ["monitor", "scheduler"])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_scheduled_value_is_logged_with_the_steps_it_holds_for(name, interval, first, tmp_path):
    key, arguments, (start, end) = SCHEDULED[name]
    schedule = Linear(start, end, **{f"{interval}s": 3})
    scheduler, monitor = NormScheduler({name: schedule}, interval=interval), NormMonitor()
    order = [monitor, scheduler] if first == "monitor" else [scheduler, monitor]
    _, events, values = logged(tmp_path, NormSwap(key, arguments), *order, data=loader(12))
    times = [0, 0, 0, 1, 1, 1, 1] if interval == "epoch" else [0, 1, 2, 3, 4, 5, 5]
    assert values[name] == pytest.approx([schedule(t) for t in times], abs=1e-6)
    page = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    patterns = [tag for category in page.category for chart in category.chart for tag in chart.multiline.tag]
    shown = [tag for tag in events.Tags()["scalars"] if tag.startswith("norm_all/")]
    assert all(any(re.match(pattern, tag) for pattern in patterns) for tag in shown)
    assert f"norm_all/{key}/{name}" in shown


def test_a_schedule_alone_is_something_to_show(tmp_path):
    logger = CSVLogger(tmp_path)
    scheduler = NormScheduler({"momentum": Linear(0.1, 0.02, epochs=2)})
    trainer(NormSwap("bn"), NormMonitor(extras=False), scheduler, logger=logger).fit(Net(), loader())
    keys = {"norm/bn/momentum/net.1", "norm_all/bn/momentum", "step"}
    assert set(logger.experiment.metrics_keys) == keys


def test_no_quantities_of_every_layer_on_request(tmp_path):
    _, _, values = logged(tmp_path, NormSwap("sn"), NormMonitor(extras=False))
    assert set(values) == set(CASES["sn"][1])
    with pytest.warns(NoEffectWarning, match="no layer of the model"):
        trainer(NormSwap("bn"), NormMonitor(extras=False), logger=CSVLogger(tmp_path)).fit(Net(), loader())


def test_the_quantities_are_to_be_had_without_a_trainer():
    model = Net()
    swap(model, "bcn")
    assert "norm/bcn/iota/net.1" in NormMonitor().quantities(model)
