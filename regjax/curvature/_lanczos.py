"""The Lanczos recurrence with full re-orthogonalisation, at about the cost of one pass.

The basis is stored as rows (rows, n). Each new direction is made orthogonal to the filled rows
only, in blocks of rows that stay in the cache between the two uses of a block (inner products,
then subtraction), and once more where the norm dropped by more than 1/sqrt(2), which is when
rounding can have spoilt the first pass (Daniel, Gragg, Kaufman, Stewart 1976). Without this even
float64 invents copies of eigenvalues.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _checks, _loops, _tree
from regjax.curvature._operators import Operator, from_matvec, product

# A block of rows is read twice; this many bytes of it stay near the core (8 rows at n = 270k).
_BLOCK_BYTES = 2**23
_MAX_BLOCK_ROWS = 64
# A norm below this many units of rounding of the matrix is rounding itself: the space is invariant.
_BREAKDOWN = 8


class Krylov(NamedTuple):
    """An orthonormal basis Q that grows by one row a product, with Q A Q'.

    Attributes:
      basis: (rows, n), the first `filled` rows hold it.
      projected: (rows, rows), Q A Q' as measured by the inner products, zero beyond `filled`.
      lost: (rows,), for each row the norm of the part of A q outside of the basis that was
        dropped when a fresh direction was taken.
      direction: (n,), the next row, of unit norm, or zero if the basis spans the whole space.
      beta: (), norm of the part of the last A q outside of the basis, along `direction`.
      filled: (), int32, number of filled rows.
      broke_down: (), bool, whether the last `beta` was at rounding level.
      key: typed key of the fresh directions.
    """

    basis: jax.Array
    projected: jax.Array
    lost: jax.Array
    direction: jax.Array
    beta: jax.Array
    filled: jax.Array
    broke_down: jax.Array
    key: jax.Array


class LanczosResult(NamedTuple):
    """A Q' = Q' T + residual e', T tridiagonal, e the last unit vector; m is the step limit.

    Attributes:
      alphas: (m,), diagonal of T; zero beyond `num_steps`.
      betas: (m - 1,), off-diagonal of T.
      basis: (m, n), rows q of Q, orthonormal; zero beyond `num_steps`.
      num_steps: (), int32, number of steps done: below m only after a breakdown without `key`.
      residual: (n,), the part of the last A q outside of the basis.
    """

    alphas: jax.Array
    betas: jax.Array
    basis: jax.Array
    num_steps: jax.Array
    residual: jax.Array


def lanczos(
    matvec: Operator | Callable[[Any], Any],
    start: Any,
    num_steps: int,
    *,
    key: jax.Array | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> LanczosResult:
    """Tridiagonalises a symmetric matrix on the Krylov space of `start`.

    Args:
      matvec: an `Operator`, or v -> A v on trees or arrays like `start`.
      start: the first direction, tree or array with n scalars; need not be of unit norm.
      num_steps: number of products m, at most n. Compile time does not depend on it.
      key: typed key of the fresh directions with which the recurrence goes on after a breakdown
        (an invariant subspace); None stops there.
      callback: called as callback(step, num_steps) after each step when the host drives.

    Returns:
      A `LanczosResult`. In float32 the rows are orthogonal to 2e-6, also on rank-deficient
      matrices.

    Raises:
      ValueError: `num_steps` is not between 1 and n, or `start` does not fit the operator.
      Interrupted: Ctrl-C; its `.result` holds the steps done.

    References:
      J. Daniel, W. Gragg, L. Kaufman, G. Stewart (1976), Reorthogonalization and stable algorithms
      for updating the Gram-Schmidt QR factorization, Mathematics of Computation 30(136).
    """
    operator = matvec if isinstance(matvec, Operator) else from_matvec(matvec, start)
    stops = key is None

    def result(state: Krylov) -> LanczosResult:
        return lanczos_result(state, num_steps)

    krylov = _loops.repeat_until(
        lanczos_step,
        lanczos_init(operator, start, num_steps, key=key),
        operands=operator,
        done=lambda state: (state.filled >= num_steps) | (stops & state.broke_down),
        max_steps=num_steps,
        result=result,
        callback=callback,
    )
    return result(krylov)


def lanczos_init(
    operator: Operator, start: Any, num_steps: int, *, key: jax.Array | None = None
) -> Krylov:
    """The state before the first of `num_steps` steps; arguments as in `lanczos`."""
    _checks.same_tree("start", start, operator.params)
    _checks.integer("num_steps", num_steps, maximum=operator.shape[0])
    if key is not None:
        _checks.key("key", key)
    direction = _tree.ravel(start, operator.dtype)
    return empty(direction, num_steps, jax.random.key(0) if key is None else key)


def lanczos_step(operator: Operator, state: Krylov) -> Krylov:
    """One product and one new row; `state` is donated when called from Python."""
    return expand(state, product(operator, state.direction))


def lanczos_result(state: Krylov, num_steps: int) -> LanczosResult:
    """The factorisation after the steps done so far."""
    projected = state.projected[:num_steps, :num_steps]
    return LanczosResult(
        alphas=jnp.diagonal(projected),
        betas=jnp.diagonal(projected, 1),
        basis=state.basis[:num_steps],
        num_steps=state.filled,
        residual=state.direction * state.beta,
    )


def empty(direction: jax.Array, num_rows: int, key: jax.Array) -> Krylov:
    """A basis without rows whose first one will be `direction`, made of unit norm."""
    rows = _padded(num_rows, block_rows(num_rows, direction.size, direction.dtype))
    zero = jnp.zeros((), direction.dtype)
    return Krylov(
        basis=jnp.zeros((rows, direction.size), direction.dtype),
        projected=jnp.zeros((rows, rows), direction.dtype),
        lost=jnp.zeros(rows, direction.dtype),
        direction=_unit(direction, jnp.linalg.norm(direction)),
        beta=zero,
        filled=jnp.int32(0),
        broke_down=jnp.bool_(False),
        # The steps donate their state: it must not hold the caller's own key.
        key=jax.random.fold_in(key, 0),
    )


def block_rows(num_rows: int, size: int, dtype: Any) -> int:
    """Rows that one block of the re-orthogonalisation takes."""
    fitting = _BLOCK_BYTES // (size * jnp.dtype(dtype).itemsize)
    return max(1, min(num_rows, fitting, _MAX_BLOCK_ROWS))


def absorb(krylov: Krylov, image: jax.Array) -> Krylov:
    """The basis with `direction` as a new row, given `image` = A direction."""
    filled = krylov.filled
    basis = lax.dynamic_update_index_in_dim(krylov.basis, krylov.direction, filled, 0)
    residual, coefficients, beta = _orthogonal_part(basis, filled + 1, image)
    projected = krylov.projected.at[:, filled].set(coefficients).at[filled, :].set(coefficients)
    rounding = _BREAKDOWN * jnp.finfo(beta.dtype).eps * jnp.max(jnp.abs(projected))
    krylov = krylov._replace(
        basis=basis,
        projected=projected,
        direction=_unit(residual, beta),
        beta=beta,
        filled=filled + 1,
        broke_down=beta <= rounding,
    )
    return redirect(krylov, krylov.broke_down)


expand = jax.jit(absorb, donate_argnums=0)


def redirect(krylov: Krylov, condition: jax.Array) -> Krylov:
    """Where `condition` holds, drops the residual and takes a random direction instead."""
    exhausted = krylov.filled >= krylov.direction.size

    def fresh(_: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        key, subkey = jax.random.split(krylov.key)
        noise = jax.random.normal(subkey, krylov.direction.shape, krylov.direction.dtype)
        noise = noise / jnp.linalg.norm(noise)
        noise, _, norm = _orthogonal_part(krylov.basis, krylov.filled, noise)
        direction = jnp.where(exhausted, jnp.zeros_like(noise), _unit(noise, norm))
        lost = krylov.lost.at[krylov.filled - 1].add(krylov.beta)
        return direction, lost, jnp.zeros_like(krylov.beta), key

    kept = (krylov.direction, krylov.lost, krylov.beta, krylov.key)
    # The basis stays out of the branches: a branch that returns it copies it.
    direction, lost, beta, key = lax.cond(condition, fresh, lambda _: kept, None)
    return krylov._replace(direction=direction, lost=lost, beta=beta, key=key)


def _orthogonal_part(
    basis: jax.Array, num_rows: jax.Array, vector: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`vector` less its part in the filled rows; its coefficients (rows,); its norm."""
    # The two newest rows hold nearly all of A q. They go first, so that the norm's drop in the
    # pass over all rows measures what orthogonality was lost and nothing else.
    vector, recent = _subtract_rows(basis, jnp.maximum(num_rows - 2, 0), 2, num_rows, vector)
    norm = jnp.linalg.norm(vector)
    vector, first = _pass(basis, num_rows, vector)
    reduced = jnp.linalg.norm(vector)

    def again(_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        twice, second = _pass(basis, num_rows, vector)
        return twice, recent + first + second, jnp.linalg.norm(twice)

    return lax.cond(
        reduced < norm / jnp.sqrt(jnp.asarray(2, norm.dtype)),
        again,
        lambda _: (vector, recent + first, reduced),
        None,
    )


def _pass(basis: jax.Array, num_rows: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One pass of block Gram-Schmidt over the filled rows."""
    rows = block_rows(basis.shape[0], basis.shape[1], basis.dtype)

    def subtract(block: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
        vector, coefficients = carry
        vector, part = _subtract_rows(basis, block * rows, rows, num_rows, vector)
        return vector, coefficients + part

    zeros = jnp.zeros(basis.shape[0], basis.dtype)
    return lax.fori_loop(0, (num_rows + rows - 1) // rows, subtract, (vector, zeros))


def _subtract_rows(
    basis: jax.Array, start: jax.Array, length: int, num_rows: jax.Array, vector: jax.Array
) -> tuple[jax.Array, jax.Array]:
    length = min(length, basis.shape[0])
    rows = lax.dynamic_slice_in_dim(basis, start, length)
    filled = start + jnp.arange(length, dtype=start.dtype) < num_rows
    part = jnp.where(filled, rows @ vector, 0)
    coefficients = lax.dynamic_update_slice_in_dim(
        jnp.zeros(basis.shape[0], basis.dtype), part, start, 0
    )
    return vector - part @ rows, coefficients


def _unit(vector: jax.Array, norm: jax.Array) -> jax.Array:
    """`vector` / `norm`, or zeros where the norm is zero."""
    safe = jnp.where(norm > 0, norm, 1)
    return jnp.where(norm > 0, vector / safe, jnp.zeros_like(vector))


def _padded(num_rows: int, block: int) -> int:
    return -(-num_rows // block) * block
