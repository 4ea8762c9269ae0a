"""The values that the numbers among the options may have."""

import math
from typing import NamedTuple

# What JAX indexes with, and what float32 holds with room for the arithmetic.
LARGEST_INTEGER = 2**31 - 1
LARGEST, SMALLEST = 1e30, 1e-30
# More layers take minutes to build and to compile, more points of a surface a day to compute, and
# more eigenvalues than that grow with the cube of their number.
_MOST_LAYERS, _MOST_POINTS, _MOST_EIGENVALUES, _MOST_STEPS = 100, 1001, 1000, 5000


class Range(NamedTuple):
    """The values of a number.

    Attributes:
      minimum: the least.
      maximum: the largest.
      is_open: without `minimum` itself.
      is_open_above: without `maximum` itself.
    """

    minimum: float
    maximum: float = LARGEST_INTEGER
    is_open: bool = False
    is_open_above: bool = False

    def broken_rule(self, value: float) -> str | None:
        """Returns the rule that `value` breaks, "at least 0", or None."""
        low = f"{'above' if self.is_open else 'at least'} {self.minimum:g}"
        high = f"{'below' if self.is_open_above else 'at most'} {_plain(self.maximum)}"
        if math.isnan(value):
            return "a finite number" if self.minimum == -LARGEST else f"{low} and {high}"
        if value < self.minimum or (self.is_open and value == self.minimum):
            return low
        if value > self.maximum or (self.is_open_above and value == self.maximum):
            return high
        if value and abs(value) < SMALLEST:
            return f"{'' if self.is_open else '0 or '}at least {SMALLEST:g} in magnitude"
        return None


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


NUMBER = Range(-LARGEST, LARGEST)
_COUNT, _NOT_NEGATIVE = Range(1), Range(0, LARGEST)
_POSITIVE = Range(0, LARGEST, is_open=True)
_SHARE = Range(0, 1, is_open_above=True)

RANGES = {
    "num_train": _COUNT,
    "num_test": _COUNT,
    "width": Range(1, 2**24),
    "depth": Range(0, _MOST_LAYERS),
    "learning_rate": _POSITIVE,
    "momentum": _SHARE,
    "weight_decay": _NOT_NEGATIVE,
    "epochs": Range(0),
    "batch_size": _COUNT,
    # A key holds 32 bits of a seed: two that differ by 2^32 would give the same numbers.
    "seed": Range(0, 2**32 - 1),
    "seeds": Range(1, 1000),
    "monitor_every": _COUNT,
    "monitor_examples": _COUNT,
    "device_bytes": Range(1, 2**62),
    "checkpoint_seconds": _NOT_NEGATIVE,
    "chunk_size": _COUNT,
    "num_samples": Range(1, 100_000),
    "curvature_examples": _COUNT,
    "num_eigenvalues": Range(1, _MOST_EIGENVALUES),
    "tol": _SHARE,
    "num_probes": Range(1, 1000),
    "num_steps": Range(1, _MOST_STEPS),
    "damping": _POSITIVE,
    "points": Range(3, _MOST_POINTS),
    "span": Range(0, 1000, is_open=True),
    "surface_examples": _COUNT,
    "probe_examples": _COUNT,
    "probe_points": Range(1, _MOST_POINTS),
}
