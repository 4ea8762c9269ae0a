"""What the data and the shapes of the network say about the options, before anything is trained."""

from regjax.experiments._dataset import Dataset
from regjax.experiments._memory import check_memory, num_parameters
from regjax.experiments._network import model_shapes
from regjax.experiments._normalization import NORMALIZATIONS
from regjax.experiments._options import UsageError, option
from regjax.experiments._settings import (
    AnalysisSettings,
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    initialization,
    num_devices,
)


def check_fit(settings: TrainSettings, dataset: Dataset) -> None:
    """Checks that the options fit the data and the network, and the network the memory.

    Args:
      settings: options that are valid by themselves.
      dataset: the examples.

    Raises:
      UsageError: they do not.
    """
    num_examples = len(dataset.train_targets)
    for name, number in _counts(settings).items():
        _check_at_most(name, number, num_examples, "number of training examples")
    if isinstance(settings, AnalysisSettings):
        _check_mode(settings, num_examples)
    model = model_shapes(settings, dataset)
    if isinstance(settings, SpectrumSettings):
        for name in ("num_eigenvalues", "num_steps"):
            value, size = getattr(settings, name), num_parameters(model)
            # The usual number is lowered for a small network.
            if value != getattr(SpectrumSettings(), name):
                _check_at_most(option(name), value, size, "number of parameters")
    check_memory(settings, dataset, model)


def _counts(settings: TrainSettings) -> dict[str, int | None]:
    """Returns the numbers of training examples that are taken at once, by option."""
    counts = {"--batch-size": settings.batch_size, **initialization(settings).num_examples_taken()}
    names: tuple[str, ...] = ()
    if isinstance(settings, SpectrumSettings):
        names = ("curvature_examples",)
        counts["--mesh"] = num_devices(settings)
    elif isinstance(settings, LandscapeSettings):
        names = ("surface_examples", "probe_examples")
    return {**counts, **{option(name): getattr(settings, name) for name in names}}


def _check_at_most(name: str, value: int | None, limit: int, what: str) -> None:
    if value is not None and value > limit:
        raise UsageError(f"{name} must be at most the {what}, {limit}, got {value}.")


def _check_mode(settings: AnalysisSettings, num_examples: int) -> None:
    """Checks that examples which batch norm couples are not divided."""
    if settings.batch_norm_mode != "train":
        return
    if not NORMALIZATIONS[settings.normalization].has_batch_statistics:
        return
    taken = num_examples
    if isinstance(settings, SpectrumSettings):
        taken = settings.curvature_examples or num_examples
    elif isinstance(settings, LandscapeSettings):
        taken = settings.surface_examples or num_examples
    if settings.chunk_size < taken:
        raise UsageError(
            f"--chunk-size must be at least the number of examples, {taken}, with "
            f"--batch-norm-mode train, got {settings.chunk_size}; or use train_per_chunk."
        )
