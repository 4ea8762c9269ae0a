"""The network of the options, and its evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from regjax._adapters import Model
from regjax._base import Params, State
from regjax._nnx import from_nnx
from regjax._one_program import one_program
from regjax._runners import ApplyFn
from regjax.experiments._architectures import ARCHITECTURES
from regjax.experiments._dataset import Dataset
from regjax.experiments._inputs import Scaling, cross_entropy, normalize
from regjax.experiments._settings import TrainSettings, depth, width

EVALUATION_CHUNK = 2048


class Evaluation(NamedTuple):
    """How well a network does on some examples.

    Attributes:
      loss: mean.
      accuracy: share of examples whose largest output is the label's.
      num_predicted: number of classes that are the prediction for an example.
    """

    loss: float
    accuracy: float
    num_predicted: int


def build_model(settings: TrainSettings, dataset: Dataset) -> Model:
    """Builds the network with its initial parameters, in the type of the options."""
    return build(settings, dataset.train_inputs.shape[1:], dataset.num_classes)


def build(settings: TrainSettings, input_shape: tuple[int, ...], num_classes: int) -> Model:
    """Builds the network for inputs (height, width, channels), as `build_model`."""
    described = nnx.eval_shape(lambda: _module(settings, input_shape, num_classes))
    drawn = _drawn(settings, input_shape, num_classes)
    return _typed(from_nnx(nnx.merge(nnx.graphdef(described), drawn)), settings.dtype)


def model_shapes(settings: TrainSettings, dataset: Dataset) -> Model:
    """Returns the network with shapes for arrays: nothing is computed, whatever its size."""
    shape, num_classes = dataset.train_inputs.shape[1:], dataset.num_classes
    shapes = nnx.eval_shape(lambda: _module(settings, shape, num_classes))
    return _typed(from_nnx(shapes), settings.dtype)


@one_program(static=("settings", "input_shape", "num_classes"), effort=1)
def _drawn(settings: TrainSettings, input_shape: tuple[int, ...], num_classes: int) -> nnx.State:
    """The arrays of the network, all of them by one program."""
    return nnx.state(_module(settings, input_shape, num_classes))


def _module(settings: TrainSettings, input_shape: tuple[int, ...], num_classes: int) -> nnx.Module:
    return ARCHITECTURES[settings.model].build(
        input_shape,
        num_classes,
        width=width(settings),
        depth=depth(settings),
        normalization=settings.normalization,
        rngs=nnx.Rngs(settings.seed),
    )


def evaluate(model: Model, images: np.ndarray, labels: np.ndarray, scaling: Scaling) -> Evaluation:
    """Computes mean loss, accuracy and predicted classes in evaluation mode, in chunks."""
    loss, correct, predicted = 0.0, 0, set[int]()
    for start in range(0, len(labels), EVALUATION_CHUNK):
        part = slice(start, start + EVALUATION_CHUNK)
        # On the host: each operation on an array outside of a program is a program itself.
        sums = jax.device_get(
            _evaluate_chunk(
                model.apply, model.params, model.state, images[part], labels[part], scaling
            )
        )
        loss, correct = loss + float(sums[0]), correct + int(np.sum(sums[1] == labels[part]))
        predicted |= set(np.unique(sums[1]).tolist())
    return Evaluation(loss / len(labels), correct / len(labels), len(predicted))


@one_program(static="apply", effort=3)
def _evaluate_chunk(
    apply: ApplyFn,
    params: Params,
    state: State,
    images: Any,
    labels: Any,
    scaling: Scaling,
) -> tuple[jax.Array, jax.Array]:
    outputs, _ = apply(params, state, normalize(images, scaling), train=False)
    loss = cross_entropy(outputs, labels) * len(labels)
    return loss, jnp.argmax(outputs, axis=1)


def _typed(model: Model, dtype: str) -> Model:
    """Returns the model with floating-point arrays, or their shapes, of another type."""

    def cast(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype))
        return leaf.astype(dtype)

    return model._replace(
        params=jax.tree.map(cast, model.params), state=jax.tree.map(cast, model.state)
    )
