"""One layer's curvature: the principal submatrix of a group of parameters."""

import jax

from regjax import _checks
from regjax._arguments import checked
from regjax.curvature._operators._operator import Operator


@checked
def by_block(operator: Operator, *, depth: int = 1) -> dict[str, Operator]:
    """Takes a curvature matrix apart into its diagonal blocks, one for each group of parameters.

    Of a loss or a model only the block's own sub-tree is differentiated, so that a layer costs a
    fraction of the whole product; a given product is made as a whole. The blocks' eigenvalues
    interlace with the whole matrix's; couplings between layers are left out by definition.

    Args:
      operator: symmetric.
      depth: leaves that share the first `depth` keys of their path form a block; with 1 the
        entries of the top-level container, usually the layers.

    Returns:
      Operators by path, such as {"layers/0": ...}, in the order of the tree. Their vectors are
      trees of the parameters' structure with None outside of the block.

    Raises:
      ValueError: `depth` is below one.
    """
    _checks.integer("depth", depth)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(operator.space.like())]
    names = [jax.tree_util.keystr(path[:depth], simple=True, separator="/") for path in paths]
    return {
        name: operator.submatrix(tuple(own == name for own in names))
        for name in dict.fromkeys(names)
    }
