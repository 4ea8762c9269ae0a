"""Where Lanczos begins: at random, or from known vectors, such as those of an earlier matrix.

Several vectors start it as one, their sum: if they are eigenvectors of k eigenvalues, the span of
its first k products holds them all. Multiplied one by one they leave a residual each, which no
row takes up but those that are spent on it: on networks whose weights had moved on that took up to
twice as many products, more than a random start.
"""

import functools

import jax
import jax.numpy as jnp

from regjax import _checks, _numerics
from regjax._base import Tree
from regjax._space import Space
from regjax.curvature._precision import precisely


def rows_of(start: Tree, space: Space) -> jax.Array:
    """The start vectors as rows (k, length), from a tree of them or a result that has `vectors`.

    Raises:
      ValueError: they are none, too many, not finite, all zero, or of another tree.
      TypeError: they are not real.
    """
    tree = getattr(start, "vectors", start)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    count = shapes[0][0] if shapes and shapes[0] else 1
    if jax.tree.structure(tree) == space.treedef and tuple(shapes) == tuple(space.shapes):
        raise ValueError(
            "`start` must have a leading axis, the number of vectors, got one vector: "
            "`jax.tree.map(lambda leaf: leaf[None], start)` gives it one."
        )
    _checks.same_tree("start", tree, space.like(), leading=(count,))
    _checks.floating_leaves("start", tree)
    if not 1 <= count <= space.size:
        raise ValueError(
            f"`start` must hold between 1 and {space.size} vectors ({_checks.ORDER}), got a "
            f"leading axis of {count}."
        )
    _checks.direction("start", tree)
    return space.ravel_rows(tree)


@functools.partial(jax.jit, static_argnums=1)
@precisely
def sum_of(rows: jax.Array, space: Space, random: jax.Array | None) -> jax.Array:
    """The sum of an orthonormal basis of the rows, and of a random vector of as much length.

    Vectors that are zero, or depend on others, add nothing: what stands for them is of no length.

    Args:
      rows: (k, length).
      space: of which they are vectors.
      random: a vector; None: the rows alone.
    """
    largest = jnp.max(jnp.abs(rows), 1, keepdims=True)
    rows = _numerics.divide(rows, largest)
    gram = rows @ rows.T
    # Whitened by the small matrix, whose eigenvalues at rounding level belong to no direction.
    values, mixing = jnp.linalg.eigh(gram)
    limit = rows.shape[0] * float(jnp.finfo(rows.dtype).eps) * 8 * jnp.max(values)
    weights = mixing @ (
        _numerics.divide(mixing.T @ jnp.ones_like(values), jnp.sqrt(values), where=values > limit)
    )
    found = weights @ rows
    found = found / space.norm(found)
    return found if random is None else found + random / space.norm(random)
