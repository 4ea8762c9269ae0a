"""The Lanczos recurrence with full re-orthogonalisation, at about the cost of one pass.

Each new direction is made orthogonal to the filled blocks of rows only, and once more where the
norm dropped by more than 1/sqrt(2), which is when rounding can have spoilt the first pass (Daniel,
Gragg, Kaufman, Stewart 1976). Without this even float64 invents copies of eigenvalues.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from regjax import _loops, _numerics
from regjax._base import PRNGKey
from regjax._on_host import on_host
from regjax._one_program import one_program
from regjax._space import Space
from regjax.curvature._engine import _basis
from regjax.curvature._engine._accumulation import small_dtype
from regjax.curvature._orthogonal import drawn_outside, orthogonalized, unit
from regjax.curvature._precision import precisely


class Krylov(NamedTuple):
    """An orthonormal basis Q that grows by one row a product, with Q A Q'.

    Attributes:
      basis: rows, the first `filled` of which hold it.
      projected: (rows, rows), Q A Q' as measured by the inner products, zero beyond `filled`.
      largest: (), the largest magnitude in `projected`.
      coupling: (rows,), the part of each row's A q along `direction`.
      lost: (rows, rows), the parts along directions that were dropped when a fresh one was taken,
        the newest first, as many as there may be until the rows are combined anew. Each is one unit
        vector, so that the parts of a combination of rows add up with their signs.
      blur: (), norm of all other parts outside of the basis, of all rows together: rounding,
        directions that were dropped long ago, and what products are off by.
      newest: the last row, a vector, or zeros after a change of basis.
      direction: the next row, of unit norm, or zero if the basis spans the whole space.
      scale: (), a power of two, found at the first product: `projected` and all other numbers are
        those of scale times A, so that no square under- or overflows. 0 before.
      beta: (), norm of the part of the last A q outside of the basis, along `direction`.
      broke_down: (), bool, whether the last `beta` was at rounding level.
      key: typed key of the fresh directions.
    """

    basis: _basis.Basis
    projected: jax.Array
    largest: jax.Array
    coupling: jax.Array
    lost: jax.Array
    blur: jax.Array
    newest: jax.Array
    direction: jax.Array
    scale: jax.Array
    beta: jax.Array
    broke_down: jax.Array
    key: PRNGKey

    @property
    def filled(self) -> jax.Array:
        """(), int32, number of filled rows."""
        return self.basis.filled

    def unscaled(self, numbers: jax.Array) -> jax.Array:
        """Numbers of A from those of scale times A."""
        return numbers / jnp.where(self.scale > 0, self.scale, 1).astype(numbers.dtype)


def empty(
    space: Space,
    direction: jax.Array,
    num_rows: int,
    key: PRNGKey,
    accumulation: str | None = None,
    generation: Any = 0,
) -> Krylov:
    """A basis without rows whose first one will be `direction`, made of unit norm."""
    basis, newest, direction = _large(space, direction, num_rows, accumulation)
    return space.replicate(_without_rows(basis, newest, direction, key, generation))


@one_program(static=("space", "num_rows", "accumulation"))
def _large(
    space: Space, direction: jax.Array, num_rows: int, accumulation: str | None
) -> tuple[_basis.Basis, jax.Array, jax.Array]:
    """The basis, no newest row, and the first direction."""
    direction = _numerics.divide(direction, jnp.max(jnp.abs(direction)))
    basis = _basis.zeros(space, num_rows, accumulation)
    newest = space.constrain(jnp.zeros_like(direction))
    return basis, newest, unit(direction, space.norm(direction))


@on_host()
def _without_rows(
    basis: _basis.Basis, newest: jax.Array, direction: jax.Array, key: PRNGKey, generation: Any
) -> Krylov:
    rows, small = basis.num_rows, small_dtype(direction.dtype, basis.accumulation)
    return Krylov(
        # The steps use their state up: what it holds must be nobody else's array.
        basis=dataclasses.replace(basis, generation=generation + jnp.int32(0)),
        projected=jnp.zeros((rows, rows), small),
        largest=jnp.zeros((), small),
        coupling=jnp.zeros(rows, small),
        lost=jnp.zeros((rows, rows), small),
        blur=jnp.zeros((), small),
        newest=newest,
        direction=direction,
        scale=jnp.zeros((), direction.dtype),
        beta=jnp.zeros((), small),
        broke_down=jnp.bool_(False),
        key=jax.random.fold_in(key, 0),
    )


@on_host()
def split(key: PRNGKey) -> tuple[PRNGKey, PRNGKey]:
    """The next key, and one to use."""
    key, subkey = jax.random.split(key)
    return key, subkey


@jax.jit
def charged(krylov: Krylov, image: jax.Array, error: jax.Array) -> Krylov:
    """The basis that knows by how much the next `image` is off."""
    scale = _scale(krylov.scale, image).astype(krylov.blur.dtype)
    return krylov._replace(blur=jnp.hypot(krylov.blur, scale * error.astype(scale.dtype)))


def _scale(scale: jax.Array, image: jax.Array) -> jax.Array:
    """The power of two that brings the first image near one; `scale` if there was one before."""
    found = _numerics.power_of_two(jnp.max(jnp.abs(image)))
    return jnp.where(scale > 0, scale, found)


def _scale_by(scale: jax.Array, image: jax.Array) -> jax.Array:
    """`_scale`, which the host knows after the first image."""
    if _loops.is_concrete(scale) and np.all(np.asarray(scale) > 0):
        return scale
    return _first_scale(scale, image)


_first_scale = one_program()(_scale)


def absorb(krylov: Krylov, image: jax.Array) -> Krylov:
    """The basis with `direction` as a new row, given `image` = A direction; its rows are used up.

    After a breakdown `renewed` has to follow: the next direction is rounding.
    """
    return _recorded(*grown(krylov, image))


class Step(NamedTuple):
    """The numbers of a new row.

    Attributes:
      coefficients: (rows,), the column of Q A Q' of the new row.
      scale, beta, broke_down: as those of a `Krylov`; beta before it is known to be rounding.
    """

    coefficients: jax.Array
    scale: jax.Array
    beta: jax.Array
    broke_down: jax.Array


def grown(krylov: Krylov, image: jax.Array) -> tuple[Krylov, Step]:
    """The large arrays with one more row, and its numbers, to be `recorded`."""
    row = krylov.direction
    scale = _scale_by(krylov.scale, image)
    basis, direction, step = _step(krylov.basis, krylov.newest, row, scale, krylov.largest, image)
    return krylov._replace(basis=basis, newest=row, direction=direction), step


@one_program(donate=("basis", "newest"), effort=3)
@precisely
def _step(
    basis: _basis.Basis,
    newest: jax.Array,
    row: jax.Array,
    scale: jax.Array,
    largest: jax.Array,
    image: jax.Array,
) -> tuple[_basis.Basis, jax.Array, Step]:
    last = basis.filled
    image = image * jnp.where(scale > 0, scale, 1)
    # The two newest rows hold nearly all of A q. They go first, so that the coefficients of the
    # pass over all rows measure what orthogonality was lost and nothing else.
    dot = functools.partial(_basis.inner, basis)
    before, here = dot(newest, image), dot(row, image)
    image = image - before.astype(row.dtype) * newest - here.astype(row.dtype) * row
    basis = _basis.append(basis, row)
    coefficients = jnp.zeros(basis.num_rows, here.dtype).at[last].set(here)
    coefficients = coefficients.at[last - 1].add(jnp.where(last > 0, before, 0))
    residual, coefficients, beta, broke_down = orthogonalized(basis, image, coefficients, largest)
    direction = basis.space.constrain(unit(residual, beta))
    return basis, direction, Step(coefficients, scale, beta, broke_down)


def recorded(krylov: Krylov, step: Step) -> Krylov:
    """The numbers of the new row beside the large arrays that have it."""
    last, coefficients, beta = krylov.filled - 1, step.coefficients, step.beta
    kept = jnp.where(step.broke_down, 0, beta)
    return krylov._replace(
        projected=krylov.projected.at[:, last].set(coefficients).at[last, :].set(coefficients),
        coupling=jnp.zeros_like(krylov.coupling).at[last].set(kept),
        largest=jnp.maximum(krylov.largest, jnp.max(jnp.abs(coefficients))),
        blur=jnp.hypot(krylov.blur, jnp.where(step.broke_down, beta, 0)),
        scale=step.scale,
        beta=kept,
        broke_down=step.broke_down,
    )


_recorded = on_host()(recorded)


def renewed(krylov: Krylov) -> Krylov:
    """The same with a random direction if the last step broke down; of several, each by itself."""
    if _loops.is_concrete(krylov.broke_down):
        return _renew(krylov) if np.any(np.asarray(krylov.broke_down)) else krylov
    # What a branch hands through, it copies, and what it gives lies where it says (see
    # `_basis.outside`).
    keep = krylov.basis.space.constrain

    def draw(_: Any) -> tuple[jax.Array, PRNGKey]:
        direction, key = _next_direction(krylov)
        return keep(direction), key

    direction, key = lax.cond(
        jnp.any(krylov.broke_down), draw, lambda _: (keep(krylov.direction), krylov.key), None
    )
    return krylov._replace(direction=keep(direction), key=key)


@one_program(donate="krylov")
def _renew(krylov: Krylov) -> Krylov:
    direction, key = _next_direction(krylov)
    return krylov._replace(direction=direction, key=key)


@precisely
def _next_direction(krylov: Krylov) -> tuple[jax.Array, PRNGKey]:
    if krylov.broke_down.ndim:
        return jax.vmap(_next_direction)(krylov)
    direction, key = _random_direction(krylov)
    broke_down = krylov.broke_down
    direction = jnp.where(broke_down, direction, krylov.direction)
    return direction, jnp.where(broke_down, key, krylov.key)


def expand(krylov: Krylov, image: jax.Array) -> Krylov:
    """`absorb`, and a random direction after a breakdown; the state is used up."""
    return renewed(absorb(krylov, image))


def _random_direction(krylov: Krylov) -> tuple[jax.Array, PRNGKey]:
    """A random direction outside of the filled rows, and the next key."""
    key, subkey = split(krylov.key)
    return _drawn_outside(krylov.basis, krylov.basis.space.normal(subkey)), key


_drawn_outside = one_program()(precisely(drawn_outside))


def redirect(krylov: Krylov) -> Krylov:
    """Drops the residual, charged to `lost`, and takes a random direction instead."""
    return _redirected(krylov, *_random_direction(krylov))


@on_host()
@precisely
def _redirected(krylov: Krylov, direction: jax.Array, key: PRNGKey) -> Krylov:
    return krylov._replace(
        direction=direction,
        coupling=jnp.zeros_like(krylov.coupling),
        lost=jnp.roll(krylov.lost, 1, 0).at[0].set(krylov.coupling),
        # |sum_i s_i r_i| is at most the norm of all r_i together, for weights s of norm 1.
        blur=jnp.hypot(krylov.blur, jnp.linalg.norm(krylov.lost[-1])),
        beta=jnp.zeros_like(krylov.beta),
        key=key,
    )
