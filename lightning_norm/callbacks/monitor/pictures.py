"""Pictures of what the layers learned: choices over layers and epochs, profiles over the depth, curves over epochs.

Drawn with matplotlib's objects on Agg; ``pyplot`` and its global state are not used.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_norm.callbacks.monitor.quantities import (
    ALL_LAYERS,
    TIE,
    Series,
    families,
    is_choice,
    is_shared,
    label,
    split,
)
from lightning_norm.surgery.extras import missing

Image = npt.NDArray[np.uint8]
History = Mapping[int, Mapping[Series, float]]
"""Epochs that were finished -> the values then."""

COLORS = {"bn": "#0072B2", "in": "#D55E00", "ln": "#009E73", "gn": "#CC79A7"}  # apart for colour-blind readers too
OTHERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PALEST = 0.12
NOBODY = -1
Notes = Mapping[str, Mapping[str, str]]
"""Key -> quantity -> what is written below the title of its panel."""
ROW, DPI = 0.24, 110  # inches
MOST_ROWS, MOST_PANELS, SHARED_ROWS = 60, 3, 10
NARROWEST = 6.4
"""So wide that the two lines above every picture fit, in inches."""


def can_draw() -> bool:
    """Tell whether matplotlib is installed."""
    return not missing("matplotlib")


def draw(history: History, notes: Notes | None = None) -> dict[tuple[str, str], Image]:
    """Return every picture of a run: (key, title) -> (height, width, 3).

    A mixture, whose weights sum to one, becomes a heat map, "choice"; what the layers have in common becomes curves
    over the epochs, "shared", once for all of them; everything else becomes profiles over the depth.

    Args:
        history: the values at the end of each epoch; 0 is the state before the training.
        notes: what the reader of a quantity must know.

    Returns:
        A title is "choice", "profile" (the method's own quantities) or "profile_every_layer" (drift, gamma). Pixels are
        0 to 255.

    Raises:
        ModuleNotFoundError: matplotlib is missing; :func:`can_draw` asks for it.

    >>> start = {("bcn", "iota", name): 1.0 for name in ("net.bn1", "net.bn2")}
    >>> end = {("bcn", "iota", "net.bn1"): 0.75, ("bcn", "iota", "net.bn2"): 0.5}
    >>> list(draw({0: start, 1: end})) if can_draw() else [("bcn", "profile")]
    [('bcn', 'profile')]
    """
    last = history[max(history)]
    images: dict[tuple[str, str], Image] = {}
    for key, every_family in families(last).items():
        shared = {family: members for family, members in every_family.items() if is_shared(last, key, members[0])}
        grouped = {family: members for family, members in every_family.items() if family not in shared}
        told = (notes or {}).get(key, {})
        mixtures = {family: members for family, members in grouped.items() if is_choice(last, key, members)}
        if mixtures:
            images[key, "choice"] = draw_choice(history, key, mixtures)
        if shared:
            images[key, "shared"] = draw_shared(history, key, shared)
        for title, part in split(grouped).items():
            images[key, title] = draw_profile(history, key, part, told)
    return images


def draw_shared(history: History, key: str, grouped: Mapping[str, list[str]]) -> Image:
    """Draw what all layers have in common: values over the epochs, one panel for each family.

    Args:
        history: the values at the end of each epoch.
        key: of the normalizers.
        grouped: family -> its quantities.

    Returns:
        The pixels, (height, width, 3), 0 to 255.
    """
    epochs = sorted(history)
    figure, axes = _figure(len(grouped), SHARED_ROWS, 2.5, sharey=False)
    for axis, (family, quantities) in zip(axes, grouped.items(), strict=True):
        for i, quantity in enumerate(quantities):
            y = [history[epoch].get((key, quantity, ALL_LAYERS), math.nan) for epoch in epochs]
            axis.plot(epochs, y, color=_color(quantity, i), lw=1.3, marker="o", ms=3.2)
        _members(axis, family, quantities, "")
        axis.grid(color="0.9", lw=0.6)
        axis.set_xlabel("epochs", fontsize=9)
        axis.tick_params(labelsize=8)
        # Half an epoch is no place to look at.
        axis.locator_params(axis="x", nbins=8, integer=True)
        _write_whole(axis.yaxis)
    _title(figure, f"{key}: the same for all layers", "over the epochs")
    return _pixels(figure)


def draw_choice(history: History, key: str, mixtures: Mapping[str, list[str]]) -> Image:
    """Draw one heat map per mixture: layers down, epochs across, the colour of the winner, deeper as its weight grows.

    Args:
        history: the values at the end of each epoch.
        key: of the normalizers.
        mixtures: family -> its quantities.

    Returns:
        The pixels, (height, width, 3), 0 to 255; the height grows with the layers.
    """
    epochs, last = sorted(history), history[max(history)]
    names = _layers_of(last, key, mixtures)
    # One array for each mixture, so that its winners are found without a loop over cells.
    cubes = {family: _cube(history, epochs, names, key, members) for family, members in mixtures.items()}
    # All heat maps of a picture share one scale, so that their colours can be compared.
    top = max(float(np.nanmax(cube)) for cube in cubes.values())
    equal = min(1 / len(members) for members in mixtures.values())
    top = max(top, equal + 0.01)
    figure, axes = _figure(len(mixtures), len(names), 2.5)
    for axis, (family, quantities) in zip(axes, mixtures.items(), strict=True):
        cube, labels = cubes[family], [label(q) for q in quantities]
        weight = cube.max(2)
        depth = np.nan_to_num(PALEST + (1 - PALEST) * (weight - equal).clip(0) / (top - equal))
        # A lead that rounding could turn around is no lead: such a cell stays white.
        winner = np.where(weight - np.sort(cube)[..., -2] > TIE, cube.argmax(2), NOBODY)
        depth[winner == NOBODY] = 0
        hues = np.array([_rgb(_color(q, i)) for i, q in enumerate(quantities)])
        # White minus the hue of the winner, the deeper the greater its weight.
        axis.imshow(
            1 - depth[..., None] * (1 - hues[winner]),
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, len(epochs) - 0.5, len(names) - 0.5, -0.5),
        )
        _name_runs(axis, winner, depth, labels)
        _epochs_below(axis, epochs)
        _layers(axis, names)
        now = zip(winner[:, -1], weight[:, -1], strict=True)
        _final(axis, [f"{'all' if w == NOBODY else labels[w]} {v:.2f}" for w, v in now])
        axis.set_title(family, fontsize=10.5, weight="bold", pad=20)
        _strips(axis, quantities)
    _title(
        figure,
        f"{key}: what each layer chooses",
        f"the deeper the colour, the greater the weight: {equal:.2f} to {top:.2f}; white: none leads",
    )
    return _pixels(figure)


def draw_profile(
    history: History, key: str, grouped: Mapping[str, list[str]], notes: Mapping[str, str] | None = None
) -> Image:
    """Draw each family over the depth: layers down, values across, the start of the run in pale.

    Args:
        history: the values at the end of each epoch.
        key: of the normalizers.
        grouped: family -> its quantities.
        notes: quantity -> what its reader must know.

    Returns:
        The pixels, (height, width, 3), 0 to 255.
    """
    # The first entry is the state before the training, or of the checkpoint that it was resumed from.
    first, last = history[min(history)], history[max(history)]
    names = _layers_of(last, key, grouped)
    figure, axes = _figure(len(grouped), len(names), 2.1)
    for axis, (family, quantities) in zip(axes, grouped.items(), strict=True):
        for i, quantity in enumerate(quantities):
            color = _color(quantity, i)
            # The start of the run lies pale behind the end.
            for values, alpha in ((first, 0.3), (last, 1.0)):
                x = [values.get((key, quantity, name), math.nan) for name in names]
                axis.plot(x, range(len(names)), color=color, alpha=alpha, lw=1.3, marker="o", ms=3.2)
        _members(axis, family, quantities, "; ".join((notes or {}).get(q, "") for q in quantities).strip("; "))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(color="0.9", lw=0.6)
        axis.tick_params(axis="x", labelsize=8)
        axis.locator_params(axis="x", nbins=3)
        _write_whole(axis.xaxis)
        low, high = axis.get_xlim()
        if low < 0 <= axis.dataLim.x0:  # a share has no room below 0
            axis.set_xlim(-0.04 * high, high)
        _layers(axis, names)
    _title(figure, f"{key}: layer by layer", "pale: at the start")
    return _pixels(figure)


def _layers_of(values: Mapping[Series, float], key: str, grouped: Mapping[str, list[str]]) -> list[str]:
    """Return the layers that have one of these quantities, in the order of their depth."""
    shown = {q for quantities in grouped.values() for q in quantities}
    return list(dict.fromkeys(layer for k, q, layer in values if k == key and q in shown))


def _members(axis: Any, family: str, quantities: list[str], note: str) -> None:
    """Write above a panel its family, a note, and the names of its curves in their colours."""
    below = len(quantities) > 1
    for i, quantity in enumerate(quantities if below else ()):
        axis.text(
            (i + 0.5) / len(quantities), 1.01, label(quantity), transform=axis.transAxes, ha="center",
            va="bottom", fontsize=9 if len(quantities) < 5 else 7.5, weight="bold", color=_color(quantity, i),
        )  # fmt: skip
    axis.set_title("\n".join(filter(None, (family, textwrap.fill(note, 26)))), fontsize=10.5, weight="bold",
                   pad=16 if below else 4)  # fmt: skip


def _write_whole(axis: Any) -> None:
    """Write the numbers of an axis whole: no offset and no power beside it."""
    # The function is asked when the ticks are known.
    axis.set_major_formatter(lambda value, _: whole(value, axis.get_majorticklocs()))


def whole(value: float, ticks: npt.ArrayLike) -> str:
    """Return a number with as many digits as tell the ticks of its axis apart.

    >>> [whole(x, [0.99998, 0.99999, 1.0]) for x in (0.99998, 1.0)], whole(2e-9, [0.0, 2e-9])
    (['0.99998', '1'], '2e-09')
    """
    sizes = np.sort(np.asarray(ticks, dtype=float))
    step, top = (np.diff(sizes).min() if len(sizes) > 1 else 0.0), np.abs(sizes).max(initial=abs(value))
    digits = 3 if step <= 0 or top == 0 else int(np.ceil(np.log10(top / step))) + 2
    # A tick that is zero but for rounding is zero.
    return f"{0.0 if abs(value) < step * 1e-6 else float(value):.{min(digits, 12)}g}"


def _figure(panels: int, rows: int, panel: float, sharey: bool = True) -> tuple[Any, list[Any]]:
    """Return a figure with three panels side by side, as high as its rows need, and room for the names at the left."""
    from matplotlib.figure import Figure

    # Ceiling division: as many rows of panels as needed, filled evenly.
    down = -(-panels // MOST_PANELS)
    across = -(-panels // down)
    # Inches: room for the names at the left and for the titles above.
    size = max(1.6 + panel * across, NARROWEST), down * (ROW * max(min(rows, MOST_ROWS), 4) + 1.0) + 0.4
    figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
    axes = list(figure.subplots(down, across, squeeze=False, sharey=sharey).flat)
    # A grid of panels may have more places than families.
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _cube(
    history: History, epochs: list[int], names: list[str], key: str, quantities: list[str]
) -> npt.NDArray[np.float64]:
    """Return the values, (layers, epochs, quantities), NaN where there is none."""
    rows = [[[history[e].get((key, q, name), math.nan) for q in quantities] for e in epochs] for name in names]
    return np.array(rows, dtype=float)


def _color(quantity: str, i: int) -> str:
    """Return the colour of a quantity: that of its statistic, or the i-th of the others."""
    return COLORS.get(quantity.rpartition("_")[2], OTHERS[i % len(OTHERS)])


def _rgb(color: str) -> tuple[float, ...]:
    """Return a colour as three numbers between 0 and 1."""
    from matplotlib.colors import to_rgb

    return tuple(to_rgb(color))


def _layers(axis: Any, names: list[str]) -> None:
    """Name the rows, without the part that all names begin with; every second or third one where they are many."""
    shared = 0
    for level in zip(*(name.split(".")[:-1] for name in names), strict=False):  # of one name, all but the last part
        if len(set(level)) > 1:
            break
        shared += 1
    shown = [".".join(name.split(".")[shared:]) for name in names]
    every = -(-len(names) // MOST_ROWS)
    axis.set_yticks(range(0, len(names), every), shown[::every], fontsize=9)
    axis.tick_params(axis="y", length=0)


def _epochs_below(axis: Any, epochs: list[int]) -> None:
    """Write the epochs below a heat map, eight at most."""
    every = -(-len(epochs) // 8)
    axis.set_xticks(range(0, len(epochs), every), ["start" if e == 0 else str(e) for e in epochs[::every]], fontsize=9)
    axis.set_xlabel("epochs", fontsize=9)


def _name_runs(axis: Any, winner: npt.NDArray[Any], depth: npt.NDArray[Any], labels: list[str]) -> None:
    """Write the winner where a row begins and where it changes."""
    if winner.shape[0] > MOST_ROWS:
        return
    for row, choices in enumerate(winner):
        for column, choice in enumerate(choices):
            if choice == NOBODY or (column and choices[column - 1] == choice):
                continue
            color = "white" if depth[row, column] > 0.55 else "black"
            axis.text(column, row, labels[choice], ha="center", va="center", fontsize=7.5, color=color)


def _final(axis: Any, texts: list[str]) -> None:
    """Write at the right of each row what it is now."""
    if len(texts) > MOST_ROWS:
        return
    # A second axis, since matplotlib ties the labels of the first to the names of the layers.
    twin = axis.secondary_yaxis("right")
    twin.set_yticks(range(len(texts)), texts, fontsize=8.5)
    twin.tick_params(length=0)


def _strips(axis: Any, quantities: list[str]) -> None:
    """Draw above a panel one strip per choice, from its palest to its deepest colour, with its name in it."""
    n = len(quantities)
    for i, quantity in enumerate(quantities):
        strip = axis.inset_axes([i / n + 0.02, 1.015, 1 / n - 0.04, 0.16 / (ROW * _rows(axis))])
        # The strip runs through the same colours as the cells, as a legend.
        ramp = np.linspace(PALEST, 1, 64)[None, :, None]
        strip.imshow(1 - ramp * (1 - np.array(_rgb(_color(quantity, i)))), aspect="auto")
        strip.set_axis_off()
        strip.text(0.5, 0.5, label(quantity), transform=strip.transAxes, ha="center", va="center", fontsize=8.5)


def _title(figure: Any, first: str, second: str) -> None:
    """Write two lines above the whole figure."""
    figure.suptitle(f"{first}\n{second}", x=0.02, ha="left", fontsize=10)


def _rows(axis: Any) -> int:
    """Return how many rows a panel has, within the limits of the figure's height."""
    bottom, top = axis.get_ylim()
    return int(max(min(round(bottom - top), MOST_ROWS), 4))


def _pixels(figure: Any) -> Image:
    """Draw a figure, and return what it shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
