"""Curvature while a network trains: measured now and then, at a share of the time."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import jax
import optax

from regjax import _checks
from regjax._base import (
    Batch,
    LossFn,
    Params,
    PRNGKey,
    ScalarOrSchedule,
    Tree,
    as_partial,
)
from regjax.diagnostics._monitor_file import Row, append_row, keep_whole_lines, replace_rows
from regjax.diagnostics._monitor_measures import MEASURES, Look, MonitorPoint, Options
from regjax.diagnostics._optimizers import optimizer_of

Measure: TypeAlias = Callable[[MonitorPoint], Mapping[str, Any]]
"""(point) -> numbers by name."""


class Monitor:
    """Measures curvature and gradient noise between the steps of any training loop.

        monitor = diagnostics.Monitor(loss_fn, batch, every=50, measures=("sharpness",), key=key)
        for step in range(num_steps):
            params, optimizer_state = train_step(params, optimizer_state)
            monitor(step, params, optimizer_state)
        plots.monitor_figure({"sgd": monitor.rows})

    Choose from these measures:

        loss            loss and gradient_norm
        sharpness       the largest eigenvalue of the Hessian; its residual norm is `_error_bound`
        preconditioned  the largest eigenvalue of P^(-1/2) H P^(-1/2), see `edge_of_stability`
        critical        `critical_sharpness` along the next update
        trace           the trace of the Hessian, with its standard error
        noise           the numbers of `gradient_noise`, such as gradient_noise_scale
        gradient_share  the share of the gradient in the `num_eigenvalues` leading eigenvectors

    With `optimizer` a row contains the stability threshold too, next to the eigenvalue to which it
    belongs. The preconditioned eigenvalue is NaN before the first update.

    A row has the error of each number, and a flag, 1 or 0, for each measure that may fail
    (`sharpness_converged`, `noise_resolved`). If there was no time to measure, `skipped` is 1.
    The first row with a loss or a curvature of NaN comes with a warning; the training goes on.
    `seconds` is the time that the row took, and `time_share` the time of all rows but the first,
    over that of the training between them.

    Each search for eigenvectors starts from those of the last row. The first row compiles and
    measures twice, in order to know the cost of a row. Both do not count for `share`.

    Example:
      >>> loss_fn = lambda w, x: jnp.mean(jnp.sum(x * w**4, axis=1))
      >>> batch, w = (jnp.array([[1.0, 0.1], [1.0, 0.1]]),), jnp.array([1.0, 1.0])
      >>> monitor = diagnostics.Monitor(
      ...     loss_fn, batch, every=2, key=jax.random.key(0), share=None
      ... )
      >>> for step in range(4):
      ...     row = monitor(step, w)
      ...     w = w - 0.05 * jax.grad(loss_fn)(w, *batch)
      >>> print([(row["step"], round(row["sharpness"], 2)) for row in monitor.rows])
      [(0, 12.0), (2, 5.84)]

    Attributes:
      rows: the rows so far, dicts of floats, each with the number of its step.
      known: names of the measures.
    """

    rows: list[Row]
    known: ClassVar[tuple[str, ...]] = tuple(MEASURES)

    def __init__(
        self,
        loss_fn: LossFn,
        batch: Batch,
        *,
        every: int,
        key: PRNGKey,
        measures: Sequence[str | Measure] = ("sharpness",),
        share: float | None = 0.1,
        num_eigenvalues: int = 1,
        tol: float = 1e-2,
        search: bool = True,
        batch_size: int | None = None,
        chunk_size: int | None = None,
        optimizer: str | None = None,
        hyperparams: Mapping[str, Any] | None = None,
        learning_rate: ScalarOrSchedule | None = None,
        tx: optax.GradientTransformation | None = None,
        path: Path | str | None = None,
        resume: bool = False,
    ) -> None:
        """Prepares a monitor; nothing is computed.

        Args:
          loss_fn: (params, *batch) -> scalar, the mean over the examples. For a network with batch
            norm take that of an adapter, `regjax.model_loss`.
          batch: tuple of the arguments of the loss after the parameters, the same for all rows.
          every: number of steps between two rows. At other steps a call returns at once.
          key: typed key of all random starts and probes.
          measures: names of measures, or functions of a `MonitorPoint` that return a dict of
            numbers.
          share: largest share of the time that the monitor may take, relative to the steps between
            two rows, from 0 to 1; None: no limit.
          num_eigenvalues: number of leading eigenpairs.
          tol: relative tolerance: the residual norm over the largest magnitude of an eigenvalue.
          search: whether to look for larger eigenvalues that were missed, which takes half as many
            products again. Without it a row may hold another eigenvalue than the largest.
          batch_size: batch size for "noise", a divisor of the number of examples; None: the one
            nearest to its square root.
          chunk_size: number of examples per pass, for bounded memory; None: all at once.
          optimizer: name of the optimiser's function in optax, such as "adam", for the stability
            threshold and for "preconditioned"; see `stability_threshold`.
          hyperparams: the numbers that the optimiser was made with, by optax's names.
          learning_rate: learning rate of the optimiser, or a schedule of the number of updates;
            None: the one that `inject_hyperparams` keeps in the state, if any.
          tx: the transformation whose next update "critical" follows; None: descent along the
            gradient.
          path: file to which each row is appended as a line of JSON; None: no file.
          resume: whether to continue the rows in that file, which must not exist otherwise.

        Raises:
          ValueError: an argument is out of its range, a measure is not known or comes twice, or the
            file exists.
          TypeError: an argument has the wrong type.
        """
        self._loss_fn = _loss_of(loss_fn)
        if not isinstance(batch, tuple):
            raise TypeError(
                f"`batch` must be a tuple of the loss's arguments, got {type(batch).__name__}."
            )
        self._batch = batch
        self._every = _checks.integer("every", every)
        self._measures = _checked_measures(measures)
        self._share = None if share is None else _checks.between("share", share, 0, 1)
        self._options = Options(
            key=_checks.key("key", key),
            k=_checks.integer("num_eigenvalues", num_eigenvalues),
            tol=_checks.number("tol", tol),
            search=_checks.boolean("search", search),
            batch_size=batch_size,
            chunk_size=chunk_size,
            optimizer=_checked_optimizer(optimizer, self._measures),
            hyperparams=hyperparams,
            learning_rate=_checked_rate(learning_rate),
            tx=None if tx is None else optax.with_extra_args_support(_checked_tx(tx)),
        )
        for name in ("batch_size", "chunk_size"):
            if (value := getattr(self._options, name)) is not None:
                _checks.integer(name, value)
        self._clock = _Clock()
        self._starts: dict[str, Tree] = {}
        self._has_warned = False
        self._path = None if path is None else Path(path)
        self.rows = _kept(self._path, _checks.boolean("resume", resume))

    def __call__(
        self,
        step: int,
        params: Params,
        optimizer_state: Tree = None,
        *,
        loss_fn: LossFn | None = None,
    ) -> Row | None:
        """Measures, if it is time to, and returns the row.

        Args:
          step: number of the step; a resumed run may go back, and rows from this step on are
            replaced.
          params: tree of parameters as they are now.
          optimizer_state: of optax, for the measures that look at it.
          loss_fn: the loss with the state that the model has now, such as
            `regjax.model_loss(model._replace(state=state), output_loss_fn)`; None: that of the
            monitor. One of the same program compiles nothing.

        Returns:
          The row, a dict of floats; None between two of them.

        Raises:
          ValueError: an argument is out of its range, or it is called inside of `jax.jit`.
          TypeError: `step` is no integer, or a parameter is not real floating point.
        """
        if type(step) is int and step > 0 and step % self._every:
            return None  # most calls, beside steps of a tenth of a millisecond
        _refuse_tracers(step=step, params=params, optimizer_state=optimizer_state)
        step = _checks.integer("step", int(step) if hasattr(step, "dtype") else step, minimum=0)
        if step % self._every:
            return None
        _checks.floating_leaves("params", params)
        self._drop_from(step)
        jax.block_until_ready(params)
        self._clock.arrive()
        row: Row = {"step": step}
        if skipped := not self._clock.allows(self._share):
            row |= self._clock.leave(measured=False)
        else:
            if self._clock.is_new:
                self._measured(step, params, optimizer_state, loss_fn)
                self._clock.compiled()
            row |= self._measured(step, params, optimizer_state, loss_fn)
            row |= self._clock.leave(measured=True)
        row["skipped"] = float(skipped)
        self.rows.append(row)
        if self._path is not None:
            append_row(self._path, row)
        self._warn_once(row)
        return row

    def _measured(
        self, step: int, params: Params, optimizer_state: Tree, loss_fn: LossFn | None
    ) -> Row:
        loss_fn = self._loss_fn if loss_fn is None else _loss_of(loss_fn)
        key = jax.random.fold_in(self._options.key, step)
        point = MonitorPoint(step, loss_fn, params, optimizer_state, self._batch, key)
        look = Look(point, self._options, self._starts)
        row: Row = {}
        for measure in self._measures:
            own = MEASURES[measure](look) if isinstance(measure, str) else measure(point)
            for name, value in own.items():
                if name in (*row, *_OWN):
                    raise ValueError(f"`measures` must give each name once, got {name!r} twice.")
                row[name] = float(value)
        return row

    def _warn_once(self, row: Row) -> None:
        broken = [name for name in _FINITE if not math.isfinite(row.get(name, 0.0))]
        if broken and not self._has_warned:
            self._has_warned = True
            found = f"{broken[0]} {row[broken[0]]} at step {row['step']}"
            message = f"`params` and `batch` must give finite numbers, got {found}; rows say NaN."
            warnings.warn(message, stacklevel=3)

    def _drop_from(self, step: int) -> None:
        if not self.rows or self.rows[-1]["step"] < step:
            return
        self.rows[:] = [row for row in self.rows if row["step"] < step]
        if self._path is not None:
            replace_rows(self._path, self.rows)


# What is finite as long as the network is.
_FINITE = ("loss", "gradient_norm", "sharpness", "trace")
_OWN = ("step", "skipped", "seconds", "time_share")


class _Clock:
    """Seconds of training and of measuring, what compiles left out."""

    def __init__(self) -> None:
        self.training, self.measuring, self.cost = 0.0, 0.0, 0.0
        self.is_new = True
        self.came, self.began = 0.0, 0.0
        self.left: float | None = None

    def arrive(self) -> None:
        self.came = self.began = time.perf_counter()
        if self.left is not None:
            self.training += self.came - self.left

    def allows(self, share: float | None) -> bool:
        """Whether one more row like the last one keeps to the share of the training's time."""
        if share is None or self.is_new:
            return True
        return self.measuring + self.cost <= share * self.training

    def compiled(self) -> None:
        """Says that what takes its time once in a run is done, and a row's own time begins."""
        self.began = time.perf_counter()

    def leave(self, *, measured: bool) -> Row:
        self.left = time.perf_counter()
        spent = self.left - self.began
        self.cost = spent if measured else self.cost
        self.measuring += 0.0 if self.is_new else spent
        self.is_new = self.is_new and not measured
        share = self.measuring / self.training if self.training else 0.0
        return {"seconds": self.left - self.came, "time_share": share}


