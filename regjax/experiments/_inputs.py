"""What goes into a network and what is made of its outputs: scaled images and the loss."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regjax import _checks
from regjax._one_program import one_program
from regjax.experiments._dataset import Dataset


class Scaling(NamedTuple):
    """Mean and standard deviation (channels,) of the training images; of uint8 in units of 255."""

    mean: jax.Array
    deviation: jax.Array


def check_precision(dtype: str) -> None:
    """Checks that JAX can hold numbers of a type.

    Raises:
      ValueError: it is neither float32 nor float64, or the latter and JAX is not set to it.
    """
    _checks.choice("dtype", dtype, ("float32", "float64"))
    if dtype == "float64" and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError("`dtype` must be float32 without jax_enable_x64, got float64.")


def measure_scaling(dataset: Dataset, dtype: str) -> Scaling:
    """Measures the mean and the standard deviation of each channel over the training images."""
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(dataset.train_inputs.shape[-1]):
        values = dataset.train_inputs[..., channel].ravel()
        if values.dtype == np.uint8:
            counts = np.bincount(values, minlength=256)
            mean = np.average(levels, weights=counts)
            deviation = math.sqrt(np.average((levels - mean) ** 2, weights=counts))
        else:
            mean, deviation = np.mean(values, dtype=np.float64), np.std(values, dtype=np.float64)
        means.append(mean)
        # A channel of one value carries nothing; 1 leaves it at zero.
        deviations.append(deviation or 1.0)
    return Scaling(jnp.asarray(means, dtype), jnp.asarray(deviations, dtype))


@one_program()
def normalize(images: jax.Array, scaling: Scaling) -> jax.Array:
    """Scales images (..., channels) to mean 0 and deviation 1 over the training images."""
    broadcast = (1,) * (images.ndim - 1) + (-1,)
    values = images.astype(scaling.mean.dtype)
    if images.dtype == jnp.uint8:
        values = values / 255
    centred = values - scaling.mean.reshape(broadcast)
    return centred / scaling.deviation.reshape(broadcast)


def cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the mean softmax cross-entropy of logits (N, classes) and integer labels (N,)."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets))
