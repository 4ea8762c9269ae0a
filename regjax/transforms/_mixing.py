"""How learners mix their weights: averages with neighbours along a named axis of the program.

Each mixing applies a doubly stochastic matrix W to the weights of all learners, of which a program
sees its own alone. So the mean of the weights stays, and learners who agree keep their weights.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from regjax import _checks, _loops, _tree
from regjax._arguments import checked
from regjax._base import Params, PRNGKey

AxisName: TypeAlias = str | tuple[str, str]
"""Name of the axis of the learners; or (axis of the mesh, axis of `jax.vmap` on each device)."""

Mixing: TypeAlias = Callable[[Params, jax.Array, AxisName], Params]
"""(params, count, axis_name) -> mixed params of this learner; the same count on all learners."""

# Rows and columns in float32 sum to one up to this.
_ROUNDING = 1e-5


def ring_mixing() -> Mixing:
    """Mixes with both neighbours on a ring.

        (w + left + right) / 3

    The mixing matrix is symmetric with the eigenvalues (1 + 2 cos(2 pi k / n)) / 3. Two learners
    are each other's only neighbour: (w + other) / 2. A single learner keeps its weights.

    Example:
      >>> mix = jax.vmap(lambda w: transforms.ring_mixing()(w, 0, "learner"), axis_name="learner")
      >>> print(mix(jnp.array([0.0, 3.0, 6.0, 9.0])))
      [4. 3. 6. 5.]

    Returns:
      A `Mixing`.
    """

    def mix(params: Params, count: jax.Array, axis_name: AxisName) -> Params:
        del count
        num = num_learners(axis_name)
        if num == 1:
            return params
        offsets = (1,) if num == 2 else (1, -1)
        return _mean(params, *(_shifted(params, offset, axis_name) for offset in offsets))

    return mix


@checked
def random_pair_mixing(*, key: PRNGKey) -> Mixing:
    """Mixes with a random partner in each step, every learner in one pair.

        (w + partner) / 2

    The pairs of step t are drawn from `fold_in(key, t)`, the same on all learners, out of the n - 1
    rounds of a tournament in which any two learners meet once. On average a step leaves the share
    (n / 2 - 1) / (n - 1) of the squared distance to the mean. A single learner keeps its weights.

    Example:
      >>> mixing = transforms.random_pair_mixing(key=jax.random.key(0))
      >>> mix = jax.vmap(lambda w: mixing(w, jnp.int32(0), "learner"), axis_name="learner")
      >>> weights = mix(jnp.array([0.0, 3.0, 6.0, 9.0]))
      >>> print(len(set(weights.tolist())), weights.mean())  # two pairs, the mean as before
      2 4.5

    Args:
      key: typed key, the same on all learners and processes.

    Returns:
      A `Mixing` for an even number of learners on one axis: not for blocks of learners on devices.

    Raises:
      TypeError: `key` is not a typed key.
      ValueError: `key` is an array of keys; on use, the number of learners is odd, or there are two
        axes.
    """
    _checks.key("key", key)

    def mix(params: Params, count: jax.Array, axis_name: AxisName) -> Params:
        num = num_learners(axis_name)
        if isinstance(axis_name, tuple):
            raise ValueError(
                "`axis_name` must be a single axis for `random_pair_mixing`, whose partners would "
                f"be on any device, got {axis_name}."
            )
        if num == 1:
            return params
        if num % 2:
            raise ValueError(
                f"`random_pair_mixing` must have an even number of learners, got {num}."
            )
        round_number = jax.random.randint(jax.random.fold_in(key, count), (), 0, num - 1, jnp.int32)
        branches = [
            functools.partial(lax.ppermute, axis_name=axis_name, perm=list(enumerate(partners)))
            for partners in matchings(num)
        ]
        return _mean(params, _loops.switch(round_number, branches, params))

    return mix


def exponential_mixing() -> Mixing:
    """Mixes with one learner at a distance that doubles each step: 1, 2, 4, ..., and again.

        W = (I + P) / 2,   P the cyclic shift by 2^(t mod ceil(log2 n))

    P is a permutation, so that W is doubly stochastic for any n; it is not symmetric. If n is a
    power of two, log2 n steps in a row give all learners the mean; for other n they come near it.

    Example:
      >>> mixing = transforms.exponential_mixing()
      >>> weights = jnp.array([0.0, 3.0, 6.0, 9.0])
      >>> for step in range(2):
      ...     mix = jax.vmap(lambda w: mixing(w, jnp.int32(step), "learner"), axis_name="learner")
      ...     weights = mix(weights)
      >>> print(weights)
      [4.5 4.5 4.5 4.5]

    Returns:
      A `Mixing`.

    References:
      B. Ying et al. (2021), arXiv:2110.13363, one-peer exponential graphs. The extension to n that
      are no powers of two is ours.
    """

    def mix(params: Params, count: jax.Array, axis_name: AxisName) -> Params:
        num = num_learners(axis_name)
        if num == 1:
            return params
        num_shifts = (num - 1).bit_length()
        branches = [
            functools.partial(_shifted, offset=2**i, axis_name=axis_name) for i in range(num_shifts)
        ]
        return _mean(params, _loops.switch(count % num_shifts, branches, params))

    return mix


def full_mixing() -> Mixing:
    """Replaces the weights of all learners by their mean.

    This differs from synchronous SGD: gradients are taken before the mixing, at weights that differ
    by the last updates. If all learners have the same batches, the two are the same.

    Example:
      >>> mix = jax.vmap(lambda w: transforms.full_mixing()(w, 0, "learner"), axis_name="learner")
      >>> print(mix(jnp.array([0.0, 3.0, 6.0, 9.0])))
      [4.5 4.5 4.5 4.5]

    Returns:
      A `Mixing`.
    """

    def mix(params: Params, count: jax.Array, axis_name: AxisName) -> Params:
        del count
        if num_learners(axis_name) == 1:
            return params
        mean = lambda leaf: _average(_tree.wide(leaf), axis_name).astype(jnp.result_type(leaf))
        return jax.tree.map(mean, params)

    return mix


@checked
def dense_mixing(matrix: ArrayLike) -> Mixing:
    """Mixes by any doubly stochastic matrix W.

        sum_k W_jk w_k   for learner j

    Every learner receives and briefly holds the weights of all others. Use it for topologies that
    have no mixing of their own, and as a reference for those that have one.

    Example:
      >>> mixing = transforms.dense_mixing([[0.75, 0.25], [0.25, 0.75]])
      >>> mix = jax.vmap(lambda w: mixing(w, 0, "learner"), axis_name="learner")
      >>> print(mix(jnp.array([0.0, 4.0])))
      [1. 3.]

    Args:
      matrix: (n, n), W, known when the program is built; rows and columns sum to one.

    Returns:
      A `Mixing` for n learners.

    Raises:
      ValueError: `matrix` is not square, has a negative entry or is not doubly stochastic (with
        only rows that sum to one the mean of the weights drifts); on use, n is not the number of
        learners.
      TypeError: `matrix` is traced.
    """
    if _checks.host_value(matrix) is None:
        raise TypeError("`matrix` must be known when the program is built, got a traced array.")
    matrix = np.asarray(matrix)
    if not np.issubdtype(matrix.dtype, np.floating) and not np.issubdtype(matrix.dtype, np.integer):
        raise TypeError(f"`matrix` must have real numbers, got {matrix.dtype}.")
    matrix = matrix.astype(np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`matrix` must have shape (n, n), got {matrix.shape}.")
    if not np.all(matrix >= 0):
        raise ValueError(f"`matrix` must be non-negative, got an entry {matrix.min()}.")
    sums = {"row": matrix.sum(1), "column": matrix.sum(0)}
    for name, values in sums.items():
        if not np.all(np.abs(values - 1) <= _ROUNDING):
            raise ValueError(
                "`matrix` must be doubly stochastic, rows and columns with sum 1, got "
                f"{name} sums from {values.min():g} to {values.max():g}."
            )

    def mix(params: Params, count: jax.Array, axis_name: AxisName) -> Params:
        del count
        num = num_learners(axis_name)
        if len(matrix) != num:
            raise ValueError(
                f"`matrix` must have a row for each of the {num} learners, got {len(matrix)}."
            )
        if num == 1:
            return params

        def weighted(leaf: jax.Array) -> jax.Array:
            everyone = _tree.wide(_gathered(leaf, axis_name))
            row = jnp.asarray(matrix, everyone.dtype)[lax.axis_index(axis_name)]
            mixed = jnp.tensordot(row, everyone, 1, precision="highest")
            return mixed.astype(jnp.result_type(leaf))

        return jax.tree.map(weighted, params)

    return mix


def num_learners(axis_name: AxisName) -> int:
    """Returns the size of the axis, or raises an error that says how to bind it."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"`axis_name` must be bound where `update` is called, got {axis_name!r}: call it under "
            "jax.vmap(..., axis_name=...) or jax.shard_map."
        ) from None


