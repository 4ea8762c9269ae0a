"""What a linear map keeps: every array once, and none that holds one number.

`jax.linearize` keeps what its linear part reads, as it stands in the program. The derivative of a
ReLU reads zeros of the size of the layer, and forward over reverse mode reads its mask twice: of
four numbers for each feature of a perceptron two are left.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun
from jax.tree_util import Partial

from regjax import _jaxprs
from regjax._base import Tree


def slim(linearize: Callable[..., Partial], *arguments: Tree) -> Partial:
    """`linearize(*arguments)`, a linear map, with as few arrays as hold all that it keeps.

    Args:
      linearize: arguments -> the map, a `Partial` of what it keeps.
      *arguments: trees of arrays, traced perhaps.
    """
    closed, shapes = jax.make_jaxpr(linearize, return_shape=True)(*arguments)
    leaves, structure = jax.tree.flatten(shapes)
    kept: dict[Any, int] = {}
    sources: list[int | _Fill] = []
    first = []
    for i, (name, leaf) in enumerate(zip(_Names().of_outputs(closed), leaves, strict=True)):
        if isinstance(name, _Number):
            sources.append(_Fill(name.value, leaf.shape, leaf.dtype))
            continue
        if name not in kept:
            kept[name] = len(kept)
            first.append(i)
        sources.append(kept[name])
    values = jaxpr_as_fun(closed)(*jax.tree.leaves(arguments))
    return Partial(_Restored(structure, tuple(sources)), [values[i] for i in first])


@dataclasses.dataclass(frozen=True)
class _Fill:
    """An array of one number."""

    number: Any
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True, eq=False)
class _Restored:
    """The map again from what is kept of it; compared by identity, as that of `jax.linearize`.

    Attributes:
      structure: of the map as a tree.
      sources: of each of its leaves the number among what is kept, or what it is filled with.
    """

    structure: Any
    sources: tuple[int | _Fill, ...]

    def __call__(self, kept: list[jax.Array], tree: Tree) -> Tree:
        leaves = [
            jnp.full(source.shape, source.number, source.dtype)
            if isinstance(source, _Fill)
            else kept[source]
            for source in self.sources
        ]
        return jax.tree.unflatten(self.structure, leaves)(tree)


class _Number(NamedTuple):
    """What an array of one number is known by: 0 and -0 differ in their bits."""

    value: Any
    bits: bytes
    dtype: str


class _Names:
    """Names of the values in a program, of which equal ones are the same: integers or numbers."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}
        self.writer = _jaxprs.Writer(derivatives=0, lasting=False)

    def of_outputs(self, closed: Any) -> list[Any]:
        """The names of what a program computes."""
        return self._inside(closed, [self._of(object()) for _ in closed.jaxpr.invars])

    def _of(self, what: Any) -> int:
        return self.known.setdefault(what, len(self.known))

    def _inside(self, closed: Any, given: list[Any]) -> list[Any]:
        jaxpr, consts = _jaxprs.parts(closed)
        names: dict[Any, Any] = dict(zip(jaxpr.invars, given, strict=True))
        names |= {
            variable: self._of((id(const),))
            for variable, const in zip(jaxpr.constvars, consts, strict=True)
        }

        def read(atom: Any) -> Any:
            return _number(atom) if isinstance(atom, Literal) else names[atom]

        for equation in jaxpr.eqns:
            found = self._results(equation, [read(atom) for atom in equation.invars])
            names |= dict(zip(equation.outvars, found, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _results(self, equation: Any, operands: list[Any]) -> list[Any]:
        name = equation.primitive.name
        if name in ("jit", "pjit"):
            return self._inside(equation.params["jaxpr"], operands)
        if name == "broadcast_in_dim" and isinstance(operands[0], _Number):
            return operands[:1]
        what: Any = object()
        # Loops, branches and rules of differentiation: what they compute is not looked into.
        is_call = any(True for _ in _jaxprs.inner_jaxprs(equation))
        if not is_call and not equation.effects:
            parameters = self.writer.value(dict(sorted(equation.params.items())))
            what = (name, parameters, *operands)
        return [self._of((what, i)) for i in range(len(equation.outvars))]


def _number(literal: Any) -> _Number:
    value = np.asarray(literal.val, literal.aval.dtype)
    return _Number(value.item(), value.tobytes(), str(value.dtype))
