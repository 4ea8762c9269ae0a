"""Lanczos: the tridiagonal matrix of a Krylov space, and its basis."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Callback, Params, PRNGKey, Tree
from regjax._on_host import on_host
from regjax._printing import legible
from regjax.curvature._engine import _basis
from regjax.curvature._engine._checkpoint import Checkpoint
from regjax.curvature._engine._driver import run
from regjax.curvature._engine._solver import Solver
from regjax.curvature._krylov import Krylov, charged, empty, expand
from regjax.curvature._operators._operator import Operator


@legible
class LanczosResult(NamedTuple):
    """A Q' = Q' T + residual e', T tridiagonal, e the last unit vector; m is the step limit.

    Attributes:
      alphas: (m,), diagonal of T; zero beyond `num_steps`.
      betas: (m - 1,), off-diagonal of T.
      basis: the rows q of Q: a tree like the parameters with a leading axis m, divided as they are,
        in float32 at least. Orthonormal; zero beyond `num_steps`.
      num_steps: (), int32, number of steps done: below m only after a breakdown without `key`.
      residual: the part of the last A q outside of the basis, a tree like the parameters.
      eps: (), unit of rounding of the narrowest type in a product.
      product_error: (), what the errors of all products add to the norm of a residual where they
        are differences of gradients; otherwise what a breakdown dropped, which is rounding.
    """

    alphas: jax.Array
    betas: jax.Array
    basis: Params
    num_steps: jax.Array
    residual: Params
    eps: jax.Array
    product_error: jax.Array


@checked
def lanczos(
    operator: Operator,
    start: Params,
    num_steps: int,
    *,
    key: PRNGKey | None = None,
    accumulation: str | None = None,
    callback: Callback | None = None,
    checkpoint: Checkpoint | None = None,
) -> LanczosResult:
    """Tridiagonalises a symmetric matrix on the Krylov space of `start`.

        A Q' = Q' T + residual e',   T tridiagonal

    The rows of Q are orthonormal, e is the last unit vector. Every new direction is made orthogonal
    to all others, so that no eigenvalue appears twice by rounding.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> result = curvature.lanczos(hessian, jnp.ones(8), 8)
      >>> print(curvature.ritz_pairs(result).values)  # n steps find all of them
      [1. 2. 3. 4. 5. 6. 7. 8.]

    Args:
      operator: symmetric, of order n.
      start: the first direction, a tree like the parameters; need not be of unit norm. One that is
        zero or not finite gives NaN where it is traced.
      num_steps: number of products m, at most n. Compile time does not depend on it.
      key: typed key for the fresh directions with which the recurrence goes on after a breakdown
        (an invariant subspace); None stops there.
      accumulation: how inner products of vectors (n,) are summed. None: in their dtype; in float32
        eigenvalues are off by some units of its rounding. "compensated": with the error of each
        addition carried along. "float64": in float64, which `alphas` and `betas` have too; the
        basis stays as it is, and JAX must have float64 enabled.
      callback: called as callback(step, num_steps, progress) after each step, outside of `jax.jit`;
        `progress.result` is the `LanczosResult` so far.
      checkpoint: a `Checkpoint`: the state is saved every few products, and after the process was
        killed the same call goes on from there. Not inside of `jax.jit`.

    Returns:
      A `LanczosResult`. In float32 the rows are orthogonal to 2e-6, also on rank-deficient matrices
      and with ten million parameters.

    Raises:
      ValueError: `num_steps` is not between 1 and n, `start` does not fit the operator or is zero
        or not finite, or the checkpoint is of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device is out of memory; the message says how much is needed, and what to
        lower.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`; the message says where to
        look, and `.result` is what there was before.
      Interrupted: Ctrl-C; its `.result` holds the steps done.

    References:
      J. Daniel, W. Gragg, L. Kaufman, G. Stewart (1976), Reorthogonalization and stable algorithms
      for updating the Gram-Schmidt QR factorization, Mathematics of Computation 30(136).
    """
    solver = lanczos_solver(operator, start, num_steps, key=key, accumulation=accumulation)
    return run(solver, callback=callback, checkpoint=checkpoint)


@checked
def lanczos_solver(
    operator: Operator,
    start: Params,
    num_steps: int,
    *,
    key: PRNGKey | None = None,
    accumulation: str | None = None,
) -> Solver[Tree, LanczosResult]:
    """Makes the solver of `lanczos`, which has the same arguments, to drive by hand.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> solver = curvature.lanczos_solver(hessian, jnp.ones(8), 8)
      >>> print(curvature.run(solver).alphas[:3])  # the mean eigenvalue, by symmetry
      [4.5 4.5 4.5]
    """
    space = operator.space
    _checks.direction("start", _checks.same_tree("start", start, space.like()))
    _checks.integer("num_steps", num_steps, maximum=(space.size, _checks.ORDER))
    if key is not None:
        _checks.key("key", key)

    def init() -> Krylov:
        fresh = jax.random.key(0) if key is None else key
        krylov = empty(space, space.ravel(start), num_steps, fresh, accumulation)
        # Traced, what is no direction could not be refused: nothing follows from it.
        first = jnp.where(jnp.any(krylov.direction != 0), krylov.direction, jnp.nan)
        return krylov._replace(direction=first)

    def done(krylov: Krylov) -> jax.Array:
        is_full = krylov.filled >= num_steps
        return is_full | krylov.broke_down if key is None else is_full

    def result(krylov: Krylov) -> LanczosResult:
        alphas, betas, eps, product_error = _numbers(krylov, num_steps, operator.eps)
        residual = krylov.direction * krylov.beta.astype(space.dtype)
        return LanczosResult(
            alphas=alphas,
            betas=betas,
            basis=_basis.to_trees(krylov.basis, num_steps),
            num_steps=krylov.filled,
            residual=space.wide().unravel(krylov.unscaled(residual)),
            eps=eps,
            product_error=product_error,
        )

    return Solver(
        name="lanczos",
        operator=operator,
        arguments={
            "start": start, "num_steps": num_steps, "key": key, "accumulation": accumulation
        },
        init=init,
        vectors=lambda krylov: krylov.direction,
        update=expand,
        done=done,
        result=result,
        max_steps=num_steps,
        lower=("num_steps",),
        charge=charged,
    )  # fmt: skip


@on_host(static=(1, 2), gives_arrays=True)
def _numbers(
    krylov: Krylov, num_steps: int, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The diagonal of T and what is beside it, the unit of rounding, the error of products."""
    projected = krylov.unscaled(krylov.projected[:num_steps, :num_steps])
    error = krylov.unscaled(krylov.blur)
    unit = jnp.asarray(eps, projected.dtype)
    return jnp.diagonal(projected), jnp.diagonal(projected, 1), unit, error
