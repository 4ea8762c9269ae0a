"""Blocks of a curvature matrix compared: distances of their densities, and the densities."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from regjax import _checks
from regjax.plots._style import COLORS, LABEL_SIZE, TICK_SIZE, label_axes, new_figure, set_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regjax.curvature import DensityDistancesResult

# Beyond so many blocks the numbers in the cells cannot be read.
_MOST_NUMBERS = 10
# Decades below the peak of a density that are shown.
_DECADES = 6


def draw_distances(
    result: "DensityDistancesResult", labels: Sequence[str], *, axes: "Axes"
) -> "Axes":
    """Draws the distances of all pairs of densities as a map of colours, from 0 to 1.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> far = density._replace(eigenvalues=100 * density.eigenvalues)  # 100, ..., 800
      >>> densities = {"first": density, "last": far}
      >>> result = curvature.density_distances(densities)
      >>> import matplotlib.figure
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> axes = plots.draw_distances(result, list(densities), axes=axes)
      >>> print([label.get_text() for label in axes.get_yticklabels()])
      ['first', 'last']

    Args:
      result: from `curvature.density_distances`.
      labels: names of the densities, in their order.
      axes: to draw on.

    Returns:
      `axes`.

    Raises:
      ValueError: there are not as many labels as densities.
    """
    values = np.asarray(result.value, np.float64)
    if len(labels) != len(values):
        raise ValueError(
            f"`labels` must be as many as the densities, {len(values)}, got {len(labels)}."
        )
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=90, fontsize=TICK_SIZE)
    axes.set_yticks(places, labels, fontsize=TICK_SIZE)
    if len(labels) <= _MOST_NUMBERS:
        for i in places:
            for j in places:
                color = "black" if values[i, j] > 0.6 else "white"
                text = f"{values[i, j]:.2f}"
                axes.text(j, i, text, ha="center", va="center", color=color, fontsize=TICK_SIZE)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("Jensen-Shannon distance", fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE)
    return axes


def distance_figure(
    result: "DensityDistancesResult", labels: Sequence[str], *, figure_width: float = 6.8
) -> "Figure":
    """Draws the densities on their common grid, and the distances of all pairs beside them.

    The scale of the eigenvalues is symmetric-log where that of the grid is, that is where its
    points are not evenly spaced.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> far = density._replace(eigenvalues=100 * density.eigenvalues)  # 100, ..., 800
      >>> densities = {"first": density, "last": far}
      >>> result = curvature.density_distances(densities)
      >>> figure = plots.distance_figure(result, list(densities))
      >>> print([axes.get_xlabel() for axes in figure.axes])
      ['eigenvalue of a block', '', '']

    Args:
      result: from `curvature.density_distances`.
      labels: names of the densities, in their order.
      figure_width: in inches.

    Returns:
      A matplotlib figure that is not registered with pyplot; `figure.savefig(path)` writes it.

    Raises:
      ImportError: matplotlib is missing.
      ValueError: there are not as many labels as densities, or the width is not positive.
    """
    _checks.positive("figure_width", figure_width)
    figure = new_figure(figure_width, 0.45 * figure_width)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    draw_distances(result, labels, axes=right)
    grid, curves = np.asarray(result.grid, np.float64), np.asarray(result.density, np.float64)
    steps = np.diff(grid)
    if steps.max() > 2 * steps.min():
        left.set_xscale("symlog", linthresh=float(10 ** np.ceil(np.log10(steps.min() * 10))))
        left.xaxis.get_major_locator().set_params(numticks=5)
    for i, (label, curve) in enumerate(zip(labels, curves, strict=True)):
        color, dash = COLORS[i % len(COLORS)], ("-", "--", ":")[i // len(COLORS) % 3]
        shown = np.where(curve > 0, curve, np.nan)
        left.plot(grid, shown, color=color, linestyle=dash, linewidth=1, label=label)
    set_log(left)
    left.set_ylim(10.0**-_DECADES * curves.max(), 3 * curves.max())
    label_axes(left, "eigenvalue of a block", "density")
    left.legend(frameon=False, fontsize=TICK_SIZE, labelspacing=0.2)
    return figure
