"""A traced program, done by NumPy: its operations one after the other.

Only what `_numpy_rules.py` and `_numpy_indexing.py` have a rule for; loops and branches are here.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from regjax import _jaxprs
from regjax._numpy_indexing import INDEXING
from regjax._numpy_rules import ELEMENTARY, Operation, Rule, is_key

# Calls whose operations are done as if they stood there, and where their program is.
_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


class Evaluated:
    """A traced program, done by NumPy: called with NumPy's arrays, it gives a list of them."""

    def __init__(self, closed: Any):
        self.values: list[Any] = []
        # An operation, the places of its operands, that of its result, or of its results.
        self.steps: list[tuple[Operation, list[int], int | list[int]]] = []
        self.places: dict[Any, int] = {}
        jaxpr: Any = closed.jaxpr
        self.dtypes = [variable.aval.dtype for variable in jaxpr.invars]
        self.inputs = [self._set(variable, None) for variable in jaxpr.invars]
        self._add(jaxpr, closed.consts)
        self.outputs = [self._place(atom) for atom in jaxpr.outvars]
        self._keep_needed()
        for dtype in self.dtypes:
            is_key(dtype)
        self.output_keys = [is_key(atom.aval.dtype) for atom in jaxpr.outvars]

    def of_leaves(self, leaves: Sequence[Any]) -> list[Any]:
        """The results as the leaves of a tree, of the arguments as such."""
        found = self(list(map(_number, leaves, self.dtypes)))
        return list(map(_leaf, found, self.output_keys))

    def __call__(self, arguments: Sequence[Any]) -> list[Any]:
        values = list(self.values)
        for place, array in zip(self.inputs, arguments, strict=True):
            values[place] = array
        with np.errstate(all="ignore"):  # as JAX: infinities and NaN are numbers
            for operation, places, into in self.steps:
                found = operation(*[values[place] for place in places])
                if isinstance(into, int):
                    values[into] = found
                else:
                    for place, value in zip(into, found, strict=True):
                        values[place] = value
        return [values[place] for place in self.outputs]

    def _add(self, jaxpr: Any, constants: Any) -> None:
        """The steps of a jaxpr whose arguments have their places."""
        for variable, constant in zip(jaxpr.constvars, constants, strict=True):
            self._set(variable, np.asarray(constant))
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            places = [self._place(atom) for atom in equation.invars]
            if name in _CALLS:
                self._add_call(equation.params[_CALLS[name]], places, equation.outvars)
                continue
            if name not in _RULES:
                raise NotImplementedError(name)
            types = [variable.aval for variable in equation.outvars]
            operation = _RULES[name](equation.params, types)
            outputs = [self._set(variable, None) for variable in equation.outvars]
            is_list = equation.primitive.multiple_results
            self.steps.append((operation, places, outputs if is_list else outputs[0]))

    def _add_call(self, closed: Any, places: list[int], outputs: Any) -> None:
        jaxpr, constants = _jaxprs.parts(closed)
        outer, self.places = self.places, dict(zip(jaxpr.invars, places, strict=True))
        self._add(jaxpr, constants)
        found = [self._place(atom) for atom in jaxpr.outvars]
        self.places = outer | dict(zip(outputs, found, strict=True))

    def _set(self, variable: Any, value: Any) -> int:
        self.values.append(value)
        self.places[variable] = len(self.values) - 1
        return len(self.values) - 1

    def _place(self, atom: Any) -> int:
        if isinstance(atom, Literal):
            kind: Any = atom.aval
            self.values.append(np.asarray(atom.val, kind.dtype))
            return len(self.values) - 1
        return self.places[atom]

    def _keep_needed(self) -> None:
        """Does the steps that read no argument once and for all, and drops what nobody reads."""
        needed, kept = set(self.outputs), []
        for step in reversed(self.steps):
            if needed.intersection(_listed(step[2])):
                needed.update(step[1])
                kept.append(step)
        varying, self.steps = set(self.inputs), []
        for operation, places, into in reversed(kept):
            if varying.intersection(places):
                varying.update(_listed(into))
                self.steps.append((operation, places, into))
                continue
            with np.errstate(all="ignore"):
                found = operation(*[self.values[place] for place in places])
            found = [found] if isinstance(into, int) else found
            for place, value in zip(_listed(into), found, strict=True):
                self.values[place] = value


def _listed(into: int | list[int]) -> list[int]:
    return [into] if isinstance(into, int) else into


def _number(leaf: Any, dtype: Any) -> Any:
    """A leaf as NumPy has it: a copy, or JAX could not use its memory in a later step."""
    if isinstance(dtype, np.dtype):
        return np.asarray(leaf, dtype) if isinstance(leaf, np.ndarray) else np.array(leaf, dtype)
    words = np.asarray(jax.random.key_data(leaf)).astype(np.uint64)
    return (words[..., 0] << np.uint64(32)) | words[..., 1]


def _leaf(number: Any, is_key: bool) -> Any:
    if not is_key:
        return np.asarray(number)
    words = np.stack([number >> np.uint64(32), number & np.uint64(0xFFFFFFFF)], -1)
    return jax.random.wrap_key_data(jax.numpy.asarray(words.astype(np.uint32)), impl="threefry2x32")


def _scan(parameters: Any, types: Any) -> Operation:
    turn, length = Evaluated(parameters["jaxpr"]), parameters["length"]
    # How many constants, what is carried and rows there are, releases of JAX say in several ways;
    # rows have one axis less within a turn.
    body, _ = _jaxprs.parts(parameters["jaxpr"])
    ranks = [variable.aval.ndim for variable in body.invars]
    pairs = zip(types, body.outvars, strict=True)
    carried = sum(kind.ndim == variable.aval.ndim for kind, variable in pairs)
    order = slice(None, None, -1 if parameters["reverse"] else 1)

    def scanned(*operands: Any) -> list[Any]:
        same = sum(np.ndim(one) == rank for one, rank in zip(operands, ranks, strict=True))
        kept = same - carried
        fixed, carry = operands[:kept], list(operands[kept:same])
        rows, stacked = operands[same:], []
        for i in range(length)[order]:
            found = turn([*fixed, *carry, *(row[i] for row in rows)])
            carry = found[:carried]
            stacked.append(found[carried:])
        return [*carry, *(np.stack(column) for column in zip(*stacked[order], strict=True))]

    return scanned


def _while(parameters: Any, types: Any) -> Operation:
    goes_on, turn = (Evaluated(parameters[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    first, second = parameters["cond_nconsts"], parameters["body_nconsts"]

    def repeated(*operands: Any) -> list[Any]:
        tested, fixed = operands[:first], operands[first : first + second]
        carry = list(operands[first + second :])
        while goes_on([*tested, *carry])[0]:
            carry = turn([*fixed, *carry])
        return carry

    return repeated


def _cond(parameters: Any, types: Any) -> Operation:
    branches = [Evaluated(branch) for branch in parameters["branches"]]
    return lambda index, *operands: branches[min(max(int(index), 0), len(branches) - 1)](operands)


_RULES: dict[str, Rule] = ELEMENTARY | INDEXING | {"scan": _scan, "while": _while, "cond": _cond}
