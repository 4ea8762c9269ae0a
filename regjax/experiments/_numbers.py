"""Numbers of records as one reads them, with their errors."""

import math

from regjax.experiments._record import Record

# More digits than a reader compares, and than another seed leaves.
_MOST_DIGITS = 5
# Of the error: what is rounding, such as a sum of nothing.
_NOTHING = 1e-4


def with_error(value: float | None, error: float | None) -> str:
    """Formats `value` to the second digit of its error, five digits at most, and the error.

    What the five digits leave out is added to the error, so that a bound stays one.
    """
    if value is None or error is None:
        return "not known"
    if not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.{_MOST_DIGITS}g} ± {error:.2g}"
    if abs(value) < _NOTHING * error:
        value = 0.0
    digits = _MOST_DIGITS
    if value and error:
        digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(error)) + 2
    if digits > _MOST_DIGITS:
        error += abs(value - float(f"{value:.{_MOST_DIGITS}g}"))
    return f"{value:.{min(max(digits, 1), _MOST_DIGITS)}g} ± {error:.2g}"


def estimate(entry: Record) -> str:
    """Formats a value with its standard error."""
    return with_error(entry["value"], entry["standard_error"])


def count(entry: Record) -> str:
    """Formats a number of eigenvalues with its error and what the Lanczos steps leave open."""
    ends = [f"{entry[f'{end}_bound']:.4g}" for end in ("lower", "upper")]
    return f"{estimate(entry)} [{', '.join(ends)}]"


def number(value: float | None, form: str = ".4g") -> str:
    """Formats a number without an error."""
    return "not known" if value is None else format(value, form)


def loss_value(value: float | None) -> str:
    """Formats a loss; one that has diverged in a few digits."""
    return number(value, ".4f" if value is not None and abs(value) < 1e4 else ".3e")
