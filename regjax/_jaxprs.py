"""Looking into what JAX has traced."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.interpreters import partial_eval

# What only decides how something is called.
_NAMES = {"jit": ("name",), "pjit": ("name",), "custom_jvp_call": ("name",)}
# Functions with rules of differentiation, and whether these go forward.
_RULES = {"custom_jvp_call": True, "custom_vjp_call": False, "custom_vjp_call_jaxpr": False}
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


def narrowest_eps(jaxpr: Any) -> float:
    """The unit of rounding of the narrowest type that a jaxpr computes in; 0 if in none."""
    dtypes = {
        variable.aval.dtype
        for equation in equations(jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "dtype") and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
    }
    return max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)


def read(closed: Any) -> list[bool]:
    """Which arguments the results of a traced program depend on."""
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return used


def parts(closed: Any) -> tuple[Any, Any]:
    """The jaxpr and its constants."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


@dataclasses.dataclass(frozen=True)
class Description:
    """What a traced program computes.

    Attributes:
      text: a digest: of equal programs equal, whatever its functions and variables are called.
      is_whole: whether nothing is missing in the text, such as a rule that could not be applied.
      references: objects that the text knows by their identity.
    """

    text: str
    is_whole: bool
    references: tuple[Any, ...]


def describe(closed: Any, *, derivatives: int = 0, lasting: bool = False) -> Description:
    """Describes a traced program.

    Args:
      closed: from `jax.make_jaxpr`; arrays that it captured count by their bits.
      derivatives: how often the program will be differentiated. Rules of differentiation are
        functions that nobody can compare: what they compute is described.
      lasting: whether the text must be the same in another process: functions that JAX cannot look
        into (callbacks to the host) are then known by their names and code alone.
    """
    writer = Writer(derivatives, lasting)
    text = writer.jaxpr(closed)
    return Description(text, writer.is_whole, tuple(writer.references))


class Writer:
    """Writes jaxprs, each once."""

    def __init__(self, derivatives: int, lasting: bool):
        self.derivatives = derivatives
        self.lasting = lasting
        self.is_whole = True
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
                is_rule = name in _RULES and not _is_plain(parameter)
                if not is_rule and key not in _NAMES.get(name, ()):
                    yield f"{key}={self.value(parameter)}"
            if name in _RULES and self.derivatives > 0:
                yield self._rule(equation)
            yield ",".join(map(old, equation.invars))
            yield ",".join(map(new, equation.outvars))
        yield ",".join(map(old, jaxpr.outvars))

    def _rule(self, equation: Any) -> str:
        """What the rule of an equation computes."""
        try:
            traced = _differentiated(equation)
        except Exception:  # whatever a rule may raise that is called in another way than here
            self.is_whole = False
            return ""
        found = describe(traced, derivatives=self.derivatives - 1, lasting=self.lasting)
        self.is_whole &= found.is_whole
        self.references += found.references
        return found.text

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
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
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


def _is_plain(parameter: Any) -> bool:
    return (
        isinstance(parameter, _PLAIN) or hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr")
    )


def _differentiated(equation: Any) -> Any:
    """The traced derivative of an equation that has a rule."""
    avals = [atom.aval for atom in equation.invars]
    structs = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
    is_float = [jnp.issubdtype(struct.dtype, jnp.inexact) for struct in structs]
    parameters = equation.primitive.get_bind_params(equation.params)

    def derivative(operands: Any, tangents: Any) -> Any:
        def function(*floats: Any) -> Any:
            remaining = iter(floats)
            pairs = zip(operands, is_float, strict=True)
            given = [next(remaining) if real else operand for operand, real in pairs]
            outputs = equation.primitive.bind(*given, **parameters)
            return [out for out in outputs if jnp.issubdtype(out.dtype, jnp.inexact)]

        floats = list(itertools.compress(operands, is_float))
        if _RULES[equation.primitive.name]:
            return jax.jvp(function, floats, tangents)
        outputs, backwards = jax.vjp(function, *floats)
        return backwards(outputs)

    return jax.make_jaxpr(derivative)(structs, list(itertools.compress(structs, is_float)))
