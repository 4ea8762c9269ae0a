"""The initial parameters that the options describe."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from regjax import initializers
from regjax._adapters import Model, model_loss
from regjax.experiments._data import Dataset
from regjax.experiments._initialization import GradInit
from regjax.experiments._network import Scaling, criterion, measure_scaling, normalize
from regjax.experiments._settings import TrainSettings, UsageError

# Folded into the key of the seed for noise in train mode.
_NOISE = 2


def initialize(settings: TrainSettings, model: Model, dataset: Dataset) -> Model:
    """The model with the initial parameters of the options.

    Raises:
      UsageError: there are fewer training examples than the options ask for.
    """
    if settings.init == "default":
        return model
    scaling = measure_scaling(dataset, settings.dtype)
    key = jax.random.fold_in(jax.random.key(settings.seed), _NOISE)
    if settings.init == "data_dependent":
        options = settings.data_dependent
        _check_enough("--data-dependent.num-examples", options.num_examples, dataset)
        images = jnp.asarray(dataset.train_images[: options.num_examples])
        params = initializers.data_dependent(
            model, model.params, model.state, normalize(images, scaling),
            std=options.std, epsilon=options.epsilon, key=key,
        )  # fmt: skip
        return model._replace(params=params)
    return _gradinit(settings.gradinit, settings.seed, model, dataset, scaling, key)


def _gradinit(
    options: GradInit, seed: int, model: Model, dataset: Dataset, scaling: Scaling, key: jax.Array
) -> Model:
    _check_enough("--gradinit.half-batch", 3 * options.half_batch, dataset)
    random, size = np.random.default_rng(seed), 3 * options.half_batch
    drawn = [
        random.choice(len(dataset.train_labels), size, replace=False)
        for _ in range(options.num_iterations)
    ]
    rows = np.stack(drawn).reshape(-1, 3, options.half_batch)
    batches = (jnp.asarray(dataset.train_images[rows]), jnp.asarray(dataset.train_labels[rows]))
    arguments = dataclasses.asdict(options)
    for name in ("num_iterations", "half_batch"):
        del arguments[name]
    loss_fn = Partial(_loss, model_loss(model, criterion, mode="train", key=key), scaling)
    result = initializers.gradinit(loss_fn, model.params, batches, **arguments)
    return model._replace(params=result.params)


def _loss(loss: Any, scaling: Scaling, params: Any, images: jax.Array, labels: jax.Array) -> Any:
    return loss(params, normalize(images, scaling), labels)


def _check_enough(name: str, number: int, dataset: Dataset) -> None:
    if number > len(dataset.train_labels):
        raise UsageError(
            f"{name} must take at most the training examples, {len(dataset.train_labels)}, "
            f"got {number}."
        )
