"""How a function is differentiated a second time: decided when an operator is made.

Forward over reverse mode is cheapest. A function with a rule of its own (`jax.custom_vjp`: fused
attention, implicit layers) often has none for forward mode; then reverse over reverse mode does, if
the backward rule can be differentiated backwards. Where that cannot be either, a central difference
of gradients is left to those who ask for it. It is a product with another matrix, off by

    |D(e) - D(2e)| / 3,    D(e) v = (g(w + e v) - g(w - e v)) / 2e

as far as two steps tell, up to the fourth order: solvers add it to their residual norms.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.interpreters import ad
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _jaxprs, _numerics, _programs, _tree
from regjax._base import Params, Tree, applied, as_partial
from regjax._programs import Program

FORWARD, REVERSE, DIFFERENCES = "forward", "reverse", "differences"

Mode: TypeAlias = str
"""How the derivative of a function is multiplied with a vector: one of the three."""

_REMEDY = (
    "Forward over reverse mode needs a forward rule (jax.custom_jvp, or one that JAX finds by "
    "itself); reverse over reverse mode needs a backward rule that can be differentiated backwards "
    "again; central differences of its gradients need nothing else: ask for them by "
    "`differences=True`, and their error is part of every residual norm."
)


def choose(
    product: Callable[..., Tree],
    jaxpr: Any,
    arguments: tuple[Tree, ...],
    *,
    name: str,
    differences: bool,
) -> Mode:
    """Returns the first way of differentiating a function that can be traced.

    Args:
      product: (mode, *arguments) -> a product that is traced for it, and not computed.
      jaxpr: of the function.
      arguments: of the product, arrays or their shapes.
      name: of the function as an argument, for errors.
      differences: whether differences may be taken where nothing else is left.

    Raises:
      TypeError: there is no way; names the function without a rule.
    """
    culprits = without_rule(jaxpr)
    if not culprits:
        return FORWARD
    for mode in (FORWARD, REVERSE):
        if _is_possible(functools.partial(product, mode), _programs.structs(arguments)):
            return mode
    if differences:
        return DIFFERENCES
    raise TypeError(
        f"`{name}` must be made of functions that can be differentiated twice, got "
        f"{', '.join(culprits)}. {_REMEDY}"
    )


def choose_of_gradient(
    gradient: Callable[..., Params], jaxpr: Any, *arguments: Tree, name: str, differences: bool
) -> Mode:
    """Does that for `jacobian_product`, whose arguments after the gradient these are."""
    product = lambda mode, *arguments: jacobian_product(mode, gradient, *arguments)
    return choose(product, jaxpr, arguments, name=name, differences=differences)


def jaxpr_of(program: Program) -> Any:
    """The first of the programs of a function, which differ in shapes alone."""
    return next(iter(program.code.traces.values())).jaxpr.jaxpr


def _is_possible(product: Callable[..., Tree], arguments: tuple[Tree, ...]) -> bool:
    try:
        traced = jax.make_jaxpr(product)(*arguments)
    except Exception:  # whatever a rule may raise that is called in another way
        return False
    # Stands for a backward rule where a forward one is asked for, and refuses when it is compiled.
    return all(e.primitive.name != "custom_lin" for e in _jaxprs.equations(traced.jaxpr))


def without_rule(jaxpr: Any) -> tuple[str, ...]:
    """The functions within a program that JAX may not be able to differentiate forwards."""
    found: dict[str, None] = {}
    for equation in _jaxprs.equations(jaxpr):
        if equation.primitive.name.startswith("custom_vjp"):
            found.setdefault(_called(equation))
        elif not _has_rule(equation):
            found.setdefault(f"`{equation.primitive.name}`")
    return tuple(found)


# Words in the names of primitives whose rule may do nothing but refuse.
_REFUSING = frozenset({"callback", "pallas", "ffi"})


def _has_rule(equation: Any) -> bool:
    primitive = equation.primitive
    if _REFUSING.intersection(primitive.name.split("_")):
        return False
    is_call = any(True for _ in _jaxprs.inner_jaxprs(equation))
    return is_call or primitive in ad.primitive_jvps


def _called(equation: Any) -> str:
    """The name of a function with a rule of its own, and where it stands."""
    inner, _ = _jaxprs.parts(equation.params["call_jaxpr"])
    where = getattr(getattr(inner, "debug_info", None), "func_src_info", None)
    return f"`{where}`" if where else f"`{equation.primitive.name}`"


def jacobian_product(
    mode: Mode,
    gradient: Callable[..., Params],
    function: Callable[..., Tree],
    params: Params,
    vector: Params,
    *batch: Tree,
    step: ArrayLike = 1.0,
) -> Params:
    """The symmetric Jacobian of a gradient times a vector.

    Args:
      mode: the way.
      gradient: (function, params, *batch) -> gradient.
      function: what it is the gradient of.
      params: where.
      vector: a tree like `params`.
      *batch: data.
      step: as of `central_difference`.
    """
    of = lambda params: gradient(function, params, *batch)
    if mode == FORWARD:
        return jax.jvp(of, (params,), (vector,))[1]
    if mode == REVERSE:
        return jax.vjp(of, params)[1](vector)[0]
    return central_difference(of, params, vector, step)


def differentiated(
    gradient: Callable[..., Params],
    function: Callable[..., Tree],
    params: Params,
    vector: Params,
    *batch: Tree,
    name: str,
    differences: bool = False,
) -> Params:
    """The same product of a function that is no program yet, in the first way that can be traced.

    Raises:
      TypeError: there is none; names the function without a rule.
    """
    function = as_partial(function)
    jaxpr = applied.trace(function, params, batch).jaxpr.jaxpr
    arguments = (function, params, vector, *batch)
    mode = choose_of_gradient(gradient, jaxpr, *arguments, name=name, differences=differences)
    if mode != DIFFERENCES:
        return jacobian_product(mode, gradient, *arguments)
    moved = (function, widened(params), widened(vector), *batch)
    found = jacobian_product(mode, gradient, *moved)
    return jax.tree.map(lambda leaf, like: leaf.astype(jnp.result_type(like)), found, params)


def jacobian_map(
    mode: Mode,
    gradient: Callable[..., Params],
    function: Callable[..., Tree],
    params: Params,
    *batch: Tree,
) -> Callable[[Params], Params]:
    """The same product as a function of the vector, with what it needs kept; not of differences."""
    of = lambda params: gradient(function, params, *batch)
    if mode == FORWARD:
        return jax.linearize(of, params)[1]
    return Partial(_first, jax.vjp(of, params)[1])


def linearized(
    mode: Mode, function: Callable[[Params], tuple[Tree, Tree]], params: Params, step: ArrayLike
) -> tuple[Tree, Tree, Tree]:
    """The outputs of a function, what comes beside them, and its Jacobian J for `push` and `pull`.

    Args:
      mode: the way.
      function: params -> (outputs, anything else).
      params: where.
      step: as of `central_difference`.
    """
    if mode == FORWARD:
        outputs, jacobian, beside = jax.linearize(function, params, has_aux=True)
        return outputs, beside, jacobian
    outputs, pull, beside = jax.vjp(function, params, has_aux=True)
    if mode == REVERSE:
        # J' u is linear in u, so that its transpose, J, is its derivative anywhere.
        nowhere = jax.tree.map(jnp.zeros_like, outputs)
        return outputs, beside, (jax.vjp(lambda u: pull(u)[0], nowhere)[1], pull)
    alone = lambda params: function(params)[0]
    push = lambda vector: (central_difference(alone, params, vector, step),)
    return outputs, beside, (push, pull)


def push(mode: Mode, jacobian: Any, vector: Params) -> Tree:
    """J v."""
    return jacobian(vector) if mode == FORWARD else jacobian[0](vector)[0]


def pull(mode: Mode, jacobian: Any, like: Params, cotangent: Tree) -> Params:
    """J' u, a tree like the parameters."""
    if mode == FORWARD:
        return jax.linear_transpose(jacobian, like)(cotangent)[0]
    return jacobian[1](cotangent)[0]


