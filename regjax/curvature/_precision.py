"""How exact products are: full float32 where that can be chosen, and what rounding leaves unknown.

TF32 and bfloat16, the defaults of accelerators, visibly perturb Lanczos. Where a model computes in
a narrow type by itself, its products are off by some units of rounding of that type, and no
residual norm below is claimed.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from regjax import _jaxprs

_Arguments = ParamSpec("_Arguments")
_Value = TypeVar("_Value")

# Units of rounding by which a product may be off. Those of trained networks in bfloat16 were off by
# 0.3 to 1.3 units, those of transformers by up to 5.
_PRODUCT = 8
# Units by which the arithmetic of a row may be. Those of a pair of m rows, each with a share of
# norm s_i, sum s_i^2 = 1, add up to at most sqrt(m) of them; among the signs +-1, where all add up,
# 1.8 sqrt(m) were seen.
_ROW = 2.5


def precision() -> contextlib.AbstractContextManager[Any]:
    """Full float32 products unless the caller says otherwise; accelerators do less by default."""
    if getattr(jax.config, "jax_default_matmul_precision") is not None:  # noqa: B009
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def precisely(function: Callable[_Arguments, _Value]) -> Callable[_Arguments, _Value]:
    """`function`, traced with full float32 products whatever the caller says.

    For what a method makes of the products: a caller who lets the model multiply in bfloat16 has
    said nothing of the coefficients of the recurrence.
    """

    @functools.wraps(function)
    def traced(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Value:
        with jax.default_matmul_precision("highest"):
            return function(*arguments, **options)

    return traced


def narrowest_eps(function: Callable[..., Any], *arguments: Any) -> float:
    """The unit of rounding of the narrowest type in `function(*arguments)`, which is only traced.

    Found once for arguments of the same types.
    """
    leaves, treedef = jax.tree.flatten(arguments)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _narrowest_eps(function, treedef, shapes)


@functools.lru_cache(maxsize=64)
def _narrowest_eps(function: Callable[..., Any], treedef: Any, shapes: tuple[Any, ...]) -> float:
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    traced = jax.make_jaxpr(function)(*jax.tree.unflatten(treedef, structs))
    return _jaxprs.narrowest_eps(traced.jaxpr)


def rounding(values: jax.Array, *, eps: Any, dtype: jnp.dtype, num_rows: jax.Array) -> jax.Array:
    """(), what rounding adds to the residual norms, from Ritz values of which some are NaN.

    Args:
      values: Ritz values, of any shape, of which the largest magnitude is that of the matrix.
      eps: unit of rounding of a product.
      dtype: of the rows.
      num_rows: (), int32, how many there are: each is a product.
    """
    largest = jnp.max(jnp.abs(jnp.nan_to_num(values)), initial=0)
    own = jnp.asarray(_ROW * float(jnp.finfo(dtype).eps), values.dtype)
    rows = own * jnp.sqrt(num_rows.astype(values.dtype))
    return (_PRODUCT * jnp.asarray(eps, values.dtype) + rows) * largest
