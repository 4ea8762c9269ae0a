"""One layer's curvature: the principal submatrix of a group of parameters."""

import jax

from regjax import _checks, _slices
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import Params
from regjax._slices import Where
from regjax._space import Space
from regjax.curvature._operators._operator import Operator
from regjax.curvature._operators._slices import Sliced


@checked
def by_block(operator: Operator, *, depth: int = 1, layout: Layouts = None) -> dict[str, Operator]:
    """Takes a curvature matrix apart into its diagonal blocks, one for each group of parameters.

    The block of a loss or a model differentiates its own parameters alone, so that a layer costs a
    fraction of a whole product. A matrix from `from_matvec` is multiplied as a whole. The blocks
    leave out what couples the layers; their eigenvalues interlace with those of the whole matrix.

    Layers that are stacked in one array have the blocks that they would have with arrays of their
    own. The path of such a block has the layer's index where the stack begins, behind the name of
    its container if there is one, such as "blocks/3/attention" with `depth=3`.

    Example:
      >>> loss = lambda p: 1.5 * jnp.sum(p["first"] ** 2) + 0.5 * jnp.sum(p["last"] ** 2)
      >>> hessian = curvature.hessian(loss, {"first": jnp.zeros(2), "last": jnp.zeros(2)})
      >>> for name, block in curvature.by_block(hessian).items():
      ...     print(name, curvature.exact_spectrum(block))
      first [3. 3.]
      last [1. 1.]

    Args:
      operator: symmetric.
      depth: leaves that share the first `depth` keys of their path form a block; with 1 the
        entries of the top-level container, usually the layers.
      layout: which axes of the leaves stack layers (`regjax.Layout`). None: a guess; arrays of
        which it is not known are not taken apart.

    Returns:
      Operators by path, such as "layers/0", in the order of the tree. Their vectors are
      trees of the parameters' structure with None outside of the block, and without the axes of
      the stack in a slice.

    Raises:
      ValueError: `depth` is below one, or `layout` names axes that a leaf has not.
    """
    places = places_of(operator.space, depth, layout)
    return {name: _block(operator, where) for name, where in places.items()}


def places_of(space: Space, depth: int, layout: Layouts) -> dict[str, dict[int, Where]]:
    """Block -> number of a leaf -> what of it is in the block, () for all."""
    _checks.integer("depth", depth)
    known = None if layout is not None else [False] * len(space.shapes)
    blocks: dict[str, dict[int, Where]] = {}
    for part in _slices.parts(space.like(), layout, depth, known):
        blocks.setdefault("/".join(part.path[:depth]), {})[part.leaf] = part.where
    return blocks


def taken(trees: Params, places: dict[int, Where]) -> Params:
    """The part of a block in trees with one axis in front; None elsewhere."""
    leaves, treedef = jax.tree.flatten(trees)
    parts = [
        _slices.take(leaf, places[i], leading=1) if i in places else None
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, parts)


def _block(operator: Operator, places: dict[int, Where]) -> Operator:
    inside = tuple(i in places for i in range(len(operator.space.shapes)))
    block = operator.submatrix(inside)
    if not any(places.values()):
        return block
    return Sliced(block, tuple(places[i] for i in sorted(places)))
