"""The network of the options, and its evaluation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from regjax._adapters import Model, from_nnx
from regjax.experiments._architectures import ARCHITECTURES
from regjax.experiments._dataset import Dataset
from regjax.experiments._inputs import Scaling, cross_entropy, normalize
from regjax.experiments._settings import TrainSettings, depth, width

_EVALUATION_CHUNK = 2048


class Evaluation(NamedTuple):
    """Mean loss, and the share of examples whose largest output is the label's."""

    loss: float
    accuracy: float


def build_model(settings: TrainSettings, dataset: Dataset) -> Model:
    """The network with its initial parameters, in the type of the options."""
    rngs = nnx.Rngs(settings.seed)
    shape, num_classes = dataset.train_inputs.shape[1:], dataset.num_classes
    module = ARCHITECTURES[settings.model].build(
        shape,
        num_classes,
        width=width(settings),
        depth=depth(settings),
        normalization=settings.normalization,
        rngs=rngs,
    )
    model = from_nnx(module)
    return model._replace(
        params=_cast(model.params, settings.dtype), state=_cast(model.state, settings.dtype)
    )


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
    loss = cross_entropy(outputs, labels) * len(labels)
    return loss, jnp.sum(jnp.argmax(outputs, axis=1) == labels, dtype=jnp.int32)


def _cast(tree: Any, dtype: str) -> Any:
    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
