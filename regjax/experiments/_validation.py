"""What can be said about the options without data."""

import re

from regjax.experiments._optimizer import optimizer
from regjax.experiments._settings import (
    SpectrumSettings,
    TrainSettings,
    UsageError,
    momentum,
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
        positive += ["chunk_size", "effective_dimension_scale"]
        non_negative += ["tolerance", "fisher_samples"]
    for name in [*positive, "learning_rate", *non_negative]:
        value = getattr(settings, name)
        # NaN is neither.
        if value is not None and not (value >= 0 if name in non_negative else value > 0):
            rule = "at least 0" if name in non_negative else "above 0"
            raise UsageError(f"{option(name)} must be {rule}, got {value}.")
    if not 0 <= momentum(settings) < 1:
        raise UsageError(f"--momentum must be at least 0 and below 1, got {settings.momentum}.")
    _validate_transformation(settings)


def _validate_transformation(settings: TrainSettings) -> None:
    name = settings.transformation
    if name == "rescale_weights":
        if settings.normalization == "none":
            raise UsageError(
                "--transformation rescale_weights must have a --normalization other than none."
            )
        if settings.normalization != "batch" and settings.rescale_weights.per_filter:
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
