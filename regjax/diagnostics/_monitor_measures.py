"""What a `Monitor` can measure, each as numbers by name."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax import _checks, _jaxprs, _numerics, curvature
from regjax._base import Batch, LossFn, Params, PRNGKey, ScalarOrSchedule, Tree
from regjax._finite import without_error
from regjax._losses import whole
from regjax._nnx import plain
from regjax._printing import legible
from regjax.diagnostics._alignment import gradient_share
from regjax.diagnostics._critical_sharpness import CriticalSharpnessResult, critical_sharpness
from regjax.diagnostics._edge_of_stability import stability_threshold
from regjax.diagnostics._gradient_noise import NoiseScaleResult, gradient_noise
from regjax.diagnostics._optimizers import Hyperparams, optimizer_of
from regjax.diagnostics._preconditioner import preconditioner, stated_numbers

# Products of a search for an eigenpair at most; beyond, the row says that it has not converged.
_MAX_MATVECS = 50
_NUM_PROBES = 10
# Where a search for the critical rate begins if no rate is known.
_TRIAL_RATE = 0.1


@legible
class MonitorPoint(NamedTuple):
    """The state of training when a row is made, which a measure of your own gets as its argument.

    Attributes:
      step: number of the step.
      loss_fn: (params, *batch) -> scalar, a pytree.
      params: tree of the parameters.
      optimizer_state: state of optax, or None.
      batch: the data of the monitor.
      key: typed key of this row.
    """

    step: int
    loss_fn: LossFn
    params: Params
    optimizer_state: Tree
    batch: Batch
    key: PRNGKey


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a monitor that measures read."""

    key: PRNGKey
    k: int
    tol: ArrayLike
    search: bool
    batch_size: int | None
    chunk_size: int | None
    optimizer: str | None
    hyperparams: Hyperparams | None
    learning_rate: ScalarOrSchedule | None
    tx: optax.GradientTransformationExtraArgs | None


class Look:
    """A point, the options, and what several measures share."""

    def __init__(self, point: MonitorPoint, options: Options, starts: dict[str, Tree]) -> None:
        self.point, self.options, self.starts = point, options, starts

    @functools.cached_property
    def compiles(self) -> bool:
        """Whether a measure is one program: not where loops with convolutions are slow."""
        return _compiles(self.point.loss_fn, self.point.params, self.point.batch)

    @functools.cached_property
    def loss_and_gradient(self) -> tuple[jax.Array, Params]:
        """The loss of the monitor's data and its gradient."""
        return _loss_and_gradient(self.point.loss_fn, self.point.params, self.point.batch)

    @functools.cached_property
    def top(self) -> curvature.EigenResult:
        """The leading eigenpairs of the Hessian."""
        return self.leading("hessian", None)

    def leading(self, name: str, diagonal: Params | None) -> curvature.EigenResult:
        """The leading eigenpairs of D H D, sought from those of the last row."""
        point, options = self.point, self.options
        if name not in self.starts:
            draw = lambda leaf: jax.random.normal(point.key, (options.k, *leaf.shape), leaf.dtype)
            self.starts[name] = jax.tree.map(draw, point.params)
        found = _either(self.compiles, _leading, ("k", "search", "chunk_size"))(
            point.loss_fn, point.params, point.batch, diagonal, self.starts[name], point.key,
            options.tol,
            k=options.k, search=options.search, chunk_size=options.chunk_size,
        )  # fmt: skip
        # What is not finite would be no start for the next one.
        if jnp.isfinite(found.values).all():
            self.starts[name] = found.vectors
        return found

    @functools.cached_property
    def learning_rate(self) -> ArrayLike | None:
        """That of the last update; None where nobody knows it."""
        rate = self.options.learning_rate
        if callable(rate):
            return rate(jnp.int32(max(self.point.step - 1, 0)))
        if rate is None and self.options.optimizer is not None:
            return stated_numbers(self.point.optimizer_state, self.options.optimizer).get(
                "learning_rate"
            )
        return rate

    @functools.cached_property
    def threshold(self) -> ArrayLike:
        """The largest stable eigenvalue of the optimiser; NaN where nobody knows it."""
        options, rate = self.options, self.learning_rate
        if options.optimizer is None or rate is None:
            return math.nan
        found = {
            **stated_numbers(self.point.optimizer_state, options.optimizer),
            **(options.hyperparams or {}),
        }
        found.pop("learning_rate", None)
        return stability_threshold(
            optimizer=options.optimizer, learning_rate=rate, hyperparams=found
        )


