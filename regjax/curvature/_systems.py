"""Linear systems by recurrences whose residual is checked in the end: the steps of `solve`.

A recurrence carries a residual along, which rounding takes away from the true one. So what it calls
a solution is multiplied once more. Where that shows a residual above the tolerance the recurrence
starts anew from there, as long as the residual at least halves between two such products.

All rows of a block are multiplied at once; one that is done waits for the others.
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _numerics
from regjax._space import Space
from regjax.curvature import _conjugate_gradients, _minres
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precisely

METHODS: dict[str, ModuleType] = {"cg": _conjugate_gradients, "minres": _minres}
# Units of rounding of the narrowest type by which a product may be off, of |A| |x|.
_PRODUCT = 8


class SystemsState(NamedTuple):
    """k systems between two products, those of scale times A + damping I and power times b.

    With these powers of two no square under- or overflows, whatever A and b are.

    Attributes:
      targets: (k, length), the right sides.
      solutions: (k, length), x so far.
      recurrences: those of the method, leaves with a leading axis k.
      powers: (k,), what brings the right sides near one. scales: (k,), what brings the images of
        first directions there; 0 before. preconditioning: (k,), the same of P.
      norms: (k,), of the residuals: true ones where `verified`, else as the recurrences have them.
      goals: (k,), norms that are small enough. last: (k,), the true norms at the last check.
      kept: (k, length), for MINRES the solutions of the last check, zero at first; else None.
      curvatures: (k,), p'Ap / p'p of the last directions. bent: (k,), bool, whether one of them
        was not positive where it must be.
      sizes: (k,), the largest |A p| / |p| of any product.
      errors: (k,), norms of what the last products are off by, where they are differences.
      stopped: (k,), bool, whether no step can be made. finished: (k,), bool, whether all is done.
      checking: (), bool, whether the solutions are multiplied next. verified: (), bool.
      num_matvecs: (), int32, products of each row so far.
      damping: (), what is added to the diagonal.
    """

    targets: jax.Array
    solutions: jax.Array
    recurrences: Any
    powers: jax.Array
    scales: jax.Array
    preconditioning: jax.Array
    norms: jax.Array
    goals: jax.Array
    last: jax.Array
    kept: jax.Array | None
    curvatures: jax.Array
    bent: jax.Array
    sizes: jax.Array
    errors: jax.Array
    stopped: jax.Array
    finished: jax.Array
    checking: jax.Array
    verified: jax.Array
    num_matvecs: jax.Array
    damping: jax.Array


class Solutions(NamedTuple):
    """What is known of k systems; all in the units of the right sides.

    Attributes:
      solutions: (k, length).
      residual_norms: (k,). error_bounds: (k,), infinite where nothing is known.
      converged: (k,), bool.
      bent: (k,), bool. curvatures: (k,), of the last directions. directions: (k, length), unit
        vectors where `bent`, else zeros.
      num_matvecs: (), int32.
    """

    solutions: jax.Array
    residual_norms: jax.Array
    error_bounds: jax.Array
    converged: jax.Array
    bent: jax.Array
    curvatures: jax.Array
    directions: jax.Array
    num_matvecs: jax.Array


@jax.jit
def is_done(state: SystemsState) -> jax.Array:
    """Whether nothing more is to be done."""
    return jnp.all(state.finished)


@functools.partial(jax.jit, static_argnames=("space", "method", "max_matvecs"))
@precisely
def begin(
    targets: jax.Array,
    damping: jax.Array,
    tol: jax.Array,
    preconditioner: Operator | None,
    *,
    space: Space,
    method: str,
    max_matvecs: int,
) -> SystemsState:
    """The state before the first product."""
    powers = _near_one(targets)
    targets = powers[:, None] * targets
    norms = jax.vmap(space.norm)(targets)
    preconditioning = jnp.ones_like(norms)
    if preconditioner is not None:
        preconditioning = _near_one(jax.vmap(preconditioner.product)(targets))
    begin = functools.partial(_start, space, method, preconditioner)
    nothing, no = jnp.zeros_like(norms), jnp.zeros(norms.shape, bool)
    state = SystemsState(
        targets=targets,
        solutions=jnp.zeros_like(targets),
        recurrences=jax.vmap(begin)(targets, preconditioning),
        powers=powers,
        scales=jnp.zeros_like(powers),
        preconditioning=preconditioning,
        norms=norms,
        goals=tol * norms,
        last=norms.copy(),
        kept=jnp.zeros_like(targets) if method == "minres" else None,
        curvatures=nothing,
        bent=no,
        sizes=nothing.copy(),
        errors=nothing.copy(),
        stopped=no.copy(),
        finished=(norms == 0) | ~jnp.isfinite(norms),
        checking=jnp.bool_(max_matvecs == 1),
        verified=jnp.bool_(True),
        num_matvecs=jnp.int32(0),
        damping=damping,
    )
    # The compiler would leave zeros whole on each device.
    is_vector = lambda leaf: leaf.shape[-1:] == (space.length,)
    return jax.tree.map(lambda leaf: space.constrain(leaf) if is_vector(leaf) else leaf, state)


def _near_one(rows: jax.Array) -> jax.Array:
    """The powers of two that bring rows near one; 1 for what has none."""
    powers = _numerics.power_of_two(jnp.max(jnp.abs(rows), 1))
    return jnp.where(powers > 0, powers, 1)


def _start(
    space: Space,
    method: str,
    preconditioner: Operator | None,
    residual: jax.Array,
    power: jax.Array,
) -> Any:
    return METHODS[method].start(space, residual, _scaled(preconditioner, power))


def _scaled(preconditioner: Operator | None, power: jax.Array) -> Operator | None:
    return None if preconditioner is None else power * preconditioner


def _are_in_range(state: SystemsState, held: jax.Array) -> jax.Array:
    """(k,), bool, whether the largest entries of the solutions can be told in their units."""
    here, there = (jnp.max(jnp.abs(rows), 1) for rows in (state.solutions, held))
    return jnp.isfinite(there) & ((there >= float(jnp.finfo(held.dtype).tiny)) | (here == 0))


@functools.partial(jax.jit, static_argnames="space")
def vectors(state: SystemsState, space: Space) -> jax.Array:
    """What is multiplied next."""
    solutions = _rounded(state, space)
    return jnp.where(state.checking, solutions, state.recurrences.direction)


def _rounded(state: SystemsState, space: Space) -> jax.Array:
    """The solutions as trees of the parameters' types can hold them, once they are checked."""
    if all(dtype == space.dtype for dtype in space.dtypes):
        return state.solutions
    held = space.ravel_rows(space.unravel_rows(_unscaled(state)))
    scales = jnp.where(state.scales > 0, state.scales, 1)
    held = held * state.powers[:, None] / scales[:, None]
    return jnp.where(state.checking, held, state.solutions)


