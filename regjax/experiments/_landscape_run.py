"""From options to a loss surface and the probes of a training run, saved row by row."""

import functools
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
from regjax.experiments._folder import CHECKPOINT, all_options, claimed
from regjax.experiments._inputs import cross_entropy
from regjax.experiments._page import write_page
from regjax.experiments._probes import Probes
from regjax.experiments._record import Record
from regjax.experiments._settings import AnalysisSettings, LandscapeSettings
from regjax.experiments._spectrum_run import Progress, precision, trained
from regjax.experiments._validation import validate_run


def landscape_files(settings: AnalysisSettings) -> tuple[str, str, str]:
    """Returns the names of the record and of the figures."""
    return "landscape.json", f"surface.{settings.figure}", f"probes.{settings.figure}"


def run_landscape(settings: LandscapeSettings, progress: Progress) -> Record:
    """Trains a network or reads a checkpoint; computes its loss surface and probes its steps.

    This is `python -m regjax landscape`. A probe measures how loss and gradient change along the
    gradient step (`diagnostics.line_probe`). A fresh run is probed before its first epoch and after
    each one, a checkpoint once. The function writes `landscape.json` into the folder `settings.out`
    after training and after each row of the surface, and `surface.png`, `probes.png` and
    `report.html` at the end.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     settings = experiments.LandscapeSettings(
      ...         epochs=2, depth=0, num_train=256, num_test=64, points=3, probe_points=2,
      ...         out=pathlib.Path(folder),
      ...     )
      ...     record = experiments.run_landscape(settings, lambda stage, done, total: None)
      ...     print((settings.out / "surface.png").exists())
      True
      >>> print(np.shape(record["surface"]["losses"]))
      (3, 3)

    Args:
      settings: a `LandscapeSettings`, whose fields are the options of the command.
      progress: called as progress(stage, done, total) after each block of batches and each row.

    Returns:
      The content of `landscape.json`: a dict with the entries that `run_train` returns, and
      "probes", "surface" and "flatness".

    Raises:
      UsageError: an option cannot be followed.
      DataError: the data are missing or damaged.
      CheckpointError: the checkpoint is missing, damaged or of another model.
      TrainingError: the loss is not finite.
      KeyboardInterrupt: Ctrl-C; what was computed is in `landscape.json`.
    """
    validate_run(settings, LandscapeSettings, progress)
    with claimed(settings, landscape_files(settings)) as folder, precision(settings):
        return _landscape(settings, progress, folder)


def _landscape(settings: LandscapeSettings, progress: Progress, folder: Path) -> Record:
    start = time.monotonic()
    path, surface, figure = (folder / name for name in landscape_files(settings))
    probes = Probes(path, folder / CHECKPOINT, settings)

    def look(epochs: int, subject: Subject) -> None:
        probes.look(epochs, subject)
        _record.write(path, {"settings": all_options(settings), "probes": probes.records()})

    subject, record = trained(settings, progress, folder, look=look)
    num_epochs = record["training"]["num_epochs"]
    if num_epochs not in probes.by_epoch:  # a checkpoint was not trained here
        look(num_epochs, subject)
    record["probes"] = probes.records()
    save = functools.partial(_record.write, path, record)
    save()
    _surface(subject, settings, record, save, progress)
    _figure.draw_surface(surface, record)
    _figure.draw_probes(figure, record)
    record["finished"] = _record.finished(start)
    save()
    write_page(folder, path.name, record)
    return record


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
