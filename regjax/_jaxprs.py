"""Looking into what JAX has traced."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

# What only decides how something is called.
_NAMES = {"jit": ("name",), "pjit": ("name",), "custom_jvp_call": ("name",)}
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of all jaxprs in them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs: of a call, of a loop, of each branch."""
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def parts(closed: Any) -> tuple[Any, Any]:
    """The jaxpr and its constants."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


@dataclasses.dataclass(frozen=True)
class Description:
    """What a traced program computes.

    Attributes:
      text: a digest: of equal programs equal, whatever its functions and variables are called.
      has_rules: whether it holds rules of differentiation, which are not in the text: functions
        that were not called yet.
      references: objects that the text knows by their identity.
    """

    text: str
    has_rules: bool
    references: tuple[Any, ...]


def describe(closed: Any, *, lasting: bool = False) -> Description:
    """Describes a traced program.

    Args:
      closed: from `jax.make_jaxpr`; arrays that it captured count by their bits.
      lasting: whether the text must be the same in another process: functions that JAX cannot look
        into (callbacks to the host) are then known by their names and code alone.
    """
    writer = _Writer(lasting)
    text = writer.jaxpr(closed)
    return Description(text, writer.has_rules, tuple(writer.references))


class _Writer:
    """Writes jaxprs, each once."""

    def __init__(self, lasting: bool):
        self.lasting = lasting
        self.has_rules = False
        self.references: list[Any] = []
        self.written: dict[int, str] = {}

    def jaxpr(self, closed: Any) -> str:
        """A digest of a jaxpr and its constants."""
        if id(closed) not in self.written:
            jaxpr, consts = parts(closed)
            total = hashlib.sha256()
            for piece in self._pieces(jaxpr, consts):
                total.update(piece.encode())
                total.update(b"\n")
            self.written[id(closed)] = total.hexdigest()
        return self.written[id(closed)]

    def _pieces(self, jaxpr: Any, consts: Any) -> Iterator[str]:
        names: dict[Any, int] = {}

        def new(variable: Any) -> str:
            names[variable] = len(names)
            aval = variable.aval
            return f"{names[variable]}:{aval}:{getattr(aval, 'weak_type', False)}"

        def old(atom: Any) -> str:
            return self.value(atom.val) + str(atom.aval) if is_literal(atom) else str(names[atom])

        is_literal = lambda atom: isinstance(atom, Literal)
        yield from map(new, [*jaxpr.constvars, *jaxpr.invars])
        yield from map(self.value, consts)
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            yield name
            for key, parameter in sorted(equation.params.items()):
                is_function = callable(parameter) or hasattr(parameter, "call_wrapped")
                is_rule = name.startswith("custom_") and is_function
                self.has_rules |= is_rule
                if not is_rule and key not in _NAMES.get(name, ()):
                    yield f"{key}={self.value(parameter)}"
            yield ",".join(map(old, equation.invars))
            yield ",".join(map(new, equation.outvars))
        yield ",".join(map(old, jaxpr.outvars))

    def value(self, value: Any) -> str:
        """A parameter or a constant, as text."""
        if isinstance(value, _PLAIN):
            return f"{type(value).__name__} {value!r}"
        if hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns"):
            return self.jaxpr(value)
        if isinstance(value, (tuple, list)):
            return f"({','.join(map(self.value, value))})"
        if isinstance(value, dict):
            return f"{{{','.join(f'{k!r}:{self.value(v)}' for k, v in value.items())}}}"
        if isinstance(value, (set, frozenset)):
            return f"{{{','.join(sorted(map(self.value, value)))}}}"
        if not isinstance(value, type) and hasattr(value, "__array__"):
            return self._array(value)
        return self._object(value)

    def _array(self, value: Any) -> str:
        if isinstance(value, jax.core.Tracer):
            return self._identity(value)
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return f"{value.dtype}{self._array(jax.random.key_data(value))}"
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"

    def _object(self, value: Any) -> str:
        if not self.lasting:
            return f"{value!r} {self._identity(value)}"
        code = getattr(value, "__code__", None)
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value))}"
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
        return f"{name} {text} {'' if code is None else code.co_code.hex()}"

    def _identity(self, value: Any) -> str:
        self.references.append(value)
        try:
            return str(hash(value))
        except TypeError:
            return str(id(value))
