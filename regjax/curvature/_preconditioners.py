"""Operators near the inverse of A + damping I, from what is known of A already."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _numerics
from regjax._arguments import checked
from regjax._base import Params, Tree
from regjax._space import Space
from regjax.curvature._eigen import EigenResult
from regjax.curvature._engine._accumulation import inner_products
from regjax.curvature._operators._identity import OnTrees, identity
from regjax.curvature._operators._operator import Multiple, Operator, Submatrix

# An entry of a diagonal counts as at least this share of the mean of the positive ones: estimates
# may be zero or negative, and the inverse of one near zero would rule over all others.
_LEAST_SHARE = 1e-3


@checked
def jacobi_preconditioner(
    operator: Operator, diagonal: Params, *, damping: ArrayLike = 0.0
) -> Operator:
    """Makes the inverse of the diagonal of A + damping I.

    It helps where the scales of the parameters differ. `diagonal` may be an estimate, such as that
    of `curvature.diagonal`: an entry that is below a thousandth of the mean of the positive ones,
    zero, negative or NaN, counts as that much.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # the diagonal 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> plain = curvature.solve(hessian, jnp.ones(8), damping=1.0)
      >>> near = curvature.jacobi_preconditioner(hessian, jnp.arange(1.0, 9.0), damping=1.0)
      >>> quick = curvature.solve(hessian, jnp.ones(8), damping=1.0, preconditioner=near)
      >>> print(plain.num_matvecs > 5, quick.num_matvecs)  # one step, and one to check it
      True 2

    Args:
      operator: A, of which only the space is used.
      diagonal: of A, a tree like the parameters.
      damping: that of the system, not negative.

    Returns:
      A positive definite `Operator` for `solve`; the identity if no entry is positive and the
      damping is 0.

    Raises:
      ValueError: `diagonal` does not fit the operator, or `damping` is negative.
    """
    space = operator.space
    _checks.real_tree("diagonal", _checks.same_tree("diagonal", diagonal, space.like()))
    damping = jnp.asarray(_checks.number("damping", damping), space.dtype)
    return identity(space).scaled(_inverse_roots(diagonal, damping, space))


@functools.partial(jax.jit, static_argnums=2)
def _inverse_roots(diagonal: Params, damping: jax.Array, space: Space) -> Params:
    leaves, treedef = jax.tree.flatten(diagonal)
    leaves = [jnp.asarray(leaf).astype(space.dtype) for leaf in leaves]
    positive = [jnp.where(jnp.isfinite(leaf) & (leaf > 0), leaf, 0) for leaf in leaves]
    total = jnp.sum(jnp.stack([jnp.sum(leaf) for leaf in positive]))
    count = jnp.sum(jnp.stack([jnp.sum(leaf > 0) for leaf in positive]))
    mean = _numerics.divide(total, count.astype(space.dtype))
    least = _LEAST_SHARE * mean
    damped = [jnp.maximum(leaf, least) + damping for leaf in positive]
    roots = [jnp.where(leaf > 0, jax.lax.rsqrt(leaf), 1) for leaf in damped]
    return jax.tree.unflatten(treedef, roots)


@checked
def low_rank_preconditioner(
    operator: Operator, pairs: EigenResult, *, damping: ArrayLike = 0.0
) -> Operator:
    """Makes the inverse of A + damping I on known eigenvectors, up to a factor.

        I + sum_i ((l + damping) / (l_i + damping) - 1) v_i v_i',   l the smallest of the l_i

    The system then has the eigenvalue l + damping, up to that factor, in place of all the known
    ones, and its condition is that of the rest of the spectrum.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> pairs = curvature.top_eigenpairs(hessian, 2, key=jax.random.key(0))  # 8 and 7
      >>> near = curvature.low_rank_preconditioner(hessian, pairs, damping=1.0)
      >>> print(near @ jnp.ones(8))  # the last is (7 + 1) / (8 + 1)
      [1.    1.    1.    1.    1.    1.    1.    0.889]

    Args:
      operator: A, of which only the space is used.
      pairs: of A, from `top_eigenpairs`; those that have not converged, and those with l_i +
        damping <= 0, are left out.
      damping: that of the system, not negative.

    Returns:
      A positive definite `Operator` for `solve`.

    Raises:
      ValueError: the vectors do not fit the operator, or `damping` is negative.
    """
    _check_pairs(operator, pairs)
    damping = jnp.asarray(_checks.number("damping", damping), operator.dtype)
    return _low_rank(operator.space, pairs, damping, None)


def deflated(operator: Operator, pairs: EigenResult, damping: ArrayLike) -> Multiple:
    """The inverse of A + damping I if all eigenvalues but those of the pairs were zero."""
    _check_pairs(operator, pairs)
    damping = jnp.asarray(damping, operator.dtype)
    return Multiple(1 / damping, _low_rank(operator.space, pairs, damping, damping))


def _check_pairs(operator: Operator, pairs: EigenResult) -> None:
    like = operator.space.like(jnp.shape(pairs.values))
    _checks.same_tree("pairs.vectors", pairs.vectors, like)


@functools.partial(jax.jit, static_argnums=0)
def _low_rank(
    space: Space, pairs: EigenResult, damping: jax.Array, rest: jax.Array | None
) -> "LowRank":
    """The inverse times `rest`, the eigenvalue of all others; None: the smallest of the pairs."""
    values = pairs.values.astype(space.dtype) + damping
    taken = pairs.converged & (values > 0)
    smallest = jnp.min(jnp.where(taken, values, jnp.inf)) if rest is None else rest
    factors = _numerics.divide(smallest, values, where=taken, otherwise=1) - 1
    rows = space.ravel_rows(pairs.vectors)
    return LowRank(space, jnp.where(taken[:, None], rows, 0), factors)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "factors"], meta_fields=["trees"]
)
@dataclasses.dataclass(frozen=True, repr=False)
class LowRank(OnTrees):
    """I + sum_i factor_i v_i v_i'.

    Attributes:
      rows: (k, length), orthonormal vectors v_i of the space.
      factors: (k,).
    """

    rows: jax.Array
    factors: jax.Array

    def product(self, vector: jax.Array) -> jax.Array:
        along = self.factors * inner_products(self.space, self.rows, vector)
        return vector + jnp.matmul(along, self.rows, precision="highest")

    def own_diagonal(self) -> jax.Array:
        """The diagonal, a vector."""
        return 1 + jnp.sum(self.factors[:, None] * self.rows**2, 0)

    def facts(self) -> dict[str, Tree]:
        return {"rows": self.rows, "factors": self.factors}

    def product_bytes(self, count: int) -> int:
        return self.space.num_bytes(jax.eval_shape(lambda: self.space.zeros(count)))

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        return Submatrix(self, inside)
