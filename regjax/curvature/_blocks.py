"""One layer's curvature: the principal submatrix of a group of parameters."""

import dataclasses
import functools
from typing import Any

import jax
from jax.tree_util import Partial

from regjax import _checks, _tree
from regjax._adapters import couples_examples
from regjax.curvature._operators import Operator, rebuilt


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["function", "rest"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class _OfBlock:
    """`function` of the block's parameters alone, the rest held fixed."""

    function: Partial
    rest: Any

    @property
    def couples_examples(self) -> bool:
        return couples_examples(self.function)

    def __call__(self, block: Any, *batch: Any) -> Any:
        return self.function(_tree.merge(block, self.rest), *batch)


def by_block(operator: Operator, *, depth: int = 1) -> dict[str, Operator]:
    """The diagonal blocks of a curvature matrix, one for each group of parameters.

    Only the block's own sub-tree is differentiated, so that a layer costs a fraction of the whole
    product. The blocks' eigenvalues interlace with the whole matrix's; couplings between layers
    are left out by definition.

    Args:
      operator: from `hessian`, `gauss_newton`, `fisher` or `empirical_fisher`.
      depth: leaves that share the first `depth` keys of their path form a block; with 1 the
        entries of the top-level container, usually the layers.

    Returns:
      Operators by path, such as {"layers/0": ...}, in the order of the tree. Their vectors are
      trees of the parameters' structure with None outside of the block.

    Raises:
      ValueError: `depth` is below one, or the operator was made by `from_matvec` and has nothing
        to differentiate.
    """
    _checks.integer("depth", depth)
    if operator.rule is None:
        raise ValueError(
            "`operator` must be made of a loss or a model to be taken apart, got one from "
            "`from_matvec`; give `from_matvec` the block's own product."
        )
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(operator.params)]
    names = [jax.tree_util.keystr(path[:depth], simple=True, separator="/") for path in paths]
    return {name: _block(operator, [n == name for n in names]) for name in dict.fromkeys(names)}


def _block(operator: Operator, inside: list[bool]) -> Operator:
    leaves, treedef = jax.tree.flatten(operator.params)
    pairs = list(zip(leaves, inside, strict=True))
    block = jax.tree.unflatten(treedef, [leaf if here else None for leaf, here in pairs])
    rest = jax.tree.unflatten(treedef, [None if here else leaf for leaf, here in pairs])
    function = _OfBlock(operator.function, rest)
    return rebuilt(operator, function, block)
