"""The options of a run."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeVar

from regjax.experiments import (
    _architectures,
    _initializations,
    _normalization,
    _transformation,
    _transformations,
)
from regjax.experiments._architectures import ARCHITECTURES
from regjax.experiments._initializations import INITIALIZATIONS
from regjax.experiments._option_values import option_types as option_types
from regjax.experiments._option_values import replace as replace
from regjax.experiments._option_values import value_of as value_of
from regjax.experiments._options import UsageError, option
from regjax.experiments._transformations import TRANSFORMATIONS

Class = TypeVar("Class", bound=type)


def _with_options(cls: Class) -> Class:
    """Adds a field for the options of each method that has some: `sam: Sam = Sam()`."""
    for name, method in {**TRANSFORMATIONS, **INITIALIZATIONS}.items():
        if dataclasses.fields(method):
            cls.__annotations__[name] = method
            setattr(cls, name, method())
    return cls


@dataclasses.dataclass(frozen=True)
@_with_options
class TrainSettings:
    """Train a network on images and write a checkpoint.

    Example:
      >>> settings = experiments.TrainSettings(width=64, transformation="sam")
      >>> print(settings.epochs, settings.sam)
      30 Sam(rho=0.05, adaptive=False, eta=0.01, num_shards=1)
    """

    data: str = "digits"
    """digits, fashion_mnist, mnist, an image classification set of tensorflow-datasets, or a file
    of own arrays: PATH.npz with train_inputs, train_targets, test_inputs and test_targets."""

    data_dir: Path | None = None
    """Folder of the data. Default: the environment variable REGJAX_DATA, or the usual places."""

    num_train: int | None = None
    """Number of training examples, the first ones. Default: all."""

    num_test: int | None = None
    """Number of test examples, the first ones. Default: all."""

    model: _architectures.Name = "mlp"
    """Network architecture."""

    width: int | None = None
    """Units per hidden layer, or channels of the first convolution. Default: 64 (mlp) or 16."""

    depth: int | None = None
    """Number of hidden layers, convolutions, or residual blocks. Default: 2, or 4 (resnet)."""

    normalization: _normalization.Name = "none"
    """Normalization of each hidden layer."""

    init: _initializations.Name = "default"
    """Initialisation of the parameters. Its own options: --init NAME --help."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser."""

    learning_rate: float | None = None
    """Constant learning rate. Default: 0.05 (sgd), 0.001 (adam), or as the transformation says."""

    momentum: float | None = None
    """Momentum of sgd, at least 0 and below 1. Default: 0.9, or as the transformation says."""

    weight_decay: float = 0.0
    """Weight decay: L2 for sgd, decoupled for adam."""

    transformation: _transformations.Name = "plain"
    """Method that changes the gradient or the update. Its own options: --transformation NAME
    --help."""

    epochs: int = 30
    """Passes over the training examples, shuffled each time; 0 leaves the network untrained."""

    batch_size: int = 64
    """Examples per step. A smaller last batch of an epoch is left out."""

    seed: int = 0
    """Seed of the initial parameters, the shuffling and the random probes; below 2^32."""

    dtype: Literal["float32", "float64"] = "float32"
    """Floating-point type of the parameters, of training and of the curvature."""

    device_bytes: int = 2**30
    """Training images that take more bytes than this are streamed from the host's memory."""

    checkpoint_seconds: float = 5.0
    """Minimum seconds between checkpoints; 0 saves every epoch. The last is always saved."""

    monitor: str | None = None
    """Measure while the network trains, then print and draw it. One or several of loss, sharpness,
    preconditioned, critical, trace, noise and gradient_share, separated by commas."""

    monitor_every: int = 1
    """Epochs between two measurements."""

    monitor_examples: int = 512
    """Number of training examples to measure on, the first ones."""

    compare: tuple[str, ...] = ()
    """Settings to run side by side, such as sgd sam,rho=0.1 batch,seed=1. Each is a comma-separated
    list of OPTION=VALUE; a bare word is the value of the one option that has it."""

    seeds: int = 1
    """Train each network with this many seeds, from --seed on, and show means, standard deviations,
    and differences to the first network, taken seed by seed."""

    resume: bool = False
    """Continue from the checkpoint in --out."""

    overwrite: bool = False
    """Replace what another run has left in --out."""

    out: Path | None = None
    """Folder of the results, such as report.html. Default: one under runs/, or of --checkpoint."""

    cache_dir: str | None = None
    """Folder that keeps compiled programs for later runs; off: none. Default: ~/.cache/regjax."""


