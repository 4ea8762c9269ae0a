"""Probes along the steps of training: loss, gradient and smoothness."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from regjax import _checks
from regjax._printing import legible
from regjax.plots._style import (
    COLORS,
    TICK_SIZE,
    Color,
    check_panels,
    label_axes,
    new_figure,
    set_log,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the size of ticks, to the inch.
_CHARACTERS = 18
# Inches, from where on panels stand side by side.
_WIDE = 5.0


@legible
class ProbePanel(NamedTuple):
    """What `probe_figure` shows of one setting.

    Example:
      >>> looks = jnp.ones((3, 8))  # three looks, eight points along the step of each
      >>> panel = plots.ProbePanel("sgd", jnp.arange(3), looks, looks, looks)
      >>> print(panel.losses.shape, panel.times)
      (3, 8) [0 1 2]

    Attributes:
      label: name of the setting.
      times: (num_looks,), when in training the probes were made.
      losses: (num_looks, S), the losses at S points along the step of each look, from
        `diagnostics.line_probe`.
      gradient_distances: (num_looks, S), likewise.
      smoothness: (num_looks, S), likewise.
    """

    label: str
    times: ArrayLike
    losses: ArrayLike
    gradient_distances: ArrayLike
    smoothness: ArrayLike


def draw_probe(
    times: ArrayLike,
    values: ArrayLike,
    *,
    axes: "Axes",
    label: str | None = None,
    color: Color | None = None,
) -> "Axes":
    """Draws the range of some values at each time as a band, and their median as a line.

    The axis is logarithmic if all values are positive. A second call on the same axes takes the
    next colour.

    Example:
      >>> import matplotlib.figure
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> values = jnp.array([[3.0, 4.0, 5.0], [1.0, 2.0, 3.0]])  # at two times
      >>> axes = plots.draw_probe(jnp.arange(2), values, axes=axes)
      >>> print(axes.lines[0].get_ydata(), axes.get_yscale())  # the medians
      [4. 2.] log

    Args:
      times: (num_looks,).
      values: (num_looks, S), such as the losses along each step.
      axes: to draw on.
      label: name of the band in a legend, or None.
      color: any colour of matplotlib; None takes the next of a palette for colour-blind readers.

    Returns:
      `axes`.

    Raises:
      ValueError: shapes do not fit.
    """
    times, values = np.asarray(times, np.float64), _looks("values", values, len(times))
    color = COLORS[len(axes.collections) % len(COLORS)] if color is None else color
    lower, upper = np.min(values, 1), np.max(values, 1)
    axes.fill_between(times, lower, upper, color=color, alpha=0.25, linewidth=0, label=label)
    marker = "o" if len(times) == 1 else None
    axes.plot(times, np.median(values, 1), color=color, linewidth=1, marker=marker, markersize=3)
    _set_log(axes)
    return axes


def probe_figure(
    panels: Sequence[ProbePanel], *, figure_width: float = 6.8, time: str = "epoch"
) -> "Figure":
    """Draws the probes of several settings over training: loss, gradient, smoothness.

    The first two panels show the range of the losses and of the distances of the gradient along
    each step as a band around their median. The third shows the largest smoothness, the effective
    one. Distances are Euclidean, in units of the loss over those of the parameters; smoothness is a
    distance over the length of its step. Below a width of 5 inches the panels stand in a column.

    Example:
      >>> looks = jnp.ones((3, 8))  # three looks, eight points along the step of each
      >>> panel = plots.ProbePanel("sgd", jnp.arange(3), looks, looks, looks)
      >>> figure = plots.probe_figure([panel])
      >>> print([axes.get_xlabel() for axes in figure.axes])
      ['epoch', 'epoch', 'epoch']

    Args:
      panels: one `ProbePanel` for each setting; colours repeat after six.
      figure_width: in inches: 6.8 is a page.
      time: name of the horizontal axes.

    Returns:
      A matplotlib figure that is not registered with pyplot; `figure.savefig(path)` writes it.

    Raises:
      TypeError: `panels` holds something else than panels.
      ValueError: there is no panel, or shapes do not fit.
      ImportError: matplotlib is missing.

    References:
      S. Santurkar, D. Tsipras, A. Ilyas, A. Madry (2018), arXiv:1805.11604, figure 4.
    """
    check_panels(panels, ProbePanel)
    _checks.positive("figure_width", figure_width)
    is_row = figure_width >= _WIDE
    figure = new_figure(figure_width, (0.36 if is_row else 1.5) * figure_width)
    loss, distance, smoothness = figure.subplots(*((1, 3) if is_row else (3, 1)), sharex=True)
    for i, panel in enumerate(panels):
        color = COLORS[i % len(COLORS)]
        times, looks = _probe_arrays(panel)
        for axes, values in ((loss, looks[0]), (distance, looks[1])):
            draw_probe(times, values, axes=axes, color=color)
        # Not a number where there was no gradient to compare.
        highest = np.max(np.where(np.isnan(looks[2]), -np.inf, looks[2]), 1)
        smoothness.plot(
            times, np.where(np.isfinite(highest), highest, np.nan), color=color, linewidth=1,
            label=panel.label, marker="o" if len(times) == 1 else None, markersize=3,
        )  # fmt: skip
    for axes, text in (
        (loss, "loss along the step\n(median and range)"),
        (distance, "change of the gradient\n(norm, median and range)"),
        (smoothness, "effective smoothness\n(change of gradient / step)"),
    ):
        _set_log(axes)
        axes.locator_params(axis="x", integer=True)
        label_axes(axes, time if is_row or axes is smoothness else "", text)
        axes.yaxis.label.set_size(TICK_SIZE)
    lines, labels = smoothness.get_legend_handles_labels()
    longest = max(map(len, labels))
    figure.legend(
        lines, labels, loc="outside upper center", frameon=False, fontsize=TICK_SIZE,
        ncols=max(1, min(len(labels), int(figure_width * _CHARACTERS / (longest + 6)))),
    )  # fmt: skip
    return figure


def _set_log(axes: "Axes") -> None:
    if axes.dataLim.y0 > 0 and np.isfinite(axes.dataLim.y1):
        set_log(axes)


def _probe_arrays(panel: ProbePanel) -> tuple[np.ndarray, list[np.ndarray]]:
    times = np.asarray(panel.times, np.float64)
    fields = zip(panel._fields[2:], panel[2:], strict=True)
    return times, [_looks(name, values, len(times)) for name, values in fields]


def _looks(name: str, values: ArrayLike, num_times: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) != num_times:
        raise ValueError(
            f"`{name}` must have shape (num_looks, S) for {num_times} times, got {values.shape}."
        )
    return values
