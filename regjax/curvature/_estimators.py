"""Trace and diagonal from random products, with standard errors; and the dense spectrum."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks
from regjax._base import Callback, Params, PRNGKey, Tree
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._hutchinson import hutchinson_solver
from regjax.curvature._hutchpp import hutchpp_solver
from regjax.curvature._operators._operator import Operator

_METHODS: dict[str, Callable[..., Solver[Any, Any]]] = {
    "hutchinson": hutchinson_solver,
    "hutch++": hutchpp_solver,
}
# Hutch++ takes one product for each of its three parts.
_FEWEST = {"hutchinson": 1, "hutch++": 3}


class TraceResult(NamedTuple):
    """An estimate of the trace.

    Attributes:
      value: (), the sum of the eigenvalues.
      standard_error: (), over the draw of the probes; NaN with a single one.
      num_matvecs: (), int32, products used.
    """

    value: jax.Array
    standard_error: jax.Array
    num_matvecs: jax.Array


class DiagonalResult(NamedTuple):
    """An estimate of the diagonal.

    Attributes:
      value: tree like the parameters.
      standard_error: tree like the parameters, of each entry; NaN with a single probe.
      num_matvecs: (), int32, products used.
    """

    value: Params
    standard_error: Params
    num_matvecs: jax.Array


def trace(
    operator: Operator,
    *,
    key: PRNGKey,
    num_matvecs: int,
    method: str = "hutchinson",
    callback: Callback | None = None,
) -> TraceResult:
    """Estimates the trace by random products.

    Args:
      operator: symmetric, of order n.
      key: typed key of the random signs.
      num_matvecs: number of products in all; Hutch++ spends two thirds of them (rounded down to an
        even number, n at most each way) on the range.
      method: "hutchinson", or "hutch++", better where a few eigenvalues dominate.
      callback: called as callback(products, num_matvecs) after each product, or each block of them,
        when the host drives.

    Returns:
      A `TraceResult`; unbiased.

    Raises:
      ValueError: `method` is unknown, or `num_matvecs` below 1 (below 3 for Hutch++).
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
      Interrupted: Ctrl-C; its `.result` is the estimate of the probes so far.

    References:
      M. Hutchinson (1990), Communications in Statistics 19(2). R. Meyer, C. Musco, C. Musco,
      D. Woodruff (2021), Hutch++, arXiv:2010.09649, algorithm 1.
    """
    solver = trace_solver(operator, key=key, num_matvecs=num_matvecs, method=method)
    return run(solver, callback=_of_products(callback, solver, num_matvecs))


def trace_solver(
    operator: Operator, *, key: PRNGKey, num_matvecs: int, method: str = "hutchinson"
) -> Solver[Tree, TraceResult]:
    """Makes the solver of `trace`, whose arguments these are, to drive by hand."""
    _check(method, key, num_matvecs)
    return _METHODS[method](
        operator, name="trace", key=key, num_matvecs=num_matvecs, of_trace=True,
        estimate=TraceResult,
    )  # fmt: skip


def diagonal(
    operator: Operator,
    *,
    key: PRNGKey,
    num_matvecs: int,
    method: str = "hutchinson",
    callback: Callback | None = None,
) -> DiagonalResult:
    """Estimates the diagonal by random products.

    Args:
      operator: symmetric, of order n.
      key: typed key of the random signs.
      num_matvecs: number of products in all, split as in `trace`.
      method: "hutchinson": the mean of z * A z. "hutch++": the diagonal of QQ' A exactly, the
        mean of u * A u for the remainder.
      callback: called as callback(products, num_matvecs) after each product, or each block of them,
        when the host drives.

    Returns:
      A `DiagonalResult`; unbiased.

    Raises:
      ValueError: `method` is unknown, or `num_matvecs` below 1 (below 3 for Hutch++).
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
      Interrupted: Ctrl-C; its `.result` is the estimate of the probes so far.

    References:
      C. Bekas, E. Kokiopoulou, Y. Saad (2007), An estimator for the diagonal of a matrix, Applied
      Numerical Mathematics 57. The Hutch++ form is its direct analogue.
    """
    solver = diagonal_solver(operator, key=key, num_matvecs=num_matvecs, method=method)
    return run(solver, callback=_of_products(callback, solver, num_matvecs))


def diagonal_solver(
    operator: Operator, *, key: PRNGKey, num_matvecs: int, method: str = "hutchinson"
) -> Solver[Tree, DiagonalResult]:
    """Makes the solver of `diagonal`, whose arguments these are, to drive by hand."""
    _check(method, key, num_matvecs)
    tree = operator.space.unravel
    return _METHODS[method](
        operator, name="diagonal", key=key, num_matvecs=num_matvecs, of_trace=False,
        estimate=lambda value, error, count: DiagonalResult(tree(value), tree(error), count),
    )  # fmt: skip


def exact_spectrum(operator: Operator) -> jax.Array:
    """Computes all eigenvalues of a small matrix, ascending (n,), from its dense form.

    Args:
      operator: symmetric, of order n at most 32768; in float64 if the parameters are.

    Returns:
      Eigenvalues (n,), exact up to rounding of n eps times the largest magnitude.

    Raises:
      ValueError: n is above 32768.
    """
    return jnp.linalg.eigvalsh(operator.dense())


def _check(method: str, key: PRNGKey, num_matvecs: int) -> None:
    _checks.choice("method", method, tuple(_METHODS))
    _checks.integer("num_matvecs", num_matvecs, minimum=_FEWEST[method])
    _checks.key("key", key)


def _of_products(
    callback: Callback | None, solver: Solver[Any, Any], num_matvecs: int
) -> Callback | None:
    """The callback told of products instead of steps, of which each may take several."""
    if callback is None:
        return None
    return lambda steps, _: callback(min(steps * solver.block, num_matvecs), num_matvecs)