Measure: TypeAlias = Callable[[Look], Mapping[str, Any]]


def _loss(look: Look) -> Mapping[str, Any]:
    loss, gradient = look.loss_and_gradient
    return {"loss": loss, "gradient_norm": _numerics.scaled_norm(gradient)}


def _sharpness(look: Look) -> Mapping[str, Any]:
    top = look.top
    others = {f"eigenvalue_{i + 1}": value for i, value in enumerate(top.values) if i > 0}
    name = look.options.optimizer
    if name is not None and optimizer_of(name).root is None:
        others["stability_threshold"] = look.threshold
    return {
        "sharpness": top.values[0],
        "sharpness_error_bound": top.residual_norms[0],
        "sharpness_converged": _is_sound(top, look.options),
        "sharpness_num_matvecs": top.num_matvecs,
        **others,
    }


def _preconditioned(look: Look) -> Mapping[str, Any]:
    point, options = look.point, look.options
    assert options.optimizer is not None
    row: dict[str, ArrayLike] = dict.fromkeys(("", "_error_bound", "_floor_mass"), math.nan)
    row |= {"_converged": 0.0, "_num_matvecs": 0.0}
    if _has_updated(point.optimizer_state):
        found = preconditioner(
            point.optimizer_state, point.params, optimizer=options.optimizer,
            hyperparams=options.hyperparams,
        )  # fmt: skip
        top = look.leading("preconditioned", found.inverse_root)
        row = {
            "": top.values[0],
            "_error_bound": top.residual_norms[0],
            "_converged": _is_sound(top, options),
            "_num_matvecs": top.num_matvecs,
            "_floor_mass": _mass(top.vectors, found.at_floor),
        }
    named = {f"preconditioned_sharpness{name}": value for name, value in row.items()}
    return {**named, "preconditioned_threshold": look.threshold}


def _critical(look: Look) -> Mapping[str, Any]:
    point, options, rate = look.point, look.options, look.learning_rate
    gradient = look.loss_and_gradient[1]
    rate = _TRIAL_RATE if rate is None else rate
    if options.tx is None:
        updates = jax.tree.map(lambda leaf: -jnp.asarray(rate, leaf.dtype) * leaf, gradient)
    else:
        grad_fn = lambda params, i: _loss_and_gradient(point.loss_fn, params, point.batch)[1]
        updates, _ = options.tx.update(
            gradient, point.optimizer_state, point.params, grad_fn=grad_fn
        )
    found = _either(look.compiles, _critical_of, ("chunk_size",))(
        point.loss_fn, point.params, updates, point.batch, jnp.asarray(rate),
        chunk_size=options.chunk_size,
    )  # fmt: skip
    return {
        "critical_sharpness": found.value,
        "critical_sharpness_lower_bound": found.lower_bound,
        "critical_sharpness_upper_bound": found.upper_bound,
        "critical_sharpness_resolved": found.resolved,
        "critical_sharpness_num_evaluations": found.num_evaluations,
    }


def _trace(look: Look) -> Mapping[str, Any]:
    point = look.point
    found = _either(look.compiles, _traced, ("chunk_size",))(
        point.loss_fn, point.params, point.batch, point.key, chunk_size=look.options.chunk_size
    )
    return {"trace": found.value, "trace_standard_error": found.standard_error}


def _noise(look: Look) -> Mapping[str, Any]:
    point, batch_size = look.point, look.options.batch_size
    if batch_size is None:
        batch_size = _divisor(_checks.num_examples(point.batch))
    arguments = (point.loss_fn, point.params, point.batch)
    if look.compiles and "noise" not in look.starts:
        _noise_of(*arguments, batch_size=batch_size)  # tests the loss, as only the host can
        look.starts["noise"] = None
    found = _either(look.compiles, _noise_of, ("batch_size",))(*arguments, batch_size=batch_size)
    row = found._asdict()
    row["noise_resolved"] = row.pop("resolved")
    return row


