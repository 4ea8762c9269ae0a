"""Spectral densities with their outliers, legible at the width of a paper's column."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# Okabe and Ito's palette, distinguishable without colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_COLUMN_WIDTH = 3.3  # inches
# Decades below the peak that are drawn: one eigenvalue among a million still shows.
_DECADES = 7


class Panel(NamedTuple):
    """What is drawn of one setting.

    Attributes:
      curve: (grid, density, standard_error, ...), arrays (num_points,), as `DensityCurve` has them.
      eigenvalues: (k,), the largest ones.
      residual_norms: (k,), their error bounds.
    """

    curve: Any
    eigenvalues: Any
    residual_norms: Any


def spectrum(
    curve: Any,
    eigenvalues: Any = None,
    residual_norms: Any = None,
    *,
    axes: Any,
    label: str | None = None,
    color: str | None = None,
    scale: str = "linear",
    linthresh: float = 1e-3,
) -> Any:
    """Draws a spectral density, logarithmic upwards, with the top eigenvalues marked.

    Args:
      curve: (grid, density, standard_error, ...), arrays (num_points,), as `DensityCurve` has them.
      eigenvalues: (k,) to mark, or None.
      residual_norms: (k,), error bounds of the marks, or None.
      axes: matplotlib axes.
      label: entry of the legend.
      color: matplotlib colour; None takes the first of the palette.
      scale: "linear" or "symlog" for the eigenvalues.
      linthresh: where the symmetric-log scale turns linear, in units of the eigenvalue.

    Returns:
      `axes`.

    Raises:
      ValueError: `scale` is unknown, or the density is nowhere positive.
    """
    if scale not in ("linear", "symlog"):
        raise ValueError(f"`scale` must be one of linear, symlog, got {scale!r}.")
    color = _COLORS[0] if color is None else color
    grid, density, error = (np.asarray(array, float) for array in tuple(curve)[:3])
    peak = np.max(density, initial=0.0)
    if not peak > 0:
        raise ValueError(f"`curve` must have a positive density somewhere, got at most {peak}.")
    floor = peak * 10.0**-_DECADES
    axes.plot(grid, np.maximum(density, floor), color=color, label=label, linewidth=1)
    low, high = np.maximum(density - error, floor), np.maximum(density + error, floor)
    axes.fill_between(grid, low, high, color=color, alpha=0.25, linewidth=0)
    if eigenvalues is not None:
        _mark(axes, eigenvalues, residual_norms, floor, color)
    axes.set_yscale("log")
    axes.set_ylim(floor, 3 * peak)
    if scale == "symlog":
        axes.set_xscale("symlog", linthresh=linthresh)
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("density")
    return axes


def spectrum_figure(
    panels: Mapping[str, Panel],
    *,
    scale: str = "symlog",
    linthresh: float = 1e-3,
    matrix: str = "Hessian",
) -> Any:
    """A figure of one to six settings: their densities, and their top eigenvalues by rank.

    Args:
      panels: label -> `Panel`.
      scale: "linear" or "symlog" for the eigenvalues of the densities.
      linthresh: where the symmetric-log scale turns linear.
      matrix: name of the matrix, for the labels.

    Returns:
      A `matplotlib.figure.Figure`, belonging to no window.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: there are no panels, or more than six.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'regjax[run]'.") from error
    if not 1 <= len(panels) <= len(_COLORS):
        raise ValueError(f"`panels` must have 1 to {len(_COLORS)} entries, got {len(panels)}.")
    figure = Figure(figsize=(2 * _COLUMN_WIDTH, 0.8 * _COLUMN_WIDTH), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (label, panel), color in zip(panels.items(), _COLORS, strict=False):
        spectrum(
            *panel, axes=left, label=label, color=color, scale=scale, linthresh=linthresh
        )
        _rank(right, panel, label, color)
    left.set_xlabel(f"eigenvalue of the {matrix}")
    right.set_xlabel("rank")
    right.set_ylabel("eigenvalue")
    for axes in (left, right):
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(8)
        axes.yaxis.label.set_size(8)
        axes.spines[["top", "right"]].set_visible(False)
    if len(panels) > 1:
        right.legend(fontsize=7, frameon=False)
    return figure


def _mark(axes: Any, eigenvalues: Any, residual_norms: Any, floor: float, color: str) -> None:
    values = np.asarray(eigenvalues, float)
    errors = None if residual_norms is None else np.asarray(residual_norms, float)
    axes.errorbar(
        values, np.full(values.shape, 3 * floor), xerr=errors, fmt="|", markersize=7,
        color=color, elinewidth=1,
    )  # fmt: skip


def _rank(axes: Any, panel: Panel, label: str, color: str) -> None:
    values = np.sort(np.asarray(panel.eigenvalues, float))[::-1]
    order = np.argsort(np.asarray(panel.eigenvalues, float))[::-1]
    errors = np.asarray(panel.residual_norms, float)[order]
    ranks = np.arange(1, values.size + 1)
    axes.errorbar(
        ranks, values, yerr=errors, fmt="o-", markersize=3, linewidth=0.8, color=color,
        label=label, capsize=1.5,
    )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    if np.all(values > 0) and axes.get_yscale() == "linear" and values[0] > 20 * values[-1]:
        axes.set_yscale("log")
