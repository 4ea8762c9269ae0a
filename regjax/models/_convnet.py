"""The plain convolutional network."""

import jax
from flax import nnx

from regjax import _checks
from regjax._nnx_module import Module
from regjax.models._normalized import Normalized, image_shape, needs_bias


class ConvNet(Module):
    """Builds `depth` 3x3 convolutions of stride 2, with normalization and ReLU, and a linear head.

    The head sees all remaining positions. With a normalization the convolutions have no biases,
    because its bias does the same. The sub-trees of the parameters are "layer_0", ..., "head".

    Example:
      >>> module = models.ConvNet((8, 8, 1), 10, width=4, normalization="batch", rngs=nnx.Rngs(0))
      >>> model = regjax.from_nnx(module)  # for everything else in regjax
      >>> print(list(model.params), sum(leaf.size for leaf in jax.tree.leaves(model.params)))
      ['head', 'layer_0', 'layer_1'] 366

    Args:
      input_shape: (height, width, channels) of one example.
      num_classes: number of outputs.
      width: channels of each convolution.
      depth: number of convolutions.
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
        width: int = 16,
        depth: int = 2,
        normalization: str = "none",
        rngs: nnx.Rngs,
    ):
        self.depth = _checks.integer("depth", depth)
        _checks.integer("width", width)
        _checks.integer("num_classes", num_classes)
        height, breadth, channels = image_shape(input_shape)
        for i in range(depth):
            convolution = nnx.Conv(
                channels, width, (3, 3), strides=2, use_bias=needs_bias(normalization), rngs=rngs
            )
            setattr(
                self,
                f"layer_{i}",
                Normalized(convolution, width, normalization=normalization, rngs=rngs),
            )
            # "SAME" padding: half the positions, rounded up.
            height, breadth, channels = -(-height // 2), -(-breadth // 2), width
        self.head = nnx.Linear(height * breadth * channels, num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes logits (batch, num_classes) of float inputs (batch, height, width, channels)."""
        features = inputs
        for i in range(self.depth):
            features = nnx.relu(getattr(self, f"layer_{i}")(features))
        return self.head(features.reshape(features.shape[0], -1))
