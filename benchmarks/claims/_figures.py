"""What the figures of the claims share: means over seeds, the seeds themselves, readable labels."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import _claims
from benchmarks._claims import Record

COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7")
LINES = {"digits": "-", "fashion_mnist": "--"}


def line(axes: Any, records: Sequence[Record], x: str, y: str, **style: Any) -> None:
    """The mean over the seeds of `y` against `x`, with their standard deviation as bars."""
    groups = dict(sorted(_claims.groups(records, x).items()))
    values = [_claims.numbers(own, y) for own in groups.values()]
    axes.errorbar(
        list(groups),
        [value.mean() for value in values],
        yerr=[value.std(ddof=1) for value in values],
        **{"marker": "o", "markersize": 3, "linewidth": 1, **style},
    )


def dots(
    axes: Any, records: Sequence[Record], by: str, y: str, names: Sequence[str] | None = None
) -> None:
    """`y` of each run over the values of `by`, a column each; a colour for each data set."""
    columns = list(_claims.groups(records, by))
    for shift, (data, own) in enumerate(_claims.groups(records, "data").items()):
        for place, column in enumerate(columns):
            values = _claims.numbers(_claims.select(own, **{by: column}), y)
            axes.plot(
                np.full(len(values), place + 0.2 * shift),
                values,
                ("o", "s", "^")[shift],
                color=COLORS[shift],
                markersize=3,
                alpha=0.6,
                label=data if place == 0 else None,
            )
    axes.set_xticks(range(len(columns)), columns if names is None else names)


def label(axes: Any, *, x: str | None = None, y: str | None = None) -> None:
    """Names of the axes, in sizes for a page's width."""
    if x is not None:
        axes.set_xlabel(x, fontsize=8)
    if y is not None:
        axes.set_ylabel(y, fontsize=8)
    axes.tick_params(which="both", labelsize=7)
