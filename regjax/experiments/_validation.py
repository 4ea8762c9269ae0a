"""What can be said about the options without data."""

import contextlib
import re
from collections.abc import Iterator

import jax

from regjax.experiments._architectures import ARCHITECTURES
from regjax.experiments._normalization import NORMALIZATIONS
from regjax.experiments._optimizer import optimizer
from regjax.experiments._options import UsageError, option
from regjax.experiments._settings import (
    AnalysisSettings,
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    initialization,
    momentum,
    num_devices,
    num_shards,
)


def validate(settings: TrainSettings) -> None:
    """Checks all that can be said without data.

    Raises:
      UsageError: an option is out of its range.
    """
    positive = ["width", "num_train", "num_test", "batch_size", "device_bytes"]
    non_negative = ["epochs", "seed", "weight_decay", "checkpoint_seconds"]
    can_be_flat = ARCHITECTURES[settings.model].least_depth == 0
    (non_negative if can_be_flat else positive).append("depth")
    if isinstance(settings, SpectrumSettings):
        positive += ["curvature_examples", "num_eigenvalues", "num_probes", "num_steps"]
        positive += ["damping", "num_samples"]
        non_negative += ["tol"]
        _validate_mesh(settings)
    if isinstance(settings, LandscapeSettings):
        positive += ["points", "span", "surface_examples", "probe_examples", "probe_points"]
        if settings.points < 3 or settings.points % 2 == 0:
            raise UsageError(f"--points must be odd and at least 3, got {settings.points}.")
    if isinstance(settings, AnalysisSettings):
        positive += ["chunk_size"]
    for name in [*positive, "learning_rate", *non_negative]:
        value = getattr(settings, name)
        # NaN is neither.
        if value is not None and not (value >= 0 if name in non_negative else value > 0):
            rule = "at least 0" if name in non_negative else "above 0"
            raise UsageError(f"{option(name)} must be {rule}, got {value}.")
    if not 0 <= momentum(settings) < 1:
        raise UsageError(f"--momentum must be at least 0 and below 1, got {settings.momentum}.")
    with _as_options(settings.transformation):
        optimizer(settings)
    with _as_options(settings.init):
        initialization(settings).check()
    _validate_batches(settings)


def _validate_mesh(settings: SpectrumSettings) -> None:
    if settings.mesh is None:
        return
    if not re.fullmatch(r"data=[1-9][0-9]{0,5}", settings.mesh):
        raise UsageError(
            f"--mesh must be data=N, N the number of devices, such as data=8, got {settings.mesh}."
        )
    number, there_are = num_devices(settings), len(jax.local_devices())
    if number > there_are:
        on_cpu = jax.default_backend() == "cpu"
        remedy = f"; JAX_NUM_CPU_DEVICES={number} in the environment divides a CPU" * on_cpu
        raise UsageError(
            f"--mesh must have at most as many devices as there are, {there_are}, "
            f"got {settings.mesh}{remedy}."
        )
    examples = settings.curvature_examples
    if examples is not None and examples > 0 and examples % number:
        raise UsageError(
            f"--curvature-examples must be a multiple of the devices of --mesh, {number}, "
            f"got {examples}."
        )


@contextlib.contextmanager
def _as_options(method: str) -> Iterator[None]:
    """Turns errors of functions, which name their arguments, into errors of a method's options."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = re.sub(r"`(\w+)`", lambda match: option(f"{method}.{match[1]}"), str(error))
        raise UsageError(text) from None


def _validate_batches(settings: TrainSettings) -> None:
    """Checks that the normalization can divide the batches of training and of initialisation."""
    multiple = NORMALIZATIONS[settings.normalization].batch_multiple
    sizes = {"--batch-size over the number of shards": settings.batch_size // num_shards(settings)}
    for name, size in {**sizes, **initialization(settings).batch_sizes()}.items():
        if size % multiple:
            raise UsageError(
                f"{name} must be a multiple of {multiple} with --normalization "
                f"{settings.normalization}, got {size}."
            )
