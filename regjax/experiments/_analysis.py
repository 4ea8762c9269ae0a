"""The curvature matrix that the options ask for, and what is computed of it, stage by stage."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from regjax import curvature
from regjax._adapters import Model, model_function, model_loss
from regjax._base import Progress
from regjax._loops import Interrupted
from regjax._losses import assume_separable
from regjax._separable import check_separable
from regjax.experiments._data import Dataset
from regjax.experiments._inputs import Scaling, cross_entropy, normalize
from regjax.experiments._options import UsageError
from regjax.experiments._record import Record
from regjax.experiments._settings import AnalysisSettings, SpectrumSettings, num_devices

# Enough examples to tell a mean from anything else.
_SEPARABLE_EXAMPLES = 512
# Eigenvalues from which on it is said how long they take.
_MANY = 50
# Shares of the largest eigenvalue that part outliers from the bulk, and the bulk from zero.
_OUTLIER, _ZERO = 0.1, 1e-3


class Subject(NamedTuple):
    """What is analysed: a trained model, its data and the scaling of its inputs."""

    model: Model
    dataset: Dataset
    scaling: Scaling


def operators(subject: Subject, settings: SpectrumSettings) -> dict[str, curvature.Operator]:
    """Makes the matrix of the options: {"network": ...}, and its layers if they are asked for.

    Raises:
      UsageError: an option does not fit the model or the data, or the loss is no mean over
        independent examples.
    """
    model = subject.model
    inputs, targets = training_examples(subject, settings, "curvature_examples")
    check_examples(model, settings, inputs, targets)
    inputs, targets = _on_mesh(settings, inputs, targets)
    whole = _operator(model, settings, inputs, targets)
    layers = curvature.by_block(whole) if settings.blocks == "layers" else {}
    return {"network": whole, **{name: layers[name] for name in sorted(layers, key=_place)}}


def _place(name: str) -> tuple[int, str, int]:
    """Sorts layers as the examples go through them: a stem, those with numbers, the head."""
    stem, _, number = name.rpartition("_")
    ends = {"stem": -1, "head": 1}
    return ends.get(name, 0), stem, int(number) if number.isdecimal() else 0


def _on_mesh(
    settings: SpectrumSettings, inputs: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Divides the examples over the devices of the options, as many as divide evenly."""
    number = num_devices(settings)
    if number == 1:
        return inputs, targets
    num_examples = len(targets) - len(targets) % number
    devices = jax.local_devices()[:number]
    mesh = jax.make_mesh((number,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    divided = NamedSharding(mesh, PartitionSpec("data"))
    return jax.device_put((inputs[:num_examples], targets[:num_examples]), divided)


def training_examples(
    subject: Subject, settings: AnalysisSettings, name: str
) -> tuple[jax.Array, jax.Array]:
    """Returns the first training examples, as many as the option `name` says; all for None."""
    _, dataset, scaling = subject
    count = getattr(settings, name)
    inputs = normalize(jnp.asarray(dataset.train_inputs[:count]), scaling)
    return inputs, jnp.asarray(dataset.train_targets[:count])


def analyse(
    operator: curvature.Operator,
    settings: SpectrumSettings,
    record: Record,
    *,
    key: jax.Array,
    save: Callable[[], None],
    progress: Callable[[str, int, int | None], None],
) -> None:
    """Computes the largest eigenvalues, then the density and what follows from it.

    Args:
      operator: the matrix.
      settings: how many, how exact.
      record: gains an entry for each stage.
      key: typed key of the random starts.
      save: called after each stage, after an interrupted one too.
      progress: called as progress(stage, products, total or None).

    Raises:
      Interrupted: Ctrl-C; the partial result is in the record.
    """
    size = operator.shape[0]
    record["num_parameters"] = size
    eigen_key, density_key = jax.random.split(key)
    result = _stage(
        functools.partial(
            curvature.top_eigenpairs,
            operator,
            min(settings.num_eigenvalues, size),
            key=eigen_key,
            tol=settings.tol,
            callback=_Estimated(min(settings.num_eigenvalues, size), progress),
        ),
        _describe_eigenvalues,
        functools.partial(_keep, record, "eigenvalues", save),
    )
    _stage(
        functools.partial(
            curvature.spectral_density,
            operator,
            key=density_key,
            num_steps=None if settings.num_steps is None else min(settings.num_steps, size),
            num_probes=settings.num_probes,
            callback=lambda done, total, _: progress("density", done, total),
        ),
        functools.partial(
            _describe_density,
            largest=abs(float(np.asarray(result.values)[0])),
            damping=settings.damping,
        ),
        functools.partial(_keep, record, "density", save),
    )


class _Estimated:
    """Reports the products of eigenvalues; of many, after a first one, how long they will take.

    Args:
      least: the least number of products, one for each eigenvalue.
      progress: called as progress(stage, products, limit).
    """

    def __init__(self, least: int, progress: Callable[[str, int, int | None], None]):
        self._least, self._progress, self._stage = least, progress, "eigenvalues"
        self._first: float | None = None

    def __call__(self, done: int, limit: int, _: Progress) -> None:
        """Reports that `done` products are over, `limit` at the most."""
        now = time.monotonic()
        if done == 2 and self._first is not None and self._least >= _MANY:
            low, high = (_duration(number * (now - self._first)) for number in (self._least, limit))
            self._stage = f"eigenvalues ({self._least} products, {low}, at least; at most {high})"
        self._first = now
        self._progress(self._stage, done, limit)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"


def _stage(
    compute: Callable[[], Any],
    describe: Callable[[Any], Record],
    keep: Callable[[Record], None],
) -> Any:
    start = time.monotonic()
    try:
        result = jax.block_until_ready(compute())
    except Interrupted as interrupted:
        keep({**describe(interrupted.result), "interrupted": True})
        raise
    keep({**describe(result), "seconds": time.monotonic() - start})
    return result


def _keep(record: Record, name: str, save: Callable[[], None], entry: Record) -> None:
    record[name] = entry
    save()


def _describe_eigenvalues(result: curvature.EigenResult) -> Record:
    return {
        "values": result.values.tolist(),
        "residual_norms": result.residual_norms.tolist(),
        "converged": result.converged.tolist(),
        "complete": bool(result.complete),
        "miss_probability": float(result.miss_probability),
        "num_matvecs": int(result.num_matvecs),
    }


def _describe_density(
    density: curvature.DensityResult, *, largest: float, damping: float
) -> Record:
    # On the host: each operation on an array outside of a program is a program itself.
    density = jax.device_get(density)
    num_taken, num_steps = int(density.num_eigenvalues), density.num_steps
    finished = bool(np.any(num_steps))
    outlier, zero = _OUTLIER * largest, _ZERO * largest
    intervals = {
        "outliers": (outlier, np.inf),
        "bulk": (zero, outlier),
        "near_zero": (-zero, zero),
        "negative": (-np.inf, -zero),
    }
    # Of an interrupted run without a finished probe there is neither.
    counts, curve = dict.fromkeys(intervals), None
    if finished:
        found = curvature.eigenvalue_count(density, *np.transpose(list(intervals.values())))
        rows = zip(*(array.tolist() for array in found), strict=True)
        counts = {
            name: dict(zip(found._fields, row, strict=True))
            for name, row in zip(intervals, rows, strict=True)
        }
        arrays = curvature.density_curve(density, axis_scale="symlog")._asdict()
        curve = {name: array.tolist() for name, array in arrays.items()}
    ritz_values = np.concatenate([np.ravel(density.nodes), density.eigenvalues[:num_taken]])
    made = slice(max(int(np.max(num_steps)), 1))
    return {
        "nodes": density.nodes[:, made].tolist(),
        "weights": density.weights[:, made].tolist(),
        "num_steps": num_steps.tolist(),
        "eigenvalues": density.eigenvalues[:num_taken].tolist(),
        "residual_norms": density.residual_norms[:num_taken].tolist(),
        "num_matvecs": int(density.num_matvecs),
        "trace": {
            "value": float(density.trace),
            "standard_error": float(density.trace_standard_error),
        },
        "smallest_ritz_value": float(np.min(ritz_values)),
        "effective_dimension": {
            "damping": damping,
            **_estimate(curvature.effective_dimension(density, damping=damping)),
        },
        "counts": {
            "outlier_threshold": outlier,
            "zero_threshold": zero,
            **counts,
        },
        "curve": curve,
    }


def _estimate(total: curvature.SpectralSumResult) -> Record:
    return {"value": float(total.value), "standard_error": float(total.standard_error)}


def _operator(
    model: Model, settings: SpectrumSettings, inputs: jax.Array, targets: jax.Array
) -> curvature.Operator:
    mode = settings.batch_norm_mode
    # A whole batch keeps its linearisation.
    own = len(targets) // num_devices(settings)
    chunk_size = settings.chunk_size if settings.chunk_size < own else None
    # `check_examples` tests it.
    declared = assume_separable if mode == "evaluation" else lambda function: function
    params, model_fn = model.params, declared(model_function(model, mode=mode))
    key = None if settings.num_samples is None else jax.random.key(settings.seed)
    matrices = {
        "hessian": lambda: curvature.hessian(
            declared(model_loss(model, cross_entropy, mode=mode)),
            params, inputs, targets, chunk_size=chunk_size,
        ),
        "gauss_newton": lambda: curvature.gauss_newton(
            model_fn, cross_entropy, params, inputs, targets, chunk_size=chunk_size
        ),
        "fisher": lambda: curvature.fisher(
            model_fn, params, inputs,
            key=key, num_samples=settings.num_samples, chunk_size=chunk_size,
        ),
        "empirical_fisher": lambda: curvature.empirical_fisher(
            model_fn, cross_entropy, params, inputs, targets, chunk_size=chunk_size
        ),
    }  # fmt: skip
    return matrices[settings.matrix]()


def check_examples(
    model: Model, settings: AnalysisSettings, inputs: jax.Array, targets: jax.Array
) -> None:
    """Checks that nothing but batch norm in a train mode couples the examples.

    Raises:
      UsageError: something else does.
    """
    mode = settings.batch_norm_mode
    if mode != "evaluation" and model.has_batch_statistics:
        return
    some = slice(min(_SEPARABLE_EXAMPLES, len(targets)))
    try:
        loss = model_loss(model, cross_entropy, mode=mode)
        check_separable(loss, model.params, inputs[some], targets[some])
    except ValueError as error:
        raise UsageError(f"The loss must be a mean over the examples: {error}") from None
