"""What scores are compared with: the loss without each unit, and the gates' second derivatives.

Both take one pass over the data for each gate, in blocks of gates, and in chunks of examples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks, _chunks, _loops, _tree
from regjax._arguments import checked
from regjax._base import Batch, LossFn, Tree, check_loss
from regjax._space import Space


@checked
def oracle_importance(
    gate_loss: LossFn,
    gates: Tree,
    *batch: Tree,
    chunk_size: int | None = None,
    block_size: int = 16,
) -> Tree:
    """Computes the squared change of the loss when each gate alone is set to 0.

        I_c = (L(gates) - L(gates with z_c = 0))^2

    This takes one forward pass per gate; Taylor importance takes one gradient for all gates.

    Example:
      >>> weights = jnp.array([1.0, 2.0, 0.0])  # with which three units go into the output
      >>> gate_loss = lambda gates, x: jnp.mean((x * jnp.sum(weights * gates)) ** 2)
      >>> print(pruning.oracle_importance(gate_loss, jnp.ones(3), jnp.ones((2, 1))))
      [25. 64.  0.]

    Args:
      gate_loss: (gates, *batch) -> scalar, the mean over the examples, from `gated_loss`.
      gates: tree of gates, 1 for units that are there and 0 for removed ones, which score 0.
      *batch: arrays with a leading axis of examples.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.
      block_size: number of gates at a time. With convolutions on CPU a large block only takes
        longer to compile.

    Returns:
      The scores, a tree like `gates`, in float32 at least, in squared units of the loss.

    Raises:
      ValueError: `gate_loss` is no scalar or cannot be split, or a size is below 1.
      TypeError: a gate is not real floating point, or a size not an integer.

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771, whose Taylor importance approximates it.
    """
    check_loss(gate_loss, gates, batch, name="gate_loss")
    # The row behind the last gate is all zeros and gives the loss with none removed.
    losses = _by_unit_rows(_losses, gate_loss, gates, batch, chunk_size, block_size, extra=1)
    changes = (losses[:-1] - losses[-1]) ** 2
    return _unravel(changes, gates)


def gate_hessian_diagonal(
    gate_loss: LossFn,
    gates: Tree,
    *batch: Tree,
    chunk_size: int | None = None,
    block_size: int = 16,
) -> Tree:
    """Computes the second derivatives of the loss with respect to each gate, exactly.

    By one Hessian product for each gate. There are few gates: for the diagonal over all parameters
    use `curvature.diagonal`.

    Args:
      gate_loss: (gates, *batch) -> scalar, the mean over the examples.
      gates: tree of gates.
      *batch: arrays with a leading axis of examples.
      chunk_size: examples per pass, for bounded memory; None: all at once.
      block_size: products at a time, as in `oracle_importance`.

    Returns:
      A tree like `gates`, in float32 at least.

    Raises:
      ValueError: `gate_loss` is no scalar or cannot be split, or a size is below 1.
      TypeError: a gate is not real floating point, or a size not an integer.
    """
    rows = _by_unit_rows(_products, gate_loss, gates, batch, chunk_size, block_size, extra=0)
    return _unravel(rows, gates)


def _by_unit_rows(
    function: Callable[..., jax.Array], gate_loss: LossFn, gates: Tree, batch: Batch,
    chunk_size: int | None, block_size: int, *, extra: int,
) -> jax.Array:  # fmt: skip
    """Applies `function` to each unit vector and `extra` zero vectors; the values as one array."""
    gate_loss, chunk_size = _chunks.prepared(gate_loss, gates, batch, chunk_size, name="gate_loss")
    size, dtype = _tree.size(gates), _tree.vector_dtype(gates)
    length = size + extra
    block = min(_checks.integer("block_size", block_size), length)
    num_blocks = -(-length // block)
    bound = Partial(function, gate_loss)

    def fill(_: None, values: jax.Array, i: jax.Array) -> jax.Array:
        # Numbers beyond the last unit give rows of zeros.
        rows = jax.nn.one_hot(i * block + jnp.arange(block, dtype=jnp.int32), size, dtype=dtype)
        found = _chunks.mean(bound, (gates, rows), batch, chunk_size)
        return jax.lax.dynamic_update_slice_in_dim(values, found, i * block, 0)

    zeros = jnp.zeros(num_blocks * block, dtype)
    return _loops.scan(fill, zeros, num_blocks)[:length]


def _losses(gate_loss: Partial, at: tuple[Tree, jax.Array], *batch: Tree) -> jax.Array:
    gates, rows = at
    space = Space.of(gates)
    flat = space.ravel(gates)
    without = lambda row: gate_loss(space.unravel(flat * (1 - row)), *batch)
    return _loops.map(without, rows).astype(rows.dtype)


def _products(gate_loss: Partial, at: tuple[Tree, jax.Array], *batch: Tree) -> jax.Array:
    gates, rows = at
    space = Space.of(gates)
    flat = space.ravel(gates)
    gradient = jax.grad(lambda vector: gate_loss(space.unravel(vector), *batch))
    along = lambda row: jnp.vdot(row, jax.jvp(gradient, (flat,), (row,))[1])
    return _loops.map(along, rows)


def _unravel(vector: jax.Array, gates: Tree) -> Tree:
    """Shapes `vector` as a tree like `gates`, but wide."""
    return Space.of(jax.tree.map(_tree.wide, gates)).unravel(vector)
