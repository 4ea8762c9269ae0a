"""The spectral density: extreme eigenpairs exactly, the rest by stochastic Lanczos quadrature.

Plain quadrature spends its accuracy on the few outliers, which a random probe hardly touches. Here
a first Lanczos run finds the extreme pairs; those that converged are taken out, and the probes see
the complement alone. The mass is split exactly: r eigenvalues weigh 1/n each, the complement the
rest.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from regjax import _checks, _loops
from regjax._sharding import Columns
from regjax.curvature import _allocation, _basis, _checkpoint, _rounding
from regjax.curvature._accumulation import inner_products, small_dtype
from regjax.curvature._lanczos import Krylov, absorb, empty, expand
from regjax.curvature._measure import DensityResult, spectral_sum
from regjax.curvature._operators import Operator, block_product, product
from regjax.curvature._precision import precisely

# A Ritz pair is taken out when its residual norm is below this share of the largest |Ritz value|.
# Left-over coupling moves no eigenvalue of the complement by more than the residual norm.
_DEFLATION_TOLERANCE = 1e-3


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "key", "deflation", "locked", "eigenvalues", "residual_norms", "num_locked",
        "probes", "nodes", "weights", "num_finished", "num_matvecs",
    ],
    meta_fields=["num_steps", "block", "columns", "accumulation", "product_eps"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class DensityState:
    """The solver between two products: first the deflation, then the probes.

    Attributes:
      key: typed key of the probes.
      deflation: the first run's basis; None once its pairs are locked.
      locked: (r, n), the vectors taken out, zero beyond `num_locked`; divided as `columns` says.
      eigenvalues: (r,). residual_norms: (r,). num_locked: (), int32.
      probes: bases of the probes under way, each leaf with a leading axis of `block`; None before.
      nodes: (P, m). weights: (P, m), each probe of mass 1. num_finished: (), int32, probes done.
      num_matvecs: (), int32, products so far.
      num_steps: m. block: number of probes carried at once.
      columns: whether and how the n columns are divided over devices.
      accumulation: how inner products are summed. product_eps: see `_rounding`.
    """

    key: jax.Array
    deflation: Krylov | None
    locked: jax.Array
    eigenvalues: jax.Array
    residual_norms: jax.Array
    num_locked: jax.Array
    probes: Krylov | None
    nodes: jax.Array
    weights: jax.Array
    num_finished: jax.Array
    num_matvecs: jax.Array
    num_steps: int
    block: int
    columns: Columns
    accumulation: str | None
    product_eps: float


def spectral_density(
    operator: Operator,
    *,
    key: jax.Array,
    num_steps: int = 40,
    num_probes: int = 2,
    deflate: int | None = None,
    accumulation: str | None = None,
    callback: Callable[[int, int], None] | None = None,
    checkpoint: _checkpoint.Checkpoint | None = None,
) -> DensityResult:
    """The spectral density of a symmetric matrix by deflated stochastic Lanczos quadrature.

    Args:
      operator: symmetric, of order n.
      key: typed key of the start and of the probes.
      num_steps: Lanczos steps m a probe, at most n.
      num_probes: number of probes P, Gaussian directions in the complement.
      deflate: products spent on finding extreme eigenpairs to take out, at most n; the vectors
        stay in memory. 0 gives the plain method; None takes 2 `num_steps`.
      accumulation: how inner products of vectors (n,) are summed, as for `lanczos`; with "float64"
        nodes, weights, eigenvalues and what follows from them are float64.
      callback: called as callback(products, total) after each product when the host drives.
      checkpoint: where the state is kept every few products, and found again by the same call after
        the process was killed; only when the host drives.

    Returns:
      A `DensityResult`, after `deflate` + P m products. Multiplying the matrix by c > 0 and
      adding d I maps all nodes and eigenvalues likewise, up to rounding.

    Raises:
      ValueError: an argument is out of its range, or the checkpoint is of another problem.
      CheckpointError: a file of the checkpoint cannot be written.
      MemoryError: the device has no room; names what to lower, with the bytes that are needed.
      Interrupted: Ctrl-C; its `.result` is the result of the probes finished so far.

    References:
      S. Ubaru, J. Chen, Y. Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
      quadrature, SIAM J. Matrix Anal. Appl. 38(4). The deflation is our addition.
    """
    init = functools.partial(
        spectral_density_init,
        operator, key=key, num_steps=num_steps, num_probes=num_probes, deflate=deflate,
        accumulation=accumulation,
    )  # fmt: skip
    names = ("num_steps", "deflate", "num_probes")
    beside = spectral_density_beside
    with _allocation.explained(_allocation.Plan("spectral_density", operator, init, beside, names)):
        state = init()
        first = 0 if state.deflation is None else state.locked.shape[0]
        second = -(-num_probes // state.block) * num_steps
        run = functools.partial(
            _checkpoint.repeat_until,
            operands=operator,
            done=lambda state: jnp.bool_(False),
            result=_result_so_far,
            callback=callback,
            checkpoint=checkpoint,
            problem=_checkpoint.Problem(
                "spectral_density",
                {
                    "key": key, "num_steps": num_steps, "num_probes": num_probes,
                    "deflate": first, "probes at once": state.block, "accumulation": accumulation,
                },
                init,
                _rows,
                krylov=lambda state: state.probes if state.deflation is None else state.deflation,
                later=_lock if first else None,
            ),
        )  # fmt: skip
        if _loops.is_concrete(operator, state):
            state = run(spectral_density_step, state, max_steps=first + second)
        else:
            if first:
                state = _lock(run(_deflation_step, state, max_steps=first))
            state = run(_probe_step, state, max_steps=second)
        return spectral_density_result(state)


def spectral_density_init(
    operator: Operator,
    *,
    key: jax.Array,
    num_steps: int = 40,
    num_probes: int = 2,
    deflate: int | None = None,
    accumulation: str | None = None,
) -> DensityState:
    """The state before the first product; arguments as in `spectral_density`."""
    size, dtype = operator.shape[0], operator.dtype
    small = small_dtype(dtype, accumulation)
    _checks.integer("num_steps", num_steps, maximum=size)
    _checks.integer("num_probes", num_probes)
    num_rows = min(2 * num_steps, size) if deflate is None else deflate
    _checks.integer("deflate", num_rows, minimum=0, maximum=size)
    key, start_key, krylov_key = jax.random.split(_checks.key("key", key), 3)
    # One at a time on CPU, where a block of vectors costs as much as its members.
    block = num_probes if operator.takes_blocks else 1
    state = DensityState(
        key=key,
        deflation=None,
        locked=operator.columns.zeros(num_rows, dtype),
        eigenvalues=jnp.full(num_rows, jnp.nan, small),
        residual_norms=jnp.full(num_rows, jnp.nan, small),
        num_locked=jnp.int32(0),
        probes=None,
        nodes=jnp.zeros((num_probes, num_steps), small),
        weights=jnp.zeros((num_probes, num_steps), small),
        num_finished=jnp.int32(0),
        num_matvecs=jnp.int32(0),
        num_steps=num_steps,
        block=block,
        columns=operator.columns,
        accumulation=accumulation,
        product_eps=_rounding.product_eps(operator),
    )
    state = state.columns.copied(state)
    if num_rows == 0:
        return _new_probes(state)
    start = jax.random.normal(start_key, (size,), dtype)
    krylov = empty(start, num_rows, krylov_key, state.columns.mesh, accumulation)
    return dataclasses.replace(state, deflation=krylov)


def spectral_density_step(operator: Operator, state: DensityState) -> DensityState:
    """One product (one of each probe of a block); host-driven. `state` is donated."""
    if state.deflation is None:
        return _probe_step(operator, state)
    state = _deflation_step(operator, state)
    is_last = int(state.num_matvecs) == state.locked.shape[0]
    return _lock(state) if is_last else state


def spectral_density_result(state: DensityState) -> DensityResult:
    """The measure of the probes finished so far; NaN weights before the first one."""
    size, dtype = state.columns.size, state.nodes.dtype
    rest = (size - state.num_locked).astype(dtype) / size
    finished = jnp.arange(state.nodes.shape[0], dtype=jnp.int32) < state.num_finished
    share = jnp.where(state.num_finished > 0, rest / state.num_finished.astype(dtype), jnp.nan)
    inside = jnp.arange(state.eigenvalues.size, dtype=jnp.int32) < state.num_locked
    result = DensityResult(
        nodes=state.nodes,
        weights=jnp.where(finished[:, None], state.weights * share, 0),
        eigenvalues=state.eigenvalues,
        eigenvalue_weights=jnp.where(inside, jnp.asarray(1 / size, dtype), 0),
        residual_norms=state.residual_norms,
        num_eigenvalues=state.num_locked,
        trace=jnp.zeros((), dtype),
        standard_error=jnp.zeros((), dtype),
        num_matvecs=state.num_matvecs,
        size=jnp.int32(size),
    )
    total = spectral_sum(result, lambda values: values)
    return result._replace(trace=total.value, standard_error=total.standard_error)


def spectral_density_beside(state: DensityState) -> Any:
    """The largest that is made while `state` is there: the state of the probes, or the result."""
    return spectral_density_result(state) if state.deflation is None else _lock(state)


def _result_so_far(state: DensityState) -> DensityResult:
    return spectral_density_result(state if state.deflation is None else _lock(state))


def _rows(state: DensityState) -> dict[str, tuple[Any, Any]]:
    """The rows of the state, for checkpoints: number filled, and what tells one lot from another.

    The locked rows are zero until they are all there.
    """
    if state.deflation is not None:
        return {".deflation.basis": (state.deflation.filled, 0), ".locked": (0, 0)}
    probes = (_probes(state).filled[0], state.num_finished)
    return {".locked": (state.locked.shape[0], 1), ".probes.basis": probes}


def _deflation_step(operator: Operator, state: DensityState) -> DensityState:
    krylov = cast(Krylov, state.deflation)
    krylov = expand(krylov, product(operator, krylov.direction))
    return dataclasses.replace(state, deflation=krylov, num_matvecs=state.num_matvecs + 1)


def _lock(state: DensityState) -> DensityState:
    """Takes the converged Ritz pairs out and starts the probes in their complement."""
    return _new_probes(dataclasses.replace(_locked(state), deflation=None))


@jax.jit
@precisely
def _locked(state: DensityState) -> DensityState:
    krylov, num_rows = cast(Krylov, state.deflation), state.locked.shape[0]
    values, vectors = jnp.linalg.eigh(krylov.projected[:num_rows, :num_rows])
    values, vectors = values[::-1], vectors[:, ::-1]
    bounds = jnp.abs(krylov.beta * vectors[-1]) + krylov.lost[:num_rows] @ jnp.abs(vectors)
    take = bounds <= _DEFLATION_TOLERANCE * jnp.max(jnp.abs(values))
    # A run cut short by Ctrl-C has empty rows, whose pairs are nobody's.
    take &= krylov.filled == num_rows
    order = jnp.argsort(~take, stable=True)
    bounds = jnp.maximum(bounds, _rounding.floor(values, state.product_eps))
    count = jnp.sum(take, dtype=jnp.int32)
    inside = jnp.arange(num_rows, dtype=jnp.int32) < count
    weights = jnp.zeros((krylov.basis.num_rows, num_rows), values.dtype)
    weights = weights.at[:num_rows].set(jnp.where(inside[None], vectors[:, order], 0))
    return dataclasses.replace(
        state,
        locked=_basis.combine(krylov.basis, weights),
        eigenvalues=jnp.where(inside, values[order], jnp.nan),
        residual_norms=jnp.where(inside, bounds[order], jnp.nan),
        num_locked=count,
    )


@jax.jit
@precisely
def _new_probes(state: DensityState) -> DensityState:
    key, probe_key, krylov_key = jax.random.split(state.key, 3)
    shape, dtype = (state.block, state.columns.size), state.locked.dtype
    starts = _outside(state, jax.random.normal(probe_key, shape, dtype))
    make = jax.vmap(
        lambda start, key: empty(
            start, state.num_steps, key, state.columns.mesh, state.accumulation
        )
    )
    probes = make(starts, jax.random.split(krylov_key, state.block))
    return dataclasses.replace(state, key=key, probes=probes)


def _probe_step(operator: Operator, state: DensityState) -> DensityState:
    state = _absorb_probes(state, block_product(operator, _probes(state).direction))
    return _loops.branch(_probes(state).filled[0] == state.num_steps, _collect, state)


def _probes(state: DensityState) -> Krylov:
    return cast(Krylov, state.probes)


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _absorb_probes(state: DensityState, images: jax.Array) -> DensityState:
    images = _outside(state, images)
    if state.block == 1:
        probes = jax.tree.map(lambda leaf: leaf[0], state.probes)
        probes = jax.tree.map(lambda leaf: leaf[None], absorb(probes, images[0]))
    else:
        probes = jax.vmap(absorb)(_probes(state), images)
    num_matvecs = state.num_matvecs + state.block
    return dataclasses.replace(state, probes=probes, num_matvecs=num_matvecs)


@functools.partial(jax.jit, donate_argnums=0)
@precisely
def _collect(state: DensityState) -> DensityState:
    """Stores the quadrature of the finished probes and starts the next ones."""
    num_steps = state.num_steps
    values, vectors = jnp.linalg.eigh(_probes(state).projected[:, :num_steps, :num_steps])
    start = (state.num_finished, jnp.int32(0))
    state = dataclasses.replace(
        state,
        nodes=jax.lax.dynamic_update_slice(state.nodes, values, start),
        weights=jax.lax.dynamic_update_slice(state.weights, vectors[:, 0, :] ** 2, start),
        num_finished=state.num_finished + state.block,
    )
    return _new_probes(state)


def _outside(state: DensityState, vectors: jax.Array) -> jax.Array:
    """The rows of `vectors` less their part in the locked rows; twice is enough."""

    def outside(vector: jax.Array) -> jax.Array:
        part = inner_products(state.locked, vector, state.columns, state.accumulation)
        return vector - part.astype(vector.dtype) @ state.locked

    vectors = state.columns.divide(vectors)
    for _ in range(2):
        vectors = jax.vmap(outside)(vectors)
    return state.columns.join(vectors)