def matchings(num: int) -> list[list[int]]:
    """Lists the partner of each of `num` learners (even) in num - 1 rounds: each meets each once.

    The circle method: one stays in the middle, the others stand around and turn by one each round.
    """
    around = num - 1
    rounds = []
    for turn in range(around):
        partners = [(2 * turn - place) % around for place in range(around)]
        partners[turn] = around
        rounds.append([*partners, turn])
    return rounds


def _shifted(params: Params, offset: int, axis_name: AxisName) -> Params:
    """Fetches what the learner `offset` places before this one on the circle holds."""
    if isinstance(axis_name, tuple):
        shift = functools.partial(_shifted_in_blocks, offset=offset, axis_names=axis_name)
        return jax.tree.map(shift, params)
    num = num_learners(axis_name)
    return lax.ppermute(params, axis_name, [(i, (i + offset) % num) for i in range(num)])


def _shifted_in_blocks(leaf: jax.Array, offset: int, axis_names: tuple[str, str]) -> jax.Array:
    """Does the same for blocks of learners; only rows that change the device are sent."""
    devices, inside = axis_names
    block = lax.all_gather(leaf, inside)
    num_devices, size = lax.axis_size(devices), block.shape[0]
    far, near = divmod(offset % (num_devices * size), size)

    def sent(rows: jax.Array, distance: int) -> jax.Array:
        if distance % num_devices == 0 or not rows.shape[0]:
            return rows
        to = [(i, (i + distance) % num_devices) for i in range(num_devices)]
        return lax.ppermute(rows, devices, to)

    moved = jnp.concatenate([sent(block[size - near :], far + 1), sent(block[: size - near], far)])
    return moved[lax.axis_index(inside)]


