"""The tap of the batch entropy as a flax nnx module: it holds a target and the last entropy."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from regjax import _tree
from regjax.regularizers import _batch_entropy


class BatchEntropy(nnx.Variable):
    """The batch entropy of a layer in the last training batch."""


class BatchEntropyTap(nnx.Module):
    """Stands behind a layer, gives its activations on and keeps their batch entropy.

    In training, `module.train()`, it stores `regjax.regularizers.batch_entropy` of its inputs in
    the variable `batch_entropy`; in evaluation it computes nothing. The target is the parameter
    `entropy_target`. `regjax.regularizers.entropies_and_targets` collects both from all taps of a
    model; one tap for each layer.

    Args:
      target: initial one, in nats.
      degrees_of_freedom: as in `batch_entropy`.
      axis_name: as in `batch_entropy`.
      deterministic: whether to start in evaluation mode.
      param_dtype: of the target, and of the entropy, in float32 at least.
    """

    def __init__(
        self,
        target: float = 0.5,
        *,
        degrees_of_freedom: int = 1,
        axis_name: str | None = None,
        deterministic: bool = False,
        param_dtype: Any = jnp.float32,
    ):
        self.degrees_of_freedom, self.axis_name = degrees_of_freedom, axis_name
        self.deterministic = deterministic
        self.entropy_target = nnx.Param(jnp.asarray(target, param_dtype))
        self.batch_entropy = BatchEntropy(
            jnp.full_like(_tree.wide(self.entropy_target[...]), jnp.nan)
        )

    def __call__(self, activations: jax.Array) -> jax.Array:
        """The activations (batch, ...) as they are."""
        if not self.deterministic:
            entropy = _batch_entropy.batch_entropy(
                activations,
                degrees_of_freedom=self.degrees_of_freedom,
                axis_name=self.axis_name,
            )
            self.batch_entropy[...] = entropy.astype(self.batch_entropy[...].dtype)
        return activations
