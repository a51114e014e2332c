"""NormMonitor in TensorBoard, beyond scalars: the page of charts, the final table, the columns of the HParams page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary

from lightning_norm.callbacks.lightning_compat import (
    EarlyStopping,
    Logger,
    ModelCheckpoint,
    TensorBoardLogger,
    callbacks_of,
    is_instance,
    lightning_base,
    pl,
)
from lightning_norm.callbacks.lightning_private import (
    event_writer,
    logs_hyperparameters,
    tag_prefix,
)
from lightning_norm.callbacks.monitor.quantities import (
    Series,
    depths,
    families,
    is_choice,
    is_shared,
    key_of,
    label,
    layer_names,
    split,
    winner,
)
from lightning_norm.callbacks.swap.norm_swap import NormSwap
from lightning_norm.surgery.walk import normalizers_of

Layout = dict[str, dict[str, list[Any]]]
MOST_NAMES = 4
"""So many names fit into the title of a chart."""
HPARAMS = "hparams"
"""The part of a run that has its row on the page "HParams"."""


def log_scalars(logger: Logger, scalars: Mapping[str, float], step: int) -> None:
    """Log as ``logger.log_metrics`` does; TensorBoard gets all of a step in one event, at a tenth of the cost."""
    # A subclass that logs in its own way is asked in its own way.
    base: Any = lightning_base(logger, TensorBoardLogger)
    if not is_instance(logger, TensorBoardLogger) or type(logger).log_metrics is not base.log_metrics:
        logger.log_metrics(dict(scalars), step=step)
        return
    prefix = tag_prefix(logger)
    values = [Summary.Value(tag=f"{prefix}{tag}", simple_value=value) for tag, value in scalars.items()]
    event_writer(logger).add_summary(Summary(value=values), step)


def layout(logged: Iterable[Series], group: str, notes: Mapping[str, Mapping[str, str]] | None = None) -> Layout:
    """Return a layout for ``SummaryWriter.add_custom_scalars``, one category per key.

    Quantities of one family share a chart, of which there is one per depth; a quantity by itself has one chart, with a
    line per depth. TensorBoard takes tags for the beginnings of regular expressions. It draws the lines of a chart in
    one colour and gives out their marks in any order, so that only the names in the legend tell them apart: they are
    short, and their last word differs.

    Args:
        logged: all that is logged.
        group: first part of the tags ``<group>_<depth>/<key>/<quantity>``.
        notes: key -> quantity -> what is written behind the title of its chart.

    >>> layout([("sn", "mean_in", "a"), ("sn", "mean_bn", "a")], "n")
    {'Normalization: sn': {'mean: IN, BN': ['Multiline', ['n_all/sn/mean_in$', 'n_all/sn/mean_bn$']]}}
    """
    logged = list(logged)
    page: Layout = {}
    for key, grouped in families(logged).items():
        charts = page.setdefault(f"Normalization: {key}", {})
        for family, quantities in grouped.items():
            parts = list(dict.fromkeys(depths(len(layer_names(logged, key, quantities[0])))))
            # Several quantities in one chart need their names in its title; one by itself has the depths as lines.
            if len(quantities) == 1:
                tags = {family: [f"{group}_{part}/{key}/{quantities[0]}" for part in parts]}
            else:
                title = _chart_title(family, [label(q) for q in quantities])
                ends = {part: "" if part == "all" else f" ({part})" for part in parts}
                tags = {title + end: [f"{group}_{p}/{key}/{q}" for q in quantities] for p, end in ends.items()}
            told = [text for q in quantities if (text := (notes or {}).get(key, {}).get(q))]
            for title, group_tags in tags.items():
                charts[": ".join((title, *told))] = ["Multiline", [f"{re.escape(t)}$" for t in group_tags]]
    return page


def _chart_title(family: str, members: list[str]) -> str:
    """Return the title of a chart: the family, and its members in short; of many, the first and the last."""
    others = [name for name in members if name != family]
    others = others if len(others) <= MOST_NAMES else [others[0], "...", others[-1]]
    return ", ".join((family, *others)) if family in members else f"{family}: {', '.join(others)}"


def tables(values: Mapping[Series, float], key: str, mark: str) -> Iterator[list[list[str]]]:
    """Yield tables of what the layers of a key hold: the method's own quantities, then those that every layer has.

    Args:
        values: of the quantities.
        key: of the normalizers.
        mark: written on both sides of the greatest weight of a mixture.

    >>> list(tables({("sn", "mean_in", "a"): 0.25, ("sn", "mean_bn", "a"): 0.75}, "sn", "*"))
    [[['layer', 'mean_in', 'mean_bn'], ['a', '0.25', '*0.75*']]]
    """
    for grouped in split(families(values).get(key, {})).values():
        chosen = [quantities for quantities in grouped.values() if is_choice(values, key, quantities)]
        quantities_of_part = [q for quantities in grouped.values() for q in quantities]
        # What the layers have in common is a table of one row.
        for in_common in (True, False):
            columns = [q for q in quantities_of_part if is_shared(values, key, q) is in_common]
            if not columns:
                continue
            rows = [["layer", *columns]]
            names = dict.fromkeys(layer for k, q, layer in values if k == key and q in columns)
            for layer in names:
                # In each mixture of the layer the weight that leads is marked, and nothing else.
                best = {winner({q: values.get((key, q, layer), 0.0) for q in quantities}) for quantities in chosen}
                cells = [(values.get((key, q, layer)), mark if q in best else "") for q in columns]
                rows.append([layer, *("" if v is None else f"{m}{v:.3g}{m}" for v, m in cells)])
            yield rows


def norm_hparams(trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> dict[str, Any]:
    """Return the norm and its arguments: those of NormSwap, or the keys of the layers where there is none.

    Args:
        trainer: whose callbacks are looked through for a NormSwap.
        pl_module: whose layers are looked at otherwise.
        prefix: name of the norm's column; its arguments stand behind it and a slash.
    """
    swap = next((c for c in callbacks_of(trainer) if isinstance(c, NormSwap)), None)
    # Layers that were swapped without the callback, in the module's __init__ for one.
    if swap is None:
        keys = dict.fromkeys(key_of(layer) for layer in normalizers_of(pl_module))
        return {prefix: "+".join(keys)} if keys else {}
    arguments = {f"{prefix}/{name}": plain(value) for name, value in (swap.options.norm_args or {}).items()}
    return {prefix: plain(swap.options.rules if swap.options.norm is None else swap.options.norm), **arguments}


def without_default_row(original: Callable[..., Any], params: Any, metrics: Any = None, *args: Any, **kw: Any) -> Any:
    """Log hyper-parameters as the logger does, without Lightning's row and its ``hp_metric`` of -1.

    TensorBoard takes the list of columns of one run for all of them, and that list has none of the norm's.
    """
    return original(params, {} if metrics is None else metrics, *args, **kw)


def writes_rows(logger: Logger) -> bool:
    """Tell whether a logger is TensorBoard's, and logs hyper-parameters in Lightning's way."""
    base: Any = lightning_base(logger, TensorBoardLogger)
    return is_instance(logger, TensorBoardLogger) and type(logger).log_hyperparams is base.log_hyperparams


def add_hparams(trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> None:
    """Add the norm, its arguments and the hyper-parameters of the module to TensorBoard's page "HParams".

    The row is that of a run of its own beside the scalars, "<run>/hparams", and has no list of columns: TensorBoard
    then has a column for every argument of any run, and for the metrics in those runs alone. The module's own hparams,
    and those in the logger's ``hparams.yaml``, stay as they are.

    Args:
        trainer: its loggers.
        pl_module: the model.
        prefix: of the names of the columns.
    """
    logged = {k: plain(v) for k, v in flat(initial_hparams(trainer, pl_module)).items()}
    row = {**norm_hparams(trainer, pl_module, prefix), **logged}
    for writer in _row_writers(trainer) if row else ():
        _, start, _ = _summaries(row)
        writer.add_summary(start)
        writer.close()


def add_metrics(trainer: pl.Trainer, metric: str | None, finished: bool = True) -> None:
    """Add the metrics to the row, as they are at the end of fit.

    Args:
        trainer: what it has logged, and what its ModelCheckpoint or EarlyStopping monitors.
        metric: the metric's tag; by default the one that is monitored, or else all that Lightning has logged.
        finished: the fit was not interrupted.
    """
    watching = [c for c in callbacks_of(trainer) if is_instance(c, ModelCheckpoint) or is_instance(c, EarlyStopping)]
    watched = [metric] if metric else [c.monitor for c in watching if c.monitor][:1]
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Whoever logs "hp_metric" means this page.
    names = dict.fromkeys((*(watched or values), *(n for n in values if n == "hp_metric")))
    for writer in _row_writers(trainer):
        numbers = [Summary.Value(tag=name, simple_value=values[name]) for name in names if name in values]
        writer.add_summary(Summary(value=numbers), trainer.global_step)
        if finished:
            *_, end = _summaries({})
            writer.add_summary(end)
        writer.close()


def _row_writers(trainer: pl.Trainer) -> Iterator[Any]:
    """Yield a writer into the row of each TensorBoard logger."""
    from torch.utils.tensorboard.writer import FileWriter

    for logger in trainer.loggers:
        if writes_rows(logger):
            assert is_instance(logger, TensorBoardLogger)
            yield FileWriter(f"{logger.log_dir}/{HPARAMS}")


def _summaries(hparams: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the summaries of a row: the list of columns, the values, and the end."""
    from torch.utils.tensorboard.summary import hparams as summaries

    made: tuple[Any, Any, Any] = summaries(hparams, {})  # type: ignore[no-untyped-call]
    return made


def initial_hparams(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Return what Lightning logs as hyper-parameters: those of the module and of the data module."""
    hparams: dict[str, Any] = {}
    for holder in (pl_module, getattr(trainer, "datamodule", None)):
        if holder is not None and logs_hyperparameters(holder):
            # Names of what LightningCLI adds begin with an underscore.
            hparams.update({k: v for k, v in holder.hparams_initial.items() if not k.startswith("_")})
    return hparams


def flat(nested: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Join the keys of nested mappings by a slash, as Lightning does.

    >>> flat({"optimizer": {"lr": 0.1}, "depth": 18})
    {'optimizer/lr': 0.1, 'depth': 18}
    """
    joined: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            joined.update(flat(value, f"{before}{key}/"))
        else:
            joined[f"{before}{key}"] = value
    return joined


def plain(value: Any) -> bool | int | float | str:
    """Return a number or a text as it is, and the text of anything else."""
    return value if isinstance(value, (bool, int, float, str)) else str(value)