def _gathered(leaf: jax.Array, axis_name: AxisName) -> jax.Array:
    """Gathers `leaf` of all learners, in their order along a leading axis."""
    gathered = leaf
    for name in reversed(_names(axis_name)):
        gathered = lax.all_gather(gathered, name)
    return gathered.reshape(-1, *jnp.shape(leaf))


def _average(leaf: jax.Array, axis_name: AxisName) -> jax.Array:
    """Averages `leaf` over the learners."""
    for name in reversed(_names(axis_name)):
        if name in jax.sharding.get_abstract_mesh().manual_axes:
            leaf = lax.pmean(leaf, name)
        else:
            # Under `jax.vmap` this sends nothing.
            leaf = _tree.mean_rows(lax.all_gather(leaf, name))
    return leaf


def _names(axis_name: AxisName) -> tuple[str, ...]:
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _mean(params: Params, *others: Params) -> Params:
    """Averages trees with equal weights, summed in float32 at least, in the dtypes of `params`."""

    def mean(leaf: jax.Array, *theirs: jax.Array) -> jax.Array:
        total = functools.reduce(jnp.add, map(_tree.wide, theirs), _tree.wide(leaf))
        return (total / (1 + len(theirs))).astype(jnp.result_type(leaf))

    return jax.tree.map(mean, params, *others)