def _unscaled(state: SystemsState) -> jax.Array:
    """The solutions in the units of the right sides over those of A."""
    return state.scales[:, None] * state.solutions / state.powers[:, None]


@functools.partial(jax.jit, static_argnames=("space", "method", "max_matvecs"), donate_argnums=0)
@precisely
def advance(
    state: SystemsState,
    images: jax.Array,
    preconditioner: Operator | None,
    *,
    space: Space,
    method: str,
    max_matvecs: int,
) -> SystemsState:
    """One step of each recurrence that is not at its end."""
    images = images + state.damping * state.recurrences.direction
    scales = jnp.where(state.scales > 0, state.scales, _near_one(images))
    images = scales[:, None] * images

    def of_row(
        solution: jax.Array, recurrence: Any, image: jax.Array, power: jax.Array
    ) -> tuple[Any, jax.Array]:
        size = _numerics.divide(space.norm(image), space.norm(recurrence.direction))
        matrix = _scaled(preconditioner, power)
        return METHODS[method].follow(space, solution, recurrence, image, matrix), size

    steps, sizes = jax.vmap(of_row)(
        state.solutions, state.recurrences, images, state.preconditioning
    )
    active = _are_active(state)
    taken = active & steps.is_taken
    bent = active & (steps.curvature <= 0) if method == "cg" else jnp.zeros_like(active)
    new = state._replace(
        solutions=_where(taken, steps.solution, state.solutions),
        recurrences=_where(taken, steps.recurrence, state.recurrences),
        scales=scales,
        norms=jnp.where(taken, steps.residual_norm, state.norms),
        curvatures=jnp.where(active, steps.curvature, state.curvatures),
        bent=state.bent | bent,
        sizes=jnp.where(active, jnp.fmax(state.sizes, sizes), state.sizes),
        stopped=state.stopped | (active & ~(steps.is_taken & steps.goes_on)),
        num_matvecs=state.num_matvecs + 1,
        verified=jnp.bool_(False),
    )
    is_last = new.num_matvecs + 1 >= max_matvecs
    return new._replace(checking=is_last | ~jnp.any(_are_active(new)))


