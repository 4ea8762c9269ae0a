"""The monitor of a training run: its measures, its file, and its rows."""

from pathlib import Path

import jax
import jax.numpy as jnp

from regjax import diagnostics
from regjax._adapters import Model, model_loss
from regjax._base import Tree
from regjax.experiments._data import Dataset
from regjax.experiments._inputs import Scaling, cross_entropy, normalize
from regjax.experiments._optimizer import optimizer
from regjax.experiments._options import UsageError, did_you_mean
from regjax.experiments._settings import TrainSettings, learning_rate, momentum

# Folded into the key of the seed for the random starts and probes.
_MONITOR = 3
# Without a transformation, which would change what is stable.
_PLAIN = TrainSettings.transformation


class Watch:
    """Shows a monitor the network after each few epochs.

    Args:
      settings: the options.
      dataset: the examples.
      scaling: of the inputs.
      path: the file of the rows; those of a run that is resumed stay.
    """

    def __init__(
        self, settings: TrainSettings, dataset: Dataset, scaling: Scaling, path: Path
    ) -> None:
        count = min(settings.monitor_examples, len(dataset.train_targets))
        inputs = normalize(jnp.asarray(dataset.train_inputs[:count]), scaling)
        batch = inputs, jnp.asarray(dataset.train_targets[:count], jnp.int32)
        if not settings.resume:
            path.unlink(missing_ok=True)
        names, is_plain = measures(settings), settings.transformation == _PLAIN
        num_batches = len(dataset.train_targets) // settings.batch_size
        self._monitor = diagnostics.Monitor(
            _unbound, batch,
            every=settings.monitor_every * num_batches,
            key=jax.random.fold_in(jax.random.key(settings.seed), _MONITOR),
            measures=names,
            share=None,
            optimizer=settings.optimizer if is_plain else None,
            hyperparams=_hyperparams(settings) if is_plain else None,
            learning_rate=learning_rate(settings),
            tx=optimizer(settings),
            num_eigenvalues=dataset.num_classes if "gradient_share" in names else 1,
            path=path,
            resume=settings.resume,
        )  # fmt: skip

    @property
    def rows(self) -> list[dict[str, float]]:
        """The rows so far."""
        return self._monitor.rows

    def __call__(self, num_steps: int, model: Model, optimizer_state: Tree) -> None:
        """Measures, if it is time to; batch norm with its running statistics."""
        loss_fn = model_loss(model, cross_entropy)
        self._monitor(num_steps, model.params, optimizer_state, loss_fn=loss_fn)


def watched(
    settings: TrainSettings, dataset: Dataset, scaling: Scaling, folder: Path
) -> Watch | None:
    """Returns what watches the training, None where nobody asked for it."""
    if settings.monitor is None:
        return None
    return Watch(settings, dataset, scaling, folder / monitor_files(settings)[0])


def monitor_files(settings: TrainSettings) -> tuple[str, str]:
    """Returns the names of the rows and of the figure."""
    return "monitor.jsonl", f"monitor.{getattr(settings, 'figure', 'png')}"


def measures(settings: TrainSettings) -> tuple[str, ...]:
    """Returns the names of what is measured."""
    return tuple(word.strip() for word in (settings.monitor or "").split(","))


def _hyperparams(settings: TrainSettings) -> dict[str, float | None]:
    """The numbers of the optimiser, by optax's names."""
    if settings.optimizer == "adam":
        return {}
    return {"momentum": momentum(settings) or None}


def check_measures(settings: TrainSettings) -> None:
    """Checks what is to be measured.

    Raises:
      UsageError: a measure is not known, comes twice, or has nothing to look at.
    """
    if settings.monitor is None:
        return
    known, words = diagnostics.Monitor.known, measures(settings)
    for word in words:
        if word not in known:
            raise UsageError(
                f"--monitor must be of {', '.join(known)}, got {word!r}{did_you_mean(word, known)}."
            )
    if "preconditioned" in words and settings.optimizer != "adam":
        raise UsageError(
            f"--monitor preconditioned needs --optimizer adam, got {settings.optimizer}."
        )
    if "preconditioned" in words and settings.transformation != _PLAIN:
        raise UsageError(
            f"--monitor preconditioned needs --transformation {_PLAIN}, whose threshold is known, "
            f"got {settings.transformation}."
        )
    if len(set(words)) < len(words):
        raise UsageError(f"--monitor must name each measure once, got {settings.monitor}.")


def _unbound(params: Tree, *batch: Tree) -> jax.Array:
    raise AssertionError("Each call brings the loss with the state of the network.")
