"""A training run: epochs, checkpoints, and going on from one."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _files
from regjax._adapters import Model
from regjax._base import Tree
from regjax._one_program import one_program
from regjax._printing import legible
from regjax.experiments._checkpoint import read_marks as read_marks
from regjax.experiments._checkpoint import read_run as read_run
from regjax.experiments._data import Dataset
from regjax.experiments._dataset import check_dataset
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

Watch = Callable[[int, Model, Tree], None]
"""Called as watch(steps, model, optimizer_state) after the epochs of so many steps."""


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


@legible
class TrainingResult(NamedTuple):
    """A trained network.

    Attributes:
      model: `Model` with the trained parameters and statistics.
      losses: training loss of each epoch, the mean over its steps of the loss before the step.
      seconds: wall time of the epochs that ran now, including compilation.
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
    watch: Watch | None = None,
) -> TrainingResult:
    """Trains the network that the settings describe, and writes checkpoints.

    However this function ends, also by an error or Ctrl-C, the last good epoch is in the
    checkpoint.

    Example:
      >>> import pathlib, tempfile
      >>> dataset = experiments.load("digits", num_train=256, num_test=64)
      >>> settings = experiments.TrainSettings(epochs=2, depth=0)  # a linear classifier
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "checkpoint.npz"
      ...     result = experiments.train(settings, dataset, path=path)
      >>> print(result.losses[1] < result.losses[0])
      True

    Args:
      settings: a `TrainSettings`. With `resume` the run continues from `path`, and ends with the
        same bits as without interruption. Otherwise the file is replaced.
      dataset: the examples. The last, smaller batch of an epoch is left out.
      path: file of the checkpoint, which is written after epochs.
      callback: called as callback(steps, total) after each block of batches.
      look: called as look(epochs, model) before the first epoch and after each one, with the
        parameters as the optimiser has them. A resumed run starts with its present epoch.
      watch: called as watch(steps, model, optimizer_state) at the same times.

    Returns:
      A `TrainingResult`.

    Raises:
      TrainingError: the loss or a parameter is no longer finite.
      UsageError: an option is out of its range or does not fit the data, or the checkpoint belongs
        to another run.
      ValueError: the settings ask for float64, and JAX is not set to it; or the arrays of the data
        set do not fit each other.
      TypeError: an argument has the wrong type.
      CheckpointError: the checkpoint is missing, damaged or of another model; it cannot be written;
        or another run is writing it.
    """
    validate(settings)
    check_dataset(dataset)
    check_precision(settings.dtype)
    check_fit(settings, dataset)
    path = Path(path)
    _files.check_replaceable(path)
    with _files.locked(path.parent, name=f".{path.name}.lock"):
        return _train(settings, dataset, path, callback, look, watch)


def _train(
    settings: TrainSettings,
    dataset: Dataset,
    path: Path,
    callback: Callable[[int, int], None] | None,
    look: Look | None,
    watch: Watch | None,
) -> TrainingResult:
    model, start = build_model(settings, dataset), time.monotonic()
    if settings.resume:
        state, losses = restore(path, settings, dataset, model)
        marks = read_marks(path)
    else:
        state, losses = initial_state(settings, initialized(settings, model, dataset)), []
        marks = {}
    epochs = Epochs(settings, dataset, Step(model.apply, optimizer(settings), num_shards(settings)))
    num_saved, saved_at = len(losses) if settings.resume else -1, start

    def report(num_batches: int) -> None:
        if callback is not None:
            done = len(losses) * epochs.num_batches + num_batches
            callback(done, settings.epochs * epochs.num_batches)

    def current() -> Model:
        return model._replace(params=state.weights.params, state=state.weights.model_state)

    def show() -> None:
        if look is not None:
            look(len(losses), current())
        if watch is not None:
            num_steps = len(losses) * epochs.num_batches
            watch(num_steps, current(), state.weights.optimizer_state)

    try:
        marks[len(losses)] = weights_sha256(current())
        show()
        while len(losses) < settings.epochs:
            key = jax.random.fold_in(state.key, len(losses))
            weights, loss = epochs.run(state.weights, key, report)
            if not _is_finite((weights.params, weights.model_state, loss)):
                raise TrainingError(_not_finite(settings, float(loss), len(losses), path))
            state, losses = state._replace(weights=weights), [*losses, float(loss)]
            marks[len(losses)] = weights_sha256(current())
            if time.monotonic() - saved_at >= settings.checkpoint_seconds:
                save(path, settings, dataset, state, losses, marks)
                num_saved, saved_at = len(losses), time.monotonic()
            show()
    finally:
        if num_saved < len(losses):
            save(path, settings, dataset, state, losses, marks)
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


def weights_sha256(model: Model) -> str:
    """Returns the SHA-256 of the parameters and the state of a model, by which it is known."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path((model.params, model.state)):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(
    path: Path,
    settings: TrainSettings,
    dataset: Dataset,
    state: TrainingState,
    losses: list[float],
    marks: dict[int, str],
) -> None:
    """Writes a checkpoint: state, options, losses, and the data's hash, shape and classes.

    The hashes of the weights after each epoch are there as well, so that what was found at one of
    them can be told from what another run found.
    """
    metadata = {
        "settings": training_options(settings),
        "losses": losses,
        "data_sha256": dataset.sha256,
        "weights_sha256": {str(epochs): sha256 for epochs, sha256 in marks.items()},
        "input_shape": list(dataset.train_inputs.shape[1:]),
        "num_classes": int(dataset.num_classes),
    }
    _files.save(path, state, metadata=metadata)


def restore(
    path: Path, settings: TrainSettings, dataset: Dataset, model: Model
) -> tuple[TrainingState, list[float]]:
    """Reads the state and the losses in a checkpoint of these options and data.

    To go on from it `epochs` may be another number.

    Raises:
      UsageError: it was trained with other options or on other data, or for more epochs.
      CheckpointError: it is missing, damaged or of another model.
    """
    stored, losses, sha256 = read_run(path)
    goes_on = getattr(settings, "checkpoint", None) is None
    check_same_training(settings, stored, path=path, may_differ=("epochs",) if goes_on else ())
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


def initial_state(settings: TrainSettings, model: Model) -> TrainingState:
    """Returns the state before the first epoch."""
    optimizer_state = optimizer(settings).init(model.params)
    weights = Weights(model.params, model.state, optimizer_state)
    return TrainingState(weights, jax.random.key(settings.seed))


@one_program()
def _is_finite(tree: Tree) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _not_finite(settings: TrainSettings, loss: float, num_epochs: int, path: Path) -> str:
    return (
        f"Training must stay finite: epoch {num_epochs + 1} ends with the loss {loss}. A smaller "
        f"--learning-rate than {learning_rate(settings):g} may help. The last good epoch, "
        f"{num_epochs}, is in {path}."
    )
