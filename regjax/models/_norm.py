"""A layer with its normalization behind it: what all networks here are built of."""

import math
from collections.abc import Callable

import jax
from flax import nnx

from regjax import _checks

NORMS = ("none", "batch", "layer", "group")

# flax's 0.99 remembers the first hundred steps, longer than a small run takes to change its
# features; 0.9 is the usual value elsewhere.
_MOMENTUM = 0.9

# He & Wu (2018), arXiv:1803.08494, use 32 groups on wide networks; ours are narrow.
_NUM_GROUPS = 8


class Normalized(nnx.Module):
    """inputs -> norm(layer(inputs)), channels last.

    The norms are flax's: "batch" over examples and positions, "layer" over the channels of each
    position, "group" over positions and groups of channels (8 groups, or the greatest common
    divisor of 8 and the number of channels). "none" is the bare layer.
    """

    def __init__(
        self,
        layer: Callable[[jax.Array], jax.Array],
        num_features: int,
        *,
        norm: str,
        rngs: nnx.Rngs,
    ):
        _checks.choice("norm", norm, NORMS)
        self.layer = layer
        if norm == "batch":
            self.norm = nnx.BatchNorm(num_features, momentum=_MOMENTUM, rngs=rngs)
        elif norm == "layer":
            self.norm = nnx.LayerNorm(num_features, rngs=rngs)
        elif norm == "group":
            num_groups = math.gcd(num_features, _NUM_GROUPS)
            self.norm = nnx.GroupNorm(num_features, num_groups, rngs=rngs)
        else:
            self.norm = None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The normalized output, shape (batch, ..., num_features)."""
        outputs = self.layer(inputs)
        return outputs if self.norm is None else self.norm(outputs)


def image_shape(value: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns `value` if it is (height, width, channels), else raises naming `input_shape`."""
    if len(value) != 3:
        raise ValueError(f"`input_shape` must be (height, width, channels), got {value!r}.")
    height, width, channels = (_checks.integer("input_shape", size) for size in value)
    return height, width, channels
