"""What a solver takes of a device's memory, and what to lower when that is too much."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax.curvature._operators import Operator, product

_EXHAUSTED = "RESOURCE_EXHAUSTED"


class MemoryEstimate(NamedTuple):
    """Bytes on each device that a solver needs; Python integers.

    Attributes:
      held: the operator's own arrays: parameters, batch, and what is kept of a linearisation.
      basis: the solver's state: the rows of its bases and a few vectors.
      product: temporaries and result of one product (of all that are made at once), from the
        compiler's own account.
      result: what is made beside the state: eigenvectors, or the probes of a density.
      total: held + basis + the larger of product and result.
    """

    held: int
    basis: int
    product: int
    result: int
    total: int


class Plan(NamedTuple):
    """A solver's need, without running it.

    Attributes:
      solver: its name.
      operator: the matrix.
      init: () -> its state before the first product.
      beside: state -> the largest tree that is made while the state is still there.
      arguments: names of the solver's arguments that make it smaller.
    """

    solver: str
    operator: Operator
    init: Callable[[], Any]
    beside: Callable[[Any], Any]
    arguments: tuple[str, ...]


def estimate(plan: Plan) -> MemoryEstimate:
    """Adds up what the arrays of the plan take."""
    operator, state = plan.operator, jax.eval_shape(plan.init)
    result = _num_bytes(jax.eval_shape(plan.beside, state), operator)
    held, basis = _num_bytes(operator, operator), _num_bytes(state, operator)
    product = _product_bytes(operator, getattr(state, "block", 1))
    return MemoryEstimate(held, basis, product, result, held + basis + max(product, result))


@contextlib.contextmanager
def explained(plan: Plan) -> Iterator[None]:
    """Says what to lower when a device has no more memory.

    Raises:
      MemoryError: it has not, with the estimate.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _EXHAUSTED not in str(error):
            raise
        names = " or ".join(f"`{name}`" for name in plan.arguments)
        raise MemoryError(
            f"`{plan.solver}` must fit into the memory of the device, got out of memory. Lower "
            f"{names}, or the `chunk_size` of the operator.{_needed(plan)}"
        ) from error


def _needed(plan: Plan) -> str:
    try:
        found = estimate(plan)
    except (TypeError, jax.errors.JaxRuntimeError):  # no account of a product
        return ""
    return (
        f" It needs about {_short(found.total)} on each device: {_short(found.basis)} for its "
        f"basis, {_short(found.product)} for a product, {_short(found.result)} for its result, "
        f"{_short(found.held)} for parameters, data and what is kept of them."
    )


def _short(num_bytes: int) -> str:
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, 4)
    return f"{num_bytes / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _num_bytes(tree: Any, operator: Operator) -> int:
    """On one device; of long rows it has its columns."""
    columns = operator.columns

    def num_bytes(leaf: Any) -> int:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return 0  # or some few
        shape, sharding = leaf.shape, getattr(leaf, "sharding", None)
        if sharding is not None:
            shape = sharding.shard_shape(shape)
        elif columns.mesh is not None and shape[-1:] == (columns.padded,):
            shape = (*shape[:-1], columns.padded // columns.mesh.size)
        return math.prod(shape) * dtype.itemsize

    return sum(map(num_bytes, jax.tree.leaves(tree)))


def _product_bytes(operator: Operator, count: int) -> int:
    """Temporaries and results of `count` products at once."""
    if type(operator) is not Operator:
        raise TypeError(
            "`operator` must have its data on the device, got one that reads them; take that of "
            "one batch."
        )
    size, dtype, extra = operator.shape[0], operator.dtype, 0
    if operator.chunk_size is not None:
        # One chunk on one device, one vector at a time: slices of the data, sums over the chunks.
        row = lambda leaf: jax.ShapeDtypeStruct((operator.chunk_size, *leaf.shape[1:]), leaf.dtype)
        batch = jax.tree.map(row, operator.batch)
        extra = _num_bytes(batch, operator) + count * size * dtype.itemsize
        whole = dataclasses.replace(operator, chunk_size=None, placement=None)
        operator = dataclasses.replace(jax.eval_shape(lambda same: same, whole), batch=batch)
        count = 1
    several = product if count == 1 else jax.vmap(product, (None, 0))
    vectors = jax.ShapeDtypeStruct((size,) if count == 1 else (count, size), dtype)
    account: Any = jax.jit(several).lower(operator, vectors).compile().memory_analysis()
    return account.temp_size_in_bytes + account.output_size_in_bytes + extra