def _gradient_share(look: Look) -> Mapping[str, Any]:
    found = gradient_share(look.loss_and_gradient[1], look.top.vectors)
    return {
        "gradient_share": found.share,
        "gradient_null_share": found.null_share,
        "gradient_share_converged": _is_sound(look.top, look.options),
    }


def _is_sound(top: curvature.EigenResult, options: Options) -> jax.Array:
    """Whether the eigenpairs are the leading ones, as far as it was asked."""
    return top.complete if options.search else top.converged.all()


MEASURES: Mapping[str, Measure] = {
    "loss": _loss,
    "sharpness": _sharpness,
    "preconditioned": _preconditioned,
    "critical": _critical,
    "trace": _trace,
    "noise": _noise,
    "gradient_share": _gradient_share,
}


@functools.cache
def _jitted(function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=static)


def _either(
    compiles: bool, function: Callable[..., Any], static: tuple[str, ...]
) -> Callable[..., Any]:
    return _jitted(function, static) if compiles else without_error(function)


@jax.jit
def _loss_and_gradient(loss_fn: LossFn, params: Params, batch: Batch) -> tuple[jax.Array, Params]:
    return jax.value_and_grad(lambda params: whole(loss_fn)(params, *batch))(params)


def _leading(
    loss_fn: LossFn,
    params: Params,
    batch: Batch,
    diagonal: Params | None,
    start: Params,
    key: PRNGKey,
    tol: ArrayLike,
    *,
    k: int,
    search: bool,
    chunk_size: int | None,
) -> curvature.EigenResult:
    operator: curvature.Operator = curvature.hessian(loss_fn, params, *batch, chunk_size=chunk_size)
    if diagonal is not None:
        operator = operator.scaled(diagonal)
    return curvature.top_eigenpairs(
        operator, k, key=key, tol=tol, search=search, start=start,
        max_matvecs=_MAX_MATVECS + 10 * k, max_basis=min(operator.size, 2 * k + 18),
    )  # fmt: skip


def _traced(
    loss_fn: LossFn, params: Params, batch: Batch, key: PRNGKey, *, chunk_size: int | None
) -> curvature.TraceResult:
    hessian = curvature.hessian(loss_fn, params, *batch, chunk_size=chunk_size)
    return curvature.trace(hessian, key=key, num_matvecs=_NUM_PROBES)


def _critical_of(
    loss_fn: LossFn,
    params: Params,
    updates: Params,
    batch: Batch,
    learning_rate: jax.Array,
    *,
    chunk_size: int | None,
) -> CriticalSharpnessResult:
    return critical_sharpness(
        loss_fn, params, updates, *batch, learning_rate=learning_rate, chunk_size=chunk_size
    )


def _has_updated(optimizer_state: Tree) -> bool:
    """Whether the optimiser has made a step: before it there are no second moments."""
    counts = [count for _, count in optax.tree.get_all_with_path(plain(optimizer_state), "count")]
    return not counts or any(int(count) > 0 for count in counts)


def _mass(vectors: Params, inside: Params) -> jax.Array:
    """The share of the first vector's squared norm on some of the parameters."""
    first = _numerics.unit(jax.tree.map(lambda leaf: leaf[0], vectors))
    part = jax.tree.map(lambda leaf, here: jnp.where(here, leaf, 0), first, inside)
    return _numerics.scaled_norm(part) ** 2


def _noise_of(
    loss_fn: LossFn, params: Params, batch: Batch, *, batch_size: int
) -> NoiseScaleResult:
    return gradient_noise(loss_fn, params, *batch, batch_size=batch_size)


def _divisor(number: int) -> int:
    """The divisor of a number nearest to its square root, from below."""
    return next(size for size in range(math.isqrt(number), 0, -1) if number % size == 0)


def _compiles(loss_fn: LossFn, params: Params, batch: Batch) -> bool:
    devices = {
        device.platform
        for leaf in jax.tree.leaves(params)
        if isinstance(leaf, jax.Array)
        for device in leaf.devices()
    } or {jax.default_backend()}
    if "cpu" not in devices:
        return True
    traced = _jaxprs.equations(jax.make_jaxpr(loss_fn)(params, *batch).jaxpr)
    return all(equation.primitive.name != "conv_general_dilated" for equation in traced)
