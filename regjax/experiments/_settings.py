"""The options of a run."""

import dataclasses
import typing
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
from regjax.experiments._options import UsageError, option
from regjax.experiments._transformations import TRANSFORMATIONS

Class = TypeVar("Class", bound=type)
Settings = TypeVar("Settings", bound="TrainSettings")


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
    """Train a network on images and write a checkpoint."""

    data: str = "digits"
    """digits, fashion_mnist, mnist, or an image classification set of tensorflow-datasets."""

    data_dir: Path | None = None
    """Folder of the data. None: the environment variable REGJAX_DATA, or the usual places."""

    num_train: int | None = None
    """Number of training examples. None: all."""

    num_test: int | None = None
    """Number of test examples. None: all."""

    model: _architectures.Name = "mlp"
    """Network."""

    width: int | None = None
    """Units of a hidden layer, channels of the first convolution. None: 64 (mlp), 16."""

    depth: int | None = None
    """Hidden layers, convolutions, or blocks of a resnet. None: 2, of a resnet 4."""

    normalization: _normalization.Name = "none"
    """Normalization of each hidden layer."""

    init: _initializations.Name = "default"
    """What is done to the initial parameters; its own options are below."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser."""

    learning_rate: float | None = None
    """Constant learning rate. None: 0.05 (sgd), 0.001 (adam), or as the transformation says."""

    momentum: float | None = None
    """Momentum of sgd, at least 0 and below 1. None: 0.9, or as the transformation says."""

    weight_decay: float = 0.0
    """Multiple of the parameters added to the gradient (sgd) or the update (adam)."""

    transformation: _transformations.Name = "plain"
    """What changes where or how the gradient is taken; its own options are below."""

    epochs: int = 30
    """Passes over the training examples, in an order drawn anew each time; 0: none."""

    batch_size: int = 64
    """Examples per step. The smaller last batch of an epoch is left out."""

    seed: int = 0
    """Seed of the initial parameters, of the order of the examples and of the probes."""

    dtype: Literal["float32", "float64"] = "float32"
    """Type of the parameters, of training and of the curvature."""

    device_bytes: int = 2**30
    """Training images of more bytes than this are streamed from the host."""

    checkpoint_seconds: float = 5.0
    """Least time between two checkpoints; 0: one each epoch. The last is always written."""

    resume: bool = False
    """Go on from the checkpoint in --out."""

    overwrite: bool = False
    """Replace what another run has left in --out."""

    out: Path | None = None
    """Folder of the results. None: one under runs/ named after the options, or that of
    --checkpoint."""


@dataclasses.dataclass(frozen=True)
class AnalysisSettings(TrainSettings):
    """Train a network on images, or read a checkpoint, and analyse it."""

    compare: tuple[str, ...] = ()
    """Settings to run side by side, such as: sgd sam entropy_sgd, or sam,rho=0.1 batch."""

    checkpoint: Path | None = None
    """Analyse this checkpoint, or the one in this folder, with its training options."""

    batch_norm_mode: Literal["evaluation", "train", "train_per_chunk"] = "evaluation"
    """Batch statistics in the analysis: the stored ones, of all examples, or of each chunk."""

    chunk_size: int = 2048
    """Examples per pass. More of them are gone over in chunks, in bounded memory."""


@dataclasses.dataclass(frozen=True)
class SpectrumSettings(AnalysisSettings):
    """Train a network on images, then print and draw its curvature spectrum with error bounds."""

    matrix: Literal["hessian", "gauss_newton", "fisher", "empirical_fisher"] = "hessian"
    """Curvature matrix of the mean training loss."""

    num_samples: int | None = None
    """Labels drawn per example for the fisher matrix. None: the exact expectation."""

    curvature_examples: int | None = None
    """Number of training examples in the matrix, the first ones. None: all."""

    num_eigenvalues: int = 10
    """Number of largest eigenvalues."""

    tol: float = 1e-3
    """An eigenvalue's residual norm relative to the largest eigenvalue, when converged."""

    num_probes: int = 2
    """Random probes of the density."""

    num_steps: int = 40
    """Lanczos steps of a probe; twice as many first take out extreme eigenvalues."""

    blocks: Literal["whole", "layers"] = "whole"
    """The whole network, or each layer as well."""

    mesh: str | None = None
    """data=N divides the examples of the matrix, and the vectors that the solvers keep, over N
    devices; of all the training examples it takes the largest multiple of N. None: one device."""

    damping: float = 0.01
    """The c of the effective dimension: sum over eigenvalues l of max(l, 0) / (max(l, 0) + c)."""

    report: bool = False
    """Geometric complexity, spherical sharpness and margins of the network as well."""


@dataclasses.dataclass(frozen=True)
class LandscapeSettings(AnalysisSettings):
    """Train a network on images, then draw its loss surface and the probes along its steps."""

    points: int = 51
    """Points along each of the two random directions; odd, so that the minimum is one of them."""

    span: float = 1.0
    """Largest distance along a direction, in units of the norm of each filter."""

    directions: Literal["filter", "layer"] = "filter"
    """What is as long in a direction as in the parameters: each filter, or each layer."""

    surface_examples: int | None = None
    """Number of training examples in the surface, the first ones. None: all."""

    probe_examples: int | None = None
    """Number of training examples of the probes, the first ones. None: the batch size."""

    probe_points: int = 8
    """Step sizes of a probe, from 1/2 to 4 times the learning rate."""


# Options that say where and how a run works, and not what comes out.
INCIDENTAL = (
    "data_dir",
    "device_bytes",
    "checkpoint_seconds",
    "resume",
    "overwrite",
    "out",
    "checkpoint",
)
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


def option_types(settings_type: type) -> dict[str, Any]:
    """Returns the type of each option by name; "sam.rho" is `rho` of the field `sam`."""
    types: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(settings_type).items():
        if dataclasses.is_dataclass(hint):
            own = typing.get_type_hints(hint)
            types |= {f"{name}.{f.name}": own[f.name] for f in dataclasses.fields(hint)}
        else:
            types[name] = hint
    return types


def training_options(settings: TrainSettings) -> dict[str, Any]:
    """Returns the options that decide which network comes out, as JSON has them, none left out."""
    values = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(TrainSettings)
        if field.name not in INCIDENTAL
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


def replace(settings: Settings, changes: dict[str, Any]) -> Settings:
    """Returns `settings` with other values; "sam.rho" is `rho` of the field `sam`."""
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        new = dataclasses.replace(getattr(settings, outer), **{inner: value}) if inner else value
        settings = dataclasses.replace(settings, **{outer: new})
    return settings


def with_training_options(settings: Settings, stored: dict[str, Any]) -> Settings:
    """Returns `settings` with the options of a checkpoint, as `read_run` has checked them."""
    return replace(settings, stored)


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
