"""Functions as they are now: traced when they are given, found again by what they compute.

A function object says little about a function: a bound method stays equal to itself while its
object changes, and each new `lambda` is another one, however often it was written before. So
whoever keeps a function keeps its program. What the function read beside its arguments (what it
closed over, and its own leaves if it is a pytree) becomes an argument of the program; two
functions of the same program share one static code, so that `jax.jit` compiles nothing again.
"""

import dataclasses
import functools
import itertools
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from regjax import _jaxprs, _meshes
from regjax._digest import digest
from regjax._printing import noted

_Jitted = TypeVar("_Jitted", bound=Callable[..., Any])

# Each program that is compiled takes about 85 of the 65530 memory maps of a Linux process.
_MAX_COMPILED = 64


@dataclasses.dataclass(frozen=True)
class _Trace:
    """The program for arguments of certain types.

    Attributes:
      jaxpr: of the constants, then the leaves of the arguments.
      places: of its constants among those of all traces.
      outputs: tree of the shapes of its outputs.
    """

    jaxpr: ClosedJaxpr
    places: tuple[int, ...]
    outputs: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Code:
    """What is static of a program; there is one of each kind, so it is compared by identity.

    Attributes:
      traces: types of the arguments -> the program for them.
      couples_examples: what the function said of itself (`_base.couples_examples`).
      text: what it computes, as far as can be said.
      references: what the name that it is found by speaks of, kept so that nothing else takes it.
    """

    traces: dict[Any, _Trace]
    couples_examples: bool
    references: tuple[Any, ...] = ()
    text: tuple[Any, ...] = ()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["constants"], meta_fields=["code"]
)
@dataclasses.dataclass(frozen=True)
class Program:
    """A function as it was when it was traced: a pytree, called like the function.

    Attributes:
      constants: the arrays that it reads beside its arguments.
      code: the rest.
    """

    constants: tuple[Any, ...]
    code: Code

    @property
    def couples_examples(self) -> bool:
        """Tells whether the function said that it couples the examples of a batch."""
        return self.code.couples_examples

    def __call__(self, *arguments: Any) -> Any:
        """Computes the function of arguments of the types that it was traced for."""
        trace = self._trace(arguments)
        constants = [self.constants[place] for place in trace.places]
        outputs = jaxpr_as_fun(trace.jaxpr)(*constants, *jax.tree.leaves(arguments))
        shapes, treedef = jax.tree.flatten(trace.outputs)
        # A number of the program itself comes as a literal.
        arrays = [
            output if isinstance(output, jax.Array) else jnp.asarray(output, shape.dtype)
            for output, shape in zip(outputs, shapes, strict=True)
        ]
        return jax.tree.unflatten(treedef, arrays)

    def outputs(self, *arguments: Any) -> Any:
        """The shapes of what the program computes of arguments."""
        return self._trace(arguments).outputs

    def _trace(self, arguments: Any) -> _Trace:
        wanted = types(arguments)
        if wanted not in self.code.traces:
            known = ", ".join(str(known[1]) for known in self.code.traces)
            raise TypeError(
                f"`arguments` must have the types that the function was traced for, {known}, got "
                f"{wanted[1]}."
            )
        return self.code.traces[wanted]


def trace(
    function: Callable[..., Any], *signatures: Any, couples_examples: bool = False
) -> Program:
    """Traces a function for arguments of some types.

    Args:
      function: a callable, perhaps a pytree, whose leaves become constants.
      *signatures: tuples of arguments, arrays or their shapes.
      couples_examples: what the function says of itself.

    Returns:
      A `Program`, not yet shared with equal ones (`share`).
    """
    leaves, treedef = _leaves(function)
    constants = {id(leaf): leaf for leaf in leaves}
    if len(constants) < len(leaves):  # one leaf at two places
        constants = dict(enumerate(leaves))
    own, traces = tuple(range(len(leaves))), {}
    for arguments in signatures:
        if types(arguments) in traces:
            continue
        closed, outputs = _closed(treedef, leaves, arguments)
        captured = list(_constants(closed))
        for constant in captured:
            constants.setdefault(id(constant), constant)
        numbers = {name: number for number, name in enumerate(constants)}
        places = tuple(numbers[id(constant)] for constant in captured)
        jaxpr = _hoisted(closed, captured, leaves, arguments)
        traces[types(arguments)] = _Trace(jaxpr, places + own, outputs)
    arrays = tuple(map(_array, constants.values()))
    return Program(arrays, Code(traces, couples_examples))


