"""What can be said about the options without data."""

import contextlib
import dataclasses
import importlib.util
import re
import typing
from collections.abc import Iterator
from typing import Any

import jax

from regjax import _platforms
from regjax.experiments._architectures import ARCHITECTURES
from regjax.experiments._initializations import INITIALIZATIONS
from regjax.experiments._monitoring import check_measures
from regjax.experiments._normalization import NORMALIZATIONS
from regjax.experiments._optimizer import optimizer
from regjax.experiments._options import UsageError, choices, did_you_mean, kind, option
from regjax.experiments._ranges import LARGEST, LARGEST_INTEGER, NUMBER, RANGES, Range
from regjax.experiments._settings import (
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    depth,
    initialization,
    num_devices,
    num_shards,
    option_types,
    transformation,
    value_of,
)
from regjax.experiments._transformations import TRANSFORMATIONS

# What a run draws figures and writes pages with, at its end.
_PACKAGES = ("matplotlib", "jinja2")


def validate(settings: TrainSettings) -> None:
    """Checks all that can be said without data.

    Raises:
      TypeError: `settings` are none.
      UsageError: an option is of another type or out of its range, or does not fit another.
    """
    if not isinstance(settings, TrainSettings):
        raise TypeError(f"`settings` must be of a kind of TrainSettings, got {settings!r}.")
    types = option_types(type(settings))
    for name in [name for name in types if "." not in name]:
        _validate_value(name, value_of(settings, name), types[name], RANGES.get(name, NUMBER))
    for name, cls in {**TRANSFORMATIONS, **INITIALIZATIONS}.items():
        if not isinstance(getattr(settings, name, cls()), cls):
            raise UsageError(f"`{name}` must be {cls()}, got {getattr(settings, name)!r}.")
    for method in (transformation(settings), initialization(settings)):
        for field in dataclasses.fields(method):
            name, most = f"{method.name()}.{field.name}", method.most.get(field.name)
            is_float = float in {types[name], *typing.get_args(types[name])}
            largest = LARGEST if is_float else LARGEST_INTEGER
            limits = Range(-LARGEST, largest if most is None else most)
            _validate_value(name, getattr(method, field.name), types[name], limits)
    _validate_sizes(settings)
    with as_options(settings.transformation):
        optimizer(settings)
    with as_options(settings.init):
        initialization(settings).check()
    _validate_batches(settings)


def validate_run(settings: TrainSettings, kind: type[TrainSettings], progress: object) -> None:
    """Checks the arguments of a run: options of its kind, all valid, and a function.

    Raises:
      TypeError: an argument is of another type.
      UsageError: as `validate`, or a package is not installed that figures and pages need.
    """
    if not isinstance(settings, kind):
        raise TypeError(f"`settings` must be {kind.__name__}, got {type(settings).__name__}.")
    if not callable(progress):
        raise TypeError(f"`progress` must be callable, got {progress!r}.")
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"A run needs {name}: pip install 'regjax[run]'.")
    validate(settings)


def _validate_value(name: str, value: Any, hint: Any, limits: Range) -> None:
    """Checks the type of a value, that it is one of the choices, and the range of a number."""
    if not _is_of(value, hint):
        hint_text = did_you_mean(value, choices(hint)) if isinstance(value, str) else ""
        raise UsageError(f"{option(name)} must be {kind(hint)}, got {value!r}{hint_text}.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        rule = limits.broken_rule(value)
        if rule is not None:
            raise UsageError(f"{option(name)} must be {rule}, got {value}.")


def _is_of(value: Any, hint: Any) -> bool:
    """Tells whether `value` is of the type of an option; an integer is a number too, True none."""
    parts = typing.get_args(hint)
    if choices(hint):
        return isinstance(value, str) and value in choices(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if parts:
        return any(_is_of(value, part) for part in parts)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)


def _validate_sizes(settings: TrainSettings) -> None:
    """Checks what the range of a number alone does not say."""
    least = ARCHITECTURES[settings.model].least_depth
    if depth(settings) < least:
        raise UsageError(
            f"--depth must be at least {least} with --model {settings.model}, got {settings.depth}."
        )
    check_measures(settings)
    if not settings.data:
        raise UsageError("--data must name a data set or a file, got ''.")
    if isinstance(settings, SpectrumSettings):
        _validate_mesh(settings)
    if isinstance(settings, LandscapeSettings) and settings.points % 2 == 0:
        raise UsageError(f"--points must be odd, got {settings.points}.")


def _validate_mesh(settings: SpectrumSettings) -> None:
    if settings.mesh is None:
        return
    if not re.fullmatch(r"data=[1-9][0-9]{0,5}", settings.mesh):
        raise UsageError(
            f"--mesh must be data=N, N the number of devices, such as data=8, got {settings.mesh}."
        )
    number, there_are = num_devices(settings), len(jax.local_devices())
    if number > there_are:
        on_cpu = _platforms.default_platform() == _platforms.CPU
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
def as_options(method: str) -> Iterator[None]:
    """Turns errors of functions, which name their arguments, into errors of a method's options."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kinds = {**TRANSFORMATIONS, **INITIALIZATIONS}
        fields = [field.name for field in dataclasses.fields(kinds[method])]
        text = re.sub(
            r"`(\w+)`",
            lambda match: option(f"{method}.{match[1]}") if match[1] in fields else match[0],
            str(error),
        )
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
