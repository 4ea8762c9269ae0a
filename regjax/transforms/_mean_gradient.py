"""The mean of a gradient over micro-batches and devices, and gradients for an `update`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _checks, _loops, _numerics, _sharding, _tree
from regjax._arguments import checked
from regjax._base import GradFn, Params, Tree
from regjax.transforms import _given, _gradients, _passes
from regjax.transforms._passes import ValueAndGradFn
from regjax.transforms._static_args import check_static


@checked
def mean_gradient(
    value_and_grad_fn: ValueAndGradFn,
    *,
    num_shards: int = 1,
    weight_fn: Callable[..., jax.Array] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> ValueAndGradFn:
    """Turns `jax.value_and_grad(loss_fn)` into a function that averages over parts of the batch.

        (sum_c w_c L_c / sum_c w_c, sum_c w_c grad L_c / sum_c w_c)

    The parts c are `num_shards` equal parts of the batch, which are computed one after the other to
    save memory, and the devices of a mapped axis. Together with `sharpness_aware_gradient` the
    order matters:

        sharpness_aware_gradient(mean_gradient(f, num_shards=4, axis_name="batch"), rho)
        mean_gradient(sharpness_aware_gradient(f, rho), num_shards=4, axis_name="batch")

    The first climbs once with the gradient of the whole batch, the second in each part by itself
    (m-sharpness). With `axis_name` all devices get the same gradient, so that their parameters stay
    equal.

    Example:
      >>> loss_fn = lambda params, x: jnp.mean((params - x) ** 2)
      >>> loss_and_grad = transforms.mean_gradient(jax.value_and_grad(loss_fn), num_shards=2)
      >>> loss, grads = loss_and_grad(jnp.array(0.0), jnp.array([0.0, 2.0, 4.0, 6.0]))
      >>> print(loss, grads)
      14.0 -6.0

    Args:
      value_and_grad_fn: (params, *batch) -> (loss, gradient) or ((loss, aux), gradient).
      num_shards: number of parts. The trees in `*batch` are divided along their leading axis.
        Keyword arguments, such as batch statistics or a dropout key, go to each part whole, so that
        all parts start from the same statistics and have the same dropout masks.
      weight_fn: function (*batch) -> weight of a part: the number by which its loss is divided,
        such as the sum of a mask. A part of weight 0 adds nothing. None: all parts have the same
        weight, which is right for plain means over equal parts and wrong for masked means.
      axis_name: axis of `jax.pmap`, `jax.vmap` or `jax.shard_map`; None: no average over devices.

    Returns:
      A function with the arguments of `value_and_grad_fn`, params first. The loss is averaged too.
      The aux is that of this device, with a leading axis of parts if there are several. An nnx
      module changes as it would in that many calls.

    Raises:
      ValueError: `num_shards` is out of its range or does not divide the batch; a weight is
        negative or not finite, or all are 0. Inside `jit`, where the weights are not known, the
        result is NaN instead.
      TypeError: an argument has the wrong type.
    """
    check_static("num_shards", num_shards, 1)
    _checks.axis_name("axis_name", axis_name)

    def gradient(params: Params, *batch: Tree, **options: Tree) -> tuple[Tree, Params]:
        if axis_name is not None:
            with _passes.mapped(params, functools.partial(_varying, axis_name)) as own:
                return averaged(own, batch, options)
        return averaged(params, batch, options)

    def averaged(
        params: Params, batch: tuple[Tree, ...], options: Mapping[str, Tree]
    ) -> tuple[Tree, Params]:
        def on_part(i: jax.Array | int) -> tuple[_Sums, Any, Tree]:
            own = shard(batch, num_shards, i)
            value, raw = _passes.value_and_grads(value_and_grad_fn, (params, *own), options)
            loss, aux = value if isinstance(value, tuple) else (value, None)
            weight = None if weight_fn is None else _weight(weight_fn(*own))
            return _weighted(loss, _passes.arrays_of(raw), weight), aux, (raw, value)

        sums, aux, (raw, value) = on_part(0)
        if num_shards > 1:
            sums, aux = _rest(on_part, sums, aux, num_shards, _passes.has_changeable(params))
        loss, grads = _mean(sums, axis_name)
        grads = _passes.as_it_came(raw, _gradients.like(grads, _passes.arrays_of(raw)))
        loss = loss.astype(jnp.result_type(value[0] if isinstance(value, tuple) else value))
        return ((loss, aux) if isinstance(value, tuple) else loss), grads

    return gradient


@checked
def gradient_function(
    value_and_grad_fn: ValueAndGradFn, *arguments: Tree, num_shards: int = 1, **options: Tree
) -> GradFn:
    """Makes the `grad_fn` of an `update` from a loss with its gradient and the batch.

        grad_fn = gradient_function(loss_and_grad, model, inputs, targets)
        loss, grads = loss_and_grad(model, inputs, targets)
        optimizer.update(model, grads, grad_fn=grad_fn)

    With `nnx.value_and_grad` and `equinox.filter_value_and_grad` the first argument is the module,
    and `grad_fn` replaces its parameters alone. Batch statistics and counts of random numbers,
    which flax changes in a pass, are copied here and change in copies. Call this function before
    the clean pass, so that both passes have the same dropout masks. Under `jax.pmap` or
    `jax.shard_map`, and for micro-batches, pass `mean_gradient(loss_and_grad, ...)`, or each device
    takes its own gradient.

    Example:
      >>> loss_and_grad = jax.value_and_grad(lambda params, x: jnp.mean((params - x) ** 2))
      >>> params, x = jnp.array(1.0), jnp.array([0.0, 2.0, 4.0, 6.0])
      >>> grad_fn = transforms.gradient_function(loss_and_grad, params, x)
      >>> loss, grads = loss_and_grad(params, x)
      >>> tx = optax.chain(transforms.sam(0.5), optax.sgd(0.1))
      >>> updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
      >>> print(grads, updates)  # the gradient at 1, and -0.1 times the one at 0.5
      -4.0 0.5

    Args:
      value_and_grad_fn: (params, *batch) -> (loss, gradient) or ((loss, aux), gradient).
      *arguments: the arguments of that function: the parameters, or a module of nnx or Equinox, and
        the batch.
      num_shards: if above 1, grad_fn(params, i) is the gradient on the i-th of this many equal
        parts of the batch, for `sam(rho, num_shards=...)`; else that on the whole batch for each i.
      **options: keyword arguments of that function.

    Returns:
      A function (params, i) -> gradient, a tree like these params.

    Raises:
      ValueError: `num_shards` is out of its range, or there are no arguments; on use, the given
        parameters are not like the first argument's, or `num_shards` does not divide the batch.
    """
    check_static("num_shards", num_shards, 1)
    if not arguments:
        raise ValueError("`arguments` must begin with the parameters, got none.")
    before = _passes.copied((arguments[0], arguments[1:], options))

    def grad_fn(point: Params, i: jax.Array | int) -> Params:
        own, whole, kept = _passes.copied(before)
        moved = (_passes.with_params(own, point), *shard(whole, num_shards, i))
        _, grads = _passes.value_and_grads(value_and_grad_fn, moved, kept)
        return _given.understood("grad_fn(params, i)", _passes.arrays_of(grads), point)

    return grad_fn


def shard(batch: tuple[Tree, ...], num_shards: int, i: jax.Array | int) -> tuple[Tree, ...]:
    """Cuts the i-th of equal parts out of a batch."""
    if num_shards == 1:
        return batch
    try:
        length = _checks.num_examples(batch)
    except ValueError as error:
        raise ValueError(f"{error} Or pass it by keyword: it goes to each part whole.") from None
    if length % num_shards:
        raise ValueError(
            f"`num_shards` must divide the number of examples, {length}, got {num_shards}."
        )

    def cut(leaf: Any) -> jax.Array:
        leaf = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        part = (length // num_shards, *leaf.shape[1:])
        return _sharding.like_rows(
            _sharding.gathered_rows(leaf).reshape(num_shards, *part)[i], leaf
        )

    return jax.tree.map(cut, batch)


class _Sums(NamedTuple):
    """What parts add up to.

    Attributes:
      loss: (), in float32 at least.
      grads: tree like the gradient, in float32 at least.
      weight: (), or the number of parts.
    """

    loss: jax.Array
    grads: Params
    weight: jax.Array


def _weighted(loss: jax.Array, grads: Params, weight: jax.Array | None) -> _Sums:
    loss, grads = _tree.wide(loss), jax.tree.map(_tree.wide, grads)
    if weight is None:
        return _Sums(loss, grads, jnp.int32(1))

    def times(leaf: jax.Array) -> jax.Array:
        # The mean over nothing is NaN, and NaN times zero too.
        part = jnp.where(weight == 0, 0, weight.astype(leaf.dtype) * leaf)
        return jnp.where(weight >= 0, part, jnp.nan)

    return _Sums(times(loss), jax.tree.map(times, grads), weight)


def _weight(weight: Any) -> jax.Array:
    """Checks the weight of a part; integers stay so, in which sums are exact."""
    name, weight = "weight_fn(*batch)", jnp.asarray(weight)
    _checks.number(name, weight)
    if jnp.issubdtype(weight.dtype, jnp.integer):
        return weight.astype(jnp.int32)
    if jnp.finfo(weight.dtype).bits < 32:
        raise TypeError(
            f"`{name}` must be of an integer type or float32 at least, in which counts are exact, "
            f"got {weight.dtype}."
        )
    return weight


def _rest(
    on_part: Callable[[Any], tuple[_Sums, Any, Tree]],
    sums: _Sums,
    aux: Tree,
    num_shards: int,
    is_module: bool,
) -> tuple[_Sums, Tree]:
    """Adds the parts from the second on."""
    row = lambda leaf: jnp.zeros((num_shards, *jnp.shape(leaf)), jnp.result_type(leaf))
    rows = jax.tree.map(lambda leaf: row(leaf).at[0].set(leaf), aux)

    def add(_: None, carry: tuple[_Sums, Tree], j: jax.Array) -> tuple[_Sums, Tree]:
        total, rows = carry
        new, aux, _ = on_part(j + 1)
        total = jax.tree.map(jnp.add, total, new)
        return total, jax.tree.map(lambda rows, leaf: rows.at[j + 1].set(leaf), rows, aux)

    if not is_module:
        return _loops.scan(add, (sums, rows), num_shards - 1)
    # A module is changed by each call, which no loop of JAX can hold.
    for j in range(num_shards - 1):
        sums, rows = add(None, (sums, rows), jnp.int32(j))
    return sums, rows


def _mean(sums: _Sums, axis_name: str | tuple[str, ...] | None) -> tuple[jax.Array, Params]:
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)
    if not isinstance(sums.weight, jax.core.Tracer) and sums.weight == 0:
        raise ValueError("`weight_fn(*batch)` must be positive for some part, got 0 for all.")
    divided = lambda leaf: _numerics.divide(leaf, sums.weight.astype(leaf.dtype), otherwise=jnp.nan)
    return divided(sums.loss), jax.tree.map(divided, sums.grads)


def _varying(axis_name: str | tuple[str, ...], leaf: Any) -> Any:
    """Marks a parameter as each device's own.

    Of parameters that `jax.shard_map` knows to be the same everywhere a gradient is the sum over
    the devices already, and its mean would be too large by their number.
    """
    if not isinstance(leaf, jax.Array):
        return leaf
    try:
        return lax.pcast(leaf, axis_name, to="varying")
    except ValueError:  # under `jax.vmap`, or it is each device's own already
        return leaf
