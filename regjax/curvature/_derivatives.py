"""Derivatives of answers with respect to what the products depend on, each by a rule.

A solver's loop has none of its own: it stops when it has converged, and its steps are not kept.
Eigenvalues have one, d lambda = v' dA v, and so have means of z * A z over given z. All other
solvers refuse (`_engine/_solver.py`).
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _loops
from regjax._base import Tree
from regjax.curvature._operators._operator import Operator

Slopes: TypeAlias = list[jax.Array | None]
"""The tangent of an operator, leaf by leaf; None for integers and keys."""


def held(operator: Operator) -> Operator:
    """Returns the operator without derivatives, for a solver whose answer gets them by a rule."""
    return operator if _loops.is_concrete(operator) else jax.lax.stop_gradient(operator)


def attach(
    rule: Callable[[Operator, Slopes, Tree], Tree], operator: Operator, value: Tree, beside: Tree
) -> Tree:
    """Gives `value` its derivative.

    Args:
      rule: a module-level function (operator, its tangent, beside) -> tangent of the value, linear
        in the second argument.
      operator: the matrix of which `value` is a function.
      value: a tree of real arrays, found with the `held` operator.
      beside: what else the rule reads.
    """
    if _loops.is_concrete(operator):
        return value
    derived = jax.custom_jvp(lambda operator, value, beside: value)

    @derived.defjvp
    def jvp(primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> tuple[Tree, Tree]:
        operator, value, beside = primals
        leaves = jax.tree.leaves(tangents[0])
        slopes = [None if leaf.dtype == jax.dtypes.float0 else leaf for leaf in leaves]
        found = rule(operator, slopes, beside)
        return value, jax.tree.map(lambda leaf, slope: slope.astype(leaf.dtype), value, found)

    return derived(operator, value, jax.lax.stop_gradient(beside))


def without_rule(operator: Operator, value: Tree) -> Tree:
    """Gives `value` the derivative NaN, in whatever direction one asks for it."""
    return attach(_not_a_number, operator, value, value)


def _not_a_number(operator: Operator, tangent: Slopes, value: Tree) -> Tree:
    del operator
    leaves = [leaf for leaf in tangent if leaf is not None]
    # Linear in the tangent, so that whoever asks for it backwards gets it too.
    total = jnp.sum(jnp.stack([jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves]))
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) * total.astype(leaf.dtype), value)


def tangent_product(operator: Operator, tangent: Slopes, vector: jax.Array) -> jax.Array:
    """Multiplies a vector by dA, the derivative of the matrix in the direction of `tangent`."""
    leaves, treedef = jax.tree.flatten(operator)
    whole = [
        np.zeros(leaf.shape, jax.dtypes.float0) if slope is None else slope
        for leaf, slope in zip(leaves, tangent, strict=True)
    ]
    image = lambda matrix: matrix.product(vector)
    return jax.jvp(image, (operator,), (jax.tree.unflatten(treedef, whole),))[1]
