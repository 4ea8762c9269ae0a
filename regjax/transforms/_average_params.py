"""Averages of the weights along the path of training."""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from regjax import _checks, _tree
from regjax._arguments import checked
from regjax._base import Params, Tree
from regjax.transforms import _gradients
from regjax.transforms._static_args import check_static, static_args


class RunningAverageState(NamedTuple):
    """State of `average_params` that averages all weights.

    Attributes:
      num_updates: (), int32, updates so far.
      num_averaged: (), int32, number of weights in the average. If it is 0, `sums` holds the newest
        weights.
      sums: tree like the parameters: the sum of the weights, each times `decay` to the power of its
        age, in float32 at least.
      rests: tree like the parameters: the rounding errors of the sums.
      total: (2,), the number by which the sums are divided, and its rounding error.
    """

    num_updates: jax.Array
    num_averaged: jax.Array
    sums: Tree
    rests: Tree
    total: jax.Array


class LatestAverageState(NamedTuple):
    """State of `average_params` that averages the latest weights.

    Attributes:
      num_updates: (), int32, updates so far.
      num_averaged: (), int32, number of weights so far that count. If it is 0, the first tree of
        `latest` holds the newest weights.
      latest: tuple of trees like the parameters, the latest weights that count, newest first.
      decay: (), float32, the decay of the last update.
    """

    num_updates: jax.Array
    num_averaged: jax.Array
    latest: tuple[Tree, ...]
    decay: jax.Array


_State: TypeAlias = RunningAverageState | LatestAverageState


