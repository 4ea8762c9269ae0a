"""Spectral densities and their top eigenvalues, one setting or several for comparison."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from regjax import _checks
from regjax.plots._panels import SpectrumPanel, panels_of
from regjax.plots._style import (
    COLORS,
    LABEL_SIZE,
    TICK_SIZE,
    Color,
    label_axes,
    new_figure,
    set_log,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regjax.curvature import DensityCurveResult, DensityResult

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Bumps this far below the peak are rounding: less than one eigenvalue in a network of 1e12.
_LEAST_BUMP = 1e-12
_LABEL_INCHES = 0.36  # of a label as -10^-3, with the space around it
_BAND, _TICKS = "error band", "eigenvalues"
_CURVE = "density"  # by this mark a second call on the same axes finds the first


def draw_spectrum(
    curve: "DensityCurveResult",
    eigenvalues: ArrayLike | None = None,
    residual_norms: ArrayLike | None = None,
    *,
    axes: "Axes",
    label: str | None = None,
    color: Color | None = None,
    matrix_name: str = "Hessian",
) -> "Axes":
    """Draws a spectral density on a logarithmic axis, with its band and the top eigenvalues.

    The scale of the eigenvalues is that of the curve. The band is the curve's own. Eigenvalues are
    ticks at the bottom, named in a legend, each with a horizontal bar of its residual norm on both
    sides. Densities that are zero leave a gap, and the axis ends below the lowest bump of the
    curve: farther down are only tails of the Gaussian that draws it. A second call on the same axes
    adds a second curve.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> import matplotlib.figure
      >>> axes = matplotlib.figure.Figure().subplots()
      >>> axes = plots.draw_spectrum(curvature.density_curve(density), axes=axes)
      >>> print(axes.get_xlabel())
      eigenvalue of the Hessian

    Args:
      curve: from `curvature.density_curve`.
      eigenvalues: (k,), or None.
      residual_norms: (k,), in units of the eigenvalue, or None.
      axes: to draw on.
      label: name of the curve in a legend, or None.
      color: any colour of matplotlib; None takes the next of a palette for colour-blind readers.
      matrix_name: name of the matrix on the axis.

    Returns:
      `axes`.

    Raises:
      ValueError: shapes differ, no density is positive, or an option is out of its range.
    """
    grid, density, low, high = _curve_arrays(curve)
    values, bounds = _eigenvalue_arrays(eigenvalues, residual_norms)
    threshold = _threshold([curve])
    num_before = sum(line.get_gid() == _CURVE for line in axes.lines)
    color = COLORS[num_before % len(COLORS)] if color is None else color
    floor, top = _limits(density, high)
    if num_before:
        floor, top = min(floor, axes.get_ylim()[0]), max(top, axes.get_ylim()[1])

    _set_x_scale(axes, threshold)
    set_log(axes)
    band = (np.maximum(end, 0.1 * floor) for end in (low, high))
    axes.fill_between(grid, *band, color=color, alpha=0.3, linewidth=0, label=_named(axes, _BAND))
    positive = np.where(density > 0, density, np.nan)
    axes.plot(grid, positive, color=color, linewidth=1.0, label=label, gid=_CURVE)
    if values.size:
        height = np.full(values.shape, 0.04 + 0.06 * num_before)
        transform = axes.get_xaxis_transform()  # the height as a share of the axes
        axes.errorbar(
            values, height, xerr=bounds, fmt="|", transform=transform, color=color,
            markersize=5, markeredgewidth=0.8, elinewidth=1.0, label=_named(axes, _TICKS),
        )  # fmt: skip
    axes.set_ylim(floor, top)
    label_axes(axes, f"eigenvalue of the {matrix_name}", "density")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=TICK_SIZE, borderaxespad=0.2)
    return axes


def _named(axes: "Axes", name: str) -> str | None:
    """Returns a name for the legend, once on each axes."""
    return None if name in axes.get_legend_handles_labels()[1] else name


def spectrum_figure(
    panels: "DensityResult | Mapping[str, DensityResult] | Sequence[SpectrumPanel]",
    *,
    axis_scale: str = "symlog",
    matrix_name: str = "Hessian",
    figure_width: float = 3.3,
) -> "Figure":
    """Draws the spectra of several settings one below the other, on axes of the same limits.

    A last panel has the eigenvalues of all settings against their index, with their residual norms
    as error bars; slightly apart, so that equal ones can be told. It stands below the densities, or
    on their right in a figure at least 5 inches wide, and is left out without eigenvalues.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> figure = plots.spectrum_figure(density)  # or {"sgd": density, "sam": another}
      >>> print([axes.get_xlabel() for axes in figure.axes])
      ['eigenvalue of the Hessian', 'index']

    Args:
      panels: a density from `curvature.spectral_density`, or a dict of them by the names of the
        settings; or a list of `SpectrumPanel`, for curves and eigenvalues of your own choice. Of a
        density the eigenvalues are the ten largest of those that it took out. Colours repeat after
        six.
      axis_scale: of densities: "symlog" or "linear" (see `curvature.density_curve`).
      matrix_name: name of the matrix on the axes.
      figure_width: in inches: 3.3 is a column, 6.8 a page.

    Returns:
      A matplotlib figure that is not registered with pyplot; `figure.savefig(path)` writes it.

    Raises:
      TypeError: `panels` holds something else than panels or densities.
      ImportError: matplotlib is missing.
      ValueError: `panels` is empty, their curves are of different scales, shapes differ, no density
        is positive, or an option is out of its range.
    """
    panels = panels_of(panels, axis_scale)
    for panel in panels:
        _curve_arrays(panel.curve)
    _checks.positive("figure_width", figure_width)
    threshold = _threshold([panel.curve for panel in panels])
    has_eigenvalues = any(panel.eigenvalues is not None for panel in panels)
    figure, rows, last = _layout(len(panels), figure_width, has_eigenvalues)
    for index, (panel, axes) in enumerate(zip(panels, rows, strict=True)):
        color = COLORS[index % len(COLORS)]
        draw_spectrum(*panel[1:], axes=axes, color=color, matrix_name=matrix_name)
        _set_x_scale(axes, threshold)
        axes.set_title(panel.label, loc="left", fontsize=LABEL_SIZE, color=color, pad=3)
        if index < len(panels) - 1:
            axes.tick_params(labelbottom=False)
            axes.set_xlabel("")
        if index > 0 and (legend := axes.get_legend()) is not None:
            legend.remove()  # the first panel has it
    _share_limits(rows)
    if last is not None:
        _eigenvalues_by_index(panels, last, threshold)
    return figure


def _share_limits(rows: "Sequence[Axes]") -> None:
    """Gives all axes the limits that hold what each was drawn to."""
    xs, ys = [axes.get_xlim() for axes in rows], [axes.get_ylim() for axes in rows]
    for axes in rows:
        axes.set_xlim(min(low for low, _ in xs), max(high for _, high in xs))
        axes.set_ylim(min(low for low, _ in ys), max(high for _, high in ys))


def _eigenvalues_by_index(
    panels: Sequence[SpectrumPanel], axes: "Axes", threshold: float | None
) -> None:
    for index, panel in enumerate(panels):
        values, bounds = _eigenvalue_arrays(panel.eigenvalues, panel.residual_norms)
        shift = 0.08 * (index - 0.5 * (len(panels) - 1))
        axes.errorbar(
            1 + np.arange(values.size) + shift,
            values,
            yerr=bounds,
            color=COLORS[index % len(COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=3,
            linewidth=0.5,
            elinewidth=1.0,
            label=panel.label,
        )
    magnitudes = np.abs(
        np.concatenate(
            [np.ravel(panel.eigenvalues) for panel in panels if panel.eigenvalues is not None]
        )
    )
    # Within two decades a logarithmic axis has too few labelled ticks to be read.
    if np.max(magnitudes) > 100 * np.min(magnitudes):
        _set_scale(axes.set_yscale, threshold)
    axes.locator_params(axis="x", integer=True)
    beside = " (settings side by side)" if len(panels) > 1 else ""
    label_axes(axes, f"index{beside}", "eigenvalue")
    if len(panels) > 1:
        # Largest first, so that this corner is empty.
        axes.legend(frameon=False, fontsize=TICK_SIZE, labelspacing=0.2, loc="upper right")


def _layout(
    num_rows: int, figure_width: float, has_eigenvalues: bool
) -> "tuple[Figure, list[Axes], Axes | None]":
    """Makes the figure: axes for each density, and for the eigenvalues."""
    row_height = 1.6 if num_rows == 1 else 1.1
    densities, beside = row_height * num_rows + 0.4, has_eigenvalues and figure_width >= 5
    if beside:
        heights, columns = [1.0] * num_rows, 2
        height = max(densities, 2.2)
    else:
        below = 1.8 if has_eigenvalues else 0.0
        heights, columns = [row_height] * num_rows + [below] * has_eigenvalues, 1
        height = densities + below
    figure = new_figure(figure_width, height)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    rows = [figure.add_subplot(grid[row, 0]) for row in range(num_rows)]
    if not has_eigenvalues:
        return figure, rows, None
    return figure, rows, figure.add_subplot(grid[:, 1] if beside else grid[num_rows, 0])


def _set_scale(setter: Callable[..., None], threshold: float | None) -> None:
    if threshold is None:
        setter("linear")
    else:
        setter("symlog", linthresh=threshold)


def _set_x_scale(axes: "Axes", threshold: float | None) -> None:
    """Sets the scale of the eigenvalues, with as many labels as have room side by side."""
    from matplotlib.ticker import SymmetricalLogLocator

    class FewTicks(SymmetricalLogLocator):
        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            ticks = np.asarray(super().tick_values(vmin, vmax))
            ticks = ticks[(ticks >= vmin) & (ticks <= vmax)]
            inches = axes.bbox.width / axes.figure.dpi
            skip = max(1, int(np.ceil(len(ticks) * _LABEL_INCHES / inches)))
            below, above = ticks[ticks < 0][::-skip], ticks[ticks > 0][::skip]
            return [*below[::-1], *ticks[ticks == 0], *above]

    _set_scale(axes.set_xscale, threshold)
    if threshold is not None:
        axes.xaxis.set_major_locator(FewTicks(base=10, linthresh=threshold))


def _threshold(curves: "Sequence[DensityCurveResult]") -> float | None:
    """Returns None on a linear scale, else where the symmetric-log scale turns linear.

    A power of ten, so that ticks fall on both ends of the linear part and not inside.
    """
    thresholds = np.array([float(curve.linear_threshold) for curve in curves])
    if np.all(np.isinf(thresholds)):
        return None
    if np.any(np.isinf(thresholds)):
        raise ValueError("`panels` must have curves of one scale, got linear and symlog ones.")
    return float(10.0 ** np.ceil(np.log10(np.max(thresholds)) - 1e-6))


def _limits(density: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """Goes from below the lowest bump of the curve to above its band."""
    peak = np.max(density)
    sides = np.concatenate([[0.0], density, [0.0]])
    is_bump = (density >= sides[:-2]) & (density >= sides[2:]) & (density > _LEAST_BUMP * peak)
    return 0.1 * np.min(density[is_bump]), 3 * max(peak, np.max(high))


def _curve_arrays(curve: "DensityCurveResult") -> list[np.ndarray]:
    if not hasattr(curve, "band_low"):
        raise ValueError(
            f"`curve` must be from `curvature.density_curve`, got a {type(curve).__name__}; "
            "`spectrum_figure` takes densities as they are."
        )
    names = ("grid", "density", "band_low", "band_high")
    arrays = [np.asarray(getattr(curve, name), np.float64) for name in names]
    for name, array in zip(names, arrays, strict=True):
        if array.ndim != 1 or array.shape != arrays[0].shape:
            raise ValueError(
                f"`curve.{name}` must have the shape (num_points,) of `curve.grid`, "
                f"got {array.shape}."
            )
    if np.any(np.isnan(arrays[1])):
        raise ValueError(
            "`curve.density` must be finite, got NaN: the products with the matrix are not finite; "
            "look at the loss and its data."
        )
    if not np.any(arrays[1] > 0):
        raise ValueError("`curve.density` must be positive somewhere, got none that is.")
    return arrays


def _eigenvalue_arrays(
    eigenvalues: ArrayLike | None, residual_norms: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray | None]:
    values = np.asarray([] if eigenvalues is None else eigenvalues, np.float64)
    if values.ndim != 1:
        raise ValueError(f"`eigenvalues` must have shape (k,), got {values.shape}.")
    if residual_norms is None:
        return values, None
    bounds = np.asarray(residual_norms, np.float64)
    if bounds.shape != values.shape:
        raise ValueError(
            f"`residual_norms` must have the shape of `eigenvalues`, {values.shape}, "
            f"got {bounds.shape}."
        )
    return values, bounds
