"""The Lanczos recurrence with full re-orthogonalisation, at about the cost of one pass.

Each new direction is made orthogonal to the filled blocks of rows only, and once more where the
norm dropped by more than 1/sqrt(2), which is when rounding can have spoilt the first pass (Daniel,
Gragg, Kaufman, Stewart 1976). Without this even float64 invents copies of eigenvalues.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from regjax import _checks, _tree
from regjax.curvature import _allocation, _basis, _checkpoint
from regjax.curvature._accumulation import small_dtype
from regjax.curvature._operators import Operator, from_matvec, product
from regjax.curvature._precision import precisely

# A norm below this many units of rounding of the matrix is rounding itself: the space is invariant.
_BREAKDOWN = 8


class Krylov(NamedTuple):
    """An orthonormal basis Q that grows by one row a product, with Q A Q'.

    Attributes:
      basis: rows (rows, n), the first `filled` of which hold it.
      projected: (rows, rows), Q A Q' as measured by the inner products, zero beyond `filled`.
      lost: (rows,), for each row the norm of the part of A q outside of the basis that was
        dropped when a fresh direction was taken.
      newest: (n,), the last row, or zeros after a change of basis.
      direction: (n,), the next row, of unit norm, or zero if the basis spans the whole space.
      beta: (), norm of the part of the last A q outside of the basis, along `direction`.
      filled: (), int32, number of filled rows.
      broke_down: (), bool, whether the last `beta` was at rounding level.
      key: typed key of the fresh directions.
    """

    basis: _basis.Basis
    projected: jax.Array
    lost: jax.Array
    newest: jax.Array
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


class RitzResult(NamedTuple):
    """What m Lanczos steps know of the spectrum: the eigenpairs of T.

    Attributes:
      values: (m,), Ritz values, ascending; NaN, at the front, for steps that were not done.
      residual_norms: (m,), of the Ritz pairs: an eigenvalue lies within it, up to rounding; NaN as
        above.
      weights: (m,), the squared component of the start along each Ritz vector, which is its weight
        in Gauss quadrature; sum 1, 0 as above.
      vectors: (m, m), columns: the Ritz vectors in the basis, `basis.T @ vectors` in full.
    """

    values: jax.Array
    residual_norms: jax.Array
    weights: jax.Array
    vectors: jax.Array


def lanczos(
    matvec: Operator | Callable[[Any], Any],
    start: Any,
    num_steps: int,
    *,
    key: jax.Array | None = None,
    accumulation: str | None = None,
    callback: Callable[[int, int], None] | None = None,
    checkpoint: _checkpoint.Checkpoint | None = None,
) -> LanczosResult:
    """Tridiagonalises a symmetric matrix on the Krylov space of `start`.

    Args:
      matvec: an `Operator`, or v -> A v on trees or arrays like `start`.
      start: the first direction, tree or array with n scalars; need not be of unit norm.
      num_steps: number of products m, at most n. Compile time does not depend on it.
      key: typed key of the fresh directions with which the recurrence goes on after a breakdown
        (an invariant subspace); None stops there.
      accumulation: how inner products of vectors (n,) are summed. None: in their dtype; in float32
        eigenvalues are off by some units of its rounding. "compensated": with the error of each
        addition carried along. "float64": in float64, which `alphas` and `betas` have too; the
        basis stays as it is, and JAX must have float64 enabled.
      callback: called as callback(step, num_steps) after each step when the host drives.
      checkpoint: where the state is kept every few products, and found again by the same call after
        the process was killed; only when the host drives.

    Returns:
      A `LanczosResult`. In float32 the rows are orthogonal to 2e-6, also on rank-deficient
      matrices and with ten million parameters.

    Raises:
      ValueError: `num_steps` is not between 1 and n, `start` does not fit the operator, or the
        checkpoint is of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
      Interrupted: Ctrl-C; its `.result` holds the steps done.

    References:
      J. Daniel, W. Gragg, L. Kaufman, G. Stewart (1976), Reorthogonalization and stable algorithms
      for updating the Gram-Schmidt QR factorization, Mathematics of Computation 30(136).
    """
    operator = matvec if isinstance(matvec, Operator) else from_matvec(matvec, start)
    stops = key is None
    init = functools.partial(
        lanczos_init, operator, start, num_steps, key=key, accumulation=accumulation
    )

    def result(state: Krylov) -> LanczosResult:
        return lanczos_result(state, num_steps)

    names = ("num_steps",)
    with _allocation.explained(_allocation.Plan("lanczos", operator, init, result, names)):
        krylov = _checkpoint.repeat_until(
            lanczos_step,
            init(),
            operands=operator,
            done=lambda state: (state.filled >= num_steps) | (stops & state.broke_down),
            max_steps=num_steps,
            result=result,
            callback=callback,
            checkpoint=checkpoint,
            problem=_checkpoint.Problem(
                "lanczos",
                {
                    "start": start, "num_steps": num_steps, "key": key,
                    "accumulation": accumulation,
                },
                init,
                rows=lambda state: {".basis": (state.filled, 0)},
                krylov=lambda state: state,
            ),
        )  # fmt: skip
        return result(krylov)


def lanczos_init(
    operator: Operator,
    start: Any,
    num_steps: int,
    *,
    key: jax.Array | None = None,
    accumulation: str | None = None,
) -> Krylov:
    """The state before the first of `num_steps` steps; arguments as in `lanczos`."""
    _checks.same_tree("start", start, operator.params)
    _checks.integer("num_steps", num_steps, maximum=operator.shape[0])
    if key is not None:
        _checks.key("key", key)
    direction = _tree.ravel(start, operator.dtype)
    key = jax.random.key(0) if key is None else key
    return empty(direction, num_steps, key, operator.columns.mesh, accumulation)


def lanczos_step(operator: Operator, state: Krylov) -> Krylov:
    """One product and one new row; `state` is donated when called from Python."""
    return expand(state, product(operator, state.direction))


def lanczos_result(state: Krylov, num_steps: int) -> LanczosResult:
    """The factorisation after the steps done so far."""
    projected = state.projected[:num_steps, :num_steps]
    return LanczosResult(
        alphas=jnp.diagonal(projected),
        betas=jnp.diagonal(projected, 1),
        basis=_basis.to_array(state.basis, num_steps),
        num_steps=state.filled,
        residual=state.direction * state.beta.astype(state.direction.dtype),
    )


@jax.jit
@precisely
def ritz_pairs(result: LanczosResult) -> RitzResult:
    """The eigenpairs of the tridiagonal matrix of a Lanczos run.

    Args:
      result: from `lanczos`.

    Returns:
      A `RitzResult`.
    """
    steps = jnp.arange(result.alphas.size, dtype=jnp.int32)
    done = steps < result.num_steps
    matrix = jnp.diag(result.alphas) + jnp.diag(result.betas, 1) + jnp.diag(result.betas, -1)
    matrix = jnp.where(done[:, None] & done[None], matrix, 0)
    # Steps that were not done get an eigenvalue below all others, so that they mix with none.
    norm = jnp.linalg.norm(matrix)
    below = -2 * jnp.where(norm > 0, norm, 1)
    values, vectors = jnp.linalg.eigh(matrix + jnp.diag(jnp.where(done, 0, below)))
    # eigh sorts: those come first.
    valid = steps >= steps.size - result.num_steps
    beta = jnp.linalg.norm(result.residual).astype(values.dtype)
    residual_norms = beta * jnp.abs(vectors[result.num_steps - 1])
    return RitzResult(
        values=jnp.where(valid, values, jnp.nan),
        residual_norms=jnp.where(valid, residual_norms, jnp.nan),
        weights=jnp.where(valid, vectors[0] ** 2, 0),
        vectors=jnp.where(valid[None], vectors, 0),
    )


def empty(
    direction: jax.Array,
    num_rows: int,
    key: jax.Array,
    mesh: Mesh | None = None,
    accumulation: str | None = None,
) -> Krylov:
    """A basis without rows whose first one will be `direction`, made of unit norm."""
    small = small_dtype(direction.dtype, accumulation)
    basis = _basis.zeros(num_rows, direction.size, direction.dtype, mesh, accumulation)
    rows, zero = basis.num_rows, jnp.zeros((), small)
    krylov = Krylov(
        basis=basis,
        projected=jnp.zeros((rows, rows), small),
        lost=jnp.zeros(rows, small),
        newest=jnp.zeros_like(direction),
        direction=_unit(direction, jnp.linalg.norm(direction)),
        beta=zero,
        filled=jnp.int32(0),
        broke_down=jnp.bool_(False),
        # The steps donate their state: it must not hold the caller's own key.
        key=jax.random.fold_in(key, 0),
    )
    return basis.columns.copied(krylov)


@precisely
def absorb(krylov: Krylov, image: jax.Array) -> Krylov:
    """The basis with `direction` as a new row, given `image` = A direction."""
    last, row = krylov.filled, krylov.direction
    # The two newest rows hold nearly all of A q. They go first, so that the coefficients of the
    # pass over all rows measure what orthogonality was lost and nothing else.
    dot = functools.partial(_basis.vdot, krylov.basis)
    before, here = dot(krylov.newest, image), dot(row, image)
    image = image - before.astype(row.dtype) * krylov.newest - here.astype(row.dtype) * row
    basis = _basis.put(krylov.basis, last, row)
    residual, coefficients = _basis.outside(basis, last + 1, image)
    beta = jnp.sqrt(dot(residual, residual))
    spoilt = beta < jnp.linalg.norm(coefficients)  # the norm dropped by more than 1/sqrt(2)
    coefficients = coefficients.at[last].add(here)
    coefficients = coefficients.at[last - 1].add(jnp.where(last > 0, before, 0))
    largest = jnp.maximum(jnp.max(jnp.abs(krylov.projected)), jnp.max(jnp.abs(coefficients)))
    rounding = _BREAKDOWN * float(jnp.finfo(image.dtype).eps) * largest

    def again(_: Any) -> tuple[jax.Array, ...]:
        twice, second = _basis.outside(basis, last + 1, residual)
        beta = jnp.sqrt(dot(twice, twice))
        broke_down = beta <= rounding
        direction, key = lax.cond(
            broke_down,
            lambda _: _fresh(basis, last + 1, krylov.key),
            lambda _: (_unit(twice, beta), krylov.key),
            None,
        )
        return direction, coefficients + second, beta, broke_down, key

    def at_once(_: Any) -> tuple[jax.Array, ...]:
        return _unit(residual, beta), coefficients, beta, jnp.bool_(False), krylov.key

    # One branch for all that is rare; what a branch hands through, it copies.
    direction, coefficients, beta, broke_down, key = lax.cond(
        spoilt | (beta <= rounding), again, at_once, None
    )
    return Krylov(
        basis=basis,
        projected=krylov.projected.at[:, last].set(coefficients).at[last, :].set(coefficients),
        lost=krylov.lost.at[last].add(jnp.where(broke_down, beta, 0)),
        newest=row,
        direction=direction,
        beta=jnp.where(broke_down, 0, beta),
        filled=last + 1,
        broke_down=broke_down,
        key=key,
    )


expand = jax.jit(absorb, donate_argnums=0)


def redirect(krylov: Krylov) -> Krylov:
    """Drops the residual, charged to `lost`, and takes a random direction instead."""
    direction, key = _fresh(krylov.basis, krylov.filled, krylov.key)
    return krylov._replace(
        direction=direction,
        lost=krylov.lost.at[krylov.filled - 1].add(krylov.beta),
        beta=jnp.zeros_like(krylov.beta),
        key=key,
    )


def _fresh(basis: _basis.Basis, filled: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A random direction orthogonal to the filled rows, zero if there is none; the next key."""
    key, subkey = jax.random.split(key)
    size = basis.columns.size
    noise = jax.random.normal(subkey, (size,), basis.blocks[0].dtype)
    for _ in range(2):
        noise, _ = _basis.outside(basis, filled, noise / jnp.linalg.norm(noise))
    exhausted = filled >= size
    noise = jnp.where(exhausted, jnp.zeros_like(noise), noise)
    return _unit(noise, jnp.linalg.norm(noise)), key


def _unit(vector: jax.Array, norm: jax.Array) -> jax.Array:
    """`vector` / `norm`, or zeros where the norm is zero."""
    norm = norm.astype(vector.dtype)
    safe = jnp.where(norm > 0, norm, 1)
    return jnp.where(norm > 0, vector / safe, jnp.zeros_like(vector))
