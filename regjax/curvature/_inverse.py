"""The inverse of a damped matrix: an operator by `solve`, and its diagonal.

The covariance of a Laplace approximation is the inverse of N times the damped curvature of the mean
loss, the precision of the prior over N for damping.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Callback, PRNGKey, Tree
from regjax._space import Space
from regjax.curvature._eigen import EigenResult
from regjax.curvature._engine._driver import run
from regjax.curvature._estimators import DiagonalResult, diagonal
from regjax.curvature._operators._operator import Operator, Submatrix
from regjax.curvature._preconditioners import LowRank, deflated, low_rank_preconditioner
from regjax.curvature._solve import check_system, limit_of, systems_solver
from regjax.curvature._systems import Solutions

# Vectors that conjugate gradients keep of each system.
_KEPT = 8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["operator", "damping", "preconditioner"],
    meta_fields=["method", "tol", "max_matvecs"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class Inverse(Operator):
    """(A + damping I)^-1, a solved system a product; NaN where that has not converged.

    Attributes:
      operator: A.
      damping: ().
      preconditioner: as in `solve`.
      method: as in `solve`.
      tol: as in `solve`.
      max_matvecs: as in `solve`.
    """

    operator: Operator
    damping: jax.Array
    preconditioner: Operator | None
    method: str
    tol: float
    max_matvecs: int

    @property
    def space(self) -> Space:
        return self.operator.space

    @property
    def home(self) -> Mesh | None:
        return self.operator.home

    @property
    def takes_blocks(self) -> bool:
        return self.operator.takes_blocks

    @property
    def eps(self) -> float:
        # What a residual leaves open is as large a share of a product.
        return max(self.operator.eps, self.tol)

    @property
    def why_not_finite(self) -> str:
        return (
            "A linear system that the inverse solves has not converged: raise `max_matvecs`, `tol` "
            "or `damping` of `inverse`, or give it a `preconditioner`."
        )

    def product(self, vector: jax.Array) -> jax.Array:
        return self.block_product(vector[None])[0]

    def block_product(self, rows: jax.Array) -> jax.Array:
        solver = systems_solver(
            self.operator, rows, damping=self.damping, method=self.method, tol=self.tol,
            preconditioner=self.preconditioner, max_matvecs=self.max_matvecs, lower_bound=None,
            result=_solutions,
        )  # fmt: skip
        return run(solver)

    def facts(self) -> dict[str, Tree]:
        own = {"damping": self.damping, "method": self.method, "tol": self.tol}
        own["max_matvecs"] = self.max_matvecs
        return {f"inverse.{name}": fact for name, fact in (self.operator.facts() | own).items()}

    def product_bytes(self, count: int) -> int:
        vectors = self.space.num_bytes(jax.eval_shape(lambda: self.space.zeros(count)))
        return self.operator.product_bytes(count) + _KEPT * vectors

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        return Submatrix(self, inside)


@jax.jit
def _solutions(found: Solutions) -> jax.Array:
    return jnp.where(found.converged[:, None], found.solutions, jnp.nan)


@checked
def inverse(
    operator: Operator,
    *,
    damping: ArrayLike = 0.0,
    method: str = "cg",
    preconditioner: Operator | None = None,
    tol: float = 1e-4,
    max_matvecs: int | None = None,
) -> Operator:
    """Makes the operator (A + damping I)^-1; each of its products solves a linear system.

    It goes wherever an operator goes: `diagonal(inverse(A, damping=d), ...)` estimates the
    variances of a Laplace approximation, and `trace` their sum.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # the diagonal 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> print(curvature.inverse(hessian, damping=1.0) @ jnp.ones(8))  # 1/2, ..., 1/9
      [0.5   0.333 0.25  0.2   0.167 0.143 0.125 0.111]

    Args:
      operator: A, symmetric, of order n.
      damping: added to the diagonal, not negative, in the units of the eigenvalues.
      method: "cg" for positive definite A + damping I, or "minres" (see `solve`).
      preconditioner: an operator near the inverse, up to a factor (see `solve`). None: none.
      tol: relative tolerance of the residuals, a Python number; also what a product is off by.
      max_matvecs: limit of the number of products of a system. Default: 10 n + 20, at most 1000.

    Returns:
      An `Operator`. A product whose system did not converge is NaN.

    Raises:
      ValueError: an argument is out of its range, or `preconditioner` is of another space or seen
        not to be positive definite.
    """
    check_system(operator, damping, method, preconditioner, tol)
    limit = limit_of(operator, max_matvecs)
    damping = jnp.asarray(damping, operator.dtype)
    return Inverse(operator, damping, preconditioner, method, float(tol), limit)


@checked
def inverse_diagonal(
    operator: Operator,
    *,
    damping: ArrayLike,
    key: PRNGKey,
    num_probes: int,
    pairs: EigenResult | None = None,
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    callback: Callback | None = None,
) -> DiagonalResult:
    """Estimates the diagonal of (A + damping I)^-1 by random systems.

    The variances of a Laplace approximation are this over the number of examples N, with the
    prior's precision over N as damping. With `pairs` the part on these eigenvectors is exact.
    Before the rest is estimated all other eigenvalues count as zero, so that little is left to
    estimate where few eigenvalues are above the damping.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # the diagonal 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> options = {"key": jax.random.key(0), "num_probes": 2}
      >>> print(curvature.inverse_diagonal(hessian, damping=1.0, **options).value)  # 1/2, ..., 1/9
      [0.5   0.333 0.25  0.2   0.167 0.143 0.125 0.111]

    Args:
      operator: A, positive semi-definite, of order n.
      damping: positive, in the units of the eigenvalues.
      key: typed key for the random signs.
      num_probes: number of systems that are solved.
      pairs: of A, from `top_eigenpairs`; they precondition the systems as well. None: none.
      tol: relative tolerance of the residuals, a Python number.
      max_matvecs: limit of the number of products of a system. Default: 10 n + 20, at most 1000.
      callback: called as callback(systems, num_probes, progress) after each system, or each block
        of them, outside of `jax.jit`; `progress.result` is the result so far.

    Returns:
      A `DiagonalResult`, whose `num_matvecs` counts systems; NaN if one of them did not converge.

    Raises:
      ValueError: `damping` is not positive, or another argument is out of its range.

    References:
      C. Bekas, E. Kokiopoulou, Y. Saad (2007), An estimator for the diagonal of a matrix, Applied
      Numerical Mathematics 57. D. MacKay (1992), A practical Bayesian framework for backpropagation
      networks, Neural Computation 4(3).
    """
    _checks.number("damping", damping, above_zero=True)
    _checks.integer("num_probes", num_probes)
    estimate = functools.partial(diagonal, key=key, num_matvecs=num_probes, callback=callback)
    solved = functools.partial(inverse, operator, damping=damping, tol=tol, max_matvecs=max_matvecs)
    if pairs is None:
        return estimate(solved())
    preconditioner = low_rank_preconditioner(operator, pairs, damping=damping)
    known = deflated(operator, pairs, damping)
    rest = solved(preconditioner=preconditioner) - known
    return _with_known(estimate(rest), known.operator, known.factor)


@jax.jit
def _with_known(found: DiagonalResult, known: LowRank, factor: jax.Array) -> DiagonalResult:
    exact = factor * known.own_diagonal()
    tree = known.space.unravel(exact)
    return found._replace(
        value=jax.tree.map(jnp.add, found.value, tree),
        trace=found.trace + jnp.sum(known.space.gather(exact)),
    )
