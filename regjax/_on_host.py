"""Small functions evaluated by NumPy where the host has their numbers, instead of compiled.

What decides how a solver goes on works on arrays of some dozens of rows. The compiler takes
hundreds of times as long for that as the arithmetic does. So outside of `jax.jit` such a function
is traced once, and NumPy does its operations one after the other; inside of `jax.jit` it is a part
of the program. There is one text and no second version of a method.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.interpreters import partial_eval

from regjax import _loops
from regjax._numpy_programs import Evaluated

_Function = TypeVar("_Function", bound=Callable[..., Any])


def on_host(
    *, static: tuple[int, ...] = (), gives_arrays: bool = False
) -> Callable[[_Function], _Function]:
    """Makes a function of small arrays one that NumPy evaluates outside of `jax.jit`.

    Leaves that it only hands through may be large, or keys: they stay where they are. A function
    with an operation that is not known here is compiled, and so is one of arrays on several
    devices.

    Args:
      static: places of the arguments that are no arrays; hashable.
      gives_arrays: whether the results are JAX's arrays, where the arguments lie; else NumPy's.
    """

    def decorated(function: _Function) -> _Function:
        inside = jax.jit(function, static_argnums=static, inline=True)

        @functools.wraps(function)
        def evaluated(*arguments: Any) -> Any:
            given = tuple(None if i in static else a for i, a in enumerate(arguments))
            leaves, treedef = jax.tree.flatten(given)
            if not _loops.is_concrete(leaves):
                return inside(*arguments)
            fixed = tuple((i, arguments[i]) for i in static)
            # What a trace depends on beside its arguments: the mesh, and whether there is float64.
            around = jax.sharding.get_abstract_mesh(), jax.numpy.result_type(float)
            types = tuple(map(_type, leaves))
            return _traced(function, fixed, treedef, types, around)(leaves, gives_arrays)

        return cast(_Function, evaluated)

    return decorated


def _type(leaf: Any) -> tuple[Any, Any, bool]:
    """Shape, dtype, and whether other types decide instead: of Python's numbers."""
    try:
        if isinstance(leaf, np.ndarray):  # float64 perhaps, which JAX may not have
            return leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), False
        return leaf.shape, leaf.dtype, False
    except AttributeError:
        return (), jax.numpy.result_type(leaf), True


@functools.lru_cache(maxsize=256)
def _traced(
    function: Callable[..., Any], fixed: Any, treedef: Any, types: Any, around: Any
) -> "_Traced":
    """The function for arguments of some types."""
    fixed = dict(fixed)

    def of_leaves(*leaves: Any) -> Any:
        given = jax.tree.unflatten(treedef, leaves)
        return function(*(fixed.get(i, argument) for i, argument in enumerate(given)))

    structs = [
        jax.ShapeDtypeStruct(shape, dtype, weak_type=is_weak) for shape, dtype, is_weak in types
    ]
    closed, outputs = jax.make_jaxpr(of_leaves, return_shape=True)(*structs)
    return _Traced(closed, jax.tree.structure(outputs))


class _Traced:
    """A function for arguments of some types."""

    def __init__(self, closed: Any, outputs: Any):
        numbers = {variable: i for i, variable in enumerate(closed.jaxpr.invars)}
        results = closed.jaxpr.outvars
        self.outputs = outputs
        # What is handed through, by the number of its argument.
        self.handed = [None if isinstance(a, Literal) else numbers.get(a) for a in results]
        jaxpr, self.is_read = partial_eval.dce_jaxpr(
            closed.jaxpr, [number is None for number in self.handed]
        )
        computed = ClosedJaxpr(jaxpr, closed.consts)
        self.compiled = jax.jit(jaxpr_as_fun(computed))
        self.evaluated: Evaluated | None = None
        with contextlib.suppress(NotImplementedError):
            self.evaluated = Evaluated(computed)

    def __call__(self, leaves: list[Any], gives_arrays: bool) -> Any:
        read = [leaf for leaf, is_read in zip(leaves, self.is_read, strict=True) if is_read]
        if self.evaluated is None or not all(map(_is_here, read)):
            computed = self.compiled(*read)
        else:
            computed = self.evaluated.of_leaves(read)
        found = iter(computed)
        results = [next(found) if i is None else leaves[i] for i in self.handed]
        if gives_arrays:
            results = _put(results, leaves)
        return jax.tree.unflatten(self.outputs, results)


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1


def _put(results: list[Any], leaves: list[Any]) -> list[Any]:
    """Results as JAX's arrays, where those of the arguments lie."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    # Arrays that nobody has put anywhere leave the results free as well.
    placed = [array for array in arrays if getattr(array, "committed", True)]
    sharding = placed[0].sharding if placed else None
    return [
        result if isinstance(result, jax.Array) else jax.device_put(result, sharding)
        for result in results
    ]
