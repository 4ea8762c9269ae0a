"""What can be said about the options without data."""

import re

import jax

from regjax.experiments._initialization import FILTER_FREE, GHOST_SIZE, KERNEL_FREE
from regjax.experiments._optimizer import optimizer
from regjax.experiments._settings import (
    AnalysisSettings,
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    UsageError,
    momentum,
    num_devices,
    num_shards,
    option,
)


def validate(settings: TrainSettings) -> None:
    """Checks all that can be said without data.

    Raises:
      UsageError: an option is out of its range.
    """
    positive = ["width", "depth", "num_train", "num_test", "batch_size", "device_bytes"]
    non_negative = ["epochs", "seed", "weight_decay", "checkpoint_seconds"]
    if settings.model == "mlp":
        positive.remove("depth")
        non_negative.append("depth")
    if isinstance(settings, SpectrumSettings):
        positive += ["curvature_examples", "num_eigenvalues", "num_probes", "num_steps"]
        positive += ["effective_dimension_scale"]
        non_negative += ["tolerance", "fisher_samples"]
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
    _validate_transformation(settings)
    _validate_initialization(settings)
    if settings.normalization == "ghost":
        _validate_ghosts(settings)


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


def _validate_transformation(settings: TrainSettings) -> None:
    name = settings.transformation
    if name == "rescale_weights":
        if settings.normalization not in KERNEL_FREE:
            raise UsageError(
                "--transformation rescale_weights must have a --normalization that divides the "
                f"scale out, {', '.join(KERNEL_FREE)}, got {settings.normalization}."
            )
        if settings.normalization not in FILTER_FREE and settings.rescale_weights.per_filter:
            raise UsageError(
                "--rescale-weights.per-filter must be off with --normalization "
                f"{settings.normalization}, which makes only whole kernels scale-invariant."
            )
    shards = num_shards(settings)
    if settings.batch_size % shards:
        raise UsageError(
            f"--sam.num-shards must divide the batch size, {settings.batch_size}, got {shards}."
        )
    try:
        optimizer(settings)
    except (TypeError, ValueError) as error:
        # The functions name their arguments; here these are options.
        prefix = option(name)
        raise UsageError(
            re.sub(r"`(\w+)`", lambda m: f"{prefix}.{m[1].replace('_', '-')}", str(error))
        ) from None


def _validate_initialization(settings: TrainSettings) -> None:
    rules: dict[str, dict[str, tuple[str, ...]]] = {
        "data_dependent": {"above 0": ("std", "num_examples"), "at least 0": ("epsilon",)},
        "gradinit": {
            "above 0": ("num_iterations", "half_batch", "first_step_learning_rate"),
            "at least 0": ("gradient_norm_bound", "learning_rate", "clip"),
        },
    }
    for rule, names in rules.get(settings.init, {}).items():
        for name in names:
            value = getattr(getattr(settings, settings.init), name)
            if not (value > 0 if rule == "above 0" else value >= 0):
                full = option(f"{settings.init}.{name}")
                raise UsageError(f"{full} must be {rule}, got {value}.")


def _validate_ghosts(settings: TrainSettings) -> None:
    sizes = {"--batch-size over the number of shards": settings.batch_size // num_shards(settings)}
    if settings.init == "data_dependent":
        sizes["--data-dependent.num-examples"] = settings.data_dependent.num_examples
    if settings.init == "gradinit":
        sizes["--gradinit.half-batch"] = settings.gradinit.half_batch
    for name, size in sizes.items():
        if size % GHOST_SIZE:
            raise UsageError(
                f"{name} must be a multiple of {GHOST_SIZE} with --normalization ghost, got {size}."
            )
