"""The curves: a row for each axis, a column for each measure."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.claims import _figures, _frame
from benchmarks.growth import _slopes, _tools
from benchmarks.growth._points import AXES

_NOTE = (
    "Both axes are logarithmic. Dashed: the arithmetic (operations, bytes moved, equations to "
    "compile, bytes held), laid through the first of the last three points of regjax. A curve that "
    "ends above it is steeper. Above each panel: the exponent of regjax over these three points "
    "and that of the arithmetic. Hollow: not run."
)
_NAMES = (_tools.REGJAX, _tools.MATFREE, _tools.CURVLINOPS)
_UNITS = {"seconds": ("s", 1.0), "compile": ("s", 1.0), "bytes": ("MB", 1e-6)}
_ROW, _ABOVE, _BELOW = 1.4, 0.25, 0.8  # inches


def figure(records: Sequence[_slopes.Record], path: pathlib.Path) -> None:
    """Draws what is recorded."""
    from matplotlib.figure import Figure

    found = {(slope.axis, slope.measure): slope for slope in _slopes.slopes(records)}
    axes = [axis for axis in AXES if any(axis == each for each, _ in found)]
    body = _ROW * len(axes)
    height = body + _ABOVE + _BELOW
    fig = Figure(figsize=(_frame.WIDTH, height), dpi=200, layout="constrained")
    layout: Any = fig.get_layout_engine()
    layout.set(rect=(0, _BELOW / height, 1, body / height))
    grid = fig.subplots(len(axes), len(_slopes.MEASURES), squeeze=False)
    for row, axis in zip(grid, axes, strict=True):
        for panel, measure in zip(row, _slopes.MEASURES, strict=True):
            if (axis, measure) in found:
                _draw(panel, records, found[axis, measure])
            else:
                panel.set_axis_off()
    handles: dict[str, Any] = {}
    for panel in fig.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    fig.align_ylabels()
    fig.legend(
        list(handles.values()), list(handles), loc="lower center", ncols=4, frameon=False,
        fontsize=7, bbox_to_anchor=(0.5, 0.52 / height),
    ).set_in_layout(False)  # fmt: skip
    fig.text(0.012, 1 - 0.06 / height, "How time and memory grow.", va="top", fontsize=9.5,
             fontweight="bold")  # fmt: skip
    lines = _frame.wrap(fig, _NOTE, _frame.WIDTH - 0.16, fontsize=7.5)
    fig.text(0.012, 0.05 / height, "\n".join(lines), fontsize=7.5, va="bottom", color="0.3")
    _frame.write(fig, path)


def _draw(panel: Any, records: Sequence[_slopes.Record], slope: _slopes.Slope) -> None:
    axis, measure = slope.axis, slope.measure
    unit, scale = _UNITS[measure]
    own = _slopes.curve(records, axis, measure, _tools.REGJAX)
    asked = _slopes.curve(records, axis, measure, "arithmetic")
    for i, name in enumerate(_NAMES):
        points = _slopes.curve(records, axis, measure, name)
        values = [scale * value for value in points.values()]
        panel.plot(list(points), values, label=name, **_figures.look(i))
    not_run = [r["parameters"] for r in records if (r["axis"], r["runs"]) == ("parameters", False)]
    for size in not_run if axis == "parameters" and measure == "bytes" else []:
        panel.plot(size, scale * own[size], **_figures.look(0), markerfacecolor="white")
    sizes = list(own)[-_slopes.LAST :]
    ratio = scale * own[sizes[0]] / asked[sizes[0]]
    panel.plot(
        sizes, [ratio * asked[size] for size in sizes], label="arithmetic", color="0.3",
        linewidth=0.9, linestyle=(0, (4, 2)), zorder=3,
    )  # fmt: skip
    panel.set(xscale="log", yscale="log")
    # At least a decade, so that what is flat looks flat.
    low, high = panel.get_ylim()
    room = max(1.0, (10 / (high / low)) ** 0.5)
    panel.set_ylim(low / room, high * room)
    _figures.logarithmic(panel)
    if axis == "parameters":
        panel.set_xticks(list(own), [f"$10^{{{round(math.log10(size))}}}$" for size in own])
        panel.set_xticks([], minor=True)
    else:
        _figures.ticks(panel, "x", list(own))
    _figures.label(panel, x=AXES[axis], y=f"{_slopes.MEASURES[measure]} ({unit})")
    numbers = [_slopes.rounded(slope.tools[_tools.REGJAX]), _slopes.rounded(slope.arithmetic)]
    panel.set_title(
        f"regjax {numbers[0]}, arithmetic {numbers[1]}", fontsize=7, pad=3,
        color="black" if slope.met else _figures.COLORS[1],
    )  # fmt: skip
