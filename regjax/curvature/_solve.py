"""Solves (A + damping I) x = b, with the residual that was found and what it says of the error."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _loops
from regjax._arguments import checked
from regjax._base import Callback, Params, Tree
from regjax._printing import legible
from regjax._space import Space
from regjax.curvature import _systems
from regjax.curvature._engine._checkpoint import Checkpoint
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._operators._operator import Operator
from regjax.curvature._operators._positive import lower_bound as known_bound
from regjax.curvature._systems import METHODS, Solutions, SystemsState

# Products at most, unless said otherwise: in exact arithmetic n would do.
_TIMES, _FEWEST, _MOST = 10, 20, 1000


Result = TypeVar("Result")


@legible
class SolveResult(NamedTuple):
    """An approximate solution x of (A + damping I) x = b.

    For k right sides at once all fields but `num_matvecs` have a leading axis k.

    Attributes:
      solution: x, a tree like the parameters.
      residual_norm: (), |b - (A + damping I) x|, from a product with this very x. Of a run that was
        cut short (Ctrl-C, a callback) it is the recurrence's, which may be too small. NaN for a
        solution too large or too small for its type.
      error_bound: (), of the distance |x - x*| to the exact solution: the residual norm, and what
        rounding may hide of it, over the least that an eigenvalue of A + damping I can be. Infinite
        where nothing positive is known of that eigenvalue (see `lower_bound` in `solve`), where
        negative curvature was met, and of a run that was cut short.
      num_matvecs: (), int32, products used; of several right sides those of each.
      converged: (), bool, whether the residual norm is at most `tol` times that of b.
      negative_curvature: (), bool, whether conjugate gradients met a direction p with p'(A +
        damping I) p <= 0 and stopped: the matrix is not positive definite, and x is what was found
        before. Take a damping above `-curvature`, `method="minres"`, or a matrix without negative
        eigenvalues (`gauss_newton` or `fisher` in place of `hessian`).
      direction: such a p, of unit norm, a tree like the parameters; zeros without one.
      curvature: (), p'(A + damping I) p of the last direction of unit norm.
    """

    solution: Params
    residual_norm: jax.Array
    error_bound: jax.Array
    num_matvecs: jax.Array
    converged: jax.Array
    negative_curvature: jax.Array
    direction: Params
    curvature: jax.Array


@checked
def solve(
    operator: Operator,
    vector: Params,
    *,
    damping: ArrayLike = 0.0,
    method: str = "cg",
    preconditioner: Operator | None = None,
    tol: ArrayLike = 1e-4,
    max_matvecs: int | None = None,
    lower_bound: ArrayLike | None = None,
    callback: Callback | None = None,
    checkpoint: Checkpoint | None = None,
) -> SolveResult:
    """Solves a damped linear system with a curvature matrix, tree in and tree out.

        (A + damping I) x = b

    For example a damped Newton step is `solve(hessian(loss, params, *batch), grads, damping=0.01)`.
    The last product is with the solution itself, so that the residual is what it is said to be. In
    float32 the residual norm cannot be smaller than about 1e-7 |A| |x|, which is up to 1e-7 |A| /
    damping times |b|, however small `tol` is. Such a run ends when it no longer gains.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # the diagonal 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> result = curvature.solve(hessian, jnp.ones(8), damping=1.0)
      >>> print(result.solution, result.converged)  # 1/2, ..., 1/9
      [0.5   0.333 0.25  0.2   0.167 0.143 0.125 0.111] True

    Args:
      operator: A, symmetric, of order n.
      vector: b, a tree like the parameters; or k of them, a tree whose leaves have a leading axis
        k. These are multiplied together, which on a stream is one pass for all.
      damping: added to the diagonal, not negative, in the units of the eigenvalues: those of the
        curvature of the mean loss. A damping for the sum over N examples is N times too large here;
        that of a prior of precision c is c / N.
      method: "cg": conjugate gradients, for positive definite A + damping I; they stop at negative
        curvature and say so. "minres": for any symmetric matrix; three vectors more in memory. Of a
        singular system that has no solution it finds one of the least residual, which has not
        converged.
      preconditioner: an operator of the same space near the inverse of A + damping I up to a
        factor, positive definite, as from `jacobi_preconditioner` and `low_rank_preconditioner`.
        None: none.
      tol: relative tolerance, positive: the residual norm over that of b.
      max_matvecs: limit of the number of products. Default: 10 n + 20, at most 1000.
      lower_bound: the least that an eigenvalue of A can be, if the caller knows: 0 for the
        Gauss-Newton matrix of a loss that is convex in the outputs, as cross-entropy and squared
        error are. None: what holds by construction, 0 for `fisher`, `empirical_fisher` and
        `dropout_covariance`, with whatever the algebra of operators makes of it; nothing for
        others.
      callback: called as callback(products, max_matvecs, progress) after each product, outside of
        `jax.jit`; `progress.result` is the `SolveResult` so far.
      checkpoint: a `Checkpoint`: the state is saved every few products, and after the process was
        killed the same call goes on from there. Not inside of `jax.jit`.

    Returns:
      A `SolveResult`. Check `converged`. A zero b has the solution 0.

    Raises:
      ValueError: `vector` does not fit the operator or is not finite, an argument is out of its
        range, `preconditioner` is of another space or seen not to be positive definite, or the
        checkpoint is of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` is the `SolveResult` so far.

    References:
      M. Hestenes, E. Stiefel (1952), Methods of conjugate gradients for solving linear systems. C.
      Paige, M. Saunders (1975), Solution of sparse indefinite systems of linear equations, SIAM J.
      Numerical Analysis 12(4). The last product and the bound are ours.
    """
    solver = solve_solver(
        operator, vector, damping=damping, method=method, preconditioner=preconditioner, tol=tol,
        max_matvecs=max_matvecs, lower_bound=lower_bound,
    )  # fmt: skip
    return run(solver, callback=callback, checkpoint=checkpoint)


@checked
def solve_solver(
    operator: Operator,
    vector: Params,
    *,
    damping: ArrayLike = 0.0,
    method: str = "cg",
    preconditioner: Operator | None = None,
    tol: ArrayLike = 1e-4,
    max_matvecs: int | None = None,
    lower_bound: ArrayLike | None = None,
) -> Solver[Tree, SolveResult]:
    """Makes the solver of `solve`, which has the same arguments, to drive by hand.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # the diagonal 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.solve_solver(hessian, jnp.ones(8), damping=1.0)
      >>> print(curvature.run(solver).solution[:4])
      [0.5   0.333 0.25  0.2  ]
    """
    space = operator.space
    leaves = jax.tree.leaves(vector)
    is_block = bool(leaves) and jnp.ndim(leaves[0]) == len(space.shapes[0]) + 1
    like = space.like(jnp.shape(leaves[0])[:1] if is_block else ())
    _checks.finite_tree("vector", _checks.same_tree("vector", vector, like))
    check_system(operator, damping, method, preconditioner, tol)
    if lower_bound is not None:
        _checks.real("lower_bound", lower_bound, finite=True)
    targets = space.ravel_rows(vector) if is_block else space.ravel(vector)[None]
    return systems_solver(
        operator, targets, damping=damping, method=method,
        preconditioner=preconditioner, tol=tol, lower_bound=lower_bound,
        max_matvecs=limit_of(operator, max_matvecs),
        result=functools.partial(_result, is_block=is_block, space=space),
    )  # fmt: skip


def systems_solver(
    operator: Operator,
    targets: jax.Array,
    *,
    damping: ArrayLike,
    method: str,
    preconditioner: Operator | None,
    tol: ArrayLike,
    max_matvecs: int,
    lower_bound: ArrayLike | None,
    result: Callable[[Solutions], Result],
) -> Solver[SystemsState, Result]:
    """The solver of (A + damping I) x = b for the rows b of `targets`.

    Args:
      operator: A.
      targets: (k, length), vectors of its space.
      damping: not negative.
      method: of `METHODS`.
      preconditioner: of the same space, positive definite; None: none.
      tol: residual norm that is small enough, over that of the right side.
      max_matvecs: limit of the number of products of each system.
      lower_bound: of the eigenvalues of A; None: what is known by its construction.
      result: `Solutions` -> the result of the public function.
    """
    space = operator.space
    fixed = {"space": space, "method": method, "max_matvecs": max_matvecs}
    parts = {} if preconditioner is None else preconditioner.facts()
    told = {f"preconditioner.{part}": fact for part, fact in parts.items()}

    def init() -> SystemsState:
        numbers = jnp.asarray(damping, space.dtype), jnp.asarray(tol, space.dtype)
        return space.replicate(_systems.begin(targets, *numbers, preconditioner, **fixed))

    def update(state: SystemsState, images: jax.Array) -> SystemsState:
        operands = state, images, preconditioner
        advance, verify = (
            functools.partial(step, **fixed) for step in (_systems.advance, _systems.verify)
        )
        return _loops.switch(
            state.checking.astype(jnp.int32),
            [lambda operands: advance(*operands), lambda operands: verify(*operands)],
            operands,
        )

    def found(state: SystemsState) -> Result:
        # Bounds that nobody knows are infinite, also where that is forbidden.
        with jax.debug_nans(False), jax.debug_infs(False):
            least = known_bound(operator) if lower_bound is None else lower_bound
            least = jnp.asarray(least, space.dtype)
            return result(_systems.solutions(state, least, space, operator.eps))

    return Solver(
        name="solve",
        operator=operator,
        arguments={
            "vectors": targets, "damping": damping, "method": method, "tol": tol,
            "preconditioner": preconditioner is not None, **told,
        },
        init=init,
        vectors=functools.partial(_systems.vectors, space=space),
        update=update,
        done=_systems.is_done,
        result=found,
        max_steps=max_matvecs,
        lower=(),
        block=targets.shape[0],
        charge=lambda state, images, errors: state._replace(
            errors=jnp.broadcast_to(errors, state.norms.shape).astype(state.norms.dtype)
        ),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("is_block", "space"))
def _result(found: Solutions, *, is_block: bool, space: Space) -> SolveResult:
    result = SolveResult(
        solution=space.unravel_rows(found.solutions),
        residual_norm=found.residual_norms,
        error_bound=found.error_bounds,
        num_matvecs=found.num_matvecs,
        converged=found.converged,
        negative_curvature=found.bent,
        direction=space.unravel_rows(found.directions),
        curvature=found.curvatures,
    )
    if is_block:
        return result
    return jax.tree.map(lambda leaf: leaf[0] if leaf.ndim else leaf, result)


def check_system(
    operator: Operator,
    damping: ArrayLike,
    method: str,
    preconditioner: Operator | None,
    tol: ArrayLike,
) -> None:
    """Checks what a system is solved with.

    Raises:
      ValueError: `damping` is negative or `tol` not positive, `method` is unknown, or
        `preconditioner` is of another space or seen not to be positive definite.
    """
    _checks.number("damping", damping)
    _checks.number("tol", tol, above_zero=True)
    _checks.choice("method", method, tuple(METHODS))
    if preconditioner is None:
        return
    space = operator.space
    if preconditioner.space != space:
        raise ValueError(
            f"`preconditioner` must be of the operator's space, got shapes "
            f"{preconditioner.space.like()} on {preconditioner.space.mesh} instead of "
            f"{space.like()} on {space.mesh}."
        )
    if not _loops.is_concrete(operator, preconditioner):
        return
    energy = float(_energy(preconditioner))
    if not energy > 0:
        raise ValueError(
            f"`preconditioner` must be positive definite, got r'P r = {energy:.2g} for a random r "
            "of unit norm."
        )


def limit_of(operator: Operator, max_matvecs: int | None) -> int:
    """The limit of the number of products."""
    if max_matvecs is None:
        return min(_TIMES * operator.size + _FEWEST, _MOST)
    return _checks.integer("max_matvecs", max_matvecs)


@jax.jit
def _energy(preconditioner: Operator) -> jax.Array:
    space = preconditioner.space
    vector = space.normal(jax.random.key(0))
    vector = vector / space.norm(vector)
    return space.inner(vector, preconditioner.product(vector))