@static_args("num_latest", "begin", "every")
@checked
def average_params(
    *, decay: ArrayLike = 1.0, num_latest: int | None = None, begin: int = 0, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Averages the weights along the path of training, and leaves the steps as they are.

        average = sum_i decay^(m - i) w_i / sum_i decay^(m - i),   i = 1 .. m

    Here w_i = params + updates are the weights after the updates begin + every, begin + 2 every,
    and so on. With `decay=1` the average is the mean of all of them (stochastic weight averaging).
    Below 1 it is an exponential average without bias towards its start. With `num_latest` it goes
    over the latest weights alone.

    Place it last in the chain, where it sees the final update. Inside `optax.MultiSteps` a step
    counts once; around it, each micro-batch counts. `averaged_params` reads the average from the
    state of any chain. If the network has running statistics, `regjax.population_statistics`
    computes those that belong to the average.

    The sums carry their rounding errors along. A plain float32 sum of weights that hardly move
    would be off by a tenth of a percent after 1e5 steps.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), transforms.average_params())
      >>> params = jnp.array(4.0)
      >>> state = tx.init(params)
      >>> for grads in (jnp.array(1.0), jnp.array(2.0)):  # the weights become 3, then 1
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, transforms.averaged_params(state))
      1.0 2.0

    Args:
      decay: weight of the average so far, from 0 (the newest weights alone) to 1 (all weights
        count the same).
      num_latest: how many of the latest weights to average. The state holds all of them. None: a
        running average, for which the state holds two copies, in float32 at least.
      begin: number of updates before the first interval.
      every: number of updates in an interval; the weights at its end are averaged.

    Returns:
      A transformation whose `update` needs `params` and passes the updates on bit for bit.

    Raises:
      ValueError: an argument is out of its range, or `params` is missing in `update`.
      TypeError: an argument has the wrong type.

    References:
      P. Izmailov, D. Podoprikhin, T. Garipov, D. Vetrov, A. Wilson (2018), arXiv:1803.05407;
      J. Kaddour (2022), arXiv:2209.14981 (`num_latest`).
    """
    _checks.between("decay", _checks.number("decay", decay), 0, 1)
    check_static("begin", begin, 0)
    check_static("every", every, 1)
    if num_latest is not None:
        check_static("num_latest", num_latest, 1)

    def init(params: Params) -> _State:
        _checks.floating_leaves("params", params)
        if num_latest is not None:
            latest = tuple(jax.tree.map(_copy, params) for _ in range(num_latest))
            return LatestAverageState(jnp.int32(0), jnp.int32(0), latest, jnp.float32(decay))
        sums = jax.tree.map(lambda leaf: _copy(leaf, _tree.wide_dtype(leaf)), params)
        rests = jax.tree.map(jnp.zeros_like, sums)
        total = jnp.asarray([1, 0], _tree.vector_dtype(params))
        return RunningAverageState(jnp.int32(0), jnp.int32(0), sums, rests, total)

    def update(
        updates: Params, state: _State, params: Params | None = None, **extra: object
    ) -> tuple[Params, _State]:
        del extra
        params = _gradients.check_params(updates, params)
        after = jax.tree.map(_after, params, updates)
        count = optax.safe_increment(state.num_updates)
        taken = (count > begin) & ((count - begin) % every == 0)
        averaged = jnp.where(taken, optax.safe_increment(state.num_averaged), state.num_averaged)
        if isinstance(state, LatestAverageState):
            latest = _pushed(after, state, taken)
            return updates, LatestAverageState(count, averaged, latest, jnp.float32(decay))
        return updates, RunningAverageState(count, averaged, *_added(after, state, taken, decay))

    return optax.GradientTransformationExtraArgs(init, update)


@checked
def averaged_params(state: Tree, params: Params | None = None) -> Params:
    """Reads the average of the weights from the state of an optimiser with `average_params`.

    Until the first weights count, the average is the newest weights themselves.

    Example:
      >>> tx = optax.chain(optax.sgd(1.0), transforms.average_params(num_latest=2))
      >>> params = jnp.array(4.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):  # the weights become 3, 2, 1
      ...     updates, state = tx.update(jnp.array(1.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(transforms.averaged_params(state))
      1.5

    Args:
      state: the state of `average_params`, or of a chain, `optax.masked`, `optax.MultiSteps`,
        `optax.inject_hyperparams` or flax's `TrainState` that contains it.
      params: tree of the weights. The average gets their types, and where a mask hid leaves from
        it, these leaves are returned. None: the average is in float32 at least, and there must be
        no mask.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: `state` holds no average or several, or the average of other parameters; or there
        is a mask and `params` is None.
    """
    found = [one for one in jax.tree.leaves(state, is_leaf=_is_ours) if _is_ours(one)]
    if len(found) != 1:
        raise ValueError(
            "`state` must hold the state of one `average_params`, got "
            f"{len(found)} in {type(state).__name__}."
        )
    (own,) = found
    if isinstance(own, LatestAverageState):
        average = _mean_of_latest(own)
    else:
        total = jnp.sum(own.total)
        average = jax.tree.map(lambda leaf: _quotient(leaf, total), own.sums)
    if params is None:
        _check_whole(average)
        return average
    leaves, treedef = jax.tree.flatten(params)
    averages, places = _gradients.carried(params, average, "the average")
    for i in places:
        leaves[i] = averages[i].astype(jnp.result_type(leaves[i]))
    return jax.tree.unflatten(treedef, leaves)


def _copy(leaf: Any, dtype: jnp.dtype | None = None) -> jax.Array:
    """A copy of its own, or both would be donated at once; zeros of what has no numbers yet."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros_like(leaf, dtype=dtype)
    return jnp.array(leaf, dtype, copy=True)


def _after(param: jax.Array, update: jax.Array) -> jax.Array:
    """The weights as `optax.apply_updates` makes and rounds them."""
    dtype, own = _gradients.sum_dtype(update, param), jnp.result_type(param)
    after = (jnp.asarray(param, dtype) + jnp.asarray(update, dtype)).astype(own)
    # A compiler leaves a cast and its way back out, and with them the rounding.
    return after if own == _tree.wide_dtype(param) else lax.optimization_barrier(after)


def _pushed(after: Params, state: LatestAverageState, taken: jax.Array) -> tuple[Tree, ...]:
    """The latest weights, with new ones in front if they count, or if there are none that do."""
    is_newest = taken | (state.num_averaged == 0)
    is_moved = taken & (state.num_averaged > 0)
    before = (after, *state.latest[:-1])
    where = (is_newest, *(is_moved for _ in state.latest[1:]))
    return tuple(
        jax.tree.map(lambda new, old: jnp.where(choose, new, old), new, old)  # noqa: B023
        for choose, new, old in zip(where, before, state.latest, strict=True)
    )


def _mean_of_latest(state: LatestAverageState) -> Params:
    """The mean of those that count, added from the oldest on."""
    counts = [jnp.where(i < jnp.maximum(state.num_averaged, 1), state.decay**i, 0)
              for i in range(len(state.latest))]  # fmt: skip
    number = functools.reduce(jnp.add, counts)

    def mean(*newest_first: jax.Array) -> jax.Array:
        total = rest = jnp.zeros_like(_tree.wide(newest_first[0]))
        for count, leaf in zip(reversed(counts), reversed(newest_first), strict=True):
            part = jnp.where(count > 0, count.astype(total.dtype) * _tree.wide(leaf), 0)
            total, rest = _sum(total, rest, part)
        return _quotient(total, number)

    return jax.tree.map(mean, *state.latest)


def _quotient(leaf: jax.Array, number: jax.Array) -> jax.Array:
    """`leaf` by a number, rounded as a quotient: XLA multiplies by the reciprocal of a scalar."""
    spread = jnp.full_like(leaf, number.astype(leaf.dtype))
    return leaf / lax.optimization_barrier(spread)


def _added(
    after: Params, state: RunningAverageState, taken: jax.Array, decay: ArrayLike
) -> tuple[Tree, Tree, jax.Array]:
    """Sums, rests and total with new weights, which stand alone where none counted before."""
    is_alone = state.num_averaged == 0

    def add(new: jax.Array, total: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = new.astype(total.dtype)
        # Of decay * total the part that is taken away, so that what is left is not rounded.
        lost = jnp.asarray(1 - decay, total.dtype)
        change = new - lost * total - lost * rest if _may_decay(decay) else new
        more, left = _sum(total, rest, change)
        keep = jnp.where(taken, more, total), jnp.where(taken, left, rest)
        return jnp.where(is_alone, new, keep[0]), jnp.where(is_alone, 0, keep[1])

    treedef = jax.tree.structure(after)
    trees = map(jax.tree.leaves, (after, state.sums, state.rests))
    pairs = [add(*triple) for triple in zip(*trees, strict=True)]
    total = jnp.stack(add(jnp.ones_like(state.total[0]), state.total[0], state.total[1]))
    sums, rests = (jax.tree.unflatten(treedef, [pair[i] for pair in pairs]) for i in (0, 1))
    return sums, rests, total


def _may_decay(decay: ArrayLike) -> bool:
    return isinstance(decay, jax.Array) or decay != 1


def _sum(total: jax.Array, rest: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(total + rest) + new as a sum and its rest, as if in twice the precision.

    D. Knuth (1969), two-sum, and T. Dekker (1971), fast two-sum.
    """
    more = total + new
    part = more - total
    left = rest + ((total - (more - part)) + (new - part))
    final = more + left
    return final, left - (final - more)


def _is_ours(node: object) -> bool:
    return isinstance(node, RunningAverageState | LatestAverageState)


def _check_whole(average: Params) -> None:
    is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
    if any(map(is_masked, jax.tree.leaves(average, is_leaf=is_masked))):
        raise ValueError(
            "`params` must be given, got None: `state` averages a part of the parameters, and the "
            "others are not in it."
        )
