"""Loss surfaces, as contours and in three dimensions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from regjax import _checks
from regjax._printing import legible
from regjax.plots._style import TICK_SIZE, check_panels, label_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d import Axes3D

_NUM_LEVELS = 12
# Inches: from where on panels stand side by side, and the width that one needs.
_WIDE, _LEAST_PANEL, _LARGEST_PANEL = 5.0, 1.6, 3.3
_COLORMAP = "viridis"


@legible
class SurfacePanel(NamedTuple):
    """What `surface_figure` shows of one setting.

    Example:
      >>> positions = jnp.linspace(-1, 1, 5)
      >>> losses = 0.1 + positions[:, None] ** 2 + 4 * positions**2
      >>> print(plots.SurfacePanel("sgd", positions, losses))
      SurfacePanel(label='sgd', positions=[-1, -0.5, 0, 0.5, 1], losses=float32[5,5])

    Attributes:
      label: name of the setting.
      positions: (len,), along both directions.
      losses: (len, len), the first axis along the first direction.
    """

    label: str
    positions: ArrayLike
    losses: ArrayLike


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

    Example:
      >>> import matplotlib.figure
      >>> positions = jnp.linspace(-1, 1, 5)
      >>> losses = 0.1 + positions[:, None] ** 2 + 4 * positions**2
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> axes = plots.draw_surface(positions, losses, axes=axes, label="sgd")
      >>> print(axes.get_title())
      sgd

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
    numbers = axes.clabel(lines, levels[::2], fontsize=TICK_SIZE, fmt=_short, colors="0.2")
    for number in numbers:  # near an edge it would be cut off
        place = np.asarray(number.get_position())
        if np.min([place - positions[0], positions[-1] - place]) < 0.1 * np.ptp(positions):
            number.remove()
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
    """Draws a loss surface in three dimensions; the height is the logarithm to base 10 of the loss.

    Where a loss is not positive the height is the loss itself.

    Example:
      >>> import matplotlib.figure
      >>> positions = jnp.linspace(-1, 1, 5)
      >>> losses = 0.1 + positions[:, None] ** 2 + 4 * positions**2
      >>> axes = matplotlib.figure.Figure().add_subplot(projection="3d")
      >>> axes = plots.draw_surface_3d(positions, losses, axes=axes, levels=[0.1, 10.0])
      >>> print(np.array(axes.get_zlim()))  # the logarithms of the levels
      [-1.  1.]

    Args:
      positions: (len,), ascending, along both directions.
      losses: (len, len), the first axis along the first direction.
      axes: three-dimensional axes (`projection="3d"`).
      levels: ascending losses; the first and the last are the limits of the height and of the
        colours. None: the smallest and the largest loss.

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
    axes.tick_params(pad=-3, labelsize=TICK_SIZE - 0.5)
    axes.locator_params(nbins=4)
    # From high above, or the wall in front hides the minimum.
    axes.view_init(elev=52, azim=-60)
    return axes


def surface_figure(panels: Sequence[SurfacePanel], *, figure_width: float = 3.3) -> "Figure":
    """Draws the surfaces of several settings side by side, with the same levels.

    The contours are above, the same in three dimensions below, in as many rows as the width asks
    for. The numbers at the contours are losses, and directions are in units of their norms.

    Example:
      >>> positions = jnp.linspace(-1, 1, 5)
      >>> losses = 0.1 + positions[:, None] ** 2 + 4 * positions**2
      >>> panels = [plots.SurfacePanel("sgd", positions, losses)]
      >>> figure = plots.surface_figure(panels)
      >>> print([axes.get_xlabel() for axes in figure.axes])
      ['direction 1', 'direction 1']

    Args:
      panels: one `SurfacePanel` for each setting.
      figure_width: in inches: 3.3 is a column, 6.8 a page. One setting takes one column; in a wider
        figure contours and height stand side by side.

    Returns:
      A matplotlib figure that is not registered with pyplot; `figure.savefig(path)` writes it.

    Raises:
      TypeError: `panels` holds something else than panels.
      ValueError: there is no panel, shapes do not fit, positions do not ascend, or fewer than two
        losses are finite.
      ImportError: matplotlib is missing.
    """
    check_panels(panels, SurfacePanel)
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
    figure.supxlabel("numbers: loss; cross: the weights", fontsize=TICK_SIZE)
    return figure


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
