"""Functions of a whole batch, computed in chunks of its examples, so that memory stays bounded."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _loops, _programs, _tree
from regjax._base import (
    Batch,
    LossFn,
    Params,
    PRNGKey,
    Tree,
    applied,
    as_partial,
    check_scalar,
    couples_examples,
)
from regjax._losses import declared, factors_of, mean_loss, mean_weights, with_factors
from regjax._separable import ensure_separable
from regjax._sharding import Placement, find


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["function", "params", "batch"],
    meta_fields=["size", "placement"],
)
@dataclasses.dataclass(frozen=True)
class _Chunked:
    """`function(params, *chunk)` over chunks of `size` examples, on each device that has some."""

    function: Callable[..., Tree]
    params: Params
    batch: Batch
    size: int
    placement: Placement | None = None

    @property
    def length(self) -> int:
        """The number of examples, on each device if they are divided."""
        num_parts = 1 if self.placement is None else self.placement.num_parts
        return _checks.num_examples(self.batch) // num_parts

    def at(self, start: ArrayLike, length: int) -> Tree:
        if self.placement is not None and not self.placement.takes_parts:
            return self.function(self.params, *self.placement.together(self.batch, start, length))
        chunk = jax.tree.map(
            lambda array: jax.lax.dynamic_slice_in_dim(array, start, length), self.batch
        )
        return self.function(self.params, *chunk)


def prepared(
    loss_fn: Callable[..., Tree],
    params: Params,
    batch: Batch,
    chunk_size: int | None,
    *,
    name: str = "loss_fn",
    single: bool = False,
) -> tuple[LossFn, int | None]:
    """A loss as it is now, ready to be split, and the size of chunks, None where one holds all.

    Args:
      loss_fn: as the user gave it.
      params: the parameters.
      batch: all data.
      chunk_size: as the user gave it.
      name: what the loss is called in a message.
      single: whether single examples are wanted as well.

    Returns:
      (params, *part) -> the mean over the examples of a part, a pytree; and the size.

    Raises:
      TypeError: the loss is not callable, or no real floating-point number.
      ValueError: the loss is no scalar, a weight is not positive, or the batch would be split
        though the loss couples its examples: it says so, or it is no mean over some of them (seen
        outside of `jit` only).
    """
    _checks.function(name, loss_fn)
    _checks.floating_tree("params", params)
    parts, size = parts_of(loss_fn, batch, chunk_size)
    smallest = size
    if single:
        parts, smallest = parts + parts_of(loss_fn, batch, 1)[0], 1
    if (placement := find(batch, params)) is not None:  # whoever goes device by device
        own, _ = parts_of(loss_fn, batch, chunk_size, placement)
        parts = parts + own
    program = traced(loss_fn, params, *parts, name=name)
    if smallest is not None:
        ensure_separable(
            loss_fn, params, batch, size=smallest, name=name,
            functions=(loss_fn,), programs=(program,),
        )  # fmt: skip
    loss = mean_loss(program)
    if loss is not program:
        factors = factors_of(Partial(mean_weights, program), params, batch, name)
        loss = with_factors(loss, factors)
    return declared(loss), size


def fixed(
    function: Callable[..., Tree],
    params: Params,
    inputs: Tree,
    chunk_size: int | None,
    *rest: Tree,
) -> _programs.Program:
    """A model as it is now, for inputs that go through `each`: all of them, or chunks.

    Args:
      function: (params, inputs, *rest) -> outputs.
      params: the parameters.
      inputs: arrays with a leading axis of examples.
      chunk_size: as the user gave it.
      *rest: what is not split.
    """
    parts, _ = parts_of(function, (inputs,), chunk_size)
    signatures = [(params, *part, *rest) for part in parts]
    return _programs.share(_programs.trace(function, *signatures))


def traced(
    loss_fn: Callable[..., Tree], params: Params, *parts: Batch, name: str = "loss_fn"
) -> _programs.Program:
    """The program of a loss for batches of some shapes, shared with equal ones."""
    coupled = couples_examples(loss_fn)
    signatures = [(params, *part) for part in parts]
    program = _programs.trace(loss_fn, *signatures, couples_examples=coupled)
    check_scalar(program.outputs(*signatures[0]), name=name)
    return _programs.share(program)


def parts_of(
    function: Callable[..., Tree],
    batch: Batch,
    chunk_size: int | None,
    placement: Placement | None = None,
) -> tuple[tuple[Batch, ...], int | None]:
    """Shapes of the batch and of all that it is split into, and the size of chunks if it is split.

    Args:
      function: a loss or a model.
      batch: arrays with a leading axis of N examples.
      chunk_size: number of examples at a time, on each device; None: all at once.
      placement: where the examples lie; None: on one device.

    Raises:
      ValueError: `chunk_size` is not positive, or splits examples that `function` couples; or there
        is no example.
    """
    _checks.not_empty("batch", batch)
    if chunk_size is None:
        return (batch,), None
    num_examples, num_parts = _checks.num_examples(batch), 1
    if placement is not None:
        num_parts = placement.num_parts
    own = num_examples // num_parts
    size = min(_checks.integer("chunk_size", chunk_size), own)
    if size == num_examples:
        return (batch,), None
    refuse_coupled(function, size)
    sizes = [size] if own % size == 0 else [size, own % size]
    if placement is not None and not placement.takes_parts:
        sizes = [size * num_parts for size in sizes]
    shapes = _programs.structs(batch)
    row = lambda leaf, size: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
    rows = (jax.tree.map(functools.partial(row, size=size), shapes) for size in sizes)
    return (batch, *rows), size


def refuse_coupled(function: Callable[..., Tree], chunk_size: int) -> None:
    """A loss or a model whose examples couple is not to be split.

    Raises:
      ValueError: it says that it couples them.
    """
    if couples_examples(function):
        raise ValueError(
            f"`chunk_size` must not split a batch whose examples the loss couples (batch norm in "
            f'train mode), got {chunk_size}; use mode="evaluation", or ask for '
            'mode="train_per_chunk" by name.'
        )


def mean(
    function: Callable[..., Tree],
    params: Params,
    batch: Batch,
    chunk_size: int | None,
    placement: Placement | None = None,
) -> Tree:
    """`function(params, *batch)`, a tree of means over the examples, as the mean of its chunks.

    Args:
      function: (params, *batch) -> tree of arrays, each a mean over the examples.
      params: what does not depend on the example.
      batch: arrays with a leading axis of N examples.
      chunk_size: at most N; the ragged last chunk counts by its size. None: all at once.
      placement: over which devices the examples are divided: each goes over its own, and the
        sums are added at the end, or all over a chunk of each device's, where these are the
        devices over which the parameters are divided. None: one device, or as the compiler sees
        fit.
    """
    function = as_partial(function)
    if chunk_size is None:
        return applied(function, params, batch)
    if placement is not None and placement.num_parts == 1:
        placement = None
    chunked = _Chunked(function, params, batch, chunk_size, placement)
    num_chunks, ragged = divmod(chunked.length, chunk_size)
    total = _loops.scan(_add, _zeros(chunked), num_chunks, operands=chunked)
    total = _with_ragged(_weighted, total, chunked) if ragged else total
    return _mean_of_parts(total) if placement is not None and placement.takes_parts else total


def each(
    function: Callable[..., Tree], params: Params, batch: Batch, chunk_size: int | None
) -> Tree:
    """`function(params, *batch)`, a tree with a leading axis of examples, chunk by chunk.

    Args:
      function: (params, *batch) -> tree of arrays (N, ...).
      params: what does not depend on the example.
      batch: arrays with a leading axis of N examples.
      chunk_size: number of examples at a time; None: all at once.
    """
    function, length = as_partial(function), _checks.num_examples(batch)
    if chunk_size is None or _checks.integer("chunk_size", chunk_size) >= length:
        return applied(function, params, batch)
    num_chunks, ragged = divmod(length, chunk_size)
    chunked = _Chunked(function, params, batch, chunk_size)
    rows = jax.tree.map(
        lambda leaf: jnp.zeros((length, *leaf.shape[1:]), leaf.dtype), _zeros(chunked)
    )
    rows = _loops.scan(_set, rows, num_chunks, operands=chunked)
    return _with_ragged(_placed, rows, chunked) if ragged else rows


def sampled(
    function: Callable[..., Tree], params: Params, inputs: jax.Array, *,
    key: PRNGKey, num_samples: int, chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The mean over examples of random numbers, and its standard error over their draws, both ().

    Args:
      function: (params, inputs, keys) -> (N,), drawn anew for each example from its key.
      params: what does not depend on the example.
      inputs: (N, ...).
      key: typed key; the draws do not depend on the chunks.
      num_samples: draws for each example; with a single one the error is NaN.
      chunk_size: number of examples at a time; None: all at once.
    """
    _checks.integer("num_samples", num_samples)
    num_examples = _checks.num_examples(inputs)
    keys = jax.random.split(_checks.key("key", key), num_examples)

    def add(_: None, moments: Tree, i: jax.Array) -> Tree:
        mean, squares = moments
        each_key = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        values = each(function, params, (inputs, each_key), chunk_size)
        change = values - mean
        mean = mean + change / (i + 1).astype(mean.dtype)
        return mean, squares + change * (values - mean)

    zeros = jnp.zeros(num_examples, _tree.wide_dtype(inputs))
    mean, squares = _loops.scan(add, (zeros, zeros), num_samples)
    # NaN with a single sample: 0 / 0.
    variances = squares / (jnp.asarray(num_samples - 1.0, squares.dtype) * num_samples)
    error = jnp.sqrt(jnp.sum(jax.lax.stop_gradient(variances))) / num_examples
    return jnp.mean(mean), error