def _loss_of(loss_fn: LossFn) -> LossFn:
    """A loss as a pytree, which programs take as an argument."""
    function: LossFn = as_partial(_checks.function("loss_fn", loss_fn))
    return function


def _checked_measures(measures: Sequence[str | Measure]) -> tuple[str | Measure, ...]:
    if isinstance(measures, str) or not isinstance(measures, Sequence):
        raise TypeError(f"`measures` must be a sequence of names or functions, got {measures!r}.")
    for measure in measures:
        if not callable(measure) and measure not in MEASURES:
            raise ValueError(
                f"`measures` must be among {', '.join(MEASURES)}, or functions, got {measure!r}."
            )
    if not measures or len(set(measures)) < len(measures):
        raise ValueError(f"`measures` must be one or more different ones, got {measures!r}.")
    return tuple(measures)


def _checked_optimizer(optimizer: str | None, measures: Sequence[str | Measure]) -> str | None:
    has_moments = optimizer is not None and optimizer_of(optimizer).root is not None
    if "preconditioned" in measures and not has_moments:
        raise ValueError(
            "`optimizer` must be one with second moments, such as adam, for the measure "
            f"preconditioned, got {optimizer}."
        )
    return optimizer


def _checked_rate(learning_rate: ScalarOrSchedule | None) -> ScalarOrSchedule | None:
    if learning_rate is None or callable(learning_rate):
        return learning_rate
    return _checks.number("learning_rate", learning_rate, above_zero=True)


def _checked_tx(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"`tx` must be a transformation such as optax.sgd(0.1), got {tx!r}.")
    return tx


def _kept(path: Path | None, resume: bool) -> list[Row]:
    if path is None:
        if resume:
            raise ValueError("`path` must be given to resume from, got None.")
        return []
    if not path.exists():
        return []
    if not resume:
        raise ValueError(f"`path` must not exist yet, or `resume` be True, got {path}.")
    return keep_whole_lines(path)


def _refuse_tracers(**arguments: Tree) -> None:
    for name, tree in arguments.items():
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
            raise ValueError(
                f"`{name}` must be known numbers, got a tracer: call the monitor between the "
                "jitted steps, not inside of jax.jit."
            )
