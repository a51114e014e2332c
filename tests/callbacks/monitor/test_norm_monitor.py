import csv
import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import backend_context, metadata
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_norm import MissingDependencyWarning, NoEffectWarning, NormMonitor, NormSwap
from lightning_norm.callbacks.monitor import page, pictures
from lightning_norm.callbacks.monitor.quantities import Quantities, families
from lightning_norm.normalizers import create, normalizers
from tests.callbacks.toy import LateNet, Net, loader, trainer

ALL = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
EVERY_LAYER = {"layer", "gamma_condition", "gamma_near_zero", "drift_mean", "drift_var"}
"""Of the heading of a table: the quantities that a layer has whatever its method. There may be more."""


def read(logger):
    return EventAccumulator(logger.log_dir, ALL).Reload()


def scalar_tags(events, start=""):
    return [tag for tag in events.Tags()["scalars"] if tag.startswith(start)]


def text(events, tag):
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


def hparams_of(events):
    """What TensorBoard shows on its HParams page: the columns, and the values of this run."""
    contents = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}
    columns = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG])
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    values = {k: v.string_value or v.number_value for k, v in start.hparams.items()}
    assert {info.name for info in columns.hparam_infos} == set(values)
    return values, [info.name.tag for info in columns.metric_infos]


def row_of(logger):
    """What a run with NormMonitor has beside it for the HParams page: its values, and its metrics."""
    events = EventAccumulator(f"{logger.log_dir}/hparams", ALL).Reload()
    contents = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    values = {k: v.string_value or v.number_value for k, v in start.hparams.items()}
    return values, {tag: events.Scalars(tag)[-1].value for tag in scalar_tags(events)}


def hparams_page(folder):
    """The columns of the page, of arguments and of metrics, as TensorBoard answers the browser."""
    runs = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    runs.Reload()
    provider = data_provider.MultiplexerDataProvider(runs, str(folder))
    backend, request = backend_context.Context(base_plugin.TBContext(data_provider=provider)), RequestContext()
    rows = backend.hparams_metadata(request, "")
    page = backend.experiment_from_metadata(request, "", True, rows, [])
    return {info.name for info in page.hparam_infos}, {info.name.tag for info in page.metric_infos}


def test_importance_weights_of_each_layer_reach_tensorboard(tmp_path):
    model = LateNet()
    logger = TensorBoardLogger(tmp_path)
    trainer(NormSwap("sn"), NormMonitor(), logger=logger, max_epochs=2).fit(model, loader())
    events = read(logger)
    tags = [t for t in events.Tags()["scalars"] if t.startswith("norm/")]
    assert len([t for t in tags if t.split("/")[2].startswith(("mean_", "var_"))]) == 3 * 6
    assert "norm/sn/mean_bn/built.1" in tags
    for layer in ("net.1", "built.1", "late"):
        for quantity in ("mean", "var"):
            series = [events.Scalars(f"norm/sn/{quantity}_{k}/{layer}") for k in ("in", "ln", "bn")]
            assert [e.step for e in series[0]] == [0, 1, 2, 3, 4]
            sums = torch.tensor([[e.value for e in s] for s in series]).sum(0)
            torch.testing.assert_close(sums, torch.ones(5), atol=1e-6, rtol=0)  # three float32 roundings
    last = events.Scalars("norm/sn/mean_in/net.1")[-1].value
    assert last == pytest.approx(model.net[1].importance()["mean"][0].item(), abs=1e-6)
    assert last != pytest.approx(1 / 3, abs=1e-6)