@functools.partial(jax.jit, static_argnames=("space", "method", "max_matvecs"), donate_argnums=0)
@precisely
def verify(
    state: SystemsState,
    images: jax.Array,
    preconditioner: Operator | None,
    *,
    space: Space,
    method: str,
    max_matvecs: int,
) -> SystemsState:
    """The true residuals; recurrences begin anew where that is of use."""
    solutions = _rounded(state, space)
    images = state.scales[:, None] * (images + state.damping * solutions)
    residuals = state.targets - images
    norms = jax.vmap(space.norm)(residuals) + state.scales * state.errors
    if state.kept is not None:
        # Of MINRES no step makes the residual larger: what did was rounding, as on singular ones.
        is_worse = ~(norms <= state.last)
        solutions = _where(is_worse, state.kept, solutions)
        norms = jnp.where(is_worse, state.last, norms)
    num_matvecs = state.num_matvecs + 1
    is_vain = state.stopped | ~(norms <= state.last / 2) | (num_matvecs >= max_matvecs)
    finished = state.finished | (norms <= state.goals) | is_vain
    begin = functools.partial(_start, space, method, preconditioner)
    fresh = jax.vmap(begin)(residuals, state.preconditioning)
    return state._replace(
        solutions=solutions,
        recurrences=_where(finished, state.recurrences, fresh),
        norms=norms,
        last=norms.copy(),
        kept=None if state.kept is None else solutions.copy(),
        finished=finished,
        checking=num_matvecs + 1 >= max_matvecs,
        verified=jnp.bool_(True),
        num_matvecs=num_matvecs,
    )


def _are_active(state: SystemsState) -> jax.Array:
    return ~(state.finished | state.stopped) & ~(state.norms <= state.goals)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of `new` in the rows where `condition` (k,) holds, else of `old`."""
    of = lambda leaf: condition.reshape(-1, *[1] * (leaf.ndim - 1))
    return jax.tree.map(lambda new, old: jnp.where(of(new), new, old), new, old)


@functools.partial(jax.jit, static_argnames=("space", "eps"))
@precisely
def solutions(state: SystemsState, least: jax.Array, space: Space, eps: float) -> Solutions:
    """What is known now, with `least` the least that an eigenvalue of A can be."""
    lengths = jax.vmap(space.norm)(state.solutions)
    directions = state.recurrences.direction
    units = _numerics.divide(directions, jax.vmap(space.norm)(directions)[:, None])
    smallest = least + state.damping
    unknown = _PRODUCT * eps * state.sizes * lengths
    bounds = _numerics.divide(
        state.norms + unknown, smallest, where=smallest > 0, otherwise=jnp.inf
    )
    held = _unscaled(state)
    in_range = _are_in_range(state, held)
    known = state.verified & ~state.bent & in_range
    is_finite = jnp.isfinite(state.norms)
    return Solutions(
        solutions=jnp.where(is_finite[:, None], held, jnp.nan),
        residual_norms=jnp.where(in_range, state.norms / state.powers, jnp.nan),
        error_bounds=jnp.where(known, bounds, jnp.inf) / state.powers,
        converged=state.verified & (state.norms <= state.goals) & in_range,
        bent=state.bent,
        curvatures=state.curvatures / jnp.where(state.scales > 0, state.scales, 1),
        directions=jnp.where(state.bent[:, None], units, 0),
        num_matvecs=state.num_matvecs,
    )
