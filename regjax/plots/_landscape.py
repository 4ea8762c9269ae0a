"""Loss surfaces, as contours and in three dimensions, and probes over training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from regjax import _checks
from regjax._printing import legible
from regjax.plots._style import COLORS, TICK_SIZE, Color, label_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d import Axes3D

_NUM_LEVELS = 12
# Of the size of ticks, to the inch.
_CHARACTERS = 18
# Inches: from where on panels stand side by side, and the width that one needs.
_WIDE, _LEAST_PANEL, _LARGEST_PANEL = 5.0, 1.6, 3.3
_COLORMAP = "viridis"


@legible
class SurfacePanel(NamedTuple):
    """What `surface_figure` shows of one setting.

    Attributes:
      label: name of the setting.
      positions: (len,), along both directions.
      losses: (len, len), the first axis along the first direction.
    """

    label: str
    positions: ArrayLike
    losses: ArrayLike


@legible
class ProbePanel(NamedTuple):
    """What `probe_figure` shows of one setting.

    Attributes:
      label: name of the setting.
      times: (num_looks,), when in training the probes were made.
      losses: (num_looks, S), along the step of each look.
      gradient_distances: (num_looks, S).
      smoothness: (num_looks, S).
    """

    label: str
    times: ArrayLike
    losses: ArrayLike
    gradient_distances: ArrayLike
    smoothness: ArrayLike


def draw_surface(
    positions: ArrayLike,
    losses: ArrayLike,
    *,
    axes: "Axes",
    levels: ArrayLike | None = None,
    label: str | None = None,
) -> "Axes":
    """Draws the contours of a loss surface; the levels are a constant factor apart.

    Losses that are not finite are left out. A cross marks the origin.

    Args:
      positions: (len,), ascending, along both directions, in units of the directions.
      losses: (len, len), the first axis along the first direction.
      axes: to draw on.
      levels: ascending losses of the contours; None: twelve, geometric between the extremes, evenly
        spaced if a loss is not positive.
      label: title of the axes, or None.

    Returns:
      `axes`.

    Raises:
      ValueError: shapes do not fit, positions do not ascend, or fewer than two losses are finite.
    """
    positions, losses = _surface_arrays(positions, losses)
    levels = _levels([losses]) if levels is None else np.asarray(levels)
    finite = np.ma.masked_invalid(losses)
    # Contours take rows as the vertical axis.
    lines = axes.contour(
        positions, positions, finite.T, levels=levels, cmap=_COLORMAP, norm=_color_scale(levels),
        linewidths=0.8,
    )  # fmt: skip
    axes.clabel(lines, levels[::2], fontsize=TICK_SIZE - 1.5, fmt=_short, colors="0.2")
    axes.plot(0, 0, "+", color="black", markersize=5, markeredgewidth=0.8)
    axes.set_aspect("equal")
    label_axes(axes, "direction 1", "direction 2")
    if label is not None:
        axes.set_title(label, fontsize=TICK_SIZE + 1)
    return axes


def draw_surface_3d(
    positions: ArrayLike,
    losses: ArrayLike,
    *,
    axes: "Axes3D",
    levels: ArrayLike | None = None,
) -> "Axes3D":
    """Draws a loss surface in three dimensions, its height the logarithm to base 10 of the loss.

    Args:
      positions: (len,), ascending, along both directions.
      losses: (len, len), the first axis along the first direction.
      axes: three-dimensional axes (`projection="3d"`).
      levels: ascending; the first and the last are the limits of the height and of the colours.
        None takes them of the losses. On a linear height if one is not positive.

    Returns:
      `axes`.

    Raises:
      ValueError: shapes do not fit, positions do not ascend, `axes` are flat, or fewer than two
        losses are finite.
    """
    positions, losses = _surface_arrays(positions, losses)
    if not hasattr(axes, "plot_surface"):
        raise ValueError('`axes` must be three-dimensional, projection="3d", got flat ones.')
    levels = _levels([losses]) if levels is None else np.asarray(levels)
    is_log = levels[0] > 0
    height = np.where(np.isfinite(losses), losses, levels[-1])
    height = np.clip(height, levels[0], levels[-1])
    limits = np.asarray([levels[0], levels[-1]])
    if is_log:
        height, limits = np.log10(height), np.log10(limits)
    first, second = np.meshgrid(positions, positions, indexing="ij")
    axes.plot_surface(
        first, second, height, cmap=_COLORMAP, vmin=limits[0], vmax=limits[1],
        rcount=len(positions), ccount=len(positions), linewidth=0, antialiased=True,
    )  # fmt: skip
    axes.set_zlim(*limits)
    label_axes(axes, "direction 1", "direction 2")
    # The name of the height stands above: beside the axis it would be cut off.
    axes.set_title("height: log10 of the loss" if is_log else "height: loss", fontsize=TICK_SIZE)
    axes.xaxis.labelpad = axes.yaxis.labelpad = -8
    axes.xaxis.label.set_size(TICK_SIZE - 0.5)
    axes.yaxis.label.set_size(TICK_SIZE - 0.5)
    axes.tick_params(pad=-3, labelsize=TICK_SIZE - 1.5)
    axes.locator_params(nbins=4)
    # From high above, or the wall in front hides the minimum.
    axes.view_init(elev=52, azim=-60)
    return axes


def surface_figure(panels: Sequence[SurfacePanel], *, figure_width: float = 3.3) -> "Figure":
    """Draws the surfaces of several settings side by side, with the same levels.

    Above the contours, below the same in three dimensions; in as many rows as the width asks for.
    The numbers at the contours are losses, and directions are in units of their norms.

    Args:
      panels: one `SurfacePanel` for each setting.
      figure_width: in inches: 3.3 is a column, 6.8 a page. One setting takes one column, in a
        wider figure contours and height stand side by side.

    Returns:
      A figure that pyplot does not know.

    Raises:
      ValueError: there is no panel, or as in `draw_surface`.
      ImportError: matplotlib is missing.
    """
    if not panels:
        raise ValueError("`panels` must hold at least one surface, got none.")
    _checks.positive("figure_width", figure_width)
    surfaces = [_surface_arrays(panel.positions, panel.losses) for panel in panels]
    levels = _levels([losses for _, losses in surfaces])
    is_row = len(panels) == 1 and figure_width >= _WIDE
    num_columns = max(1, min(len(panels), int(figure_width / _LEAST_PANEL)))
    num_rows = 2 * -(-len(panels) // num_columns)
    shape = (1, 2) if is_row else (num_rows, num_columns)
    size = figure_width / shape[1]
    figure = new_figure(figure_width, min(0.95 * size, _LARGEST_PANEL) * shape[0])
    for i, (panel, (positions, losses)) in enumerate(zip(panels, surfaces, strict=True)):
        place = 2 * (i // num_columns) * num_columns + i % num_columns + 1
        flat = figure.add_subplot(*shape, place)
        draw_surface(positions, losses, axes=flat, levels=levels, label=panel.label)
        below = place + 1 if is_row else place + num_columns
        solid = figure.add_subplot(*shape, below, projection="3d")
        draw_surface_3d(positions, losses, axes=solid, levels=levels)
    return figure


def draw_probe(
    times: ArrayLike,
    values: ArrayLike,
    *,
    axes: "Axes",
    label: str | None = None,
    color: Color | None = None,
) -> "Axes":
    """Draws the range of some values at each time as a band, and their median as a line.

    Logarithmic if all are positive. A second call on the same axes takes the next colour.

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
    each step as a band around their median; the third the largest smoothness, the effective one.
    Distances are Euclidean, in units of the loss over those of the parameters; smoothness is a
    distance over the length of its step. Below a width of 5 inches the panels stand in a column.

    Args:
      panels: one `ProbePanel` for each setting; six are told apart by colour alone.
      figure_width: in inches: 6.8 is a page.
      time: name of the horizontal axes.

    Returns:
      A figure that pyplot does not know.

    Raises:
      ValueError: there is no panel, or shapes do not fit.
      ImportError: matplotlib is missing.

    References:
      S. Santurkar, D. Tsipras, A. Ilyas, A. Madry (2018), arXiv:1805.11604, figure 4.
    """
    if not panels:
        raise ValueError("`panels` must hold at least one setting, got none.")
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
        (loss, "loss along the step"),
        (distance, "change of the gradient\n(Euclidean norm)"),
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
        axes.set_yscale("log")


def _surface_arrays(positions: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    positions, losses = np.asarray(positions, np.float64), np.asarray(losses, np.float64)
    if positions.ndim != 1 or losses.shape != (len(positions),) * 2:
        raise ValueError(
            f"`losses` must have shape (len, len) for positions (len,), got {losses.shape} for "
            f"{positions.shape}."
        )
    if len(positions) < 2 or np.any(np.diff(positions) <= 0):
        raise ValueError(f"`positions` must be two or more that ascend, got {positions}.")
    if np.sum(np.isfinite(losses)) < 2:
        raise ValueError("`losses` must be finite at two points at least, got fewer.")
    return positions, losses


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


def _levels(surfaces: Sequence[np.ndarray]) -> np.ndarray:
    finite = np.concatenate([losses[np.isfinite(losses)] for losses in surfaces])
    low, high = np.min(finite), np.max(finite)
    if low == high:
        high = low + max(abs(low), 1.0) * 1e-6
    spaced = np.geomspace if low > 0 else np.linspace
    return spaced(low, high, _NUM_LEVELS)


def _short(level: float) -> str:
    return f"{level:.2g}"


def _color_scale(levels: np.ndarray) -> "Normalize":
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if levels[0] > 0 else Normalize)(levels[0], levels[-1])