def test_cadence_and_prefix(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer(NormSwap("bcn"), NormMonitor(every_n_steps=3, prefix="n"), logger=logger, max_epochs=2).fit(
        LateNet(), loader()
    )
    events = read(logger)
    assert [e.step for e in events.Scalars("n/bcn/iota/late")] == [0, 3, 4]


def test_accumulated_batches_log_a_step_once(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer(NormSwap("sn"), NormMonitor(every_n_steps=1), logger=logger, accumulate_grad_batches=2).fit(
        LateNet(), loader(16)
    )
    events = read(logger)
    assert [e.step for e in events.Scalars("norm/sn/mean_in/late")] == [0, 1, 2]


def test_any_logger_will_do(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(NormSwap("sn"), NormMonitor(), logger=logger).fit(LateNet(), loader())
    assert "norm/sn/mean_bn/late" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


class Doubled(TensorBoardLogger):
    def log_metrics(self, metrics, step=None):
        super().log_metrics({tag: 2 * value for tag, value in metrics.items()}, step)


def test_a_logger_of_the_users_own_gets_the_scalars_its_way(tmp_path):
    logger = Doubled(tmp_path)
    trainer(NormSwap("sn"), NormMonitor(), logger=logger).fit(Net(), loader())
    assert read(logger).Scalars("norm/sn/mean_in/net.1")[0].value == pytest.approx(2 / 3)


class Decided(LateNet):
    """A mixture in which one statistic leads from the start."""

    def on_train_start(self):
        for layer in (self.net[1], self.built[1], self.late):
            layer.mean_weight.data[0] += 1


def test_the_table_is_printed_on_request(capsys):
    model = Decided()
    trainer(NormSwap("sn"), NormMonitor(print_table=True)).fit(model, loader())
    text = capsys.readouterr().out.partition("NormMonitor: sn\n")[2].rstrip("\n")
    custom, every_layer = text.split("\n\n")
    rows = [row.split() for row in custom.splitlines()]
    assert rows[0] == ["layer", "mean_in", "mean_ln", "mean_bn", "var_in", "var_ln", "var_bn"]
    assert [row[0] for row in rows[1:]] == ["net.1", "built.1", "late"]
    weights = model.late.importance()["mean"]
    cells = [f"{w:.3g}" for w in weights.tolist()]
    cells[weights.argmax()] = f"*{cells[weights.argmax()]}*"
    assert rows[3][1:4] == cells
    assert {len(row) for row in custom.splitlines()} == {len(custom.splitlines()[0])}  # aligned
    assert set(every_layer.splitlines()[0].split()) >= EVERY_LAYER


def test_nothing_to_log_is_said():
    with pytest.warns(NoEffectWarning, match="no logger"):
        trainer(NormSwap("sn"), NormMonitor()).fit(LateNet(), loader())


def test_epochs_as_the_interval(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    monitor = NormMonitor(logging_interval="epoch", every_n_steps=1)
    trainer(NormSwap("sn"), monitor, logger=logger, max_epochs=2).fit(LateNet(), loader(12))
    assert [e.step for e in read(logger).Scalars("norm/sn/mean_in/late")] == [0, 3, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a positive int, got 0"),
        ({"pictures_every_n_epochs": 0}, "pictures_every_n_epochs must be a positive int, got 0"),
        ({"logging_interval": "batch"}, "must be 'step', 'epoch' or None, got 'batch'"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        NormMonitor(**arguments)


def test_depths_average_their_layers(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    model = deep_net()
    trainer(NormSwap("sn"), NormMonitor(), logger=logger).fit(model, loader())
    events = read(logger)
    names = [f"net.{i}" for i in range(1, 12, 3)]
    last = {n: events.Scalars(f"norm/sn/var_ln/{n}")[-1].value for n in names}
    for depth, custom in {"early": names[:2], "middle": names[2:3], "late": names[3:]}.items():
        got = events.Scalars(f"norm_{depth}/sn/var_ln")[-1].value
        assert got == pytest.approx(sum(last[n] for n in custom) / len(custom), rel=1e-6)
    assert len({round(v, 7) for v in last.values()}) > 1  # otherwise any average would do


@pytest.mark.parametrize("prefix", ["", "run"])
def test_the_page_has_one_chart_per_family_and_depth(prefix, tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    monitor = NormMonitor(prefix="n.")
    trainer(NormSwap(rules={"net.10": "bcn", ".*": "sn"}), monitor, logger=logger).fit(deep_net(), loader())
    events = read(logger)
    page = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in page.category}
    assert list(charts) == ["Normalization: sn", "Normalization: bcn"]
    thirds = ("early", "middle", "late")
    mixtures = [f"{f}: IN, LN, BN ({t})" for f in ("mean", "var") for t in thirds]
    of_every_layer = ["gamma condition", "gamma near zero", *(f"drift: mean, var ({t})" for t in thirds)]
    assert list(charts["Normalization: sn"]) == mixtures + of_every_layer  # its own before those of every layer
    assert list(charts["Normalization: bcn"]) == ["iota, min, max", *of_every_layer[:2], "drift: mean, var"]
    shown = [pattern for charts_of in charts.values() for chart in charts_of.values() for pattern in chart]
    results = [[tag for tag in scalar_tags(events) if re.match(pattern, tag)] for pattern in shown]
    assert all(len(tags) == 1 for tags in results), results  # as TensorBoard looks for them
    assert len(shown) == len({tags[0] for tags in results})  # every line in one chart


def test_lines_that_belong_together_share_a_chart():
    names = ("condensation", "skipped", "weight_center", "gate_scale", "gate_affine", "gamma_condition", "threshold")
    assert families([("ubn", q, "a") for q in names]) == {
        "ubn": {
            "condensation": ["condensation", "threshold"],
            "skipped": ["skipped"],
            "weight": ["weight_center"],
            "gate": ["gate_scale", "gate_affine"],
            "gamma condition": ["gamma_condition"],
        }
    }


def test_pictures_tables_and_histograms(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    model = Decided()
    trainer(NormSwap("sn"), NormMonitor(), logger=logger, max_epochs=2).fit(model, loader())
    events = read(logger)
    assert events.Tags()["images"] == ["norm/sn/choice", "norm/sn/profile", "norm/sn/profile_every_layer"]
    for tag in events.Tags()["images"]:
        (image,) = events.Images(tag)
        assert image.step == 4
        assert Image.open(io.BytesIO(image.encoded_image_string)).size == (image.width, image.height)
        assert image.width > 400
    assert len(events.Tags()["histograms"]) == 3 * 3
    first, last = events.Histograms("norm_histograms/sn/weight/late")
    assert (first.step, last.step) == (2, 4)
    assert last.histogram_value.num == 6
    assert last.histogram_value.sum == pytest.approx(model.late.weight.sum().item(), rel=1e-6)
    rows = [row.strip("| ").split(" | ") for row in text(events, "norm/sn/table").splitlines()]
    assert rows[0] == ["layer", "mean_in", "mean_ln", "mean_bn", "var_in", "var_ln", "var_bn"]
    assert set(rows[6]) >= EVERY_LAYER
    assert [row[0] for row in rows[2:5]] == [row[0] for row in rows[8:]] == ["net.1", "built.1", "late"]
    weights = model.late.importance()["mean"]
    cells = [f"{w:.3g}" for w in weights.tolist()]
    cells[weights.argmax()] = f"**{cells[weights.argmax()]}**"
    assert rows[4][1:4] == cells


SHOWN = {"in": {"affine": True}, "gn": {"num_groups": 2}, "ubn": {"threshold": 0.5}, "cn": {"context": "ids"}}
BEFORE = {1: ["a"], 25: [f"backbone.features.{i}.conv_block.normalization.{'x' * (i % 9)}" for i in range(25)]}


@pytest.mark.parametrize(("key", "layers"), [*((key, 1) for key in normalizers()), ("sn", 25), ("ubn", 25)])
def test_no_text_of_a_picture_is_cut_and_no_axis_has_an_offset(key, layers, monkeypatch):
    shown = []

    def looked_at(figure):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        shown.append(figure)
        drawn_box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
        assert min(drawn_box.x0, drawn_box.y0) >= 0
        assert drawn_box.x1 <= width
        assert drawn_box.y1 <= height
        for axes in figure.axes:
            assert not axes.xaxis.get_offset_text().get_text()
            low, high = axes.get_xlim()
            places = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            ticks = [label.get_text() for at, label in places if low <= at <= high and label.get_text()]
            assert len(ticks) == len(set(ticks)), ticks
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(pictures, "_pixels", looked_at)
    net = torch.nn.ModuleDict({name.replace(".", "-"): create(key, 8, **SHOWN.get(key, {})) for name in BEFORE[layers]})
    quantities, history = Quantities(), {}
    for epoch in range(3):
        for layer in net.values():
            # Values that differ in their sixth digit, as at the start of a run.
            for tensor in (*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())):
                tensor.data.add_(torch.randn(tensor.shape) * 1e-6)
        history[epoch] = quantities.read(net)[0]
    told = {"ubn": {"skipped": "no batch can be condensed before update 100"}}
    drawn = pictures.draw(history, told)
    assert bool(drawn) == bool(shown) == bool(history[2])


@pytest.mark.parametrize("context", ["ids", "gate"])
def test_contexts_that_layers_share_are_drawn_once(context, tmp_path):
    net = torch.nn.Sequential(*(create("cn", 4, context=context) for _ in range(3)))
    once = {("cn", q, "all layers") for q in ("prior_0", "prior_1", "prior_2", "entropy")}
    read_now = Quantities().read(net)[0]
    if context == "gate":
        assert not once & read_now.keys()
        assert ("cn", "prior_0", "2") in read_now
        return
    assert {series for series in read_now if series[1] in ("prior_0", "prior_1", "prior_2", "entropy")} == once
    titles = page.layout(read_now, "norm")["Normalization: cn"]
    assert [title for title in titles if "prior" in title] == ["prior: #0, #1, #2"]
    assert titles["prior: #0, #1, #2"][1][0] == "norm_all/cn/prior_0$"
    shared, *others = page.tables(read_now, "cn", "*")
    assert shared[1][0] == "all layers"
    assert len(shared) == 2  # the heading and one row
    assert [row[0] for row in others[0][1:]] == ["0", "1", "2"]
    assert ("cn", "shared") in pictures.draw({0: read_now})
    assert ("cn", "choice") not in pictures.draw({0: read_now})


@pytest.mark.parametrize("key", normalizers())
def test_a_mixture_whose_members_are_equal_marks_none(key):
    arguments = {**SHOWN.get(key, {}), **({"context": "gate"} if key == "cn" else {})}
    values = Quantities().read(torch.nn.Sequential(create(key, 4, **arguments)))[0]
    assert not any("*" in cell for table in page.tables(values, key, "*") for row in table for cell in row)


@pytest.mark.parametrize(("key", "quantity"), [("ubn", "condensation"), ("dbn", "gap_mean"), ("brn", "gap_std")])
def test_a_value_that_was_never_measured_is_not_drawn(key, quantity, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    arguments = {"threshold": 0.5} if key == "ubn" else {}
    trainer(NormSwap(key, arguments), NormMonitor(), logger=logger).fit(Net(), loader())
    events = read(logger)
    assert [e.step for e in events.Scalars("norm/" + f"{key}/{quantity}/net.1")] == [1, 2]
    assert [e.step for e in events.Scalars(f"norm_all/{key}/{quantity}")] == [1, 2]
    assert [e.step for e in events.Scalars(f"norm/{key}/gamma_condition/net.1")] == [0, 1, 2]


def test_a_value_that_becomes_nan_is_drawn():
    net = torch.nn.Sequential(create("bcn", 4))
    quantities = Quantities()
    quantities.read(net)
    net[0].iota.data.fill_(torch.nan)
    assert np.isnan(quantities.read(net)[0]["bcn", "iota", "0"])


@pytest.mark.parametrize("updates", [100, 2])
def test_a_warm_up_is_told_in_the_chart_the_table_and_one_line(updates, tmp_path, caplog, capsys):
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    logger, text_of_note = TensorBoardLogger(tmp_path), f"no batch can be condensed before update {updates}"
    swap = NormSwap("ubn", {"threshold": 0.5, "min_updates": updates})
    trainer(swap, NormMonitor(print_table=True), logger=logger, max_epochs=2).fit(LateNet(), loader())
    assert [r.getMessage() for r in caplog.records if "condensed" in r.getMessage()] == [
        f"NormMonitor: ubn: {text_of_note}"
    ]
    events = read(logger)
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert f"skipped: {text_of_note}" in [chart.title for category in layout.category for chart in category.chart]
    skipped = [tag for tag in scalar_tags(events) if "/ubn/skipped" in tag]
    over = updates == 2
    assert (text_of_note in text(events, "norm/ubn/table")) is not over
    assert (text_of_note in capsys.readouterr().out) is not over
    assert bool(skipped) is over
    if over:
        assert [e.step for e in events.Scalars("norm/ubn/skipped/late")] == [2, 3, 4]


def test_pictures_during_the_run(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    monitor = NormMonitor(pictures_every_n_epochs=2, histograms=False, extras=False)
    trainer(NormSwap("bcn"), monitor, logger=logger, max_epochs=3).fit(Net(), loader())
    events = read(logger)
    assert [e.step for e in events.Images("norm/bcn/profile")] == [4, 6]
    assert events.Tags()["images"] == ["norm/bcn/profile"]  # iota is no mixture of several weights
    assert events.Tags()["histograms"] == []


def test_the_heat_map_has_the_colour_of_the_winner_as_deep_as_its_weight():
    def history(bn):
        weights = {"in": (1 - bn) / 2, "ln": (1 - bn) / 2, "bn": bn}
        start = {("sn", f"mean_{k}", layer): 1 / 3 for k in weights for layer in ("a", "b")}
        now = {("sn", f"mean_{k}", layer): w for k, w in weights.items() for layer in ("a", "b")}
        strong = {("sn", f"mean_{k}", "b"): w for k, w in {"in": 1.0, "ln": 0.0, "bn": 0.0}.items()}
        return {0: start, 1: {**now, **strong}}

    def fraction(image, color, tolerance=12):
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        return (np.abs(image.astype(int) - wanted).max(2) <= tolerance).mean()

    deep = pictures.draw(history(1.0))["sn", "choice"]
    pale = pictures.draw(history(0.4))["sn", "choice"]
    blue, orange, green = (pictures.COLORS[k] for k in ("bn", "in", "ln"))
    cell = fraction(deep, orange)
    assert cell > 0.04  # half of a column of two, less its label
    assert fraction(deep, blue) == pytest.approx(cell, rel=0.15)
    assert fraction(deep, green) < cell / 5  # its strip in the legend only
    assert fraction(pale, orange) == pytest.approx(cell, rel=0.15)
    assert fraction(pale, blue) < cell / 5


def test_without_matplotlib_the_scalars_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = TensorBoardLogger(tmp_path)
    with pytest.warns(MissingDependencyWarning, match=r"pip install 'lightning-norm\[examples\]'"):
        trainer(NormSwap("sn"), NormMonitor(), logger=logger).fit(Net(), loader())
    events = read(logger)
    assert events.Tags()["images"] == []
    assert [e.step for e in events.Scalars("norm/sn/mean_in/net.1")] == [0, 1, 2]
    assert "**" in text(events, "norm/sn/table")


class Tunable(Net):
    def __init__(self, lr=0.1, optimizer=None):
        super().__init__()
        self.save_hyperparameters()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


class WithOwnRow(Tunable):
    def on_fit_start(self):
        self.logger.log_hyperparams(self.hparams, {"my_metric": 1.0})


def test_the_norm_joins_the_hparams_of_the_module(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    model = Tunable(optimizer={"name": "sgd"})
    swap = NormSwap("sn", norm_args={"choices": ["in", "bn"]})
    run = trainer(swap, NormMonitor(metric="val_loss"), logger=logger)
    run.fit(model, loader(), loader())
    values, metrics = row_of(logger)
    assert values == {"lr": 0.1, "optimizer/name": "sgd", "norm": "sn", "norm/choices": "['in', 'bn']"}
    assert metrics == {"val_loss": pytest.approx(float(run.callback_metrics["val_loss"]))}
    assert read(logger).Scalars("val_loss")
    assert set(model.hparams) == {"lr", "optimizer"}
    assert set(yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())) == {"lr", "optimizer"}
    assert "log_hyperparams" not in vars(logger)


@pytest.mark.parametrize("metric", [None, "val_loss"])
def test_the_columns_of_runs_with_different_arguments_unite(metric, tmp_path):
    for norm, arguments in (("sn", {"choices": ["in", "bn"]}), ("dbn", {"alpha": 0.5}), ("bn", {})):
        run = trainer(NormSwap(norm, arguments), NormMonitor(metric=metric), logger=TensorBoardLogger(tmp_path))
        run.fit(Tunable(), loader(), loader())
        run.test(run.lightning_module, loader(), verbose=False)
    columns, metrics = hparams_page(tmp_path)
    assert columns == {"lr", "optimizer", "norm", "norm/choices", "norm/alpha"}
    assert metrics == {"val_loss"}  # and no hp_metric
    assert not [
        tag
        for log in tmp_path.rglob("version_*")
        for tag in scalar_tags(EventAccumulator(str(log), ALL).Reload())
        if "hp_metric" in tag
    ]


def test_an_interrupted_run_has_its_row(tmp_path):
    class Failing(Tunable):
        def on_train_epoch_end(self):
            if self.current_epoch == 1:
                raise RuntimeError("failed")

    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(RuntimeError, match="failed"):
        trainer(NormSwap("sn"), NormMonitor(), logger=logger, max_epochs=3).fit(Failing(), loader(), loader())
    values, metrics = row_of(logger)
    assert (values["norm"], set(metrics)) == ("sn", {"val_loss"})
    assert "log_hyperparams" not in vars(logger)


@pytest.mark.parametrize("default", [True, False])
def test_a_row_of_the_users_own_stands(default, tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=default)
    trainer(NormSwap("sn"), NormMonitor(metric="val_loss"), logger=logger).fit(WithOwnRow(), loader())
    assert hparams_of(read(logger)) == ({"lr": 0.1, "optimizer": "None"}, ["my_metric"])
    assert not Path(logger.log_dir, "hparams").exists()


def test_a_monitored_metric_is_the_one_of_the_row(tmp_path):
    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    run = trainer(NormSwap("bcn"), NormMonitor(), best, logger=logger, enable_checkpointing=True)
    run.fit(Net(), loader(), loader())
    assert row_of(logger)[0] == {"norm": "bcn"}
    assert set(row_of(logger)[1]) == {"val_loss"}


def test_page_off(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer(NormSwap("sn"), NormMonitor(page=False, pictures=False), logger=logger).fit(Tunable(), loader())
    events = read(logger)
    assert events.Tags()["tensors"] == events.Tags()["images"] == []
    assert hparams_of(events)[0] == {"lr": 0.1, "optimizer": "None"}


def test_a_logger_other_than_tensorboard_gets_the_scalars_alone(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = NormMonitor()
    trainer(NormSwap("sn"), monitor, logger=logger).fit(Net(), loader())
    assert [p.name for p in Path(logger.log_dir).iterdir()] == ["metrics.csv"]
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["norm/sn/mean_bn/net.1"]]
    assert [row["step"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert sum(float(row[f"norm/sn/var_{k}/net.1"]) for k in ("in", "ln", "bn")) == pytest.approx(1)
        assert float(row["norm_all/sn/var_in"]) == float(row["norm/sn/var_in/net.1"])


def test_sanity_check_and_learning_rate_finder_do_not_log(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    model = Tunable()
    run = trainer(NormSwap("sn"), NormMonitor(), logger=logger, num_sanity_val_steps=1, default_root_dir=tmp_path)
    Tuner(run).lr_find(model, loader(), loader(), num_training=8, update_attr=False)
    run.fit(model, loader(), loader())
    events = read(logger)
    assert [e.step for e in events.Scalars("norm/sn/mean_in/net.1")] == [0, 1, 2]
    assert [e.step for e in events.Images("norm/sn/choice")] == [2]


def test_a_second_fit_goes_on(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    monitor = NormMonitor()
    model = Net()
    run = trainer(NormSwap("sn"), monitor, logger=logger)
    run.fit(model, loader())
    run.fit_loop.max_epochs = 3
    run.fit(model, loader())
    assert [e.step for e in read(logger).Scalars("norm/sn/mean_in/net.1")] == [0, 1, 2, 3, 4, 5, 6]
    assert list(monitor.history) == [0, 1, 2, 3]
    other = TensorBoardLogger(tmp_path)
    trainer(NormSwap("sn"), monitor, logger=other).fit(Net(), loader())
    assert [e.step for e in read(other).Scalars("norm/sn/mean_in/net.1")] == [0, 1, 2]
    assert list(monitor.history) == [0, 1]
    assert monitor.history[0]["sn", "mean_in", "net.1"] == pytest.approx(1 / 3)


def test_a_resumed_run_has_its_whole_history(tmp_path):
    def job(epochs, **fit):
        monitor = NormMonitor()
        torch.manual_seed(0)
        run = trainer(NormSwap("sn"), monitor, logger=TensorBoardLogger(tmp_path), max_epochs=epochs)
        run.fit(Net(), loader(), **fit)
        return run, monitor.history

    _, whole = job(4)
    first, _ = job(2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    _, resumed = job(4, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert list(resumed) == list(whole) == [0, 1, 2, 3, 4]
    for epoch in whole:
        assert resumed[epoch] == pytest.approx(whole[epoch], abs=1e-6)


def test_two_monitors_with_their_own_prefixes(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    run = trainer(NormSwap("sn"), NormMonitor(), NormMonitor(prefix="other"), logger=logger)
    run.fit(Net(), loader())
    tags = scalar_tags(read(logger))
    assert "norm/sn/mean_in/net.1" in tags
    assert "other/sn/mean_in/net.1" in tags


class ScalarReads(TorchDispatchMode):
    """Count what makes the host wait for one number of a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("key", normalizers())
def test_no_quantity_is_read_by_itself(key):
    cls = normalizers()[key]
    layer = cls(6, **cls.test_arguments)
    layer(torch.randn(4, 6, 5, 5))
    quantities = Quantities(extras=True)
    with ScalarReads() as reads:
        quantities.read(layer)
        layer(torch.randn(4, 6, 5, 5))
        reads.count = 0
        quantities.read(layer, values=True)
    assert reads.count == 0
    with ScalarReads() as reads:
        torch.ones(1).item()
    assert reads.count == 1


@pytest.mark.parametrize("board", [False, True])
def test_the_device_is_read_at_the_cadence_and_at_the_end_of_an_epoch(board, tmp_path, monkeypatch):
    steps = []
    original = Quantities.read

    def counting(self, *args):
        steps.append(run.fit_loop.epoch_loop._batches_that_stepped)
        return original(self, *args)

    monkeypatch.setattr(Quantities, "read", counting)
    logger = TensorBoardLogger(tmp_path) if board else CSVLogger(tmp_path)
    run = trainer(NormSwap("sn"), NormMonitor(every_n_steps=4), logger=logger, max_epochs=2)
    run.fit(Net(), loader(20))  # 5 steps per epoch: 0, 4, 8 by cadence, 5 by epoch, 10 at the end
    assert steps == ([0, 4, 5, 8, 10] if board else [0, 4, 8, 10])
    assert len(steps) == len(set(steps))


def test_the_progress_bar_shows_two_means_on_request(tmp_path):
    model = LateNet()
    run = trainer(NormSwap("sn"), NormMonitor(progress_bar=True), logger=CSVLogger(tmp_path))
    run.fit(model, loader())
    shown = run.progress_bar_metrics
    assert set(shown) == {"sn/mean_bn", "sn/var_bn"}
    assert 0.2 < shown["sn/mean_bn"] < 0.5
    assert "sn/mean_bn" not in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().split("\n")[
        0
    ].split(",")


def test_the_progress_bar_needs_no_logger_and_takes_names():
    run = trainer(NormSwap("bcn"), NormMonitor(progress_bar=["iota_min"]))
    run.fit(Net(), loader())
    assert set(run.progress_bar_metrics) == {"bcn/iota_min"}
    with pytest.warns(
        NoEffectWarning, match=r"progress_bar=\['nothing'\], and the layers have \['drift_mean', .*'iota', 'iota_max'"
    ):
        trainer(NormSwap("bcn"), NormMonitor(progress_bar=["nothing"])).fit(Net(), loader())


def test_extras_of_every_layer(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    statistics = []

    class Spied(Net):
        def on_train_batch_start(self, batch, batch_idx):
            statistics.append(self.net[1].running_var.clone())

    model = Spied()
    with torch.no_grad():
        model.net[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, 0.001]))
    trainer(NormSwap("bn"), NormMonitor(), logger=logger).fit(model, loader())
    events = read(logger)
    first = {q: events.Scalars(f"norm/bn/{q}/net.1")[0] for q in ("gamma_condition", "gamma_near_zero")}
    assert first["gamma_condition"].value == pytest.approx(2000)
    assert first["gamma_near_zero"].value == pytest.approx(1 / 6)
    drift = events.Scalars("norm/bn/drift_var/net.1")
    assert [e.step for e in drift] == [1, 2]  # nothing to compare with at the first step
    old, new = statistics
    expected = (new - old).abs().sum() / max(old.sum(), new.sum())
    assert drift[0].value == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 0.01


def test_a_scheduled_value_of_the_layers_own_is_shown(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer(NormSwap("sn", {"sparse": True, "radius": 0.25}), NormMonitor(), logger=logger).fit(Net(), loader())
    assert {e.value for e in read(logger).Scalars("norm/sn/radius/net.1")} == {0.25}


class FSDPLikeStrategy(SingleDeviceStrategy):
    pass


def test_sharded_parameters_are_left_alone(tmp_path):
    strategy = FSDPLikeStrategy("cpu")
    swap = NormSwap("sn", check_optimizer=False)
    with pytest.warns(NoEffectWarning, match="FSDPLikeStrategy shards the parameters"):
        trainer(swap, NormMonitor(), logger=CSVLogger(tmp_path), strategy=strategy).fit(Net(), loader())
    assert not (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").exists()


def deep_net():
    model = Net()
    blocks = [
        m
        for i in range(4)
        for m in (torch.nn.Conv2d(6 if i else 3, 6, 3, padding=1), torch.nn.BatchNorm2d(6), torch.nn.ReLU())
    ]
    model.net = torch.nn.Sequential(*blocks)
    return model
