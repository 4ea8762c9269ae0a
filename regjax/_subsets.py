"""Functions of a part of the parameters: what is chosen is differentiated, the rest is data."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.tree_util import Partial

from regjax import _checks, _selection
from regjax._arguments import checked
from regjax._base import Mask, Params, Tree, Wrapper, as_partial
from regjax._differentiation import widened


@dataclasses.dataclass(frozen=True, eq=False)
class _Constant:
    """A leaf that is no array. It is compared with its type: 1 is not True."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Constant) and self._name() == other._name()

    def __hash__(self) -> int:
        return hash(self._name())

    def _name(self) -> Any:
        if isinstance(self.value, (float, complex)):
            return type(self.value), repr(self.value)  # 0 is not -0
        try:
            hash(self.value)
        except TypeError:
            return type(self.value), id(self.value)
        return type(self.value), self.value


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["function", "rest"],
    meta_fields=["treedef", "inside", "constants"],
)
@dataclasses.dataclass(frozen=True)
class PartFunction(Wrapper):
    """A function of some leaves of its parameters alone, the rest bound as data; a pytree.

    Attributes:
      function: (params, *batch) -> anything.
      rest: the other leaves, in their order, None where they are no arrays.
      treedef: structure of the parameters.
      inside: for each of their leaves whether it is chosen.
      constants: those of the rest that are no arrays, None elsewhere.
    """

    function: Callable[..., Tree]
    rest: tuple[Any, ...]
    treedef: Any
    inside: tuple[bool, ...]
    constants: tuple[_Constant | None, ...]

    @property
    def within(self) -> Callable[..., Tree]:
        """The function that is wrapped."""
        return self.function

    def __call__(self, part: Params, *batch: Tree) -> Tree:
        """Computes the function of the chosen leaves and the rest."""
        return self.function(self.whole(part), *batch)

    def of(self, params: Params) -> Params:
        """Takes the chosen leaves of a tree like all parameters; None elsewhere."""
        leaves = self.treedef.flatten_up_to(params)
        pairs = zip(leaves, self.inside, strict=True)
        return jax.tree.unflatten(self.treedef, [leaf if here else None for leaf, here in pairs])

    def whole(self, part: Params) -> Params:
        """Puts leaves in the place of the chosen ones: all parameters, as the function takes them.

        Raises:
          ValueError: `part` has not the structure of the chosen leaves.
        """
        placeholders = [0 if here else None for here in self.inside]
        _checks.same_structure("part", part, jax.tree.unflatten(self.treedef, placeholders))
        ours, pairs = iter(jax.tree.leaves(part)), zip(self.rest, self.constants, strict=True)
        others = iter([leaf if c is None else c.value for leaf, c in pairs])
        leaves = [next(ours) if here else next(others) for here in self.inside]
        return jax.tree.unflatten(self.treedef, leaves)


@checked
def subset(
    function: Callable[..., Tree], params: Params, *, wrt: Mask
) -> tuple[PartFunction, Params]:
    """Makes a function of some leaves of the parameters alone, and chooses these leaves.

    `loss(part, *batch)` is `loss_fn(params, *batch)`. Whatever takes a loss and its parameters
    takes `loss` and `part` as well: operators, diagnostics, transformations, optimisers. The other
    leaves are data of the function, whatever their types: integers, bools, quantised weights, keys.
    `loss.whole(part)` puts a part back among them.

    Example:
      >>> params = {"scale": jnp.array([2.0]), "table": jnp.array([0, 1])}
      >>> loss_fn = lambda params, x: jnp.sum(params["scale"] ** 2 * x[params["table"]])
      >>> loss, part = regjax.subset(loss_fn, params, wrt={"scale": True, "table": False})
      >>> print(part, jax.grad(loss)(part, jnp.array([1.0, 2.0]))["scale"])  # 2 * 2 * (1 + 2)
      {'scale': Array([2.], dtype=float32), 'table': None} [12.]

    Args:
      function: (params, *batch) -> anything: a loss or a model.
      params: tree of parameters, perhaps an `nnx.State`, which holds a shared variable once. An
        array that stands at two places of another tree is two leaves.
      wrt: which leaves are chosen: a tree of bools like `params` or an upper part of it; a function
        (path, leaf) -> bool, the path a tuple of names and numbers; a type of nnx variables or any
        other filter of nnx, where the tree has nnx variables; None: all.

    Returns:
      The function of the chosen leaves, a pytree, and these leaves, a tree like `params` with
      None elsewhere.

    Raises:
      ValueError: nothing is chosen, or a tree of bools is no upper part of `params`.
      TypeError: a chosen leaf is not real floating point, or `function` cannot be called.
    """
    _checks.function("function", function)
    inside = tuple(_selection.mask_leaves(wrt, params, "wrt"))
    if not any(inside):
        raise ValueError("`wrt` must choose at least one leaf, got none.")
    return of_leaves(function, params, inside)


def part_of(
    function: Callable[..., Tree], params: Params, wrt: Mask, *, differences: bool = False
) -> tuple[Callable[..., Tree], Params]:
    """Returns the same where something is chosen, else what was given; wide for differences."""
    if wrt is not None:
        function, params = subset(function, params, wrt=wrt)
    return function, widened(params) if differences else params


def gradient_of_part(
    grad_fn: Callable[[Params], Params], params: Params, wrt: Mask
) -> tuple[Callable[[Params], Params], Params]:
    """Returns a gradient of all leaves as one of the chosen leaves alone, and these."""
    if wrt is None:
        return grad_fn, params
    of_part, part = subset(grad_fn, params, wrt=wrt)
    return Partial(part_of_gradient, of_part), part


def part_of_gradient(of_part: PartFunction, part: Params) -> Params:
    """Computes the chosen leaves of a gradient of all."""
    return of_part.of(of_part(part))


def of_leaves(
    function: Callable[..., Tree], params: Params, inside: tuple[bool, ...]
) -> tuple[PartFunction, Params]:
    """A function of the leaves inside, and these."""
    leaves, treedef = jax.tree.flatten(params)
    outside = [leaf for leaf, here in zip(leaves, inside, strict=True) if not here]
    is_array = [isinstance(leaf, (jax.Array, np.ndarray, np.generic)) for leaf in outside]
    pairs = list(zip(outside, is_array, strict=True))
    rest = tuple(leaf if array else None for leaf, array in pairs)
    constants = tuple(None if array else _Constant(leaf) for leaf, array in pairs)
    of_part = PartFunction(as_partial(function), rest, treedef, inside, constants)
    return of_part, of_part.of(params)
