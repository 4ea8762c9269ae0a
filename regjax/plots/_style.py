"""Colours, sizes and axes of all figures, readable in a column of 3.3 inches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

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
      TypeError: one is something else, or they are not a list.
    """
    if hasattr(panels, "_fields"):  # a NamedTuple is a sequence too, of its fields
        given, remedy = type(panels).__name__, f"[{kind.__name__}(label, ...)]"
        raise TypeError(
            f"`panels` must be a list of {kind.__name__}, got one {given}: pass "
            f"{'[panel]' if isinstance(panels, kind) else remedy}."
        )
    if not isinstance(panels, Sequence):
        given = type(panels).__name__
        raise TypeError(f"`panels` must be a list of {kind.__name__}, got a {given}.")
    if not panels:
        raise ValueError(f"`panels` must have at least one {kind.__name__}, got none.")
    for panel in panels:
        if not isinstance(panel, kind):
            name = type(panel).__name__
            raise TypeError(f"`panels` must be a list of {kind.__name__}, got {name} in it.")


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


def set_log(axes: "Axes", which: str = "y") -> None:
    """Makes an axis logarithmic, with few ticks that say their values in full."""
    from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

    class FewTicks(LogLocator):
        def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
            low, high = sorted((vmin, vmax))
            found = log_ticks(low, high)
            return found if len(found) > 1 else MaxNLocator(4).tick_values(low, high)

    class InFull(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:.6g}"

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return tick_texts(values)

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FewTicks())
    axis.set_major_formatter(InFull())
    axis.set_minor_locator(NullLocator())


def log_ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2 and 5 of each decade, over more decades 1 and 3, then powers of ten."""
    decades = np.log10(high / low)
    steps = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.5 else (1,)
    skip = max(1, int(np.ceil(decades / 5)))
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    found = [s * 10.0**e for e in range(first, last + 1) if e % skip == 0 for s in steps]
    return [value for value in found if low <= value <= high]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Writes the ticks of an axis as plain numbers, or as powers of ten where these are long."""
    if all(0.9e-3 < value < 1.1e4 for value in values):
        return [f"{value:.6g}" for value in values]
    return [_power(value) for value in values]


def _power(value: float) -> str:
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = round(value / 10.0**exponent)
    return (rf"{factor}$\times$" if factor != 1 else "") + f"$10^{{{exponent}}}$"
