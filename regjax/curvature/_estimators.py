"""Trace and diagonal from random products, with standard errors; and the dense spectrum."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Callback, Params, PRNGKey, Tree
from regjax.curvature._derivatives import Slopes, attach, held, without_rule
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._hutchinson import Estimates, derivative, hutchinson_solver
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
      trace: (), the estimate of `trace` from the same products.
      trace_standard_error: (), of it.
    """

    value: Params
    standard_error: Params
    num_matvecs: jax.Array
    trace: jax.Array
    trace_standard_error: jax.Array


@checked
def trace(
    operator: Operator,
    *,
    key: PRNGKey,
    num_matvecs: int,
    method: str = "hutchinson",
    callback: Callback | None = None,
) -> TraceResult:
    """Estimates the trace by random products.

    With Hutchinson's method it can be differentiated with respect to what the products depend on,
    which gives the mean of z' dA z over the same signs z. `diagonal` gives both from the same
    products.

    Args:
      operator: symmetric, of order n.
      key: typed key of the random signs.
      num_matvecs: number of products in all; Hutch++ spends two thirds of them (rounded down to an
        even number, n at most each way) on the range.
      method: "hutchinson", or "hutch++", better where a few eigenvalues dominate.
      callback: called as callback(products, num_matvecs, progress) after each product, or each
        block of them, when the host drives; `progress.result` is the result so far.

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
    matrix = held(operator) if method == "hutchinson" else operator
    solver = trace_solver(matrix, key=key, num_matvecs=num_matvecs, method=method)
    found = run(solver, callback=_of_products(callback, solver, num_matvecs))
    if method != "hutchinson":
        return found
    return found._replace(
        value=attach(functools.partial(_slope_of_trace, num_matvecs), operator, found.value, key),
        standard_error=without_rule(operator, found.standard_error),
    )


@checked
def trace_solver(
    operator: Operator, *, key: PRNGKey, num_matvecs: int, method: str = "hutchinson"
) -> Solver[Tree, TraceResult]:
    """Makes the solver of `trace`, whose arguments these are, to drive by hand."""
    _check(method, key, num_matvecs)
    return _METHODS[method](
        operator, name="trace", key=key, num_matvecs=num_matvecs, of_trace=True,
        result=lambda found: TraceResult(
            found.trace, found.trace_standard_error, found.num_matvecs
        ),
    )  # fmt: skip


@checked
def diagonal(
    operator: Operator,
    *,
    key: PRNGKey,
    num_matvecs: int,
    method: str = "hutchinson",
    callback: Callback | None = None,
) -> DiagonalResult:
    """Estimates the diagonal by random products, and the trace from the same ones.

    With Hutchinson's method it can be differentiated as `trace` can.

    Args:
      operator: symmetric, of order n.
      key: typed key of the random signs.
      num_matvecs: number of products in all, split as in `trace`.
      method: "hutchinson": the mean of z * A z. "hutch++": the diagonal of QQ' A exactly, the
        mean of u * A u for the remainder.
      callback: called as callback(products, num_matvecs, progress) after each product, or each
        block of them, when the host drives; `progress.result` is the result so far.

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
    matrix = held(operator) if method == "hutchinson" else operator
    solver = diagonal_solver(matrix, key=key, num_matvecs=num_matvecs, method=method)
    found = run(solver, callback=_of_products(callback, solver, num_matvecs))
    if method != "hutchinson":
        return found
    slope = functools.partial(_slope_of_diagonal, num_matvecs)
    value, trace = attach(slope, operator, (found.value, found.trace), key)
    errors = without_rule(operator, (found.standard_error, found.trace_standard_error))
    return DiagonalResult(value, errors[0], found.num_matvecs, trace, errors[1])


@checked
def diagonal_solver(
    operator: Operator, *, key: PRNGKey, num_matvecs: int, method: str = "hutchinson"
) -> Solver[Tree, DiagonalResult]:
    """Makes the solver of `diagonal`, whose arguments these are, to drive by hand."""
    _check(method, key, num_matvecs)
    tree = operator.space.unravel

    def result(found: Estimates) -> DiagonalResult:
        return DiagonalResult(
            value=tree(found.diagonal),
            standard_error=tree(found.diagonal_standard_error),
            num_matvecs=found.num_matvecs,
            trace=found.trace,
            trace_standard_error=found.trace_standard_error,
        )

    return _METHODS[method](
        operator, name="diagonal", key=key, num_matvecs=num_matvecs, of_trace=False, result=result
    )


def _slope_of_trace(
    num_matvecs: int, operator: Operator, tangent: Slopes, key: PRNGKey
) -> jax.Array:
    return jnp.sum(derivative(num_matvecs, operator, tangent, key))


def _slope_of_diagonal(
    num_matvecs: int, operator: Operator, tangent: Slopes, key: PRNGKey
) -> tuple[Params, jax.Array]:
    slope = derivative(num_matvecs, operator, tangent, key)
    return operator.space.unravel(slope), jnp.sum(slope)


@checked
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
    return lambda steps, _, progress: callback(
        min(steps * solver.block, num_matvecs), num_matvecs, progress
    )
