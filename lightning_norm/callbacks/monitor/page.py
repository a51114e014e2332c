"""NormMonitor in TensorBoard, beyond scalars: the page of charts, the final table, the columns of the HParams page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
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
    writes_default_metric,
)
from lightning_norm.callbacks.monitor.quantities import (
    Series,
    depths,
    families,
    is_choice,
    key_of,
    label,
    layer_names,
    split,
)
from lightning_norm.callbacks.swap.norm_swap import NormSwap
from lightning_norm.surgery.walk import normalizers_of

Layout = dict[str, dict[str, list[Any]]]


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


def layout(logged: Iterable[Series], group: str) -> Layout:
    """Return a layout for ``SummaryWriter.add_custom_scalars``, one category per key.

    Quantities of one family share a chart, of which there is one per depth; a quantity by itself has one chart, with a
    line per depth. TensorBoard takes tags for the beginnings of regular expressions.

    Args:
        logged: all that is logged.
        group: first part of the tags ``<group>/<key>/<quantity>/<depth>``.

    >>> layout([("sn", "mean_in", "a"), ("sn", "mean_bn", "a")], "n")
    {'Normalization: sn': {'mean (IN, BN), all layers': ['Multiline', ['n/sn/mean_in/all$', 'n/sn/mean_bn/all$']]}}
    """
    logged = list(logged)
    page: Layout = {}
    for key, grouped in families(logged).items():
        charts = page.setdefault(f"Normalization: {key}", {})
        for family, quantities in grouped.items():
            parts = list(dict.fromkeys(depths(len(layer_names(logged, key, quantities[0])))))
            # Several quantities in one chart need their names in its title; one by itself has the depths as lines.
            if len(quantities) == 1:
                tags = {family: [f"{group}/{key}/{quantities[0]}/{part}" for part in parts]}
            else:
                title = f"{family} ({', '.join(q for q in map(label, quantities) if q != family)})"
                tags = {f"{title}, {p} layers": [f"{group}/{key}/{q}/{p}" for q in quantities] for p in parts}
            charts.update(
                {title: ["Multiline", [f"{re.escape(t)}$" for t in group_tags]] for title, group_tags in tags.items()}
            )
    return page


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
        columns = [q for quantities in grouped.values() for q in quantities]
        rows = [["layer", *columns]]
        for layer in layer_names(values, key):
            # In each mixture of the layer the greatest weight is marked, and in nothing else.
            best = {max(quantities, key=lambda q: values[key, q, layer]) for quantities in chosen}
            cells = [(values.get((key, q, layer)), mark if q in best else "") for q in columns]
            rows.append([layer, *("" if v is None else f"{m}{v:.3g}{m}" for v, m in cells)])
        yield rows


def markdown(rows: list[list[str]]) -> str:
    """Return a table in Markdown.

    >>> print(markdown([["layer", "iota"], ["a", "0.9"]]))
    | layer | iota |
    |---|--:|
    | a | 0.9 |
    """
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---|" + "--:|" * (len(rows[0]) - 1), *body])


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


def add_hparams(trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str, metric: str | None, end: bool) -> None:
    """Add the norm, its arguments and the metric to the run's row among TensorBoard's HParams.

    TensorBoard takes the first list of columns that a run has. With the logger's ``default_hp_metric``, that list is
    the one that Lightning writes after ``on_fit_start``: there the same one, longer, is written before it. Without it,
    whatever the user writes comes first, and this one at the end of fit. The module's own hparams, and those in the
    logger's ``hparams.yaml``, stay as they are.

    Args:
        trainer: its loggers, and what its ModelCheckpoint or EarlyStopping monitors.
        pl_module: the model.
        prefix: of the names of the columns.
        metric: the metric's tag; by default the one that is monitored.
        end: of fit; its start otherwise.
    """
    norm = norm_hparams(trainer, pl_module, prefix)
    watching = [c for c in callbacks_of(trainer) if is_instance(c, ModelCheckpoint) or is_instance(c, EarlyStopping)]
    watched = [c.monitor for c in watching if c.monitor]
    metrics = ([metric] if metric else watched)[:1]
    for logger in trainer.loggers:
        if norm and is_instance(logger, TensorBoardLogger) and writes_default_metric(logger) is not end:
            logged = {k: plain(v) for k, v in flat(initial_hparams(trainer, pl_module)).items()}
            # hp_metric must be among the columns, or Lightning's own list would not match this one.
            names = [f"{tag_prefix(logger)}{m}" for m in (*metrics, *(() if end else ("hp_metric",)))]
            _write({**norm, **logged}, names, event_writer(logger))


def _write(hparams: dict[str, Any], metrics: list[str], writer: Any) -> None:
    """Write the summaries of the page "HParams": these values, and columns for metrics of these names."""
    from torch.utils.tensorboard.summary import hparams as summaries

    # The values of the metrics come from the scalars; 0 only says that the column exists.
    for summary in summaries(hparams, dict.fromkeys(metrics, 0)):  # type: ignore[no-untyped-call]
        writer.add_summary(summary)


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
