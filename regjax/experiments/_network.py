"""The network of the options, its input scaling, its loss and its evaluation."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from regjax import models
from regjax._adapters import Model, from_nnx
from regjax.experiments._data import Dataset
from regjax.experiments._settings import TrainSettings, depth, width

_EVALUATION_CHUNK = 2048


class Scaling(NamedTuple):
    """Mean and standard deviation (channels,) of the training images, in units of 255."""

    mean: jax.Array
    deviation: jax.Array


class Evaluation(NamedTuple):
    """Mean loss, and the share of examples whose largest output is the label's."""

    loss: float
    accuracy: float


def build_model(settings: TrainSettings, dataset: Dataset) -> Model:
    """The network with its initial parameters, in the type of the options."""
    rngs = nnx.Rngs(settings.seed)
    shape, num_classes = dataset.train_images.shape[1:], dataset.num_classes
    channels, norm = width(settings), settings.normalization
    module: nnx.Module
    if settings.model == "resnet":
        # Twice the channels at each of two reductions, as is usual.
        widths = tuple(channels * min(2**i, 4) for i in range(depth(settings)))
        module = models.ResNet(shape, num_classes, widths=widths, normalization=norm, rngs=rngs)
    else:
        network = models.MLP if settings.model == "mlp" else models.ConvNet
        module = network(
            shape, num_classes, width=channels, depth=depth(settings), normalization=norm, rngs=rngs
        )
    model = from_nnx(module)
    return model._replace(
        params=_cast(model.params, settings.dtype), state=_cast(model.state, settings.dtype)
    )


def criterion(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy of logits (N, classes) and integer labels (N,)."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets))


def measure_scaling(dataset: Dataset, dtype: Any) -> Scaling:
    """The mean and the standard deviation of each channel over the training images."""
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(dataset.train_images.shape[-1]):
        counts = np.bincount(dataset.train_images[..., channel].ravel(), minlength=256)
        mean = np.average(levels, weights=counts)
        means.append(mean)
        # A channel of one value carries nothing; 1 leaves it at zero.
        deviations.append(math.sqrt(np.average((levels - mean) ** 2, weights=counts)) or 1.0)
    return Scaling(jnp.asarray(means, dtype), jnp.asarray(deviations, dtype))


def normalize(images: jax.Array, scaling: Scaling) -> jax.Array:
    """uint8 images (..., channels) in floating point, mean 0 and deviation 1 in training."""
    broadcast = (1,) * (images.ndim - 1) + (-1,)
    centred = images.astype(scaling.mean.dtype) / 255 - scaling.mean.reshape(broadcast)
    return centred / scaling.deviation.reshape(broadcast)


def evaluate(model: Model, images: np.ndarray, labels: np.ndarray, scaling: Scaling) -> Evaluation:
    """Mean loss and accuracy in evaluation mode, in chunks."""
    loss, correct = 0.0, 0
    for start in range(0, len(labels), _EVALUATION_CHUNK):
        part = slice(start, start + _EVALUATION_CHUNK)
        sums = _evaluate_chunk(
            model.apply, model.params, model.state, images[part], labels[part], scaling
        )
        loss, correct = loss + float(sums[0]), correct + int(sums[1])
    return Evaluation(loss / len(labels), correct / len(labels))


@functools.partial(jax.jit, static_argnums=0)
def _evaluate_chunk(
    apply: Any, params: Any, state: Any, images: jax.Array, labels: jax.Array, scaling: Scaling
) -> tuple[jax.Array, jax.Array]:
    outputs, _ = apply(params, state, normalize(images, scaling), train=False)
    loss = criterion(outputs, labels) * len(labels)
    return loss, jnp.sum(jnp.argmax(outputs, axis=1) == labels, dtype=jnp.int32)


def _cast(tree: Any, dtype: str) -> Any:
    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
