"""The leading eigenpairs by Lanczos with thick restart, each with its residual norm.

A Ritz pair (theta, y) of the basis Q has the residual A y - theta y, whose norm is read off the
last component of the small eigenvector: |beta s_last|. It bounds the distance of theta to *some*
eigenvalue. It cannot tell that an eigenvalue was passed over, and a Krylov space of one start
never sees the second copy of a multiple one. So the converged pairs are followed by a search: a
fresh random start in their orthogonal complement, continued until a larger eigenvalue there would
have shown itself.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _loops
from regjax._arguments import checked
from regjax._base import Callback, Params, PRNGKey, Tree
from regjax._on_host import on_host
from regjax._one_program import one_program
from regjax._printing import legible
from regjax._space import Space
from regjax.curvature import _search, _start
from regjax.curvature._assessment import (
    assess_in_time,
    assessed,
    begin_search,
    is_pair,
    restart,
)
from regjax.curvature._derivatives import Slopes, attach, held, tangent_product, without_rule
from regjax.curvature._eigen_state import EigenState, without_pairs
from regjax.curvature._engine import _basis
from regjax.curvature._engine._checkpoint import Checkpoint
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._krylov import Step, charged, empty, grown, recorded, renewed, split
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precisely, rounding

_ENDS = ("LA", "SA", "LM", "BE")


@legible
class EigenResult(NamedTuple):
    """The k wanted eigenpairs, in the order of `which`.

    Attributes:
      values: (k,), the estimated eigenvalues (Ritz values).
      vectors: tree like the parameters with a leading axis k, orthonormal up to the rounding of the
        parameters' type.
      residual_norms: (k,), ||A v - value v||: some eigenvalue lies within it of the value. It does
        not tell which one. It includes what rounding may add, relative to the largest |Ritz value|:
        8 units of rounding of the narrowest type in a product (6 % in bfloat16) and, with m rows in
        the basis, 2.5 sqrt(m) of the rows' own; and the error of products that are differences
        (`differences` of `hessian`). A is the matrix as the products have it (see
        `top_eigenpairs`).
      num_matvecs: (), int32, products used, the search for missed copies included.
      converged: (k,), bool: the residual norm is at most `tol` times the largest |Ritz value|, or
        twice what rounding adds, were products exact to the vectors' type.
      complete: (), bool: all pairs have converged, and the search ended without finding an
        eigenvalue that was passed over. Never true without a search, unless the basis spans the
        whole space.
      miss_probability: (), a bound on the probability, over all random starts of the run, that an
        eigenvector was passed over whose eigenvalue would change the list by more than the
        tolerance. (After a search it counts eigenvectors orthogonal to what the search began with.)
        At most 0.01 if complete, 0.02 from both ends; 1 without a search.
    """

    values: jax.Array
    vectors: Params
    residual_norms: jax.Array
    num_matvecs: jax.Array
    converged: jax.Array
    complete: jax.Array
    miss_probability: jax.Array


@checked
def top_eigenpairs(
    operator: Operator,
    k: int,
    *,
    key: PRNGKey,
    tol: ArrayLike = 1e-3,
    which: str = "LA",
    max_basis: int | None = None,
    max_matvecs: int | None = None,
    search: bool = True,
    start: Tree = None,
    accumulation: str | None = None,
    callback: Callback | None = None,
    checkpoint: Checkpoint | None = None,
) -> EigenResult:
    """Finds the k eigenpairs at one end of the spectrum, with residual norms.

    The residual norm of a pair is rigorous: an eigenvalue lies within it of the value. It speaks of
    the matrix as its products give it. The products themselves lose digits where a loss cancels:
    near interpolation, 1 - p of a softmax in float32 is off by 6e-8 / (1 - p), and so is the
    curvature, which no residual shows. There, compare with products in float64.

    Called from Python it stops as soon as all pairs have converged; inside of `jax.jit` it is one
    compiled loop with the same limits and the same flags.

    The values can be differentiated with respect to what the products depend on: d value = v' dA v,
    whose error is of the order of the residual norm over the distance to the next eigenvalue. Of a
    multiple eigenvalue only the sum over its copies has a derivative. The derivatives of the
    vectors and of the residual norms are NaN.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> pairs = curvature.top_eigenpairs(hessian, 2, key=jax.random.key(0))
      >>> print(pairs.values, pairs.converged, pairs.complete)
      [8. 7.] [ True  True] True

    Args:
      operator: symmetric, of order n.
      k: number of eigenpairs, at most n.
      key: typed key for the random starts.
      tol: relative tolerance: a pair has converged when its residual norm is at most `tol` times
        the largest |Ritz value|, or twice what rounding adds to it. (A Ritz value is the estimate
        of an eigenvalue from the products so far.)
      which: "LA" algebraically largest, "SA" smallest, "LM" largest magnitude, "BE" from both ends
        (the larger half from above).
      max_basis: number of vectors (n,) in memory. When there are so many, they are compressed to
        the best Ritz vectors (thick restart). Default: min(n, max(48, 2 k + 20)).
      max_matvecs: limit of the number of products. Default: 20 times `max_basis`.
      search: whether to look, after convergence, for copies of multiple eigenvalues that were
        missed, at half as many products more. It ends when one that would change the list by more
        than the tolerance is there with a probability below 0.01. A single pair at an end has no
        copies that matter: there the random start goes on, for a third as many products more,
        until it would have shown a larger eigenvalue. Without a search eigenvalues of a dense
        spectrum may be missed that are not multiple, too.
      start: where to begin instead of at a random vector: an earlier `EigenResult`, or a tree of
        vectors with a leading axis of any length. Eigenvectors of a matrix not far from this one
        spare products, k vectors that are those of this one spare all but k and the search; any
        others cost products and nothing else. Without a search a random vector goes with them. For
        a single pair a random start is as fast.
      accumulation: how inner products of vectors (n,) are summed (see `lanczos`); with "float64"
        values and residual norms are float64, the vectors are not.
      callback: called as callback(products, max_matvecs, progress) after each product, outside of
        `jax.jit`; `progress.result` is the `EigenResult` so far.
      checkpoint: a `Checkpoint`: the state is saved every few products, and after the process was
        killed the same call goes on from there. Not inside of `jax.jit`.

    Returns:
      An `EigenResult`. Check `converged`, because pairs that have not converged are included.

    Raises:
      ValueError: an argument is out of its range, or the checkpoint is of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` is the `EigenResult` so far.

    References:
      K. Wu, H. Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems,
      SIAM J. Matrix Anal. Appl. 22(2). The search for missed copies is ours (`_search.py`); its
      shortest length is from J. Kuczynski, H. Wozniakowski (1992), Estimating the largest
      eigenvalue by the power and Lanczos algorithms with a random start, SIAM J. Matrix Anal. Appl.
      13(4).
    """
    solver = top_eigenpairs_solver(
        held(operator), k, key=key, tol=tol, which=which, max_basis=max_basis,
        max_matvecs=max_matvecs, search=search, start=start, accumulation=accumulation,
    )  # fmt: skip
    found = run(solver, callback=callback, checkpoint=checkpoint)
    vectors, residual_norms = without_rule(operator, (found.vectors, found.residual_norms))
    values = attach(_slopes, operator, found.values, found.vectors)
    return found._replace(values=values, vectors=vectors, residual_norms=residual_norms)


def _slopes(operator: Operator, tangent: Slopes, vectors: Params) -> jax.Array:
    """D lambda = v' dA v for each pair."""
    rows = jax.vmap(operator.space.ravel)(vectors)
    slopes = jnp.zeros(rows.shape[0], rows.dtype)
    return _loops.scan(_set_slope, slopes, rows.shape[0], operands=(operator, tangent, rows))


def _set_slope(operands: Tree, slopes: jax.Array, i: jax.Array) -> jax.Array:
    operator, tangent, rows = operands
    vector = rows[i]
    slope = jnp.vdot(vector, tangent_product(operator, tangent, vector))
    return slopes.at[i].set(slope / jnp.vdot(vector, vector))


@checked
def top_eigenpairs_solver(
    operator: Operator,
    k: int,
    *,
    key: PRNGKey,
    tol: ArrayLike = 1e-3,
    which: str = "LA",
    max_basis: int | None = None,
    max_matvecs: int | None = None,
    search: bool = True,
    start: Tree = None,
    accumulation: str | None = None,
) -> Solver[Tree, EigenResult]:
    """Makes the solver of `top_eigenpairs`, which has the same arguments, to drive by hand.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.top_eigenpairs_solver(hessian, 2, key=jax.random.key(0))
      >>> print(curvature.run(solver).values)
      [8. 7.]
    """
    space = operator.space
    _checks.integer("k", k, maximum=(space.size, _checks.ORDER))
    _checks.non_negative("tol", tol)
    _checks.choice("which", which, _ENDS)
    _checks.key("key", key)
    start_rows = None if start is None else _start.rows_of(start, space)
    # Two rows beyond the kept ones: one for the residual's direction, one to make progress.
    num_rows = min(space.size, max(48, 2 * k + 20)) if max_basis is None else max_basis
    # Known vectors as a part of that start were tried: it took more products than their search.
    from_random = _search.is_alone(k, which) and start_rows is None
    certificate = ("start" if from_random else "search") if search else None
    least = min(k + 2, space.size), "`k` and two more to make progress"
    _checks.integer("max_basis", num_rows, minimum=least, maximum=(space.size, _checks.ORDER))
    limit = 20 * num_rows if max_matvecs is None else max_matvecs

    return Solver(
        name="top_eigenpairs",
        operator=operator,
        arguments={
            "k": k, "key": key, "tol": tol, "which": which, "max_basis": num_rows,
            "search": search, "start": start_rows, "accumulation": accumulation,
        },
        init=lambda: space.replicate(
            _begin(key, tol, start_rows, space, k, which, num_rows, accumulation, certificate)
        ),
        vectors=lambda state: state.krylov.direction,
        update=_update,
        done=lambda state: state.done,
        result=lambda state: _result(state, operator.eps),
        max_steps=_checks.integer("max_matvecs", limit),
        lower=("max_basis",),
        charge=_charge,
    )  # fmt: skip


def _begin(
    key: PRNGKey,
    tol: ArrayLike,
    start_rows: jax.Array | None,
    space: Space,
    k: int,
    which: str,
    num_rows: int,
    accumulation: str | None,
    certificate: str | None,
) -> EigenState:
    """The state before the first product."""
    fresh_key, start_key = split(key)
    first = space.normal(start_key)
    if start_rows is not None:
        # Nothing but a random part, or a search, sees what the given vectors do not.
        first = _start.sum_of(start_rows, space, None if certificate else first)
    krylov = empty(space, first, num_rows, fresh_key, accumulation)
    return without_pairs(krylov, tol, k, which, num_rows, certificate)


def _charge(state: EigenState, image: jax.Array, error: jax.Array) -> EigenState:
    return dataclasses.replace(state, krylov=charged(state.krylov, image, error))


def _is_complete(state: EigenState) -> jax.Array:
    """Whether the list is right, as far as it was looked for: never without a certificate."""
    was_searched = jnp.bool_(state.certificate is not None) | _basis.spans_all(state.krylov.basis)
    return jnp.all(state.small[: state.k]) & state.done & was_searched


def _update(state: EigenState, image: jax.Array) -> EigenState:
    """One more row, the assessment, and what it asks for."""
    state = _advance(state, image)
    state = dataclasses.replace(state, krylov=renewed(state.krylov))
    state = _loops.cond(state.wants_restart, restart, state)
    return _loops.cond(state.wants_search, begin_search, state)


def _advance(state: EigenState, image: jax.Array) -> EigenState:
    krylov, step = grown(state.krylov, image)
    return _followed(dataclasses.replace(state, krylov=krylov), step)


@on_host()
@precisely
def _followed(state: EigenState, step: Step) -> EigenState:
    """What the new row tells."""
    krylov = recorded(state.krylov, step)
    return assess_in_time(
        dataclasses.replace(
            state,
            krylov=krylov,
            search=_search.follow(state.search, krylov),
            num_matvecs=state.num_matvecs + 1,
        )
    )


def _result(state: EigenState, eps: float) -> EigenResult:
    """The wanted pairs as they stand, converged or not."""
    state = assessed(state)
    return _described(state, _vectors(state.krylov.basis, state.weights, state.k), eps)


@one_program(static="k")
@precisely
def _vectors(basis: _basis.Basis, weights: jax.Array, k: int) -> Params:
    return basis.space.unravel_rows(_basis.combine(basis, weights[:, :k]))


@on_host(static=(2,), gives_arrays=True)
@precisely
def _described(state: EigenState, vectors: Params, eps: float) -> EigenResult:
    k, krylov, space = state.k, state.krylov, state.krylov.basis.space
    unknown = rounding(state.largest, eps=eps, dtype=space.dtype, num_rows=krylov.filled)
    # After Ctrl-C there may be fewer pairs than are wanted.
    exists = is_pair(state.bounds[:k])
    return EigenResult(
        values=jnp.where(exists, krylov.unscaled(state.values[:k]), jnp.nan),
        vectors=vectors,
        residual_norms=jnp.where(exists, krylov.unscaled(state.bounds[:k] + unknown), jnp.inf),
        num_matvecs=state.num_matvecs,
        converged=state.small[:k],
        complete=_is_complete(state),
        miss_probability=_search.miss_probability(state.search, which=state.which, size=space.size),
    )
