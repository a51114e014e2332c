"""``NormSwap(mask_key=...)``: every layer follows the mask of each batch, in training and in evaluation."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_norm import MaskError, NormMonitor, NormSwap
from lightning_norm.callbacks.lightning_compat import pl

LENGTHS = torch.tensor([8, 3, 5, 6])


class Signals(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4))
        self.seen = []

    def training_step(self, batch, batch_idx):
        y = self.net(batch["x"])
        self.seen.append(y.detach())
        return y.square().sum()

    validation_step = test_step = predict_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def lengths_of(batch):
    return batch["lengths"]


def data(padding=0.0):
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    for sample, n in zip(x, LENGTHS, strict=True):
        sample[:, n:] = padding
    return torch.utils.data.DataLoader([{"x": a, "lengths": b} for a, b in zip(x, LENGTHS, strict=True)], batch_size=4)


def trainer(callback):
    return pl.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("how", [{"mask_key": "lengths"}, {"mask_fn": lengths_of}])
def test_padding_is_not_seen_in_any_stage(how):
    seen = []
    for padding in (0.0, 7.0):
        model = Signals()
        run = trainer(NormSwap("bn", **how))
        run.fit(model, data(padding), data(padding))
        run.test(model, data(padding), verbose=False)
        seen.append([*model.seen, *model.net.buffers()])
        # Nothing is left of the last batch's mask.
        assert model.net.train()(torch.randn(5, 3, 9)).shape == (5, 4, 9)
    assert len(seen[0]) > 3
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_without_a_mask_and_wrong_arguments():
    with pytest.raises(MaskError, match=r"mask_key='mask' found no mask in a batch .*\['lengths', 'x'\]"):
        trainer(NormSwap("bn", mask_key="mask")).fit(Signals(), data())
    with pytest.raises(ValueError, match="exclude each other"):
        NormSwap("bn", mask_key="mask", mask_fn=lengths_of)
    with pytest.raises(ValueError, match="mask_size belongs to"):
        NormSwap("bn", mask_size=3)


def test_the_report_and_the_monitor_tell_of_masks(tmp_path):
    swap, model = NormSwap("bn", mask_key="lengths"), Signals()
    run = trainer(swap)
    run.callbacks.append(NormMonitor(every_n_steps=1))
    run.loggers = [CSVLogger(tmp_path)]
    run.fit(model, data())
    assert "masks       batch['lengths']: what is padding" in str(swap.report)
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        logged = {tag: value for row in csv.DictReader(lines) for tag, value in row.items() if value}
    for layer in ("net.0", "net.2"):
        assert float(logged[f"norm/bn/valid_fraction/{layer}"]) == pytest.approx(LENGTHS.float().mean().item() / 8)


def test_without_masks_neither_tells_of_them():
    swap, model = NormSwap("bn"), Signals()
    trainer(swap).fit(model, data())
    assert "masks" not in str(swap.report)
    assert not [tag for tag in NormMonitor().quantities(model) if "valid_fraction" in tag]
