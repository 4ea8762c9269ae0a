"""What a monitor saw, over the steps of training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from regjax import _checks
from regjax.plots._style import COLORS, TICK_SIZE, Color, label_axes, new_figure, set_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches: from where on panels stand side by side.
_WIDE = 5.0
# Of the size of ticks, to the inch.
_CHARACTERS = 18


class _Quantity(NamedTuple):
    """A number of a monitor's rows and what stands beside it.

    Attributes:
      label: what it is called on the axis.
      error: the name of its error, or None.
      flag: the name of its flag, 0 where it is not to be relied on; or None.
      reference: the name of what it is compared with, drawn as a dashed line; or None.
      is_log: whether its axis is logarithmic where all is positive.
    """

    label: str
    error: str | None = None
    flag: str | None = None
    reference: str | None = None
    is_log: bool = True


_QUANTITIES: Mapping[str, _Quantity] = {
    "loss": _Quantity("loss"),
    "sharpness": _Quantity(
        "largest eigenvalue", "sharpness_error_bound", "sharpness_converged", "stability_threshold"
    ),
    "preconditioned_sharpness": _Quantity(
        "largest eigenvalue,\npreconditioned",
        "preconditioned_sharpness_error_bound",
        "preconditioned_sharpness_converged",
        "preconditioned_threshold",
    ),
    "critical_sharpness": _Quantity("critical sharpness", None, "critical_sharpness_resolved"),
    "trace": _Quantity("trace", "trace_standard_error"),
    "gradient_noise_scale": _Quantity(
        "noise scale\n(examples)", "gradient_noise_scale_standard_error", "noise_resolved"
    ),
    "gradient_share": _Quantity(
        "gradient in the\nleading eigenspace", None, "gradient_share_converged", is_log=False
    ),
}


def draw_monitor(
    rows: Sequence[Mapping[str, float]],
    name: str,
    *,
    axes: "Axes",
    color: Color | None = None,
    label: str | None = None,
) -> "Axes":
    """Draws one number of a monitor's rows over the steps.

    A band is one error to either side, and a flagged number is an open circle. Steps that were
    skipped, and numbers that are not finite, are left out. What a number is compared with, such as
    the threshold of the optimiser, is a dashed line.

    Example:
      >>> import matplotlib.figure
      >>> rows = [{"step": 0, "sharpness": 1.5}, {"step": 10, "sharpness": 2.5}]
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> axes = plots.draw_monitor(rows, "sharpness", axes=axes)
      >>> print(axes.lines[0].get_xydata())
      [[ 0.   1.5]
       [10.   2.5]]

    Args:
      rows: of a `diagnostics.Monitor`, or from `diagnostics.read_monitor`.
      name: name of a number in the rows, such as "sharpness".
      axes: what to draw on.
      color: any colour of matplotlib; None takes the next of a palette for colour-blind readers.
      label: its name in a legend.

    Returns:
      `axes`.

    Raises:
      ValueError: no row has such a number.
    """
    known = [row for row in rows if name in row]
    if not known:
        raise ValueError(f"`name` must be a number of the rows, got {name!r}.")
    quantity = _QUANTITIES.get(name, _Quantity(name))
    color = COLORS[len(axes.collections) % len(COLORS)] if color is None else color
    steps, values = (_column(known, key) for key in ("step", name))
    axes.plot(steps, values, color=color, linewidth=1, label=label,
              marker="o" if len(known) == 1 else None, markersize=3)  # fmt: skip
    if quantity.error is not None:
        errors = _column(known, quantity.error)
        low, high = values - errors, values + errors
        if quantity.is_log and np.nanmin(values, initial=np.inf) > 0:
            # A band to below zero has no end on a logarithmic axis.
            low = np.maximum(low, np.nanmin(values) / 2)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0, gid="error")
    if quantity.flag is not None:
        doubtful = _column(known, quantity.flag) == 0
        if doubtful.any():
            axes.plot(steps[doubtful], values[doubtful], "o", color=color, markersize=3,
                      markerfacecolor="white", markeredgewidth=0.7, gid="flag")  # fmt: skip
    if quantity.reference is not None:
        reference = _column(known, quantity.reference)
        if np.isfinite(reference).any():
            axes.plot(steps, reference, color=color, linewidth=0.8, linestyle="--", gid="reference")
    return axes


def monitor_figure(
    runs: Mapping[str, Sequence[Mapping[str, float]]], *, figure_width: float = 6.8
) -> "Figure":
    """Draws what monitors saw of one or several runs, a panel for each number.

    Below a width of 5 inches the panels stand in a column, else in rows of three.

    Example:
      >>> rows = [{"step": 0, "sharpness": 1.5}, {"step": 10, "sharpness": 2.5}]
      >>> figure = plots.monitor_figure({"sgd": rows})
      >>> print([axes.get_xlabel() for axes in figure.axes])
      ['step']

    Args:
      runs: rows of a monitor by the name of the run; colours repeat after six.
      figure_width: in inches: 6.8 is a page.

    Returns:
      A matplotlib figure that is not registered with pyplot; `figure.savefig(path)` writes it.

    Raises:
      ValueError: there is no run, or none has a number that is known.
      ImportError: matplotlib is missing.
    """
    _checks.positive("figure_width", figure_width)
    names = [
        name for name in _QUANTITIES if any(name in row for rows in runs.values() for row in rows)
    ]
    if not names:
        raise ValueError(
            f"`runs` must hold rows with one of {', '.join(_QUANTITIES)}, got none in {list(runs)}."
        )
    columns = (min(3, len(names)) if len(names) != 4 else 2) if figure_width >= _WIDE else 1
    num_rows = -(-len(names) // columns)
    height = 0.75 * figure_width / columns * num_rows + 0.3
    figure = new_figure(figure_width, height)
    grid = figure.subplots(num_rows, columns, sharex=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        for i, (label, rows) in enumerate(runs.items()):
            if any(name in row for row in rows):
                draw_monitor(rows, name, axes=axes, color=COLORS[i % len(COLORS)], label=label)
        quantity = _QUANTITIES[name]
        if quantity.is_log and axes.dataLim.minposy > 0 and axes.dataLim.y0 > 0:
            set_log(axes)
        label_axes(axes, "step", quantity.label)
        axes.yaxis.label.set_size(TICK_SIZE)
    for i, axes in enumerate(grid.flat):
        if i >= len(names):
            axes.set_axis_off()
        elif i + columns < len(names):
            axes.set_xlabel("")
        else:  # the lowest of its column, which may end above others
            axes.tick_params(labelbottom=True)
    lines = _meanings(figure)
    if len(runs) > 1:
        handles = [axes.get_legend_handles_labels() for axes in grid.flat]
        names_of_runs = {label: line for pair in handles for line, label in zip(*pair, strict=True)}
        lines = {**names_of_runs, **lines}
    if lines:
        longest = max(map(len, lines))
        figure.legend(
            lines.values(), lines.keys(), loc="outside upper center", frameon=False,
            fontsize=TICK_SIZE,
            ncols=max(1, min(len(lines), int(figure_width * _CHARACTERS / (longest + 6)))),
        )  # fmt: skip
    return figure


def _meanings(figure: "Figure") -> dict[str, Any]:
    """Returns what bands, open circles and dashes mean, as far as the figure has them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    artists = {artist.get_gid() for axes in figure.axes for artist in axes.get_children()}
    circle: dict[str, Any] = {
        "marker": "o",
        "markersize": 3,
        "markerfacecolor": "white",
        "linestyle": "",
    }
    meanings = {
        "error": ("one error to either side", Patch(color="0.5", alpha=0.3)),
        "flag": ("not converged or not resolved", Line2D([], [], color="0.3", **circle)),
        "reference": ("stable below", Line2D([], [], color="0.3", linewidth=0.8, linestyle="--")),
    }
    return {text: handle for gid, (text, handle) in meanings.items() if gid in artists}


def _column(rows: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    values = np.asarray([row.get(name, np.nan) for row in rows], np.float64)
    return np.where(np.isfinite(values), values, np.nan)
