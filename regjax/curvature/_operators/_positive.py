"""What is known of the least eigenvalue of a matrix by how it is made.

J' C J is positive semi-definite if C is, whatever J: the Fisher matrix and the means of outer
products are. So is the Gauss-Newton matrix of a loss that is convex in the outputs; but whether a
loss is, its program does not say.
"""

import functools
import math

import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax.curvature._operators._curvature import CurvatureOperator, Linearization
from regjax.curvature._operators._identity import Identity
from regjax.curvature._operators._matvec import MatvecOperator
from regjax.curvature._operators._operator import (
    Congruent,
    Multiple,
    Operator,
    Projected,
    Sum,
)
from regjax.curvature._operators._stream import StreamedOperator


@functools.singledispatch
def lower_bound(operator: Operator) -> ArrayLike:
    """The least that an eigenvalue can be by construction; minus infinity: nothing is known."""
    del operator
    return -math.inf


@lower_bound.register
def _(operator: CurvatureOperator) -> ArrayLike:
    return _of_form(operator.linearization)


@lower_bound.register
def _(operator: StreamedOperator) -> ArrayLike:
    return _of_form(operator.programs.at(operator.programs.first).linearization)


@lower_bound.register
def _(operator: MatvecOperator) -> ArrayLike:
    return 0.0 if operator.is_positive else -math.inf


@lower_bound.register
def _(operator: Identity) -> ArrayLike:
    del operator
    return 1.0


@lower_bound.register
def _(operator: Sum) -> ArrayLike:
    return lower_bound(operator.one) + lower_bound(operator.other)


@lower_bound.register
def _(operator: Multiple) -> ArrayLike:
    factor = operator.factor
    least = jnp.where(factor > 0, factor, 1) * lower_bound(operator.operator)
    return jnp.where(factor > 0, least, jnp.where(factor == 0, 0, -jnp.inf))


@lower_bound.register
def _(operator: Congruent) -> ArrayLike:
    # Of a positive bound nothing is left where the diagonal is zero.
    return jnp.where(jnp.asarray(lower_bound(operator.operator)) >= 0, 0, -jnp.inf)


@lower_bound.register
def _(operator: Projected) -> ArrayLike:
    return lower_bound(operator.operator)  # eigenvalues of a principal submatrix interlace


def _of_form(linearization: Linearization) -> float:
    multiply = linearization.multiply
    # Of differences J' is not the transpose of J.
    if "step" in multiply.keywords or not multiply.args:
        return -math.inf
    curvature = getattr(multiply.args[0], "func", None)
    return 0.0 if getattr(curvature, "is_positive", False) else -math.inf