@dataclasses.dataclass(frozen=True)
class AnalysisSettings(TrainSettings):
    """Train a network on images, or read a checkpoint, and analyse it."""

    checkpoint: Path | None = None
    """Analyse this checkpoint, or the one in this folder, instead of training."""

    batch_norm_mode: Literal["evaluation", "train", "train_per_chunk"] = "evaluation"
    """Batch norm in the analysis. evaluation: running statistics; train: statistics of all
    examples; train_per_chunk: of each chunk."""

    chunk_size: int = 2048
    """Examples per pass of the analysis; fewer take less memory."""

    figure: Literal["png", "pdf", "svg"] = "png"
    """Format of the figures."""

    figure_width: Literal["page", "column"] = "page"
    """Width of the figures: 6.8 or 3.3 inches."""


@dataclasses.dataclass(frozen=True)
class SpectrumSettings(AnalysisSettings):
    """Train a network on images, then print and draw its curvature spectrum with error bounds.

    Example:
      >>> settings = experiments.SpectrumSettings(matrix="gauss_newton", num_eigenvalues=5)
      >>> print(settings.matrix, settings.num_eigenvalues, settings.num_probes)
      gauss_newton 5 2
    """

    matrix: Literal["hessian", "gauss_newton", "fisher", "empirical_fisher"] = "hessian"
    """Curvature matrix of the mean training loss."""

    num_samples: int | None = None
    """Labels drawn per example for the fisher matrix. Default: the exact expectation."""

    curvature_examples: int | None = None
    """Number of training examples in the matrix, the first ones. Default: all."""

    num_eigenvalues: int = 10
    """Number of largest eigenvalues to compute."""

    tol: float = 1e-3
    """Converged when residual norm / largest eigenvalue is below this; below 1."""

    num_probes: int = 2
    """Number of random probes of the density."""

    num_steps: int | None = None
    """Lanczos steps per probe. Default: 40 to 320, as many as the counts of eigenvalues need."""

    blocks: Literal["whole", "layers"] = "whole"
    """Spectrum of the whole network, or of each layer as well."""

    mesh: str | None = None
    """data=N divides the examples and the solver's vectors over N devices; the number of examples
    is rounded down to a multiple of N. Default: one device."""

    damping: float = 0.01
    """The c of the effective dimension: sum over eigenvalues l of max(l, 0) / (max(l, 0) + c)."""

    geometry: bool = False
    """Also measure geometric complexity, spherical sharpness and margins."""


@dataclasses.dataclass(frozen=True)
class LandscapeSettings(AnalysisSettings):
    """Train a network on images, then draw its loss surface, and loss and gradient along steps.

    Example:
      >>> settings = experiments.LandscapeSettings(points=21, directions="layer")
      >>> print(settings.points, settings.span)
      21 1.0
    """

    points: int = 51
    """Points along each of the two random directions; odd, so that the network is one of them."""

    span: float = 1.0
    """Largest distance along a direction, in units of the norm of each filter; at most 1000."""

    directions: Literal["filter", "layer"] = "filter"
    """Normalize the random directions per filter or per layer."""

    surface_examples: int | None = None
    """Number of training examples in the surface, the first ones. Default: all."""

    probe_examples: int | None = None
    """Number of training examples in the probes, the first ones. Default: the batch size."""

    probe_points: int = 8
    """Number of step sizes per probe, from 1/2 to 4 times the learning rate."""


