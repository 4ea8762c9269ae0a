"""The networks with known dynamics as flax linen modules."""

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike

from regjax import _checks
from regjax.models import _diagonal_linear

__all__ = ["DiagonalLinear"]


class DiagonalLinear(linen.Module):
    """Is `regjax.models.DiagonalLinear` for linen; the inputs tell the number of features.

    Example:
      >>> module = models.linen.DiagonalLinear(depth=2, init_scale=0.1)
      >>> variables = module.init(jax.random.key(0), jnp.eye(3))
      >>> variables["params"]["u"] = jnp.array([2.0, 0.1, 0.1])
      >>> print(module.apply(variables, jnp.eye(3)))  # 2^2 - 0.1^2, and 0
      [3.99 0.   0.  ]

    Attributes:
      depth: N, at least 2.
      init_scale: alpha, positive.
      signed: whether weights may be negative.
      param_dtype: of the parameters.
    """

    depth: int
    init_scale: float
    signed: bool = True
    param_dtype: DTypeLike = jnp.float32

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes predictions (batch,) of inputs (batch, num_inputs)."""
        _checks.positive("init_scale", self.init_scale)
        start = lambda key: jnp.full(inputs.shape[-1], self.init_scale, self.param_dtype)
        u = self.param("u", start)
        v = self.param("v", start) if self.signed else None
        return inputs @ _diagonal_linear.diagonal_weights(u, v, depth=self.depth)
