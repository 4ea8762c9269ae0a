"""A start from several vectors: what their images leave outside of the basis is held.

Lanczos has one direction to come, along which all residuals lie. Vectors from elsewhere, such as
the eigenvectors of an earlier matrix, leave a residual each. They are held beside the basis and made
orthogonal to each new row, so that all residual norms stay as sharp as without, while the basis
goes on from one direction: what the wanted pairs lack, or a random one, or both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _numerics
from regjax._base import PRNGKey, Tree
from regjax._space import Space
from regjax.curvature._engine import _basis
from regjax.curvature._engine._accumulation import small_dtype
from regjax.curvature._lanczos import Krylov, fresh, unit

# Of the length of the start vectors: what fills up those that depend on one another.
_FILLING = 1e-6


class Held(NamedTuple):
    """What A q of some rows q has outside of the basis, beside the direction to come.

    Attributes:
      vectors: (count, length), first the start vectors that have not been multiplied, then in their
        place what they leave; the last row is a place for a direction that is given up.
      parts: (count, rows), how much of each of them the rows have.
      gram: (count, count), inner products of the vectors.
      taken: (), int32, how many start vectors have been multiplied.
    """

    vectors: jax.Array
    parts: jax.Array
    gram: jax.Array
    taken: jax.Array

    @property
    def waits(self) -> jax.Array:
        """(), bool, whether there are start vectors to come."""
        return self.taken < self.vectors.shape[0] - 1


def rows_of(start: Tree, space: Space) -> jax.Array:
    """The start vectors as rows (k, length), from a tree of them or a result that has `vectors`.

    Raises:
      ValueError: they are none, too many, not finite, all zero, or of another tree.
      TypeError: they are not real.
    """
    tree = getattr(start, "vectors", start)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    count = shapes[0][0] if shapes and shapes[0] else 1
    _checks.same_tree("start", tree, space.like(), leading=(count,))
    _checks.floating_leaves("start", tree)
    if not 1 <= count <= space.size:
        raise ValueError(
            f"`start` must hold between 1 and {space.size} vectors, got a leading axis of {count}."
        )
    _checks.direction("start", tree)
    return space.ravel_rows(tree)


def begin(
    space: Space, rows: jax.Array, num_rows: int, key: PRNGKey, accumulation: str | None
) -> Held:
    """The start vectors, made orthonormal, before the first product.

    Zero vectors, and those that depend on others, become random ones.
    """
    count = rows.shape[0]
    largest = jnp.max(jnp.abs(rows), 1, keepdims=True)
    rows = _numerics.divide(rows, largest)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    noise = space.normal(key, count) / space.size**0.5
    rows = _numerics.divide(rows, norms) + jnp.asarray(_FILLING, rows.dtype) * noise
    rows = space.orthonormal(rows)
    dtype = small_dtype(rows.dtype, accumulation)
    num_rows = _basis.num_rows_of(num_rows)
    return Held(
        vectors=space.constrain(jnp.concatenate([rows, jnp.zeros_like(rows[:1])])),
        parts=jnp.zeros((count + 1, num_rows), dtype),
        gram=jnp.zeros((count + 1, count + 1), dtype),
        taken=jnp.int32(0),
    )


def follow(held: Held, krylov: Krylov) -> tuple[Held, Krylov]:
    """Both after the newest row was absorbed: of a start vector the residual is held."""
    row, last = krylov.newest, krylov.filled - 1
    along = held.vectors @ row
    vectors = held.vectors - along[:, None] * row[None]
    residual = krylov.beta.astype(row.dtype) * krylov.direction
    place, is_start = held.taken, held.waits
    vectors = jnp.where(is_start, vectors.at[place].set(residual), vectors)
    parts = jnp.where(is_start, held.parts.at[place, last].set(1), held.parts)
    held = Held(
        vectors=krylov.basis.space.constrain(vectors),
        parts=parts,
        gram=(vectors @ vectors.T).astype(held.gram.dtype),
        taken=held.taken + is_start.astype(held.taken.dtype),
    )
    none = jnp.zeros_like(krylov.coupling)
    return held, krylov._replace(coupling=jnp.where(is_start, none, krylov.coupling))


def norms(held: Held, weights: jax.Array) -> jax.Array:
    """The norms of what is held of combinations of rows, from weights (rows, k)."""
    parts = held.parts @ weights
    return jnp.sqrt(jnp.maximum(jnp.sum(parts * (held.gram @ parts), 0), 0))


def next_start(held: Held, krylov: Krylov) -> Krylov:
    """The basis whose next row is the next start vector."""
    return krylov._replace(direction=held.vectors[held.taken])


def hold_direction(held: Held, krylov: Krylov) -> tuple[Held, Krylov]:
    """Gives up the direction to come without losing it; only once."""
    vectors = held.vectors.at[-1].set(krylov.direction)
    held = held._replace(
        vectors=krylov.basis.space.constrain(vectors),
        parts=held.parts.at[-1].set(krylov.coupling),
        gram=(vectors @ vectors.T).astype(held.gram.dtype),
    )
    return held, krylov._replace(coupling=jnp.zeros_like(krylov.coupling))


def turn(
    held: Held, krylov: Krylov, lacking: jax.Array, is_random: bool
) -> tuple[Krylov, jax.Array]:
    """The basis that goes on from what is held of a combination of rows, and from a random vector.

    Args:
      held: what is held.
      krylov: the basis, with no part of A Q' along its direction.
      lacking: (rows,), the combination.
      is_random: whether there is a random part, of the same size.

    Returns:
      The basis, and the length () of the sum of both of unit length, of which the direction is
      made.
    """
    space = krylov.basis.space
    mixed = (held.parts @ lacking).astype(space.dtype) @ held.vectors
    mixed, _ = _basis.outside(krylov.basis, mixed)
    mixed = unit(mixed, space.norm(mixed))
    drawn, key = fresh(krylov.basis, krylov.key)
    both = mixed + drawn if is_random else mixed
    # Where nothing is lacking there is nothing but the random vector.
    both = jnp.where(jnp.any(mixed != 0), both, drawn)
    length = space.norm(both)
    return krylov._replace(
        direction=unit(both, length), beta=jnp.zeros_like(krylov.beta), key=key
    ), length
