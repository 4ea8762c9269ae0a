"""A layer with its normalization behind it: what all networks here are built of."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from regjax import _checks, normalization

# flax's 0.99 remembers the first hundred steps, longer than a small run takes to change its
# features; 0.9 is the usual value elsewhere.
_MOMENTUM = 0.9

# He & Wu (2018), arXiv:1803.08494, use 32 groups on wide networks; ours are narrow.
_NUM_GROUPS = 8

GHOST_SIZE = 16


def _group_norm(num_features: int, *, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.GroupNorm(num_features, math.gcd(num_features, _NUM_GROUPS), rngs=rngs)


def _group_norm_plus(num_features: int, *, rngs: nnx.Rngs) -> nnx.Module:
    """Makes the usable variant, with groups of two channels at least."""
    num_groups = math.gcd(num_features, _NUM_GROUPS)
    if num_groups == num_features:
        num_groups = max(1, num_groups // 2)
    return normalization.nnx.GroupNormPlus(
        num_features, num_groups=num_groups, batch_axes=None, track_running=True, rngs=rngs
    )


def _ours(kind: Callable[..., nnx.Module], **options: Any) -> Callable[..., nnx.Module]:
    return functools.partial(kind, momentum=_MOMENTUM, **options)


_LAYERS: dict[str, Callable[..., nnx.Module]] = {
    "batch": _ours(normalization.nnx.BatchNorm),
    "layer": nnx.LayerNorm,
    "group": _group_norm,
    "ghost": _ours(normalization.nnx.GhostBatchNorm, ghost_size=GHOST_SIZE),
    "noisy": _ours(normalization.nnx.NoisyBatchNorm),
    "lp1": _ours(normalization.nnx.LpNorm, order=1),
    "lp2": _ours(normalization.nnx.LpNorm, order=2),
    "lpinf": _ours(normalization.nnx.LpNorm, order=math.inf),
    "group_plus": _group_norm_plus,
    "mean_only": _ours(normalization.nnx.MeanOnlyBatchNorm),
}
_KERNELS: dict[str, Callable[..., nnx.Module]] = {
    "weight": normalization.nnx.WeightNorm,
    "weight_standardized": normalization.nnx.WeightStandardized,
}
NORMALIZATIONS = ("none", *_LAYERS, *_KERNELS, "weight_mean_only")


class Normalized(nnx.Module):
    """A layer and its normalization, channels last.

        inputs -> norm(layer(inputs))

    "layer" and "group" are flax's, over the channels of each position and over positions and groups
    of channels (8, or the greatest common divisor of 8 and the number of channels). All others are
    those of `regjax.normalization`: "batch", "ghost" (groups of 16 examples), "noisy", "lp1",
    "lp2", "lpinf", "mean_only", "group_plus" (running statistics); "weight" and
    "weight_standardized" act on the kernel, "weight_mean_only" on both. "none" is the bare layer.
    """

    def __init__(
        self,
        layer: Callable[[jax.Array], jax.Array],
        num_features: int,
        *,
        normalization: str,
        rngs: nnx.Rngs,
    ):
        _checks.choice("normalization", normalization, NORMALIZATIONS)
        kernel = behind = normalization
        if normalization == "weight_mean_only":
            kernel, behind = "weight", "mean_only"
        self.layer = _KERNELS[kernel](layer) if kernel in _KERNELS else layer
        self.norm = _LAYERS[behind](num_features, rngs=rngs) if behind in _LAYERS else None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the normalized output, shape (batch, ..., num_features)."""
        outputs = self.layer(inputs)
        return outputs if self.norm is None else self.norm(outputs)


def needs_bias(normalization: str) -> bool:
    """Tells whether the layer needs a bias of its own: the normalizations behind it have one."""
    return normalization == "none" or normalization in _KERNELS


def image_shape(value: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns `value` if it is (height, width, channels), else raises naming `input_shape`."""
    if len(value) != 3:
        raise ValueError(f"`input_shape` must be (height, width, channels), got {value!r}.")
    height, width, channels = (_checks.integer("input_shape", size) for size in value)
    return height, width, channels
