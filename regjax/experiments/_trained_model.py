"""A trained network out of its checkpoint, for a notebook."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from regjax import _files
from regjax._adapters import Model
from regjax.experiments._checkpoint import read_run, read_shape
from regjax.experiments._dataset import Dataset, check_dataset
from regjax.experiments._inputs import check_precision, measure_scaling, normalize
from regjax.experiments._network import build
from regjax.experiments._settings import TrainSettings, checkpoint_path, replace
from regjax.experiments._training import initial_state, trained_model
from regjax.experiments._validation import validate


def load_model(path: str | os.PathLike[str]) -> Model:
    """Reads the trained network of a run of the command line from its checkpoint.

    For example, with an `output_loss_fn` (outputs, targets) -> mean loss,

        dataset = experiments.load("digits")
        inputs, _ = experiments.scaled_inputs(dataset)
        model = experiments.load_model("runs/mine")
        loss_fn = regjax.model_loss(model, output_loss_fn)
        curvature.hessian(loss_fn, model.params, inputs, dataset.train_targets)

    Example:
      >>> import pathlib, tempfile
      >>> dataset = experiments.load("digits", num_train=256, num_test=64)
      >>> settings = experiments.TrainSettings(epochs=2, depth=0)  # a linear classifier
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "checkpoint.npz"
      ...     result = experiments.train(settings, dataset, path=path)
      ...     model = experiments.load_model(folder)
      >>> inputs, test_inputs = experiments.scaled_inputs(dataset)
      >>> print(regjax.model_function(model)(model.params, test_inputs).shape)
      (64, 10)

    Args:
      path: the checkpoint, or the folder that holds `checkpoint.npz`.

    Returns:
      A `Model` with the trained parameters and statistics, for inputs from `scaled_inputs`. Noise
      that a transformation keeps on the parameters is removed.

    Raises:
      CheckpointError: the checkpoint is missing, damaged, or not that of a training run; or it is
        in float64, and JAX is not set to it.
      UsageError: it contains options that this version does not have.
    """
    file = checkpoint_path(Path(path))
    stored, _, _ = read_run(file)
    settings = replace(TrainSettings(), stored)
    validate(settings)
    try:
        check_precision(settings.dtype)
    except ValueError as error:
        raise _files.CheckpointError(f"{file} cannot be loaded: {error}") from None
    model = build(settings, *read_shape(file))
    state = _files.load(file, initial_state(settings, model))
    return trained_model(settings, model, state.weights)


def scaled_inputs(
    dataset: Dataset, *, dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Scales the images of a data set as training does, to mean 0 and deviation 1 of each channel.

    Mean and standard deviation are those of the training images.

    Example:
      >>> dataset = experiments.load("digits", num_train=256, num_test=64)
      >>> inputs, test_inputs = experiments.scaled_inputs(dataset)
      >>> print(inputs.shape, f"{abs(inputs.mean()):.3f} {inputs.std():.3f}")
      (256, 8, 8, 1) 0.000 1.000

    Args:
      dataset: a `Dataset`, such as from `load`.
      dtype: type of the results, float32 or float64.

    Returns:
      The training and the test inputs, (examples, height, width, channels).

    Raises:
      TypeError: `dataset` is not a `Dataset`, or `dtype` is not a type.
      ValueError: `dtype` is another type, or it is float64 and JAX is not set to it.
    """
    name = np.dtype(dtype).name
    check_precision(name)
    check_dataset(dataset)
    scaling = measure_scaling(dataset, name)
    train, test = (
        normalize(jnp.asarray(images), scaling)
        for images in (dataset.train_inputs, dataset.test_inputs)
    )
    return train, test
