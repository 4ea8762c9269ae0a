"""The learning rate at which the next step would raise the loss, from forward passes alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _loops, _numerics, _programs, _tree
from regjax._arguments import checked
from regjax._base import LossFn, Params, Tree
from regjax._printing import legible
from regjax.diagnostics._surface import Path

# Differences of so many units of rounding of the loss are noise.
_NOISE = 8
# How far a multiple of the step is stretched or shrunk while one end of the bracket is missing.
_MOST_STRETCH = 32.0


@legible
class CriticalSharpnessResult(NamedTuple):
    """The critical sharpness, with its bracket.

    Attributes:
      value: (), lambda_c = 2 / eta_c, in units of the loss per squared parameter; NaN unless
        `resolved`.
      lower_bound: (), 2 over a rate at which the loss is higher than at the parameters; 0 if there
        was none.
      upper_bound: (), 2 over the largest rate below it at which the loss was lower; infinite if
        there was none.
      critical_learning_rate: (), eta_c; NaN unless resolved.
      resolved: (), bool: both ends of the bracket were found, and their losses differ from that at
        the parameters by more than rounding.
      descends: (), bool: a lower loss was found along the direction. If not, the loss rises, or it
        falls over a distance shorter than the smallest step or by less than rounding.
      num_evaluations: (), int32, forward passes that were made.
    """

    value: jax.Array
    lower_bound: jax.Array
    upper_bound: jax.Array
    critical_learning_rate: jax.Array
    resolved: jax.Array
    descends: jax.Array
    num_evaluations: jax.Array


class _Point(NamedTuple):
    """A multiple t of the step, and (L(w + t u) - L(w)) / t: a line in t where L is quadratic.

    Attributes:
      at: (), t; 0 where there is no point yet.
      slope: (), the slope of the chord; infinite for a loss that is not finite.
    """

    at: jax.Array
    slope: jax.Array


class _Bracket(NamedTuple):
    """Where the chord's slope changes its sign.

    Attributes:
      low: the largest multiple with a lower loss. before: the one before it.
      high: the smallest multiple with a higher loss. after: the one before it.
      blind: (), the last multiple whose difference was rounding while an end was missing.
      width: (), how far from the estimate the next one is taken, relative.
      num_evaluations: (), int32, losses so far.
      is_done: (), bool, whether both ends are as near as they are to come.
    """

    low: _Point
    before: _Point
    high: _Point
    after: _Point
    blind: jax.Array
    width: jax.Array
    num_evaluations: jax.Array
    is_done: jax.Array


@checked
def critical_sharpness(
    loss_fn: LossFn,
    params: Params,
    updates: Params,
    *batch: Tree,
    learning_rate: ArrayLike,
    num_evaluations: int = 10,
    tol: ArrayLike = 1e-2,
    chunk_size: int | None = None,
) -> CriticalSharpnessResult:
    """Finds the learning rate at which an update would begin to raise the loss.

        lambda_c = 2 / eta_c,   eta_c = inf{eta > 0: L(w - eta d) > L(w)},   d = -updates / rate

    Here w are the parameters and d is the direction of the update. For a quadratic loss with
    Hessian H and gradient g the value is d'Hd / g'd, which for d = g is at most the largest
    eigenvalue. Take loss and updates from the same batch. If the updates belong to another task
    than the loss, the value is the relative critical sharpness.

    The search needs losses alone. It stretches or shrinks the update until the loss is lower at one
    end and higher at the other, guided by the slope (L(w - eta d) - L(w)) / eta, which is a line in
    eta for a quadratic loss, and then moves both ends towards the zero of that line. Two crossings
    within a single stretch can be missed.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([4.0, 1.0]) * w**2)
      >>> params = jnp.array([1.0, 0.0])
      >>> updates = -0.1 * jax.grad(loss_fn)(params)
      >>> result = diagnostics.critical_sharpness(loss_fn, params, updates, learning_rate=0.1)
      >>> print(f"{result.value:.2f} {result.critical_learning_rate:.2f}", result.resolved)
      4.00 0.50 True

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters, w.
      updates: tree like `params`, what the optimiser is about to add to them.
      *batch: arrays with a leading axis of examples.
      learning_rate: the learning rate that is contained in the updates, positive.
      num_evaluations: largest number of forward passes, at least 4.
      tol: relative distance of the bracket's ends from the estimate at which the search ends. If
        differences at this distance are rounding, the distance is doubled.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A `CriticalSharpnessResult`. If the loss rises along the direction, the value is NaN, and
      `resolved` and `descends` are False.

    Raises:
      ValueError: a number is out of its range, `updates` is another tree, or the loss is no scalar
        or cannot be split in chunks.
      TypeError: a parameter is not real floating point.

    References:
      D. Kalra et al. (2026), arXiv:2601.16979, for the definition of the two measures. The search
      along the slope and the treatment of rounding are ours.
    """
    _checks.number("learning_rate", learning_rate, above_zero=True)
    _checks.number("tol", tol, above_zero=True)
    _checks.integer("num_evaluations", num_evaluations, minimum=4)
    _checks.finite_tree("updates", _checks.floating_like("updates", updates, params))
    loss_fn, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size)
    path = Path(loss_fn, Partial(_moved, params, updates), batch, chunk_size)
    # Whatever goes over chunks compiles its own loops.
    begin, step = (_compiled_begin, _compiled) if chunk_size is None else (_begin, _narrowed)
    operands, bracket = begin(path, jnp.asarray(tol), jnp.asarray(learning_rate))
    # The first step is no part of a loop: eight more can be unrolled.
    bracket = _loops.while_loop(
        step, step(operands, bracket), operands=operands, done=lambda bracket: bracket.is_done,
        max_steps=num_evaluations - 2, result=lambda bracket: bracket,
    )  # fmt: skip
    return _reported(bracket, operands)


class _Operands(NamedTuple):
    """What a step of the search reads.

    Attributes:
      path: the loss along the update.
      start: (), the loss at the parameters.
      noise: (), the relative difference that is rounding.
      rate: (), the learning rate in the updates.
    """

    path: Path
    start: jax.Array
    noise: jax.Array
    rate: jax.Array


def _begin(path: Path, tol: jax.Array, rate: jax.Array) -> tuple[_Operands, _Bracket]:
    params = path.place.args[0]
    start = jnp.asarray(_chunks.mean(path.loss_fn, params, path.batch, path.chunk_size))
    start = start.astype(_tree.wide_dtype(start))
    dtype = start.dtype
    eps = max(_eps(jnp.result_type(leaf)) for leaf in jax.tree.leaves((params, start)))
    zero = jnp.zeros((), dtype)
    none = _Point(zero, zero)
    width = tol.astype(dtype)
    bracket = _Bracket(none, none, none, none, zero, width, jnp.int32(1), jnp.bool_(False))
    return _Operands(path, start, jnp.asarray(_NOISE * eps, dtype), rate.astype(dtype)), bracket


def _eps(dtype: jnp.dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def _moved(params: Params, updates: Params, multiple: jax.Array) -> Params:
    def move(weights: jax.Array, update: jax.Array) -> jax.Array:
        weights = jnp.asarray(weights)
        wide = _tree.wide(weights)
        return (wide + multiple.astype(wide.dtype) * update.astype(wide.dtype)).astype(
            weights.dtype
        )

    return jax.tree.map(move, params, updates)


def _narrowed(operands: _Operands, bracket: _Bracket) -> _Bracket:
    """The bracket after one more loss."""
    path, start, noise, _ = operands
    at = _next(bracket)
    loss = path.loss(at).astype(start.dtype)
    difference = loss - start
    floor = noise * jnp.maximum(jnp.abs(start), jnp.abs(loss))
    # Beyond where the loss is finite it is higher.
    is_finite = jnp.isfinite(loss)
    is_above = (difference > floor) | ~is_finite
    is_below = (difference < -floor) & is_finite
    is_rounding = ~is_above & ~is_below
    here = _Point(at, jnp.where(is_finite, difference / at, jnp.inf))
    choose = lambda condition, one, other: jax.tree.map(
        lambda a, b: jnp.where(condition, a, b), one, other
    )
    is_blind = is_rounding & ((bracket.low.at == 0) | (bracket.high.at == 0))
    bracket = _Bracket(
        low=choose(is_below, here, bracket.low),
        before=choose(is_below, bracket.low, bracket.before),
        high=choose(is_above, here, bracket.high),
        after=choose(is_above, bracket.high, bracket.after),
        blind=jnp.where(is_blind, at, bracket.blind),
        # Rounding so near to the crossing: look farther away.
        width=jnp.where(is_rounding & ~is_blind, 2 * bracket.width, bracket.width),
        num_evaluations=bracket.num_evaluations + 1,
        is_done=bracket.is_done,
    )
    return bracket._replace(is_done=_is_narrow(bracket))


_compiled_begin = _programs.bounded(jax.jit(_begin))
_compiled = _programs.bounded(jax.jit(_narrowed))


def _next(bracket: _Bracket) -> jax.Array:
    """The multiple of the step at which the loss is looked up next."""
    low, high, blind = bracket.low.at, bracket.high.at, bracket.blind
    has_low, has_high = low > 0, high > 0
    # Outwards: somewhat beyond where the chord's slope will be zero, or twice as far.
    root = _crossing(bracket.before, bracket.low)
    is_known = (bracket.before.at > 0) & (root > low)
    outwards = jnp.clip(1.1 * root, 1.1 * low, _MOST_STRETCH * low)
    outwards = jnp.where(is_known, outwards, 2 * low)
    # A difference of rounding beyond a lower loss: it was the crossing itself.
    outwards = jnp.where(blind > low, 1.1 * blind, outwards)
    # Inwards: not as far as it will be zero, or a quarter.
    root = _crossing(bracket.high, bracket.after)
    is_known = (bracket.after.at > 0) & (root > 0) & (root < high)
    inwards = jnp.clip(0.9 * root, high / _MOST_STRETCH, 0.9 * high)
    inwards = jnp.where(is_known, inwards, high / 4)
    inwards = jnp.where(blind > 0, jnp.sqrt(blind * high), inwards)
    # Between: near the estimate, on the side of the farther end.
    root = _estimate(bracket)
    from_low, from_high = root / jnp.where(has_low, low, 1), high / root
    side = jnp.where(from_low > from_high, 1 - bracket.width, 1 + bracket.width)
    between = root * side
    # Far from a line the estimate stays at one end.
    is_lopsided = (high > 1.5 * low) & ((root < 1.1 * low) | (root > high / 1.1))
    is_inside = (between > low) & (between < high) & ~is_lopsided
    between = jnp.where(is_inside, between, jnp.sqrt(low * high))
    one_end = jnp.where(has_low, outwards, inwards)
    none = jnp.where(blind > 0, 2 * blind, 1)
    return jnp.where(has_low & has_high, between, jnp.where(has_low | has_high, one_end, none))


def _crossing(one: _Point, other: _Point) -> jax.Array:
    """Where the line through two points is zero; infinite where it does not rise."""
    change = _numerics.divide(other.slope - one.slope, other.at - one.at)
    rises = (change > 0) & jnp.isfinite(change)
    return _numerics.divide(-one.slope, change, where=rises, otherwise=jnp.inf) + one.at


def _estimate(bracket: _Bracket) -> jax.Array:
    """The crossing, from both ends of the bracket."""
    low, high = bracket.low.at, bracket.high.at
    root = _crossing(bracket.low, bracket.high)
    return jnp.where((root > low) & (root < high), root, jnp.sqrt(low * high))


def _is_narrow(bracket: _Bracket) -> jax.Array:
    low, high, root = bracket.low.at, bracket.high.at, _estimate(bracket)
    # The estimate moves while the ends come nearer; the width has grown where rounding is met.
    width = 1.5 * bracket.width
    near = (low >= root * (1 - width)) & (high <= root * (1 + width))
    return (low > 0) & (high > 0) & near


@jax.jit
def _reported(bracket: _Bracket, operands: _Operands) -> CriticalSharpnessResult:
    start, rate = operands.start, operands.rate
    low, high = bracket.low.at, bracket.high.at
    descends, rises = low > 0, high > 0
    is_finite = jnp.isfinite(start)
    resolved = descends & rises & (low < high) & is_finite
    critical = jnp.where(resolved, rate * _estimate(bracket), jnp.nan)
    two_over = lambda multiple, otherwise: _numerics.divide(
        2, multiple * rate, where=multiple > 0, otherwise=otherwise
    )
    known = lambda number: jnp.where(is_finite, number, jnp.nan)
    return CriticalSharpnessResult(
        value=2 / critical,
        lower_bound=known(two_over(high, 0)),
        upper_bound=known(two_over(low, jnp.inf)),
        critical_learning_rate=critical,
        resolved=resolved,
        descends=descends & is_finite,
        num_evaluations=bracket.num_evaluations,
    )
