"""From options to a trained network and its curvature spectrum, saved stage by stage."""

import contextlib
import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from regjax.experiments import _figure, _record
from regjax.experiments._analysis import Subject, analyse, operators
from regjax.experiments._data import DataError, Dataset, load
from regjax.experiments._folder import CHECKPOINT, all_options, check_data, claimed
from regjax.experiments._geometry import measure_geometry
from regjax.experiments._inputs import measure_scaling
from regjax.experiments._monitoring import monitor_files, watched
from regjax.experiments._network import Evaluation, build_model, evaluate
from regjax.experiments._options import option
from regjax.experiments._page import write_page
from regjax.experiments._preflight import check_fit
from regjax.experiments._record import Record
from regjax.experiments._settings import (
    AnalysisSettings,
    SpectrumSettings,
    TrainSettings,
    checkpoint_path,
    num_devices,
)
from regjax.experiments._training import TrainingResult, failure, restore, train, trained_model
from regjax.experiments._validation import validate_run
from regjax.experiments._words import command_line

TRAINING_FILES = ("training.json",)

Progress = Callable[[str, int, int | None], None]
"""Called as progress(stage, done, total or None)."""


def spectrum_files(settings: AnalysisSettings) -> tuple[str, str]:
    """Returns the names of the record and of the figure."""
    return "spectrum.json", f"spectrum.{settings.figure}"


def run_train(settings: TrainSettings, progress: Progress) -> Record:
    """Trains and evaluates a network, like `python -m regjax train`.

    It writes `checkpoint.npz`, `training.json` and `report.html` into the folder `settings.out`.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     settings = experiments.TrainSettings(
      ...         epochs=2, depth=0, num_train=256, num_test=64, out=pathlib.Path(folder)
      ...     )
      ...     record = experiments.run_train(settings, lambda stage, done, total: None)
      ...     print((settings.out / "checkpoint.npz").exists())
      True
      >>> print(len(record["training"]["losses"]), record["num_parameters"])
      2 650

    Args:
      settings: a `TrainSettings`, whose fields are the options of the command.
      progress: called as progress(stage, done, total) after each block of batches.

    Returns:
      The content of `training.json`: a dict with "settings", "versions", "data", "training" (losses
      and time), "generalization" (loss and accuracy on training and test examples) and others.

    Raises:
      UsageError: an option cannot be followed.
      DataError: the data are missing or damaged.
      CheckpointError: the checkpoint to resume from is missing, damaged or of another model.
      TrainingError: the loss is not finite.
    """
    validate_run(settings, TrainSettings, progress)
    start = time.monotonic()
    with claimed(settings, TRAINING_FILES) as folder, precision(settings):
        _, record = trained(settings, progress, folder)
        record["finished"] = _record.finished(start)
        _record.write(folder / TRAINING_FILES[0], record)
        write_page(folder, TRAINING_FILES[0], record)
    return record


def run_spectrum(settings: SpectrumSettings, progress: Progress) -> Record:
    """Trains a network or reads a checkpoint, and analyses its curvature.

    This is `python -m regjax spectrum`. It writes `spectrum.json` into the folder `settings.out`
    after each stage, so that an interruption loses one stage at most, and `spectrum.png` and
    `report.html` at the end.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     settings = experiments.SpectrumSettings(
      ...         epochs=2, depth=0, num_train=256, num_test=64, num_eigenvalues=1, tol=0.1,
      ...         num_steps=4, out=pathlib.Path(folder),
      ...     )
      ...     record = experiments.run_spectrum(settings, lambda stage, done, total: None)
      ...     print((settings.out / "spectrum.png").exists())
      True
      >>> print(record["blocks"]["network"]["eigenvalues"]["converged"])
      [True]

    Args:
      settings: a `SpectrumSettings`, whose fields are the options of the command.
      progress: called as progress(stage, done, total) after each block of batches and each matrix
        product.

    Returns:
      The content of `spectrum.json`: a dict with the entries that `run_train` returns, and
      "blocks", {"network": ..., layer: ...}, each with its eigenvalues and its density. With the
      option `geometry` there is "geometry" too.

    Raises:
      UsageError: an option cannot be followed.
      DataError: the data are missing or damaged.
      CheckpointError: the checkpoint is missing, damaged or of another model.
      TrainingError: the loss is not finite.
      Interrupted: Ctrl-C; what was computed is in `spectrum.json`.
    """
    validate_run(settings, SpectrumSettings, progress)
    with claimed(settings, spectrum_files(settings)) as folder, precision(settings):
        return _spectrum(settings, progress, folder)