@_programs.bounded
@jax.jit
def _zeros(chunked: _Chunked) -> Tree:
    shapes = jax.eval_shape(lambda: chunked.at(0, chunked.size))
    if chunked.placement is not None:
        return chunked.placement.zeros(shapes)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


@jax.jit
def _mean_of_parts(total: Tree) -> Tree:
    return jax.tree.map(lambda parts: jnp.mean(parts, axis=0), total)


def _add(chunked: _Chunked, total: Tree, i: jax.Array) -> Tree:
    return _weighted(total, chunked, i * chunked.size, chunked.size)


@_programs.bounded
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _with_ragged(put: Callable[..., Tree], total: Tree, chunked: _Chunked) -> Tree:
    ragged = chunked.length % chunked.size
    return put(total, chunked, chunked.length - ragged, ragged)


def _weighted(total: Tree, chunked: _Chunked, start: ArrayLike, length: int) -> Tree:
    placement = chunked.placement
    if placement is not None and placement.takes_parts:
        add = functools.partial(_weighted_part, length=length)
        shared = (chunked.function, chunked.params, start)
        return placement.map_parts(add, total, chunked.batch, shared)
    share = length / chunked.length
    return jax.tree.map(lambda a, b: a + share * b, total, chunked.at(start, length))


def _weighted_part(total: Tree, batch: Batch, shared: Tree, *, length: int) -> Tree:
    function, params, start = shared
    return _weighted(total, _Chunked(function, params, batch, length), start, length)


def _set(chunked: _Chunked, rows: Tree, i: jax.Array) -> Tree:
    return _placed(rows, chunked, i * chunked.size, chunked.size)


def _placed(rows: Tree, chunked: _Chunked, start: ArrayLike, length: int) -> Tree:
    return jax.tree.map(
        lambda row, piece: jax.lax.dynamic_update_slice_in_dim(row, piece, start, 0),
        rows,
        chunked.at(start, length),
    )
