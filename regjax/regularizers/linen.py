"""The tap of the batch entropy as a flax linen module: it holds a target and the last entropy."""

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike

from regjax import _tree
from regjax.regularizers import _batch_entropy
from regjax.regularizers._batch_entropy import tapped_entropies as tapped_entropies

__all__ = ["BatchEntropyTap", "tapped_entropies"]


class BatchEntropyTap(linen.Module):
    """Passes the activations of a layer on, and keeps their batch entropy.

    Put a tap behind each layer. If the collection "batch_entropy" is mutable, as in training, it
    stores `regjax.regularizers.batch_entropy` of its inputs there. Otherwise it computes nothing
    and needs no such collection. The target is the parameter "target_entropy". `tapped_entropies`
    collects both from all taps of a model, for `layerwise_batch_entropy`.

    Example:
      >>> tap = regularizers.linen.BatchEntropyTap(0.5)
      >>> activations = jnp.array([[0.0], [2.0]])
      >>> variables = tap.init(jax.random.key(0), activations)
      >>> _, new = tap.apply(variables, activations, mutable=["batch_entropy"])
      >>> print(f"{new['batch_entropy']['batch_entropy']:.3f}")
      1.447

    Attributes:
      initial_target_entropy: initial target, in nats.
      degrees_of_freedom: subtracted from the number of examples in the variance.
      axis_name: name of a mapped axis over which the batch is split; None under plain `jit`.
      param_dtype: type of the target; the entropy is in float32 at least.
    """

    initial_target_entropy: float = 0.5
    degrees_of_freedom: int = 1
    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32

    @linen.compact
    def __call__(self, activations: jax.Array) -> jax.Array:
        """Returns the activations (batch, ...) as they are."""
        _batch_entropy.check_tap(
            self.initial_target_entropy, self.degrees_of_freedom, self.param_dtype
        )
        target = self.param(
            _batch_entropy.TARGET,
            lambda key: jnp.asarray(self.initial_target_entropy, self.param_dtype),
        )
        if not self.is_mutable_collection(_batch_entropy.ENTROPY):
            return activations
        stored = self.variable(
            _batch_entropy.ENTROPY,
            _batch_entropy.ENTROPY,
            lambda: jnp.full_like(_tree.wide(target), jnp.nan),
        )
        if not self.is_initializing():  # often with a single example
            entropy = _batch_entropy.batch_entropy(
                activations,
                degrees_of_freedom=self.degrees_of_freedom,
                axis_name=self.axis_name,
            )
            stored.value = entropy.astype(stored.value.dtype)
        return activations
