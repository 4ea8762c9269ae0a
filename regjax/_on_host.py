"""Small functions evaluated by NumPy where the host has their numbers, instead of compiled.

What decides how a solver goes on works on arrays of some dozens of rows. The compiler takes
hundreds of times as long for that as the arithmetic does. So outside of `jax.jit` such a function
is traced once, and NumPy does its operations one after the other; inside of `jax.jit` it is a part
of the program. There is one text and no second version of a method.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jax.interpreters import partial_eval

from regjax import _loops
from regjax._numpy_rules import RULES, keys

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Calls whose operations are done as if they stood there, and where their program is.
_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


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
            types = tuple(map(_type, leaves))
            traced = _traced(function, fixed, treedef, types, jax.sharding.get_abstract_mesh())
            return traced(leaves, gives_arrays)

        return cast(_Function, evaluated)

    return decorated


def _type(leaf: Any) -> tuple[Any, Any, bool]:
    """Shape, dtype, and whether other types decide instead: of Python's numbers."""
    if hasattr(leaf, "dtype"):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)
    return (), jax.numpy.result_type(leaf), True


@functools.lru_cache(maxsize=256)
def _traced(
    function: Callable[..., Any], fixed: Any, treedef: Any, types: Any, mesh: Any
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
        self.evaluated: _Evaluated | None = None
        with contextlib.suppress(NotImplementedError):
            self.evaluated = _Evaluated(computed)

    def __call__(self, leaves: list[Any], gives_arrays: bool) -> Any:
        read = [leaf for leaf, is_read in zip(leaves, self.is_read, strict=True) if is_read]
        if self.evaluated is None or not all(map(_is_here, read)):
            computed = self.compiled(*read)
        else:
            computed = self.evaluated(jax.device_get([_numbers(leaf) for leaf in read]))
            computed = list(map(_typed, computed, self.evaluated.types))
            if gives_arrays:
                computed = _put(computed, leaves)
        found = iter(computed)
        results = [next(found) if i is None else leaves[i] for i in self.handed]
        return jax.tree.unflatten(self.outputs, results)


def _numbers(leaf: Any) -> Any:
    """A leaf as it is evaluated: a key by its two words."""
    is_key = hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def _typed(result: Any, kind: Any) -> Any:
    if not keys(kind.dtype):
        return result
    words = np.stack([result >> np.uint64(32), result & np.uint64(0xFFFFFFFF)], -1)
    return jax.random.wrap_key_data(jax.numpy.asarray(words.astype(np.uint32)), impl="threefry2x32")


def _is_here(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1


def _put(results: list[Any], leaves: list[Any]) -> Any:
    """Results as arrays on the device of the arguments."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    # Arrays that nobody has put anywhere leave the results free as well.
    placed = [array for array in arrays if getattr(array, "committed", True)]
    return jax.device_put(results, placed[0].sharding if placed else None)


class _Evaluated:
    """A traced program, done by NumPy: called with NumPy's arrays, it gives a list of them."""

    def __init__(self, closed: Any):
        self.values: list[Any] = []
        self.steps: list[tuple[Any, list[int], Any, Any, list[int]]] = []
        self.places: dict[Any, int] = {}
        jaxpr = closed.jaxpr
        self.inputs = [self._new(variable) for variable in jaxpr.invars]
        self.keys = {self.places[v] for v in jaxpr.invars if keys(v.aval.dtype)}
        for variable, constant in zip(jaxpr.constvars, closed.consts, strict=True):
            self._set(variable, np.asarray(constant))
        self._add(jaxpr)
        self.outputs = [self._place(atom) for atom in jaxpr.outvars]
        self.types = [atom.aval for atom in jaxpr.outvars]
        self._keep_needed()

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        values = list(self.values)
        for place, array in zip(self.inputs, arguments, strict=True):
            # A copy: a later step of a solver may use the memory of its arguments.
            values[place] = _one_word(array) if place in self.keys else np.array(array)
        with np.errstate(all="ignore"):  # as JAX: infinities and NaN are numbers
            for rule, places, parameters, types, outputs in self.steps:
                found = rule([values[place] for place in places], parameters, types)
                if len(outputs) == 1 and not isinstance(found, list):
                    values[outputs[0]] = found
                    continue
                for output, value in zip(outputs, found, strict=True):
                    values[output] = value
        return [
            np.asarray(values[place], np.uint64 if keys(kind.dtype) else kind.dtype)
            for place, kind in zip(self.outputs, self.types, strict=True)
        ]

    def _add(self, jaxpr: Any) -> None:
        """The steps of a jaxpr whose arguments have their places."""
        for equation in jaxpr.eqns:
            name, operands = equation.primitive.name, equation.invars
            places = [self._place(atom) for atom in operands]
            if name in _CALLS:
                self._add_call(equation.params[_CALLS[name]], places, equation.outvars)
                continue
            rule = _LOOPS.get(name, RULES.get(name))
            if rule is None:
                raise NotImplementedError(name)
            parameters = _PREPARED[name](equation.params) if name in _LOOPS else equation.params
            types = [variable.aval for variable in equation.outvars]
            outputs = [self._new(variable) for variable in equation.outvars]
            self.steps.append((rule, places, parameters, types, outputs))

    def _add_call(self, closed: Any, places: list[int], outputs: Any) -> None:
        jaxpr = getattr(closed, "jaxpr", closed)
        outer, self.places = self.places, dict(zip(jaxpr.invars, places, strict=True))
        for variable, constant in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
            self._set(variable, np.asarray(constant))
        self._add(jaxpr)
        found = [self._place(atom) for atom in jaxpr.outvars]
        self.places = outer | dict(zip(outputs, found, strict=True))

    def _new(self, variable: Any) -> int:
        return self._set(variable, None)

    def _set(self, variable: Any, value: Any) -> int:
        self.values.append(value)
        self.places[variable] = len(self.values) - 1
        return len(self.values) - 1

    def _place(self, atom: Any) -> int:
        if isinstance(atom, Literal):
            self.values.append(np.asarray(atom.val, atom.aval.dtype))
            return len(self.values) - 1
        return self.places[atom]

    def _keep_needed(self) -> None:
        """Drops steps that nobody reads, and does those of constants once and for all."""
        needed, kept = set(self.outputs), []
        for step in reversed(self.steps):
            if needed.intersection(step[4]):
                needed.update(step[1])
                kept.append(step)
        varying, self.steps = set(self.inputs), []
        for step in reversed(kept):
            rule, places, parameters, types, outputs = step
            if varying.intersection(places):
                varying.update(outputs)
                self.steps.append(step)
                continue
            with np.errstate(all="ignore"):
                found = rule([self.values[place] for place in places], parameters, types)
            found = found if isinstance(found, list) else [found]
            for output, value in zip(outputs, found, strict=True):
                self.values[output] = value


def _one_word(words: Any) -> Any:
    high, low = (np.asarray(words)[..., i].astype(np.uint64) for i in range(2))
    return (high << np.uint64(32)) | low


def _scan(operands: Any, parameters: Any, types: Any) -> list[Any]:
    turn, kept, carried, length, backwards = parameters
    fixed, carry, rows = (
        operands[:kept],
        operands[kept : kept + carried],
        operands[kept + carried :],
    )
    stacked: list[list[Any]] = []
    for i in range(length)[:: -1 if backwards else 1]:
        found = turn([*fixed, *carry, *(row[i] for row in rows)])
        carry = found[:carried]
        stacked.append(found[carried:])
    columns = zip(*stacked[:: -1 if backwards else 1], strict=True)
    return [*carry, *(np.stack(column) for column in columns)]


def _while(operands: Any, parameters: Any, types: Any) -> list[Any]:
    goes_on, of_condition, turn, of_turn = parameters
    tested, fixed = operands[:of_condition], operands[of_condition : of_condition + of_turn]
    carry = operands[of_condition + of_turn :]
    while goes_on([*tested, *carry])[0]:
        carry = turn([*fixed, *carry])
    return list(carry)


def _cond(operands: Any, parameters: Any, types: Any) -> list[Any]:
    index = min(max(int(operands[0]), 0), len(parameters) - 1)
    return cast(list[Any], parameters[index](operands[1:]))


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
# What these need of their parameters.
_PREPARED: dict[str, Callable[[Any], Any]] = {
    "scan": lambda given: (
        _Evaluated(given["jaxpr"]), given["num_consts"], given["num_carry"], given["length"],
        given["reverse"],
    ),
    "while": lambda given: (
        _Evaluated(given["cond_jaxpr"]), given["cond_nconsts"], _Evaluated(given["body_jaxpr"]),
        given["body_nconsts"],
    ),
    "cond": lambda given: [_Evaluated(branch) for branch in given["branches"]],
}  # fmt: skip
