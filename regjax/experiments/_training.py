"""A training run: epochs, checkpoints, and going on from one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _files
from regjax._adapters import Model
from regjax._base import Tree
from regjax.experiments._data import Dataset
from regjax.experiments._epochs import Epochs, Step, Weights
from regjax.experiments._inputs import check_precision
from regjax.experiments._network import Evaluation, build_model
from regjax.experiments._optimizer import optimizer
from regjax.experiments._options import UsageError
from regjax.experiments._preflight import check_fit
from regjax.experiments._settings import (
    TrainSettings,
    check_same_training,
    initialization,
    learning_rate,
    num_shards,
    training_options,
    transformation,
)
from regjax.experiments._validation import as_options, validate

Look = Callable[[int, Model], None]
"""Called as look(epochs, model) with the network as it is after so many epochs."""


class TrainingError(ValueError):
    """Training that cannot go on, in one line."""


class TrainingState(NamedTuple):
    """What a checkpoint holds, all that the next epoch needs besides its number.

    Attributes:
      weights: parameters, batch statistics and the optimiser's state.
      key: typed key of the run; the number of the epoch is folded in.
    """

    weights: Weights
    key: jax.Array


class TrainingResult(NamedTuple):
    """A trained network.

    Attributes:
      model: with the trained parameters and statistics.
      losses: mean training loss of each epoch, before each of its steps.
      seconds: wall time of the epochs run now, compilation included.
    """

    model: Model
    losses: list[float]
    seconds: float


def train(
    settings: TrainSettings,
    dataset: Dataset,
    *,
    path: Path,
    callback: Callable[[int, int], None] | None = None,
    look: Look | None = None,
) -> TrainingResult:
    """Trains the network that the options describe.

    However this function ends, by an error or Ctrl-C too, the last good epoch is in the checkpoint.

    Args:
      settings: the options; with `resume` the run goes on from `path`, to the same bits as one
        that was not interrupted.
      dataset: the examples. The last, smaller batch of an epoch is left out.
      path: the checkpoint, written after epochs.
      callback: called as callback(steps, total) after each block of batches.
      look: called as look(epochs, model) before the first epoch and after each one, with the
        parameters as the optimiser has them.

    Returns:
      A `TrainingResult`.

    Raises:
      TrainingError: the loss or a parameter is no longer finite.
      UsageError: an option is out of its range or does not fit the data, or the checkpoint is
        another run's.
      ValueError: the options ask for float64, and JAX is not set to it.
      CheckpointError: the checkpoint is missing, damaged or of another model.
    """
    validate(settings)
    check_precision(settings.dtype)
    check_fit(settings, dataset)
    model, start = build_model(settings, dataset), time.monotonic()
    if settings.resume:
        state, losses = restore(path, settings, dataset, model)
    else:
        state, losses = initial_state(settings, initialized(settings, model, dataset)), []
    epochs = Epochs(settings, dataset, Step(model.apply, optimizer(settings), num_shards(settings)))
    num_saved, saved_at = len(losses) if settings.resume else -1, start

    def report(num_batches: int) -> None:
        if callback is not None:
            done = len(losses) * epochs.num_batches + num_batches
            callback(done, settings.epochs * epochs.num_batches)

    def show(weights: Weights) -> None:
        if look is not None:
            own = model._replace(params=weights.params, state=weights.model_state)
            look(len(losses), own)

    try:
        if not losses:
            show(state.weights)
        while len(losses) < settings.epochs:
            key = jax.random.fold_in(state.key, len(losses))
            weights, loss = epochs.run(state.weights, key, report)
            if not _is_finite((weights.params, weights.model_state, loss)):
                raise TrainingError(_not_finite(settings, float(loss), len(losses), path))
            state, losses = state._replace(weights=weights), [*losses, float(loss)]
            if time.monotonic() - saved_at >= settings.checkpoint_seconds:
                save(path, settings, dataset, state, losses)
                num_saved, saved_at = len(losses), time.monotonic()
            show(weights)
    finally:
        if num_saved < len(losses):
            save(path, settings, dataset, state, losses)
    trained = trained_model(settings, model, state.weights)
    return TrainingResult(trained, losses, time.monotonic() - start)


def failure(
    settings: TrainSettings, dataset: Dataset, losses: list[float], seen: Evaluation
) -> str | None:
    """Says that training did not teach the network anything; None if it did, or was not asked to.

    The best constant guess has the entropy of the labels for loss. Who does not beat it and
    predicts one class only is dead; who is far above it, or ends above where it began, diverged.

    Args:
      settings: of the training.
      dataset: the examples.
      losses: mean training loss of each epoch.
      seen: evaluation on the training examples at the end.
    """
    shares = np.bincount(dataset.train_targets) / len(dataset.train_targets)
    guess = float(-np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
    if not losses or not guess or seen.loss < guess:
        return None
    if seen.num_predicted == 1:
        what = "predicts one class only"
    elif not seen.loss <= 2 * guess or losses[-1] > losses[0]:
        what = "diverged"
    else:
        return None
    return (
        f"TRAINING FAILED: the network {what}; its training loss, {seen.loss:.4g}, is not below "
        f"that of the best constant guess, {guess:.4g}. A smaller --learning-rate than "
        f"{learning_rate(settings):g} may help."
    )


def initialized(settings: TrainSettings, model: Model, dataset: Dataset) -> Model:
    """Returns the model with the initial parameters of the options.

    Raises:
      UsageError: there are fewer training examples than the options ask for, or the network cannot
        be initialised so.
    """
    method = initialization(settings)
    with as_options(settings.init):
        params = method.make(model, dataset, dtype=settings.dtype, seed=settings.seed)
    return model._replace(params=params)


def trained_model(settings: TrainSettings, model: Model, weights: Weights) -> Model:
    """Returns the model with trained weights, without what a transformation left on them."""
    method = transformation(settings)
    params = method.params_to_evaluate(weights.params, weights.optimizer_state)
    return model._replace(params=params, state=weights.model_state)


def save(
    path: Path, settings: TrainSettings, dataset: Dataset, state: TrainingState, losses: list[float]
) -> None:
    """Writes a checkpoint: state, options, losses, and the data's hash, shape and classes."""
    metadata = {
        "settings": training_options(settings),
        "losses": losses,
        "data_sha256": dataset.sha256,
        "input_shape": list(dataset.train_inputs.shape[1:]),
        "num_classes": int(dataset.num_classes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _files.save(path, state, metadata=metadata)


def restore(
    path: Path, settings: TrainSettings, dataset: Dataset, model: Model
) -> tuple[TrainingState, list[float]]:
    """Reads the state and the losses in a checkpoint of these options (but `epochs`) and data.

    Raises:
      UsageError: it was trained with other options or on other data, or for more epochs.
      CheckpointError: it is missing, damaged or of another model.
    """
    stored, losses, sha256 = read_run(path)
    check_same_training(settings, stored, path=path, may_differ=("epochs",))
    if len(losses) > settings.epochs:
        raise UsageError(
            f"--epochs must be at least the {len(losses)} of the checkpoint {path}, "
            f"got {settings.epochs}."
        )
    if sha256 != dataset.sha256:
        raise UsageError(
            f"The data must be those of the checkpoint {path}, SHA-256 {sha256[:12]}..., "
            f"got {dataset.source}, {dataset.sha256[:12]}..."
        )
    return _files.load(path, initial_state(settings, model)), losses


def read_run(path: Path) -> tuple[dict[str, Any], list[float], str]:
    """Reads the training options, the losses and the SHA-256 of the data in a checkpoint.

    Raises:
      CheckpointError: it is missing, damaged or not one of a training run.
    """
    metadata = _files.read_metadata(path)
    try:
        return metadata["settings"], list(metadata["losses"]), metadata["data_sha256"]
    except KeyError as error:
        raise _files.CheckpointError(
            f"{path} must be the checkpoint of a training run, got one without {error}."
        ) from None


def initial_state(settings: TrainSettings, model: Model) -> TrainingState:
    """Returns the state before the first epoch."""
    optimizer_state = optimizer(settings).init(model.params)
    weights = Weights(model.params, model.state, optimizer_state)
    return TrainingState(weights, jax.random.key(settings.seed))


@jax.jit
def _is_finite(tree: Tree) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _not_finite(settings: TrainSettings, loss: float, num_epochs: int, path: Path) -> str:
    return (
        f"Training must stay finite: epoch {num_epochs + 1} ends with the loss {loss}. A smaller "
        f"--learning-rate than {learning_rate(settings)} may help. The last good epoch, "
        f"{num_epochs}, is in {path}."
    )
