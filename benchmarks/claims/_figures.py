"""What the figures of the claims share: panels, means over seeds, the seeds themselves, ticks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import _claims, _papers
from benchmarks._claims import Record
from regjax.plots import _style

# Of Okabe and Ito, told apart by the colour-blind, the darker ones first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^v<p>"
NAMES = {
    **_papers.DATA,
    "moons": "two moons", "linear": "linear net", "valley": "valley",
    "one_dimensional": "1-d regression",
}  # fmt: skip
BARS = "Points: means over the seeds; bars: their standard deviation."
DOTS = "Each dot is one seed; the black bars are means."


def panels(
    figure: Any, records: Sequence[Record], measures: Mapping[str, str], *, height: float = 1.75
) -> Iterator[tuple[Any, list[Record], str]]:
    """Axes for each data set and measure: a row per data set, or one row for a single measure.

    `measures` are the labels of the vertical axes, by what is drawn there.
    """
    sets = _claims.groups(records, "data")
    rows, columns = (len(sets), len(measures)) if len(measures) > 1 else (1, len(sets))
    figure.figure.set_figheight(rows * height)
    every = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for data, own in sets.items():
        for name, text in measures.items():
            axes = next(every)
            axes.set_title(NAMES.get(data, data), fontsize=8)
            label(axes, y=text)
            yield axes, own, name


def sweep(
    axes: Any,
    records: Sequence[Record],
    x: str,
    y: str,
    *,
    values: Sequence[Any],
    index: int = 0,
    of: int = 1,
    name: str | None = None,
    **style: Any,
) -> None:
    """The mean over the seeds of `y` at each of the `values` of `x`, as line `index` of several.

    Settings are evenly spaced and the lines stand side by side, so that none hides another.
    """
    found = {value: _claims.select(records, **{x: value}) for value in values}
    places = [i + side(index, of) for i, value in enumerate(values) if found[value]]
    each = [_claims.numbers(own, y) for own in found.values() if own]
    axes.errorbar(
        places, [v.mean() for v in each], yerr=[v.std(ddof=min(1, len(v) - 1)) for v in each],
        label=name, capsize=2, **{**look(index), **style},
    )  # fmt: skip
    texts = [value if isinstance(value, str) else f"{value:g}" for value in values]
    axes.set_xticks(range(len(values)), texts)
    axes.set_xlim(-0.4, len(values) - 0.6)


def sweeps(
    axes: Any, lines: Mapping[str, Sequence[Record]], x: str, y: str, *, values: Sequence[Any],
    first: int = 0, of: int | None = None,
) -> None:  # fmt: skip
    """A sweep for each label and its records, from line `first` on, `of` that many in all."""
    for index, (name, records) in enumerate(lines.items(), first):
        sweep(axes, records, x, y, values=values, index=index, of=of or len(lines), name=name)


def side(index: int, of: int) -> float:
    """How far to the side the one of several that share a place stands."""
    return 0.5 * ((index + 0.5) / of - 0.5)


def look(index: int) -> dict[str, Any]:
    """A colour and a marker, so that lines differ in print too."""
    place = index % len(COLORS)
    return {"color": COLORS[place], "marker": MARKERS[place], "markersize": 3.5, "linewidth": 1}


def dots(
    axes: Any, records: Sequence[Record], by: str, y: str, names: Sequence[str] | None = None
) -> None:
    """`y` of each run over the values of `by`, a column each, with the means."""
    columns = _claims.groups(records, by)
    for place, own in enumerate(columns.values()):
        column(axes, place, _claims.numbers(own, y))
    axes.set_xticks(range(len(columns)), list(columns) if names is None else names)
    axes.set_xlim(-0.5, len(columns) - 0.5)


def column(
    axes: Any, place: float, values: Any, *, index: int = 0, of: int = 1, name: str | None = None
) -> None:
    """The runs of one setting, which shares its place with others, and their mean."""
    if not len(values):
        return
    style = {**look(index), "linestyle": "", "alpha": 0.6, "label": name}
    axes.plot(np.full(len(values), place), values, **style)
    half = min(0.16, 0.22 / of)
    axes.plot([place - half, place + half], [np.mean(values)] * 2, color="black", linewidth=1.2)


def level(
    axes: Any,
    value: float,
    text: str = "",
    *,
    left: float = 0.02,
    above: bool = True,
    name: str | None = None,
) -> None:
    """A dashed line at a value that matters, with its name at it or in the legend."""
    axes.axhline(value, color="0.35", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1, label=name)
    axes.annotate(
        text, (left, value), xycoords=("axes fraction", "data"), fontsize=7, color="0.25",
        xytext=(0, 2 if above else -2), textcoords="offset points",
        va="bottom" if above else "top", ha="right" if left > 0.5 else "left",
    )  # fmt: skip


def note(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Words inside a panel, at a place in shares of its sides."""
    axes.text(x, y, text, transform=axes.transAxes, fontsize=7, **{"va": "center", **style})


def ticks(axes: Any, axis: str, values: Sequence[float]) -> None:
    """Ticks at these values only, as plain numbers."""
    one = getattr(axes, f"{axis}axis")
    one.set_ticks(list(values), [f"{value:g}" for value in values])
    one.set_ticks([], minor=True)


def logarithmic(axes: Any, which: str = "y") -> None:
    """Logarithmic axes with the library's ticks."""
    for name in which:
        _style.set_log(axes, name)


def label(axes: Any, *, x: str | None = None, y: str | None = None) -> None:
    """Names of the axes, in sizes for a page's width."""
    if x is not None:
        axes.set_xlabel(x, fontsize=8)
    if y is not None:
        axes.set_ylabel(y, fontsize=8)
    axes.tick_params(which="both", labelsize=7)
