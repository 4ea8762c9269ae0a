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

    Of a loss or a model only the block's own sub-tree is differentiated, so that a layer costs a
    fraction of the whole product; a given product is made as a whole. The blocks' eigenvalues
    interlace with the whole matrix's; couplings between layers are left out by definition.

    Layers that are stacked in one array have the blocks that they would have with arrays of their
    own: the path of a slice has the layer's index where the stack begins, behind a container's name
    if there is one, as "blocks/3/attention" with `depth=3`.

    Args:
      operator: symmetric.
      depth: leaves that share the first `depth` keys of their path form a block; with 1 the
        entries of the top-level container, usually the layers.
      layout: which axes of the leaves stack layers (`regjax.Layout`). None: a guess; arrays of
        which it is not known are not taken apart.

    Returns:
      Operators by path, such as {"layers/0": ...}, in the order of the tree. Their vectors are
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
