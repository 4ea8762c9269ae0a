"""Squared norms of the rows of a symmetric matrix, and their sum, from random products."""

from typing import Any, NamedTuple

import jax

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Callback, Params, PRNGKey, Tree
from regjax._printing import legible
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._estimators import TraceResult, entries, of_products
from regjax.curvature._hutchinson import Estimates, Result
from regjax.curvature._leave_one_out import leave_one_out_solver
from regjax.curvature._operators._operator import Operator

# Two random vectors, of which one is left out at a time, and their second products.
_FEWEST = 4


@legible
class RowNormsResult(NamedTuple):
    """An estimate of the squared norms of all rows.

    Attributes:
      value: tree like the parameters, of the squared units of the matrix.
      standard_error: tree like the parameters, of each entry.
      num_matvecs: (), int32, products used.
      squared_norm: (), their sum, the squared Frobenius norm: the sum of the squared eigenvalues.
      squared_norm_standard_error: (), of it.
    """

    value: Params
    standard_error: Params
    num_matvecs: jax.Array
    squared_norm: jax.Array
    squared_norm_standard_error: jax.Array


@checked
def squared_row_norms(
    operator: Operator, *, key: PRNGKey, num_matvecs: int, callback: Callback | None = None
) -> RowNormsResult:
    """Estimates the squared norm of each row of a matrix, and its squared Frobenius norm.

    The squared norms of the rows are the diagonal of A A. Half of the products find the range of
    the matrix, in which the norms are exact; each of the random vectors samples what the others
    leave. The result is exact for a rank below half of the products.

    Example:
      >>> v = jnp.array([1.0, 2.0, 2.0])
      >>> operator = curvature.from_matvec(lambda u: v * (v @ u), v)  # v v', of rank one
      >>> result = curvature.squared_row_norms(operator, key=jax.random.key(0), num_matvecs=4)
      >>> print(result.value, f"{result.squared_norm:.3f}")  # v_i^2 |v|^2 and |v|^4
      [ 9. 36. 36.] 81.000

    Args:
      operator: symmetric, of order n.
      key: typed key for the random vectors.
      num_matvecs: number of products in all, at least 4; an odd one and those beyond 2 n are not
        made.
      callback: called as callback(products, num_matvecs, progress) after each product, or each
        block of them, outside of `jax.jit`; `progress.result` is the result so far.

    Returns:
      A `RowNormsResult`; unbiased, with standard errors as of `trace` by "xtrace".

    Raises:
      ValueError: `num_matvecs` is below 4.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` is the estimate of the products so far.

    References:
      The form for rows of XDiag, E. Epperly, J. Tropp, R. Webber (2024), arXiv:2301.07825, with
      vectors that are normal and normalised where they enter.
    """
    solver = squared_row_norms_solver(operator, key=key, num_matvecs=num_matvecs)
    return run(solver, callback=of_products(callback, solver, num_matvecs))


@checked
def squared_row_norms_solver(
    operator: Operator, *, key: PRNGKey, num_matvecs: int
) -> Solver[Tree, RowNormsResult]:
    """Makes the solver of `squared_row_norms`, which has the same arguments, to drive by hand.

    Example:
      >>> v = jnp.array([1.0, 2.0, 2.0])
      >>> operator = curvature.from_matvec(lambda u: v * (v @ u), v)  # v v', of rank one
      >>> options = {"key": jax.random.key(0), "num_matvecs": 4}
      >>> print(curvature.run(curvature.squared_row_norms_solver(operator, **options)).value)
      [ 9. 36. 36.]
    """

    def result(found: Estimates) -> RowNormsResult:
        value, error = entries(operator, found)
        return RowNormsResult(
            value=value,
            standard_error=error,
            num_matvecs=found.num_matvecs,
            squared_norm=found.trace,
            squared_norm_standard_error=found.trace_standard_error,
        )

    return _solver(operator, "squared_row_norms", key, num_matvecs, of_trace=False, result=result)


@checked
def squared_frobenius_norm(
    operator: Operator, *, key: PRNGKey, num_matvecs: int, callback: Callback | None = None
) -> TraceResult:
    """Estimates the squared Frobenius norm, which is the trace of A A.

    It makes the products of `squared_row_norms`, and is exact for a rank below half of them.

    Example:
      >>> v = jnp.array([1.0, 2.0, 2.0])
      >>> operator = curvature.from_matvec(lambda u: v * (v @ u), v)  # v v', of rank one
      >>> key = jax.random.key(0)
      >>> print(f"{curvature.squared_frobenius_norm(operator, key=key, num_matvecs=4).value:.3f}")
      81.000

    Args:
      operator: symmetric, of order n.
      key: typed key for the random vectors.
      num_matvecs: number of products in all, at least 4; an odd one and those beyond 2 n are not
        made.
      callback: called as callback(products, num_matvecs, progress) after each product, or each
        block of them, outside of `jax.jit`; `progress.result` is the result so far.

    Returns:
      A `TraceResult` of the matrix's square.

    Raises:
      ValueError: `num_matvecs` is below 4.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` is the estimate of the products so far.
    """
    solver = _solver(
        operator, "squared_frobenius_norm", key, num_matvecs, of_trace=True,
        result=lambda found: TraceResult(
            found.trace, found.trace_standard_error, found.num_matvecs
        ),
    )  # fmt: skip
    return run(solver, callback=of_products(callback, solver, num_matvecs))


def _solver(
    operator: Operator, name: str, key: PRNGKey, num_matvecs: int, *, of_trace: bool, result: Result
) -> Solver[Any, Any]:
    _checks.integer("num_matvecs", num_matvecs, minimum=_FEWEST)
    return leave_one_out_solver(
        operator, name=name, key=_checks.key("key", key), num_matvecs=num_matvecs,
        of_trace=of_trace, of_squares=True, result=result,
    )  # fmt: skip
