"""The tap of the batch entropy as a flax nnx module: it holds a target and the last entropy."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from regjax import _tree
from regjax._nnx_module import Module
from regjax.regularizers import _batch_entropy
from regjax.regularizers._batch_entropy import tapped_entropies as tapped_entropies

__all__ = ["BatchEntropy", "BatchEntropyTap", "tapped_entropies"]


class BatchEntropy(nnx.Variable):
    """Holds the batch entropy of a layer in the last training batch.

    Example:
      >>> tap = regularizers.nnx.BatchEntropyTap()
      >>> activations = tap(jnp.array([[0.0], [2.0]]))
      >>> entropies = nnx.state(tap, regularizers.nnx.BatchEntropy)
      >>> print([f"{entropy:.3f}" for entropy in jax.tree.leaves(entropies)])
      ['1.447']
    """


class BatchEntropyTap(Module):
    """Passes the activations of a layer on, and keeps their batch entropy.

    Put a tap behind each layer. In training, after `module.train()`, it stores
    `regjax.regularizers.batch_entropy` of its inputs in the variable `batch_entropy`. In evaluation
    it computes nothing. The target is the parameter `target_entropy`. `tapped_entropies` collects
    both from all taps of a model, for `layerwise_batch_entropy`.

    Example:
      >>> tap = regularizers.nnx.BatchEntropyTap(0.5)
      >>> activations = tap(jnp.array([[0.0], [2.0]]))  # as they are
      >>> print(f"{tap.batch_entropy[...]:.3f} {tap.target_entropy[...]}")
      1.447 0.5

    Args:
      initial_target_entropy: initial target, in nats.
      degrees_of_freedom: subtracted from the number of examples in the variance.
      axis_name: name of a mapped axis over which the batch is split; None under plain `jit`.
      deterministic: whether to start in evaluation mode.
      param_dtype: type of the target; the entropy is in float32 at least.
    """

    def __init__(
        self,
        initial_target_entropy: float = 0.5,
        *,
        degrees_of_freedom: int = 1,
        axis_name: str | None = None,
        deterministic: bool = False,
        param_dtype: DTypeLike = jnp.float32,
    ):
        _batch_entropy.check_tap(initial_target_entropy, degrees_of_freedom, param_dtype)
        self.degrees_of_freedom, self.axis_name = degrees_of_freedom, axis_name
        self.deterministic = deterministic
        self.target_entropy = nnx.Param(jnp.asarray(initial_target_entropy, param_dtype))
        self.batch_entropy = BatchEntropy(
            jnp.full_like(_tree.wide(self.target_entropy[...]), jnp.nan)
        )

    def __call__(self, activations: jax.Array) -> jax.Array:
        """Returns the activations (batch, ...) as they are."""
        if not self.deterministic:
            entropy = _batch_entropy.batch_entropy(
                activations,
                degrees_of_freedom=self.degrees_of_freedom,
                axis_name=self.axis_name,
            )
            # Not [...], which writes into the array where it is one of NumPy.
            self.batch_entropy.set_value(entropy.astype(self.batch_entropy[...].dtype))
        return activations
