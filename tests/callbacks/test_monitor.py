import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_norm import NoEffectWarning, NormMonitor, NormSwap
from tests.callbacks.toy import LateNet, loader, trainer


def test_importance_weights_of_each_layer_reach_tensorboard(tmp_path):
    model = LateNet()
    logger = TensorBoardLogger(tmp_path)
    trainer(NormSwap("sn"), NormMonitor(), logger=logger, max_epochs=2).fit(model, loader())
    events = EventAccumulator(logger.log_dir).Reload()
    tags = [t for t in events.Tags()["scalars"] if t.startswith("norm/")]
    assert len(tags) == 3 * 6
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
    events = EventAccumulator(logger.log_dir).Reload()
    assert [e.step for e in events.Scalars("n/bcn/iota/late")] == [0, 3, 4]


def test_accumulated_batches_log_a_step_once(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer(NormSwap("sn"), NormMonitor(every_n_steps=1), logger=logger, accumulate_grad_batches=2).fit(
        LateNet(), loader(16)
    )
    events = EventAccumulator(logger.log_dir).Reload()
    assert [e.step for e in events.Scalars("norm/sn/mean_in/late")] == [0, 1, 2]


def test_any_logger_will_do(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(NormSwap("sn"), NormMonitor(), logger=logger).fit(LateNet(), loader())
    assert "norm/sn/mean_bn/late" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_nothing_to_log_is_said():
    with pytest.warns(NoEffectWarning, match="no logger"):
        trainer(NormSwap("sn"), NormMonitor()).fit(LateNet(), loader())


def test_no_layer_to_show_is_said(tmp_path):
    with pytest.warns(NoEffectWarning, match="no layer of the model"):
        trainer(NormSwap("bn"), NormMonitor(), logger=CSVLogger(tmp_path)).fit(LateNet(), loader())


def test_cadence_must_be_positive():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1 or None, got 0"):
        NormMonitor(every_n_steps=0)
