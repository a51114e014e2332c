"""``lightning-norm compare``: normalizers on the same job, seed by seed, with intervals."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm  # type: ignore[import-untyped]
from typing_extensions import override

from lightning_norm.callbacks import NormContext, NormSwap
from lightning_norm.cli.compare_report import draw, summarize
from lightning_norm.cli.norm_cli import NormCLI, class_path
from lightning_norm.cli.section import chosen
from lightning_norm.demo.data import DATA_SETS
from lightning_norm.demo.job import ImageClassifier
from lightning_norm.normalizers import normalizers, resolve
from lightning_norm.normalizers.context.context_norm import ContextNorm

EPILOG = """'bn' is the network as it is, with torch's own BatchNorm; any other key swaps all its BatchNorm layers.
Every finished run is a row of OUT/runs.csv. Started again with the same settings, it goes on where it stopped.

examples:
  lightning-norm compare --norms bn,sn,bcn --seeds 3
  lightning-norm compare --norms bn,sn --data FashionMNIST --root data --epochs 10 --out compare_fashion
  lightning-norm compare --norms bn,sn --config examples/configs/digits_section.yaml
"""
SETTINGS = ("data", "arch", "epochs", "batch_size", "lr", "compile", "accelerator", "limit", "more")
COLUMNS = ("norm", "seed", *SETTINGS, "test_acc", "val_acc", "train_loss", "step_ms", "params", "seconds", "torch")
BASELINE = "bn"


class Recorder(Callback):
    """Keep what the report needs: loss and accuracy per epoch, and the time of each step."""

    def __init__(self) -> None:
        self.val_acc: list[float] = []
        self.train_loss: list[float] = []
        self.step_ms: list[float] = []
        self._losses: list[torch.Tensor] = []
        self._start = 0.0

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = _now(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.step_ms.append(1e3 * (_now(pl_module) - self._start))
        self._losses.append(outputs["loss"].detach())

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.train_loss.append(float(torch.stack(self._losses).mean()))
        self.val_acc.append(float(trainer.callback_metrics["val_acc"]))
        self._losses.clear()


def run(argv: Sequence[str]) -> None:
    """Train what is missing in OUT/runs.csv, then print the table and draw the curves.

    Args:
        argv: the arguments behind ``compare``.

    Raises:
        ValueError: an unknown norm or data set, a configuration of another job, or an OUT that holds runs with other
            settings.
        SystemExit: wrong arguments.
    """
    options = parser().parse_args(argv)
    # Options that were typed win over the configuration, which therefore only sets their defaults.
    if options.config:
        made = parser()
        made.set_defaults(**job_of(options.config))
        options = made.parse_args(argv)
    norms = list(dict.fromkeys(n.strip() for n in options.norms.split(",") if n.strip()))
    _check(options, norms)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_runs(out / "runs.csv", {name: str(getattr(options, name)) for name in SETTINGS})
    # Seeds outside, norms inside: slow drifts of the machine meet every norm alike.
    todo = [
        (norm, seed)
        for seed in range(options.seeds)
        for norm in norms
        if not any(row["norm"] == norm and row["seed"] == str(seed) for row in rows)
    ]
    data = DATA_SETS[options.data](batch_size=options.batch_size, root=options.root)
    with _quiet(), tqdm(todo, desc="runs", unit="run", disable=not todo) as bar:
        for norm, seed in bar:
            bar.set_postfix_str(f"{norm}, seed {seed}")
            rows.append(append(out / "runs.csv", one_run(norm, seed, data, options)))
    chosen = [row for row in rows if row["norm"] in norms and int(row["seed"]) < options.seeds]
    baseline = BASELINE if BASELINE in norms else norms[0]
    print(summarize(chosen, norms, baseline))
    draw(chosen, norms, out / "curves.png", f"{options.data}, {options.arch}")
    print(f"Picture: {out / 'curves.png'}     Data: {out / 'runs.csv'}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser(
        "lightning-norm compare",
        description="Train the built-in job with several normalizers: same seeds, same data, same everything else.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    keys = ",".join(normalizers())
    made.add_argument("--norms", default="bn,sn,bcn", help=f"out of {keys}, by commas (default: %(default)s)")
    made.add_argument(
        "--config", metavar="FILE", help="model, data, epochs, accelerator and norm: from there; options win"
    )
    made.set_defaults(more="{}")
    made.add_argument("--seeds", type=int, default=3, help="runs per norm, seeds 0, 1, ... (default: %(default)s)")
    made.add_argument("--data", default="Digits", help=f"one of {', '.join(DATA_SETS)}")
    made.add_argument("--root", default="data", help="folder of torchvision's files (default: %(default)s)")
    made.add_argument("--epochs", type=int, default=5, help="per run (default: %(default)s)")
    made.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    made.add_argument("--arch", default="resnet18", help="classification model of torchvision (default: %(default)s)")
    made.add_argument("--lr", type=float, default=0.05, help="peak learning rate (default: %(default)s)")
    made.add_argument("--compile", action="store_true", help="compile each normalizer")
    made.add_argument("--accelerator", default="auto", help="cpu, gpu, ... (default: %(default)s)")
    made.add_argument("--limit", type=int, help="batches per epoch, validation and test, for a quick look")
    made.add_argument("--out", default="compare", help="folder of the results (default: %(default)s)")
    return made


def one_run(norm: str, seed: int, data: Any, options: argparse.Namespace) -> dict[str, str]:
    """Train and test once; return a row of runs.csv."""
    started = time.perf_counter()
    pl.seed_everything(seed, workers=True, verbose=False)
    more = json.loads(options.more)
    model = ImageClassifier(options.arch, data.num_classes, options.lr, **more.get("model", {}))
    recorder = Recorder()
    swap = {"compile": options.compile, **more.get("norm", {})}
    if swap.pop("norm", None) != norm:
        swap.pop("norm_args", None)
    swaps: list[Callback] = [] if norm == BASELINE else [NormSwap(norm, **swap)]
    if swaps and issubclass(resolve(norm)[0], ContextNorm):
        swaps.append(NormContext())
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        callbacks=[*swaps, recorder],
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_train_batches=options.limit,
        limit_val_batches=options.limit,
        limit_test_batches=options.limit,
    )
    trainer.fit(model, datamodule=data)
    if trainer.interrupted:  # Lightning swallows the first Ctrl-C
        raise KeyboardInterrupt
    tested = trainer.test(model, datamodule=data, verbose=False)
    row: dict[str, Any] = {name: getattr(options, name) for name in SETTINGS}
    row |= {"norm": norm, "seed": seed, "test_acc": tested[0]["test_acc"], "torch": torch.__version__}
    row |= {"val_acc": json.dumps(recorder.val_acc), "train_loss": json.dumps(recorder.train_loss)}
    # The first steps allocate, and compile where that was asked for.
    row["step_ms"] = statistics.median(recorder.step_ms[min(3, len(recorder.step_ms) - 1) :])
    row["params"] = sum(p.numel() for p in model.parameters())
    row["seconds"] = round(time.perf_counter() - started, 1)
    return {name: str(row[name]) for name in COLUMNS}


def job_of(path: str) -> dict[str, Any]:
    """Return what a configuration says about the options of compare, and ``more``, the rest of its job as JSON.

    Raises:
        ValueError: its job is another than the built-in one, or its section names layers and not one norm.
    """
    config = NormCLI(["--config", path], run=False, save_config_callback=None).config
    names = {class_path(cls): name for name, cls in DATA_SETS.items()}
    data_class = config.data.class_path if config.data else None
    if config.model.class_path != class_path(ImageClassifier) or data_class not in names or config.get("optimizer"):
        raise ValueError(
            f"compare trains ImageClassifier on {', '.join(DATA_SETS)} with its own optimizer; {path} has "
            f"{config.model.class_path} on {data_class}{' and an optimizer:' if config.get('optimizer') else ''}."
        )
    model, trainer, section = config.model.init_args, config.trainer, chosen(config.norm)
    if "rules" in section or not isinstance(section.get("norm", ""), str):
        raise ValueError(
            f"compare takes norms by their keys, the section norm: of {path} has more. Leave out --config."
        )
    settings = {
        "data": names[data_class],
        "arch": model.arch,
        "lr": model.lr,
        "batch_size": config.data.init_args.batch_size,
    }
    settings |= {"root": config.data.init_args.root, "accelerator": trainer.accelerator}
    if trainer.max_epochs:
        settings["epochs"] = trainer.max_epochs
    settings["compile"] = section.pop("compile", False)
    rest = {"momentum": model.momentum, "weight_decay": model.weight_decay}
    return {**settings, "more": json.dumps({"model": rest, "norm": section}, sort_keys=True)}


def read_runs(path: Path, settings: dict[str, str]) -> list[dict[str, str]]:
    """Return the finished runs.

    Raises:
        ValueError: a run was made with other settings.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        other = {name: row.get(name) for name, value in settings.items() if row.get(name) != value}
        if other:
            asked = {name: settings[name] for name in other}
            raise ValueError(
                f"{path} holds runs with {other}, asked for is {asked}: runs of different settings do not compare. "
                "Choose another folder with --out, or delete this one."
            )
    return rows


def append(path: Path, row: dict[str, str]) -> dict[str, str]:
    """Write one row, and the header in front of the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
    return row


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the Trainer's introduction of itself, which would come once per run."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def _check(options: argparse.Namespace, norms: list[str]) -> None:
    if options.data not in DATA_SETS:
        raise ValueError(f"compare has no data {options.data!r}: choose one of {', '.join(DATA_SETS)}.")
    if not norms or min(options.seeds, options.epochs) < 1:
        raise ValueError("compare needs at least one norm, one seed and one epoch: --norms bn,sn --seeds 3 --epochs 5.")
    for norm in norms:
        if norm != BASELINE:
            resolve(norm)


def _now(module: pl.LightningModule) -> float:
    # Kernels run behind the host's back: without waiting, the clock would measure their launches.
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()
