"""Meshes with explicit axes, JAX's default: converted, as far as arrays are known, and given back.

On explicit axes each operation says how its result lies, and what cannot be told is refused: a
contraction over divided examples, a vector made of divided leaves. Our own arrays lie on automatic
axes. So what a public function gets on explicit axes goes on automatic ones of the same devices,
without a copy, and its results come back. Inside of `jax.jit`, where types cannot be changed, all
that has no place yet is copied to each device, and the mesh is that of everything made from it.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Tree: TypeAlias = Any


# The mesh of the caller whose arrays are on automatic axes for the time of a call.
_home: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("home", default=None)


def home() -> Mesh | None:
    """The mesh with explicit axes from which the arrays of this call come; None: they are as given.

    What keeps such arrays (an operator) keeps it as its `home`, to which results go back.
    """
    return _home.get()


def settled(
    function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result:
    """Calls a function with arrays on one mesh, which has automatic axes wherever that can be."""
    leaves = jax.tree.leaves((args, kwargs), is_leaf=_is_iterator)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    explicit = [leaf for leaf in arrays if _is_on_explicit(leaf)]
    context = jax.sharding.get_abstract_mesh()
    mesh = _mesh_of(explicit, context, (args, kwargs))
    if not explicit and not is_explicit(context) and (mesh is None or home() is not None):
        return function(*args, **kwargs)
    is_traced = lambda array: isinstance(array, jax.core.Tracer)
    if mesh is not None and not any(map(is_traced, [*arrays, jnp.zeros(())])):
        with jax.set_mesh(automatic_mesh(mesh)) if is_explicit(context) else _NOTHING:
            token = _home.set(mesh)
            try:
                args, kwargs = automatic((args, kwargs))
                return _back(function(*args, **kwargs), mesh)
            except (AssertionError, TypeError, ValueError) as error:
                error.add_note(_NOTE)
                raise
            finally:
                _home.reset(token)
    if not is_traced(jnp.zeros(())):
        return function(*args, **kwargs)  # a derivative outside of jax.jit: as JAX has it
    if not explicit and not is_explicit(context):
        return function(*args, **kwargs)  # an operator in jax.jit: its arrays are on automatic axes
    abstract = jax.typeof(explicit[0]).sharding.mesh if explicit else context
    with jax.sharding.use_abstract_mesh(abstract):
        typed = functools.partial(_typed, abstract)
        args, kwargs = jax.tree.map(typed, (args, kwargs), is_leaf=_is_iterator)
        return function(*args, **kwargs)


def _is_on_explicit(array: jax.Array) -> bool:
    # Asked of each array of each product: most lie on one device, which is quickly told.
    is_traced = isinstance(array, jax.core.Tracer)
    if not is_traced and isinstance(array.sharding, SingleDeviceSharding):
        return False
    return is_explicit(jax.typeof(array).sharding.mesh)


def _mesh_of(explicit: list[jax.Array], context: Any, arguments: _Tree) -> Mesh | None:
    """The devices under the names that the caller has for them, if those are explicit."""
    known = [array for array in explicit if _is_known(array)]
    if known:
        sharding: Any = known[0].sharding
        return sharding.mesh
    if is_explicit(context) and not explicit:
        return _known_context()
    is_node = lambda node: _is_operator(node) or _is_iterator(node)
    nodes = jax.tree.leaves(arguments, is_leaf=is_node)
    homes = [node.home for node in nodes if _is_operator(node)]
    return next((home for home in homes if home is not None), None)


def _known_context() -> Mesh | None:
    try:
        return jax.sharding.get_mesh()
    except ValueError:  # inside of jit
        return None


def _is_iterator(node: Any) -> bool:
    """Batches that come one by one: no tree, and JAX warns of who takes them for a leaf."""
    return isinstance(node, Iterator)


def _is_operator(node: Any) -> bool:
    # Of its class: a generator of flax has a stream for whatever name it is asked for.
    return hasattr(type(node), "block_product")


def num_bytes(tree: _Tree) -> int:
    """Bytes of a tree of arrays, or of their shapes, on one device; keys count nothing."""

    def of(leaf: Any) -> int:
        if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(of, jax.tree.leaves(tree)))


def on_one_mesh(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """`function`, called so."""

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return settled(function, *args, **kwargs)

    return call


_NOTE = (
    "The arrays of this call lie on a mesh with explicit axes; regjax puts its arguments on "
    "automatic axes of the same devices. Arrays that a function closes over, and axes that it "
    "names itself, stay explicit: pass such arrays as arguments, or make the mesh by "
    "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))."
)
_NOTHING = contextlib.nullcontext()


def without_mesh(trace: Callable[..., _Result], *arguments: _Tree) -> _Result:
    """Traces a function for arrays on any mesh: what it computes then remembers none.

    One that names axes needs the mesh that it is called under.
    """
    context = jax.sharding.get_abstract_mesh()
    if context.empty or any(kind == AxisType.Manual for kind in context.axis_types):
        return trace(*arguments)
    try:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return trace(*arguments)
    except Exception:  # an error of the function itself comes again
        return trace(*arguments)


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether a mesh has axes that are part of the types of arrays."""
    return AxisType.Explicit in mesh.axis_types


def automatic_mesh(mesh: Mesh) -> Mesh:
    """The same devices under the same names, which the compiler divides arrays over."""
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def automatic(tree: _Tree) -> _Tree:
    """`tree` with its arrays on explicit axes on automatic ones, where they are."""

    def moved(leaf: Any) -> Any:
        if not _is_known(leaf) or not is_explicit(leaf.sharding.mesh):
            return leaf
        mesh = automatic_mesh(leaf.sharding.mesh)
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree.map(moved, tree, is_leaf=_is_iterator)


def whole(tree: _Tree) -> _Tree:
    """`tree` with what is divided by its type copied to each device, inside of `jax.jit`."""

    def gathered(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        sharding = jax.typeof(leaf).sharding
        is_divided = is_explicit(sharding.mesh) and any(sharding.spec)
        return jax.sharding.reshard(leaf, PartitionSpec()) if is_divided else leaf

    return jax.tree.map(gathered, tree)


def _back(tree: _Tree, mesh: Mesh) -> _Tree:
    """`tree` with its arrays on the mesh that the caller knows; operators stay as they are."""
    ours = automatic_mesh(mesh)

    def moved(leaf: Any) -> Any:
        if not _is_known(leaf) or leaf.sharding.mesh != ours:
            return leaf
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree.map(moved, tree, is_leaf=_is_operator)


def _typed(mesh: AbstractMesh, leaf: Any) -> Any:
    """A traced array as one of the mesh, if it is of none."""
    is_nowhere = isinstance(leaf, jax.core.Tracer) and jax.typeof(leaf).sharding.mesh.empty
    return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec())) if is_nowhere else leaf


def _is_known(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return is_array and isinstance(leaf.sharding, NamedSharding)
