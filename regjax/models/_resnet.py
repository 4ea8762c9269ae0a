"""The small residual network."""

import jax
import jax.numpy as jnp
from flax import nnx

from regjax import _checks
from regjax._nnx_module import Module
from regjax.models._normalized import Normalized, image_shape


class ResNet(Module):
    """Builds a residual network of basic blocks, with two 3x3 convolutions each.

    The network is a convolution, one block for each entry of `widths`, the mean over the positions,
    and a linear head. No convolution has a bias. The sub-trees of the parameters are "stem",
    "block_0", ..., "head".

    Example:
      >>> module = models.ResNet((8, 8, 1), 10, widths=(4, 4), rngs=nnx.Rngs(0))
      >>> model = regjax.from_nnx(module)  # for everything else in regjax
      >>> print(list(model.params), sum(leaf.size for leaf in jax.tree.leaves(model.params)))
      ['block_0', 'block_1', 'head', 'stem'] 662

    Args:
      input_shape: (height, width, channels) of one example.
      num_classes: number of outputs.
      widths: channels of each block; where they change, the block has stride 2.
      normalization: "none"; flax's "layer" or "group"; "batch", "ghost", "noisy", "mean_only",
        "lp1", "lp2", "lpinf" or "group_plus" of `regjax.normalization`; or on the kernels "weight",
        "weight_standardized" or "weight_mean_only".
      rngs: generators whose stream "params", or else the default one, draws the initial parameters.

    Raises:
      ValueError: a size is too small, `widths` is empty, or `normalization` is unknown.
      TypeError: a size is not a Python integer.

    References:
      He, Zhang, Ren, Sun (2016), arXiv:1512.03385, figure 5 left and equation 2.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        num_classes: int,
        *,
        widths: tuple[int, ...] = (16, 32, 64, 64),
        normalization: str = "none",
        rngs: nnx.Rngs,
    ):
        if not widths:
            raise ValueError(f"`widths` must name at least one block, got {widths!r}.")
        for width in widths:
            _checks.integer("widths", width)
        _checks.integer("num_classes", num_classes)
        self.num_blocks = len(widths)
        channels = image_shape(input_shape)[2]
        self.stem = _convolution(channels, widths[0], normalization=normalization, rngs=rngs)
        channels = widths[0]
        for i, width in enumerate(widths):
            setattr(
                self, f"block_{i}", _Block(channels, width, normalization=normalization, rngs=rngs)
            )
            channels = width
        self.head = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes logits (batch, num_classes) of float inputs (batch, height, width, channels)."""
        features = nnx.relu(self.stem(inputs))
        for i in range(self.num_blocks):
            features = getattr(self, f"block_{i}")(features)
        return self.head(jnp.mean(features, axis=(1, 2)))


class _Block(nnx.Module):
    """inputs -> relu(second(relu(first(inputs))) + shortcut(inputs))."""

    def __init__(self, channels: int, width: int, *, normalization: str, rngs: nnx.Rngs):
        stride = 1 if channels == width else 2
        self.first = _convolution(
            channels, width, stride=stride, normalization=normalization, rngs=rngs
        )
        self.second = _convolution(width, width, normalization=normalization, rngs=rngs)
        self.shortcut = (
            None
            if channels == width
            else _convolution(
                channels, width, size=1, stride=stride, normalization=normalization, rngs=rngs
            )
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        residual = self.second(nnx.relu(self.first(inputs)))
        shortcut = inputs if self.shortcut is None else self.shortcut(inputs)
        return nnx.relu(residual + shortcut)


def _convolution(
    channels: int, width: int, *, size: int = 3, stride: int = 1, normalization: str, rngs: nnx.Rngs
) -> Normalized:
    convolution = nnx.Conv(channels, width, (size, size), strides=stride, use_bias=False, rngs=rngs)
    return Normalized(convolution, width, normalization=normalization, rngs=rngs)