def share(tree: Any) -> Any:
    """`tree` with the code of equal programs in place of its own.

    Programs are equal if they compute the same, and so do their first two derivatives; one whose
    rules of differentiation cannot be applied by themselves is equal to no other.
    """
    is_program = lambda node: isinstance(node, Program)

    def shared(node: Any) -> Any:
        return Program(node.constants, _find(node.code)) if is_program(node) else node

    return jax.tree.map(shared, tree, is_leaf=is_program)


def same(one: Any, other: Any) -> bool:
    """Whether two trees of shared programs compute the same of equal arguments, as far as is seen.

    Rules of differentiation that cannot be applied by themselves are taken to be the same.
    """
    is_program = lambda node: isinstance(node, Program)
    ones, others = (jax.tree.leaves(tree, is_leaf=is_program) for tree in (one, other))
    structure: Any = jax.tree.structure(one, is_leaf=is_program)
    if structure != jax.tree.structure(other, is_leaf=is_program):
        return False
    return all(map(_same_leaf, ones, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Program) and isinstance(other, Program):
        known = one.code.text if one.code.text else one.code
        return known == (other.code.text or other.code) and same(one.constants, other.constants)
    return one is other or digest(one) == digest(other)


_known: weakref.WeakValueDictionary[Any, Code] = weakref.WeakValueDictionary()
_compiled: list[Any] = []
_count = itertools.count(1)


def num_bytes(
    function: Callable[..., Any], *arguments: Any, donate_argnums: tuple[int, ...] = ()
) -> int:
    """Bytes that a function takes on a device beside its arguments, by the compiler's account.

    Args:
      function: what is compiled, and not run.
      *arguments: arrays or their shapes.
      donate_argnums: the arguments whose memory it may use for its results.
    """
    lowered = jax.jit(function, donate_argnums=donate_argnums).lower(*arguments)
    try:
        account: Any = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise
        # For TPUs a program that does not fit is refused, and the message has what it takes.
        total = round(float(refused[1]) * 1024 ** " KMGTP".index(refused[2] or " "))
        return max(total - _meshes.num_bytes(arguments), 0)
    results = account.output_size_in_bytes - account.alias_size_in_bytes
    return int(account.temp_size_in_bytes + results)


# "HLO temporaries" are all that the program holds there: its arguments and results as well.
_REFUSED = re.compile(r"RESOURCE_EXHAUSTED: .*required for HLO temporaries \(([\d.]+)([KMGTP]?)\)")


def bounded(jitted: _Jitted) -> _Jitted:
    """Registers a compiled function of programs: what it remembers of them is bounded."""
    _compiled.append(jitted)
    return jitted


def _find(code: Code) -> Code:
    described = [
        _jaxprs.describe(trace.jaxpr, derivatives=2 if i == 0 else 0)
        for i, trace in enumerate(code.traces.values())
    ]
    places = tuple(trace.places for trace in code.traces.values())
    texts = tuple(description.text for description in described)
    alone = None if all(description.is_whole for description in described) else object()
    # An equation remembers the mesh under which it was traced.
    mesh = jax.sharding.get_abstract_mesh()
    # What two functions give may be called differently: a loss and aux, a sum and its weight.
    forms = tuple(jax.tree.structure(trace.outputs) for trace in code.traces.values())
    text = (texts, places, forms, tuple(code.traces), code.couples_examples, mesh)
    name = (text, alone)
    found = _known.get(name)
    if found is not None:
        return found
    if next(_count) % _MAX_COMPILED == 0:
        for jitted in _compiled:
            jitted.clear_cache()
    references = tuple(description.references for description in described)
    return _known.setdefault(name, dataclasses.replace(code, references=references, text=text))


def _leaves(function: Callable[..., Any]) -> tuple[list[Any], Any]:
    """The leaves of a function that is a pytree, and how it is called with others."""
    leaves, treedef = jax.tree.flatten(function)
    if len(leaves) == 1 and leaves[0] is function:
        return [], lambda _: function
    return leaves, lambda others: jax.tree.unflatten(treedef, others)


def _closed(function_of: Callable[[Any], Any], leaves: Any, arguments: Any) -> tuple[Any, Any]:
    """The traced function, and the shapes of its outputs; a new function, as JAX remembers them."""

    def fresh(own: Any, arguments: Any) -> Any:
        return function_of(own)(*arguments)

    traced = jax.make_jaxpr(fresh, return_shape=True)
    with noted(*arguments):
        return _meshes.without_mesh(traced, structs(leaves), structs(arguments))


def _hoisted(closed: Any, captured: list[Any], leaves: Any, arguments: Any) -> ClosedJaxpr:
    """The same program with what it captured as its first arguments."""
    if not captured:
        return closed

    def run(captured: Any, rest: Any) -> Any:
        return _run(closed, iter(captured), jax.tree.leaves(rest))

    rest = structs(leaves), structs(arguments)
    return _meshes.without_mesh(jax.make_jaxpr(run), structs(captured), rest)


def _run(closed: Any, captured: Iterator[Any], arguments: list[Any]) -> list[Any]:
    """Evaluates a jaxpr with other constants, those of the compiled functions in it included."""
    jaxpr, consts = _jaxprs.parts(closed)
    environment = dict(zip(jaxpr.constvars, [next(captured) for _ in consts], strict=True))
    environment |= dict(zip(jaxpr.invars, arguments, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else environment[atom]
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = _called(equation)
        if inner is not None:
            results = _run(inner, captured, operands)
        else:
            parameters = equation.primitive.get_bind_params(equation.params)
            with equation.ctx.manager:
                results = equation.primitive.bind(*operands, **parameters)
            results = results if equation.primitive.multiple_results else [results]
        environment |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _constants(closed: Any) -> Iterator[Any]:
    """The arrays that a jaxpr and the compiled functions in it capture, in the order of `_run`."""
    jaxpr, consts = _jaxprs.parts(closed)
    for constant in consts:
        # NumPy's arrays come in a wrapper.
        yield constant if isinstance(constant, jax.Array) else getattr(constant, "val", constant)
    for equation in jaxpr.eqns:
        inner = _called(equation)
        if inner is not None:
            yield from _constants(inner)


def _called(equation: Any) -> Any:
    """The compiled function that an equation calls, if that captures an array; else None."""
    if equation.primitive.name not in ("jit", "pjit"):
        return None
    inner = equation.params["jaxpr"]
    return inner if next(_constants(inner), None) is not None else None


def types(arguments: Any) -> Any:
    """The types of arguments: what a program is found by among those of a function."""
    leaves, treedef = jax.tree.flatten(arguments)
    return treedef, tuple((tuple(jnp.shape(leaf)), _dtype(leaf)) for leaf in leaves)


def structs(tree: Any) -> Any:
    """The shapes and types of arrays, without where they lie."""

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        is_weak = getattr(leaf, "weak_type", not hasattr(leaf, "dtype"))
        return jax.ShapeDtypeStruct(jnp.shape(leaf), _dtype(leaf), weak_type=is_weak)

    return jax.tree.map(struct, tree)


def _dtype(leaf: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended)
    return dtype if is_key else jnp.result_type(leaf)


def _array(constant: Any) -> Any:
    """On the device once and for all, and not the caller's own memory, which may change."""
    return constant if isinstance(constant, jax.Array) else jnp.array(constant)
