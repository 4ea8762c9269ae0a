"""What products are off by, from the narrowest type that they compute in."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from regjax import _jaxprs
from regjax.curvature._operators import Operator, product

# No residual norm is claimed below this many units of rounding of the matrix. Products of trained
# networks in bfloat16 were off by 0.3 to 1.3 units, those of transformers by up to 5.
_FLOOR = 8


@functools.singledispatch
def product_eps(operator: Operator) -> float:
    """The unit of rounding of the narrowest type in a product, at least that of its vectors."""
    of = lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
    vector = jax.ShapeDtypeStruct(operator.shape[:1], operator.dtype)
    # The whole batch at once on one device: it is traced, not computed.
    whole = dataclasses.replace(operator, chunk_size=None, placement=None)
    traced = jax.make_jaxpr(product)(jax.tree.map(of, whole), vector)
    dtypes = {
        variable.aval.dtype
        for equation in _jaxprs.equations(traced.jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "dtype") and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
    }
    return max(float(jnp.finfo(dtype).eps) for dtype in (operator.dtype, *dtypes))


def floor(values: jax.Array, eps: float) -> jax.Array:
    """(), residual norm below which nothing is claimed, from Ritz values of which some are NaN."""
    return _FLOOR * eps * jnp.max(jnp.abs(jnp.nan_to_num(values)), initial=0)