# Options that say where and how a run works, and not what comes out.
INCIDENTAL = (
    *("monitor", "monitor_every", "monitor_examples", "data_dir", "device_bytes", "cache_dir"),
    *("checkpoint_seconds", "resume", "overwrite", "out", "checkpoint", "figure", "figure_width"),
)
# Options of several networks side by side.
COMPARISON = ("compare", "seeds")
_LEARNING_RATES = {"sgd": 0.05, "adam": 1e-3}
_MOMENTUM = 0.9


def transformation(settings: TrainSettings) -> _transformation.Transformation:
    """Returns the options of the transformation that is used."""
    name = settings.transformation
    return getattr(settings, name, TRANSFORMATIONS[name]())


def initialization(settings: TrainSettings) -> _initializations.Initialization:
    """Returns the options of the initialisation that is used."""
    return getattr(settings, settings.init, INITIALIZATIONS[settings.init]())


def width(settings: TrainSettings) -> int:
    """Returns the width, the model's usual one where none is given."""
    return ARCHITECTURES[settings.model].width if settings.width is None else settings.width


def depth(settings: TrainSettings) -> int:
    """Returns the depth, the model's usual one where none is given."""
    return ARCHITECTURES[settings.model].depth if settings.depth is None else settings.depth


def learning_rate(settings: TrainSettings) -> float:
    """Returns the learning rate, the usual one where none is given."""
    usual = transformation(settings).usual_learning_rate
    if settings.optimizer != "sgd" or usual is None:
        usual = _LEARNING_RATES[settings.optimizer]
    return usual if settings.learning_rate is None else settings.learning_rate


def momentum(settings: TrainSettings) -> float:
    """Returns the momentum of sgd, the usual one where none is given."""
    usual = transformation(settings).usual_momentum
    if settings.optimizer != "sgd" or usual is None:
        usual = _MOMENTUM
    return usual if settings.momentum is None else settings.momentum


def num_devices(settings: SpectrumSettings) -> int:
    """Returns the number of devices of the analysis, of settings that are valid."""
    return 1 if settings.mesh is None else int(settings.mesh.removeprefix("data="))


def num_shards(settings: TrainSettings) -> int:
    """Returns the number of shards of a batch."""
    return transformation(settings).count_shards()


def is_comparison(settings: TrainSettings) -> bool:
    """Tells whether more than one network is trained or analysed."""
    return bool(settings.compare) or settings.seeds > 1


def checkpoint_path(path: Path) -> Path:
    """Returns the checkpoint that a folder or a file name stands for."""
    return path / "checkpoint.npz" if path.is_dir() else path


def training_options(settings: TrainSettings) -> dict[str, Any]:
    """Returns the options that decide which network comes out, as JSON has them, none left out."""
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(TrainSettings)
        if field.name not in (*INCIDENTAL, *COMPARISON)
    }
    options = {name: value for name, value in values.items() if not dataclasses.is_dataclass(value)}
    usual = {
        "width": width(settings),
        "depth": depth(settings),
        "learning_rate": learning_rate(settings),
        "momentum": momentum(settings),
    }
    # Of the methods' own options only those of the ones that are used matter.
    own = {
        f"{name}.{field}": value
        for name in methods(settings)
        for field, value in dataclasses.asdict(values[name]).items()
    }
    return {**options, **usual, **own}


def methods(settings: TrainSettings) -> list[str]:
    """Returns the chosen methods that have options of their own."""
    return [name for name in (settings.transformation, settings.init) if hasattr(settings, name)]


def check_same_training(
    settings: TrainSettings, stored: dict[str, Any], *, path: Path, may_differ: tuple[str, ...] = ()
) -> None:
    """Checks that a checkpoint was trained with the options asked for.

    Raises:
      UsageError: an option differs from the stored one.
    """
    for name, value in training_options(settings).items():
        expected = stored.get(name, value)
        if name not in may_differ and value != expected:
            raise UsageError(
                f"{option(name)} must be {expected} as in the checkpoint {path}, got {value}."
            )
