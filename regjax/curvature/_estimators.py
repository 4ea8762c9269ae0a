"""Trace and diagonal from random products, with standard errors; and the dense spectrum."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Callback, Params, PRNGKey, Tree
from regjax._finite import check_product
from regjax._printing import legible
from regjax.curvature._derivatives import Slopes, attach, held, without_rule
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._hutchinson import Estimates, derivative, hutchinson_solver
from regjax.curvature._hutchpp import hutchpp_solver
from regjax.curvature._leave_one_out import leave_one_out_solver
from regjax.curvature._nystrom import nystrom_solver
from regjax.curvature._operators._operator import Operator

Make = Callable[..., Solver[Any, Any]]
_SHARED: dict[str, tuple[Make, int]] = {
    "hutchinson": (hutchinson_solver, 1),
    "hutch++": (hutchpp_solver, 3),
}
# Method -> how its solver is made, and the fewest products: Hutch++ takes one for each of its three
# parts, and what leaves one vector out at a time needs two of them for an error.
_OF_TRACE = _SHARED | {"xtrace": (leave_one_out_solver, 4), "xnystrace": (nystrom_solver, 2)}
_OF_DIAGONAL = _SHARED | {"xdiag": (leave_one_out_solver, 4), "xnysdiag": (nystrom_solver, 2)}


@legible
class TraceResult(NamedTuple):
    """An estimate of the trace.

    Attributes:
      value: (), the sum of the eigenvalues.
      standard_error: (), from the random draw of the probes; NaN with a single one.
      num_matvecs: (), int32, products used.
    """

    value: jax.Array
    standard_error: jax.Array
    num_matvecs: jax.Array


@legible
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
    which gives the mean of z' dA z over the same signs z. `diagonal` gives both, trace and
    diagonal, from the same products.

    Example:
      >>> matrix = 2 * jnp.eye(8) + 0.5  # of trace 20
      >>> operator = curvature.from_matvec(lambda v: matrix @ v, jnp.zeros(8))
      >>> result = curvature.trace(operator, key=jax.random.key(0), num_matvecs=64)
      >>> print(f"{result.value:.1f} +- {result.standard_error:.1f}")
      20.3 +- 0.7

    Args:
      operator: symmetric, of order n.
      key: typed key for the random signs.
      num_matvecs: number of products in all; Hutch++ spends two thirds of them (rounded down to an
        even number, n at most each way) on the range; XTrace takes an even number, 2 n at most,
        XNysTrace n at most.
      method: "hutchinson"; "hutch++", better where a few eigenvalues dominate; "xtrace", which is
        better still and exact for a rank below half of the products; "xnystrace", the best for
        positive semi-definite matrices, and exact for a rank below their number.
      callback: called as callback(products, num_matvecs, progress) after each product, or each
        block of them, outside of `jax.jit`; `progress.result` is the result so far.

    Returns:
      A `TraceResult`; unbiased. The two X methods make as many estimates as random vectors, each of
      which leaves one vector out. Their standard error comes from the spread of these estimates and
      from their covariance, found by leaving out two; its square is unbiased. Before the last
      product their result is Hutchinson's of these vectors. Of a matrix that XNysTrace sees to be
      indefinite the value is NaN inside of `jax.jit`.

    Raises:
      ValueError: `method` is unknown, `num_matvecs` below 1 (3 for Hutch++, 4 for XTrace, 2 for
        XNysTrace), or XNysTrace sees that the matrix is not positive semi-definite.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` is the estimate of the probes so far.

    References:
      M. Hutchinson (1990), Communications in Statistics 19(2). R. Meyer, C. Musco, C. Musco, D.
      Woodruff (2021), Hutch++, arXiv:2010.09649, algorithm 1. E. Epperly, J. Tropp, R. Webber
      (2024), XTrace, arXiv:2301.07825. The vectors are normal and normalised where they enter.
    """
    matrix = held(operator) if method == "hutchinson" else operator
    solver = trace_solver(matrix, key=key, num_matvecs=num_matvecs, method=method)
    found = run(solver, callback=of_products(callback, solver, num_matvecs))
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
    """Makes the solver of `trace`, which has the same arguments, to drive by hand.

    Example:
      >>> matrix = 2 * jnp.eye(8) + 0.5  # of trace 20
      >>> operator = curvature.from_matvec(lambda v: matrix @ v, jnp.zeros(8))
      >>> solver = curvature.trace_solver(operator, key=jax.random.key(0), num_matvecs=64)
      >>> print(f"{curvature.run(solver).value:.1f}")
      20.3
    """
    _check(_OF_TRACE, method, key, num_matvecs)
    return _OF_TRACE[method][0](
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

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # a diagonal Hessian
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> result = curvature.diagonal(hessian, key=jax.random.key(0), num_matvecs=4)
      >>> print(result.value, result.trace)  # exact, as of every diagonal matrix
      [1. 2. 3. 4. 5. 6. 7. 8.] 36.0

    Args:
      operator: symmetric, of order n.
      key: typed key for the random signs.
      num_matvecs: number of products in all, split as in `trace`.
      method: "hutchinson": the mean of z * A z over random signs z. "hutch++": the diagonal on the
        range that the first products find exactly, and Hutchinson's for the remainder. "xdiag":
        each vector for the remainder of all others. "xnysdiag": the same for positive semi-definite
        matrices, with half of the products.
      callback: called as callback(products, num_matvecs, progress) after each product, or each
        block of them, outside of `jax.jit`; `progress.result` is the result so far.

    Returns:
      A `DiagonalResult`; unbiased, with standard errors as in `trace`.

    Raises:
      ValueError: `method` is unknown, `num_matvecs` too small for it, or the matrix is seen not to
        be positive semi-definite, as in `trace`.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` is the estimate of the probes so far.

    References:
      C. Bekas, E. Kokiopoulou, Y. Saad (2007), An estimator for the diagonal of a matrix, Applied
      Numerical Mathematics 57. The Hutch++ form is its direct analogue. E. Epperly, J. Tropp, R.
      Webber (2024), XTrace, arXiv:2301.07825 (XDiag).
    """
    matrix = held(operator) if method == "hutchinson" else operator
    solver = diagonal_solver(matrix, key=key, num_matvecs=num_matvecs, method=method)
    found = run(solver, callback=of_products(callback, solver, num_matvecs))
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
    """Makes the solver of `diagonal`, which has the same arguments, to drive by hand.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # a diagonal Hessian
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.diagonal_solver(hessian, key=jax.random.key(0), num_matvecs=4)
      >>> print(curvature.run(solver).value)
      [1. 2. 3. 4. 5. 6. 7. 8.]
    """
    _check(_OF_DIAGONAL, method, key, num_matvecs)

    def result(found: Estimates) -> DiagonalResult:
        value, error = entries(operator, found)
        return DiagonalResult(
            value=value,
            standard_error=error,
            num_matvecs=found.num_matvecs,
            trace=found.trace,
            trace_standard_error=found.trace_standard_error,
        )

    return _OF_DIAGONAL[method][0](
        operator, name="diagonal", key=key, num_matvecs=num_matvecs, of_trace=False, result=result
    )


def entries(operator: Operator, found: Estimates) -> tuple[Params, Params]:
    """Estimates of entries and their errors as trees; NaN of a single probe is no accident."""
    tree = operator.space.unravel
    with jax.debug_nans(False):
        return tree(found.diagonal), tree(found.diagonal_standard_error)


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

    Example:
      >>> matrix = jnp.array([[2.0, 1.0], [1.0, 2.0]])
      >>> operator = curvature.from_matvec(lambda v: matrix @ v, jnp.zeros(2))
      >>> print(curvature.exact_spectrum(operator))
      [1. 3.]

    Args:
      operator: symmetric, of order n at most 32768; in float64 if the parameters are.

    Returns:
      Eigenvalues (n,), exact up to rounding of n eps times the largest magnitude.

    Raises:
      ValueError: n is above 32768.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`.
    """
    matrix = operator.dense()
    check_product(operator, matrix)
    return jnp.linalg.eigvalsh(matrix)


def _check(
    methods: dict[str, tuple[Make, int]], method: str, key: PRNGKey, num_matvecs: int
) -> None:
    _checks.choice("method", method, tuple(methods))
    _checks.integer("num_matvecs", num_matvecs, minimum=(methods[method][1], f"for {method}"))
    _checks.key("key", key)


def of_products(
    callback: Callback | None, solver: Solver[Any, Any], num_matvecs: int
) -> Callback | None:
    """The callback told of products instead of steps, of which each may take several."""
    if callback is None:
        return None
    return lambda steps, _, progress: callback(
        min(steps * solver.block, num_matvecs), num_matvecs, progress
    )
