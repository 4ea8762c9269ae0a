"""Colours and sizes of all figures, readable in a column of 3.3 inches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), distinguishable with all common kinds of colour blindness, dark ones first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LABEL_SIZE, TICK_SIZE = 8, 7  # points

Color: TypeAlias = str | tuple[float, ...]
"""A colour of matplotlib: a name or its channels."""


def check_panels(panels: Sequence[object], kind: type) -> None:
    """Checks that there are panels, and that they are of the kind that a figure draws.

    Raises:
      ValueError: there is none.
      TypeError: one is something else.
    """
    if not panels:
        raise ValueError(f"`panels` must have at least one {kind.__name__}, got none.")
    for panel in panels:
        if not isinstance(panel, kind):
            name = type(panel).__name__
            raise TypeError(f"`panels` must be a list of {kind.__name__}, got a {name} in it.")


def new_figure(width: float, height: float) -> "Figure":
    """Makes an empty figure of so many inches that pyplot does not know."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib: pip install 'regjax[run]'.") from error
    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def label_axes(axes: "Axes", horizontal: str, vertical: str) -> None:
    """Sets the names of both axes, and the sizes of all text on them."""
    axes.set_xlabel(horizontal, fontsize=LABEL_SIZE)
    axes.set_ylabel(vertical, fontsize=LABEL_SIZE)
    axes.tick_params(which="both", labelsize=TICK_SIZE)