def _spectrum(settings: SpectrumSettings, progress: Progress, folder: Path) -> Record:
    start = time.monotonic()
    path, figure = (folder / name for name in spectrum_files(settings))
    subject, record = trained(settings, progress, folder)
    num_examples = settings.curvature_examples or record["data"]["num_train"]
    record["num_curvature_examples"] = num_examples - num_examples % num_devices(settings)
    record["blocks"] = {}
    save = functools.partial(_record.write, path, record)
    save()
    for number, (name, operator) in enumerate(operators(subject, settings).items()):
        analyse(
            operator,
            settings,
            record["blocks"].setdefault(name, {}),
            key=jax.random.fold_in(jax.random.key(settings.seed), number),
            save=save,
            progress=functools.partial(_of_block, progress, name),
        )
    if settings.geometry:
        record["geometry"] = measure_geometry(subject, settings)
        save()
    _figure.draw_spectrum(figure, record)
    record["finished"] = _record.finished(start)
    save()
    write_page(folder, path.name, record)
    return record


def _of_block(progress: Progress, block: str, stage: str, done: int, total: int | None) -> None:
    progress(stage if block == "network" else f"{stage}, {block}", done, total)


def _load(settings: TrainSettings) -> Dataset:
    """Loads the data of the options, whose names are those of the arguments of `load`."""
    names = ("data_dir", "num_train", "num_test")
    try:
        return load(settings.data, **{name: getattr(settings, name) for name in names})
    except DataError as error:
        text = re.sub(r"`(\w+)`", lambda match: option(match[1]), str(error))
        raise DataError(text) from error


def trained(
    settings: TrainSettings,
    progress: Progress,
    folder: Path,
    *,
    look: Callable[[int, Subject], None] | None = None,
) -> tuple[Subject, Record]:
    """Returns the trained network, or that of the checkpoint, and what is known of it.

    Calls look(epochs, subject) before the first epoch of training and after each one.
    """
    start, watch = time.monotonic(), None
    dataset = _load(settings)
    scaling = measure_scaling(dataset, settings.dtype)
    subject_of = lambda model: Subject(model, dataset, scaling)
    if isinstance(settings, AnalysisSettings) and settings.checkpoint is not None:
        path = checkpoint_path(settings.checkpoint)
        check_fit(settings, dataset)
        model = build_model(settings, dataset)
        state, losses = restore(path, settings, dataset, model)
        weights = state.weights
        model = trained_model(settings, model, weights)
        result = TrainingResult(model, losses, time.monotonic() - start)
    else:
        path = folder / CHECKPOINT
        check_data(settings, path, dataset.sha256)
        report = functools.partial(progress, "training")
        see = None if look is None else lambda epochs, model: look(epochs, subject_of(model))
        watch = watched(settings, dataset, scaling, folder)
        result = train(settings, dataset, path=path, callback=report, look=see, watch=watch)
    subject = subject_of(result.model)
    seen = evaluate(result.model, dataset.train_inputs, dataset.train_targets, scaling)
    unseen = evaluate(result.model, dataset.test_inputs, dataset.test_targets, scaling)
    record = {
        "command": command_line(settings),
        "settings": all_options(settings),
        "versions": _record.versions(),
        "device": jax.devices()[0].device_kind,
        "data": _record.describe(dataset),
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(result.model.params)),
        "training": {
            "checkpoint": path,
            "num_epochs": len(result.losses),
            "losses": result.losses,
            "seconds": result.seconds,
            "failure": failure(settings, dataset, result.losses, seen),
        },
        "generalization": _generalization(seen, unseen),
    }
    if watch is not None:
        record["monitor"] = watch.rows
        _figure.draw_monitor(folder / monitor_files(settings)[1], {"": record})
    return subject, record


def _generalization(seen: Evaluation, unseen: Evaluation) -> Record:
    return {
        "train_loss": seen.loss,
        "test_loss": unseen.loss,
        "loss_gap": unseen.loss - seen.loss,
        "train_accuracy": seen.accuracy,
        "test_accuracy": unseen.accuracy,
        "accuracy_gap": seen.accuracy - unseen.accuracy,
    }


def precision(settings: TrainSettings) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a run has the type of the options."""
    is_double = settings.dtype == "float64"
    return jax.enable_x64(True) if is_double else contextlib.nullcontext()
