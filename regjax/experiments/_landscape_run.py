"""From options to a loss surface and the probes of a training run, saved row by row."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from regjax import _numerics, diagnostics
from regjax._adapters import model_loss
from regjax._base import Params
from regjax.experiments import _figure, _record
from regjax.experiments._analysis import Subject, check_examples, training_examples
from regjax.experiments._inputs import cross_entropy
from regjax.experiments._record import Record
from regjax.experiments._settings import LandscapeSettings, learning_rate, out_dir
from regjax.experiments._spectrum_run import Progress, precision, trained
from regjax.experiments._validation import validate

# Of the learning rate: where a probe begins and ends (Santurkar et al. 2018, figure 4).
_FIRST_STEP, _LAST_STEP = 0.5, 4.0


def run_landscape(settings: LandscapeSettings, progress: Progress) -> Record:
    """Trains or reads a checkpoint, probes the steps of training, and computes the loss surface.

    A fresh run is probed before its first epoch and after each one, a checkpoint as it is.
    `landscape.json` is written after training and after each row of the surface; `surface.png` and
    `probes.png` at the end.

    Args:
      settings: the options.
      progress: called after each block of batches and each row.

    Returns:
      What `landscape.json` holds: as `run_train`, and `probes`, `surface` and `flatness`.

    Raises:
      UsageError: an option cannot be followed.
      DataError: the data are missing or damaged.
      CheckpointError: the checkpoint is missing, damaged or of another model.
      TrainingError: the loss is not finite.
      KeyboardInterrupt: Ctrl-C; what was computed is in `landscape.json`.
    """
    validate(settings)
    folder = out_dir(settings)
    path = folder / "landscape.json"
    probes = _known_probes(path, settings) if settings.resume else {}
    with precision(settings):

        def look(epochs: int, subject: Subject) -> None:
            probes[epochs] = {"epochs": epochs, **_probe(subject, settings)}
            _record.write(path, {"probes": list(probes.values())})

        subject, record = trained(settings, progress, look=look)
        num_epochs = record["training"]["num_epochs"]
        if num_epochs not in probes:  # a checkpoint was not trained here
            probes[num_epochs] = {"epochs": num_epochs, **_probe(subject, settings)}
        record["probes"] = list(probes.values())
        save = functools.partial(_record.write, path, record)
        save()
        _surface(subject, settings, record, save, progress)
    _figure.draw_surface(folder / "surface.png", record)
    _figure.draw_probes(folder / "probes.png", record)
    return record


def _probe(subject: Subject, settings: LandscapeSettings) -> Record:
    """Probes along the gradient, always on the same examples, in train mode."""
    inputs, targets = training_examples(subject, settings, "probe_examples")
    if settings.probe_examples is None:
        inputs, targets = inputs[: settings.batch_size], targets[: settings.batch_size]
    steps = np.geomspace(_FIRST_STEP, _LAST_STEP, settings.probe_points) * learning_rate(settings)
    # The key is that of noise in the network: the same for all points.
    loss = model_loss(subject.model, cross_entropy, mode="train", key=jax.random.key(settings.seed))
    report = diagnostics.line_probe(
        loss, subject.model.params, inputs, targets, learning_rates=jnp.asarray(steps, inputs.dtype)
    )
    return {
        "num_examples": len(targets),
        "learning_rates": steps.tolist(),
        **{name: value.tolist() for name, value in report._asdict().items()},
    }


def _known_probes(path: Path, settings: LandscapeSettings) -> dict[int, Record]:
    """Returns the probes before an interruption, by epoch, if they were made like these."""
    if not path.exists():
        return {}
    # A number that was not finite was written as null.
    probes = json.loads(path.read_text().replace("null", "NaN")).get("probes", [])
    like = settings.probe_points, settings.probe_examples or settings.batch_size
    made = lambda probe: (len(probe["learning_rates"]), probe["num_examples"])
    return {probe["epochs"]: probe for probe in probes if made(probe) == like}


def _surface(
    subject: Subject,
    settings: LandscapeSettings,
    record: Record,
    save: Callable[[], None],
    progress: Progress,
) -> None:
    """Computes the losses row by row, then how wide the minimum is along both directions."""
    start, params = time.monotonic(), subject.model.params
    inputs, targets = training_examples(subject, settings, "surface_examples")
    check_examples(subject.model, settings, inputs, targets)
    loss = model_loss(subject.model, cross_entropy, mode=settings.batch_norm_mode)
    chunk_size = settings.chunk_size
    first, second = (
        diagnostics.filter_normalized_direction(
            params, key=key, per_filter=settings.directions == "filter"
        )
        for key in jax.random.split(jax.random.key(settings.seed))
    )
    positions = np.linspace(-settings.span, settings.span, settings.points)
    rows: list[list[float]] = []
    record["surface"] = {
        "positions": positions.tolist(),
        "losses": rows,
        "num_examples": len(targets),
    }
    for row, position in enumerate(positions.tolist()):
        centre = optax.tree.add_scale(params, position, first)
        line = diagnostics.interpolate(
            loss, centre, optax.tree.add(centre, second), inputs, targets,
            positions=jnp.asarray(positions, inputs.dtype), chunk_size=chunk_size,
        )  # fmt: skip
        rows.append(line.tolist())
        save()
        progress("surface", row + 1, settings.points)
    record["surface"]["seconds"] = time.monotonic() - start
    record["flatness"] = [
        _flatness(
            diagnostics.interval_flatness(
                loss, params, direction, inputs, targets,
                max_distance=settings.span * float(_numerics.scaled_norm(direction)),
                chunk_size=chunk_size,
            ),
            direction,
        )
        for direction in (first, second)
    ]  # fmt: skip
    save()


def _flatness(report: diagnostics.FlatnessResult, direction: Params) -> Record:
    """Gives the lengths in units of the direction, as the positions of the surface."""
    norm = float(_numerics.scaled_norm(direction))
    lengths = {name: float(value) / norm for name, value in report._asdict().items()}
    return {**lengths, "converged": bool(report.converged)}
