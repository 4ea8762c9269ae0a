"""The multilayer perceptron."""

import math

import jax
from flax import nnx

from regjax import _checks
from regjax._nnx_module import Module
from regjax.models._normalized import NORMALIZATIONS, Normalized, image_shape, needs_bias


class MLP(Module):
    """Builds a perceptron of `depth` hidden layers (linear, normalization, ReLU) and a head.

    With a normalization the hidden layers have no biases, because its bias does the same. The
    sub-trees of the parameters are "layer_0", ..., "head".

    Example:
      >>> module = models.MLP((8, 8, 1), 10, width=32, depth=2, rngs=nnx.Rngs(0))
      >>> print(module(jnp.ones((5, 8, 8, 1))).shape)
      (5, 10)
      >>> model = regjax.from_nnx(module)  # for everything else in regjax
      >>> print(sum(leaf.size for leaf in jax.tree.leaves(model.params)))
      3466

    Args:
      input_shape: (height, width, channels) of one example.
      num_classes: number of outputs.
      width: units of each hidden layer.
      depth: number of hidden layers; 0 is a linear classifier.
      normalization: "none"; flax's "layer" or "group"; "batch", "ghost", "noisy", "mean_only",
        "lp1", "lp2", "lpinf" or "group_plus" of `regjax.normalization`; or on the kernels "weight",
        "weight_standardized" or "weight_mean_only".
      rngs: generators whose stream "params", or else the default one, draws the initial parameters.

    Raises:
      ValueError: a size is too small, or `normalization` is unknown.
      TypeError: a size is not a Python integer.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        width: int = 256,
        depth: int = 2,
        normalization: str = "none",
        rngs: nnx.Rngs,
    ):
        self.depth = _checks.integer("depth", depth, minimum=0)
        _checks.integer("width", width)
        _checks.integer("num_classes", num_classes)
        _checks.choice("normalization", normalization, NORMALIZATIONS)
        num_inputs = math.prod(image_shape(input_shape))
        for i in range(depth):
            linear = nnx.Linear(num_inputs, width, use_bias=needs_bias(normalization), rngs=rngs)
            setattr(
                self,
                f"layer_{i}",
                Normalized(linear, width, normalization=normalization, rngs=rngs),
            )
            num_inputs = width
        self.head = nnx.Linear(num_inputs, num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes logits (batch, num_classes) of float inputs (batch, height, width, channels)."""
        features = inputs.reshape(inputs.shape[0], -1)
        for i in range(self.depth):
            features = nnx.relu(getattr(self, f"layer_{i}")(features))
        return self.head(features)
