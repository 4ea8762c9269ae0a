"""Probes along the steps of training, each known by the weights that it is of."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from regjax import diagnostics
from regjax._adapters import model_loss
from regjax.experiments import _record
from regjax.experiments._analysis import Subject, training_examples
from regjax.experiments._inputs import cross_entropy
from regjax.experiments._options import UsageError
from regjax.experiments._record import Record
from regjax.experiments._settings import LandscapeSettings, learning_rate
from regjax.experiments._training import read_marks, read_run, weights_sha256

# Of the learning rate: where a probe begins and ends (Santurkar et al. 2018, figure 4).
_FIRST_STEP, _LAST_STEP = 0.5, 4.0
_LISTS = ("losses", "gradient_distances", "smoothness", "learning_rates")
_NUMBERS = ("loss", "gradient_norm")


class Probes:
    """The probes of a run, those before an interruption among them.

    A probe that is found belongs to this run if the checkpoint has gone through the very weights,
    or if training comes to them again: any other run may have left its own in the same folder.

    Args:
      path: the record that an interrupted run has left, if there is one.
      checkpoint: of the run.
      settings: with `resume`, probes that are found are not made again.

    Raises:
      UsageError: the record has something else for probes.
      CheckpointError: the record or the checkpoint cannot be read.

    Attributes:
      by_epoch: what is known so far.
    """

    def __init__(self, path: Path, checkpoint: Path, settings: LandscapeSettings):
        self._settings = settings
        self._found = _read(path) if settings.resume and path.exists() else []
        self.by_epoch: dict[int, Record] = {}
        if self._found and settings.checkpoint is None:
            _, losses, data = read_run(checkpoint)
            for epochs, weights in sorted(read_marks(checkpoint).items()):
                probe = self._find(epochs, self._mark(weights, data))
                if probe is not None and epochs < len(losses):
                    self.by_epoch[epochs] = probe

    def look(self, epochs: int, subject: Subject) -> None:
        """Finds or makes the probe of a network after so many epochs."""
        mark = self._mark(weights_sha256(subject.model), subject.dataset.sha256)
        found = self._find(epochs, mark)
        made = lambda: {"epochs": epochs, **mark, **_probe(subject, self._settings, mark)}
        self.by_epoch[epochs] = made() if found is None else found

    def records(self) -> list[Record]:
        """Returns the probes in the order of their epochs."""
        return [probe for _, probe in sorted(self.by_epoch.items())]

    def _mark(self, weights: str, data: str) -> Record:
        """Returns all that decides a probe."""
        settings = self._settings
        steps = np.geomspace(_FIRST_STEP, _LAST_STEP, settings.probe_points)
        return {
            "weights_sha256": weights,
            "data_sha256": data,
            "seed": settings.seed,
            "num_examples": settings.probe_examples or settings.batch_size,
            "learning_rates": (steps * learning_rate(settings)).tolist(),
        }

    def _find(self, epochs: int, mark: Record) -> Record | None:
        wanted = {"epochs": epochs, **mark}
        is_it = lambda probe: all(probe.get(name) == value for name, value in wanted.items())
        return next(filter(is_it, self._found), None)


def _probe(subject: Subject, settings: LandscapeSettings, mark: Record) -> Record:
    """Probes along the gradient, always on the same examples, in train mode."""
    inputs, targets = training_examples(subject, settings, "probe_examples")
    inputs, targets = inputs[: mark["num_examples"]], targets[: mark["num_examples"]]
    # The key is that of noise in the network: the same for all points.
    loss = model_loss(subject.model, cross_entropy, mode="train", key=jax.random.key(mark["seed"]))
    steps = jnp.asarray(mark["learning_rates"], inputs.dtype)
    report = diagnostics.line_probe(
        loss, subject.model.params, inputs, targets, learning_rates=steps
    )
    return {name: value.tolist() for name, value in report._asdict().items()}


def _read(path: Path) -> list[Record]:
    probes = _record.read(path).get("probes", [])
    if not isinstance(probes, list) or not all(map(_is_probe, probes)):
        raise UsageError(
            f"{path} must have the probes of a landscape, got something else: choose another --out."
        )
    return [{name: _number(value) for name, value in probe.items()} for probe in probes]


def _is_probe(probe: object) -> bool:
    if not isinstance(probe, dict):
        return False
    is_number = lambda value: value is None or type(value) in (int, float)
    lists = [probe.get(name) for name in _LISTS]
    return all(is_number(probe.get(name)) for name in _NUMBERS) and all(
        isinstance(values, list)
        and len(values) == len(probe["learning_rates"])
        and all(map(is_number, values))
        for values in reversed(lists)
    )


def _number(value: Any) -> Any:
    """Returns numbers as they were before they were written: null stands for not a number."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    return float("nan") if value is None else value