@functools.cache
def static(function: Callable[..., Any], *options: Any) -> Callable[..., Any]:
    """`function` with its first arguments bound: the same object for the same ones, a cache key."""
    return functools.partial(function, *options)


def _first(pull: Callable[..., tuple[Tree, ...]], vector: Tree) -> Tree:
    return pull(vector)[0]


def widened(params: Params) -> Params:
    """The parameters in float32 at least, which hold the steps of differences."""
    return jax.tree.map(_tree.wide, params)


def central_difference(
    function: Callable[[Params], Tree], params: Params, vector: Params, step: ArrayLike = 1.0
) -> Tree:
    """The derivative of a function in the direction of a vector, by a central difference.

    The parameters move by step * eps^(1/3) (|w| + 1) each way, eps the unit of rounding of their
    type: where the error of the difference, of second order in that, is about as large as that of
    rounding. Exact up to rounding for functions whose second derivative is constant.
    """
    length = _numerics.scaled_norm(vector)
    dtype = length.dtype
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params))
    reach = eps ** (1 / 3) * (_numerics.scaled_norm(params).astype(dtype) + 1)
    reach = jnp.asarray(step, dtype) * reach
    unit = _numerics.unit(vector)
    moved = lambda sign: jax.tree.map(
        lambda w, u: w + (sign * reach * u.astype(dtype)).astype(w.dtype), params, unit
    )
    scale = length / (2 * reach)

    def slope(above: jax.Array, below: jax.Array) -> jax.Array:
        return ((_tree.wide(above) - _tree.wide(below)) * scale).astype(above.dtype)

    return jax.tree.map(slope, function(moved(1)), function(moved(-1)))
