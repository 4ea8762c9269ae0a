"""Curvature matrices known by their products: Hessian, Gauss-Newton, Fisher.

Every one is the linear map v -> A v of a *linearisation* at the parameters. `jax.linearize` splits
it into residuals, computed once, and the linear part, run once a product: of a multi-layer
perceptron's Hessian product a quarter is saved (operation counts in benchmarks/speed).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks, _chunks, _loops, _tree
from regjax._base import as_partial, check_loss
from regjax._sharding import Columns, Placement, find
from regjax.curvature._precision import precision

# Residuals above this many bytes are recomputed in each product instead of kept: 8 KB an example
# for a 269k-parameter MLP, 1 MB an example for a small convnet.
CACHE_BYTES = 2**30
# A dense float32 matrix of this order takes 4 GiB.
_MAX_DENSE = 2**15


class Rule(NamedTuple):
    """How a curvature matrix follows from a function, as static functions.

    Attributes:
      linearize: (function, params, *batch) -> the linear map v -> A v as a `Partial`, for the mean
        over the examples of that batch.
      multiply: (function, params, vector, *batch) -> A v in one go, for when nothing is kept.
    """

    linearize: Partial
    multiply: Partial


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rule", "function", "params", "batch", "linear_map"],
    meta_fields=["chunk_size", "placement"],
)
@dataclasses.dataclass(frozen=True)
class Operator:
    """A symmetric matrix over the parameters, known by its products; n is their number.

    A pytree, so that it passes through `jax.jit` as an argument: its leaves are the parameters, the
    batch and the residuals; the functions are static. Build it with `hessian`, `gauss_newton`,
    `fisher`, `empirical_fisher`, `from_gradient` or `from_matvec`. A second operator of the same
    functions and shapes compiles nothing; a new `lambda` is a new function and compiles again.

    Attributes:
      rule: how the matrix follows from `function`; None for `from_matvec`.
      function: the loss or the model, a callable pytree; None for `from_matvec`.
      params: the parameters, or for `from_matvec` the example of a vector.
      batch: the arrays with a leading axis of examples.
      linear_map: the linear map at `params`, kept if its residuals fit `CACHE_BYTES`; else None.
      chunk_size: number of examples per pass over the network, on each device; None for all at
        once.
      placement: where the arrays lie if they are on several devices; else None.
    """

    rule: Rule | None
    function: Any
    params: Any
    batch: tuple[Any, ...]
    linear_map: Partial | None
    chunk_size: int | None
    placement: Placement | None = None

    @property
    def columns(self) -> Columns:
        """How rows of n columns are kept: divided over the devices of the arrays, if several."""
        return Columns(self.shape[0], None if self.placement is None else self.placement.mesh)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        return (_tree.size(self.params),) * 2

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the flat vectors: the widest of the parameters, float32 at least."""
        return _tree.vector_dtype(self.params)

    @property
    def takes_blocks(self) -> bool:
        """Whether several vectors cost less together than one after the other."""
        return jax.default_backend() != "cpu"

    def matvec(self, vector: Any) -> Any:
        """The product with `vector`, a tree like `params`; returns another one.

        Raises:
          ValueError: `vector` has another structure or other shapes than `params`.
        """
        _checks.same_tree("vector", vector, self.params)
        return _tree.unravel(product(self, _tree.ravel(vector, self.dtype)), self.params)

    def matmat(self, vectors: Any) -> Any:
        """The products with k vectors: a tree like `params` whose leaves have a leading axis k.

        On accelerators the k products are one batched product; on CPU, where that gains nothing,
        they follow one another.

        Raises:
          ValueError: `vectors` has another structure or other shapes than (k,) + `params`.
        """
        leading = jnp.shape(jax.tree.leaves(vectors)[0])[:1] if jax.tree.leaves(vectors) else ()
        _checks.same_tree("vectors", vectors, self.params, leading=leading)
        ravel = jax.vmap(lambda tree: _tree.ravel(tree, self.dtype))
        unravel = jax.vmap(lambda flat: _tree.unravel(flat, self.params))
        return unravel(block_product(self, ravel(vectors)))

    def dense(self) -> jax.Array:
        """The matrix (n, n), made symmetric, in the order of `jax.tree.leaves(params)`.

        Raises:
          ValueError: n is above 32768 (4 GiB in float32).
        """
        size = self.shape[0]
        if size > _MAX_DENSE:
            raise ValueError(
                f"`dense` must have at most {_MAX_DENSE} parameters, got {size}; use "
                "`top_eigenpairs` or `spectral_density`."
            )
        matrix = block_product(self, jnp.eye(size, dtype=self.dtype))
        return (matrix + matrix.T) / 2


@functools.singledispatch
def product(operator: Operator, vector: jax.Array) -> jax.Array:
    """A v for a flat `vector` (n,); the one place where products are made."""
    if operator.chunk_size is None:
        return _whole_product(operator, vector)
    whole = dataclasses.replace(operator, batch=(), chunk_size=None)
    return _chunks.mean(
        _part_product, (whole, vector), operator.batch, operator.chunk_size, operator.placement
    )


@functools.singledispatch
def block_product(operator: Operator, vectors: jax.Array) -> jax.Array:
    """A V' for the rows of `vectors` (k, n), as rows."""
    if operator.chunk_size is not None and _loops.is_concrete(operator, vectors):
        return jnp.stack([product(operator, vector) for vector in vectors])
    if jax.default_backend() == "cpu":
        return _loops.fold(
            _set_row, jnp.zeros_like(vectors), vectors.shape[0], operands=(operator, vectors)
        )
    return jax.vmap(functools.partial(product, operator))(vectors)


def hvp(loss_fn: Callable[..., Any], params: Any, vector: Any, *batch: Any) -> Any:
    """One Hessian-vector product by forward-over-reverse differentiation (Pearlmutter 1994).

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters.
      vector: tree like `params`.
      *batch: arrays with a leading axis of examples.

    Returns:
      H v, a tree like `params`, in the units of the loss per squared parameter times `vector`.

    Raises:
      ValueError: `vector` is not a tree like `params`, or the loss is not a scalar.

    References:
      B. Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6(1).
    """
    check_loss(loss_fn, params, batch)
    _checks.same_tree("vector", vector, params)
    with precision():
        return differentiate_gradient(loss_fn, params, vector, *batch)


def hessian(
    loss_fn: Callable[..., Any], params: Any, *batch: Any, chunk_size: int | None = None
) -> Operator:
    """The Hessian of the mean loss over the batch.

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples. Data are arguments: what it
        closes over is compiled in. Bind state as `jax.tree_util.Partial(loss_fn, state=...)`.
      params: tree of real floating-point parameters, n in all.
      *batch: arrays with a leading axis of examples.
      chunk_size: number of examples per pass, for bounded memory; the ragged last chunk counts by
        its size. None takes the whole batch at once and keeps the linearisation if it fits. Where
        the batch is divided over the devices of a mesh, each passes over its own examples.

    Returns:
      An `Operator` of shape (n, n).

    Raises:
      TypeError: a parameter is not real floating point.
      ValueError: the loss is not a scalar, the batch has no common leading axis, `chunk_size` is
        not positive, or it splits a batch whose examples the loss couples (batch norm in train
        mode: ask for "train_per_chunk" by name). The arrays of the batch are divided differently,
        or lie on a mesh with explicit axes.
    """
    check_loss(loss_fn, params, batch)
    rule = Rule(Partial(_linearize_gradient), Partial(differentiate_gradient))
    return build(rule, as_partial(loss_fn), params, batch, chunk_size)


def from_matvec(matvec: Callable[[Any], Any], like: Any) -> Operator:
    """An operator from any symmetric product.

    Args:
      matvec: v -> A v on trees (or arrays) like `like`; traceable by JAX. Arrays that it closes
        over are compiled in: bind them with `jax.tree_util.Partial(matvec_of, matrix)`.
      like: an example of a vector: a tree or an array of real floating point.

    Returns:
      An `Operator` of shape (n, n).
    """
    _checks.floating_tree("like", like)
    linear_map = as_partial(matvec)
    placement = find((), like, linear_map)
    if placement is not None:
        like, linear_map = placement.copied((like, linear_map))
    return Operator(None, None, like, (), linear_map, None, placement)


def from_gradient(grad_fn: Callable[[Any], Any], params: Any) -> Operator:
    """The Hessian of a loss that is known by its gradient alone.

    Args:
      grad_fn: params -> gradient; the same function again, or `jax.tree_util.Partial` of the same
        function with the data as arguments, compiles nothing again.
      params: tree of parameters.

    Returns:
      An `Operator` of shape (n, n): the Jacobian of `grad_fn` at `params`.

    Raises:
      TypeError: a parameter is not real floating point.
    """
    return build(_JACOBIAN, as_partial(grad_fn), params, (), None)


def build(
    rule: Rule,
    function: Any,
    params: Any,
    batch: tuple[Any, ...],
    chunk_size: int | None,
) -> Operator:
    """An operator from its rule: checks the chunks, keeps the residuals if they fit."""
    _checks.floating_tree("params", params)
    linear_map, num_parts = None, 1
    placement = find(batch, params, function, rule)
    if placement is not None:
        rule, function, params = placement.copied((rule, function, params))
        batch, num_parts = placement.divided(batch), placement.num_parts
    if chunk_size is not None:
        num_examples = _checks.num_examples(batch)
        chunk_size = min(_checks.integer("chunk_size", chunk_size), num_examples // num_parts)
        if chunk_size < num_examples:
            _chunks.refuse_coupled(function, chunk_size)
    else:
        residuals = jax.tree.leaves(_linear_map.eval_shape(rule, function, params, batch))
        num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in residuals)
        if num_bytes <= CACHE_BYTES * num_parts:
            linear_map = _linear_map(rule, function, params, batch)
    return Operator(rule, function, params, batch, linear_map, chunk_size, placement)


@functools.singledispatch
def rebuilt(operator: Operator, function: Any, params: Any) -> Operator:
    """The same kind of matrix over the same data, of another function and its parameters."""
    return build(cast(Rule, operator.rule), function, params, operator.batch, operator.chunk_size)


def _linearize_gradient(loss_fn: Callable[..., Any], params: Any, *batch: Any) -> Any:
    return jax.linearize(jax.grad(lambda p: loss_fn(p, *batch)), params)[1]


def differentiate_gradient(
    loss_fn: Callable[..., Any], params: Any, vector: Any, *batch: Any
) -> Any:
    return jax.jvp(jax.grad(lambda p: loss_fn(p, *batch)), (params,), (vector,))[1]


def _linearize(function: Callable[[Any], Any], params: Any) -> Any:
    return jax.linearize(function, params)[1]


def _differentiate(function: Callable[[Any], Any], params: Any, vector: Any) -> Any:
    return jax.jvp(function, (params,), (vector,))[1]


_JACOBIAN = Rule(Partial(_linearize), Partial(_differentiate))


@jax.jit
def _linear_map(rule: Rule, function: Any, params: Any, batch: Any) -> Partial:
    with precision():
        return rule.linearize(function, params, *batch)


@jax.jit
def _whole_product(operator: Operator, vector: jax.Array) -> jax.Array:
    params = operator.params
    tree = _tree.unravel(vector, params)
    with precision():
        if operator.linear_map is not None:
            image = operator.linear_map(tree)
        else:
            rule = cast(Rule, operator.rule)
            image = rule.multiply(operator.function, params, tree, *operator.batch)
    _checks.same_tree("matvec(vector)", image, params)
    return _tree.ravel(image, vector.dtype)


def _part_product(pair: Any, *batch: Any) -> jax.Array:
    operator, vector = pair
    return _whole_product(dataclasses.replace(operator, batch=batch), vector)


def _set_row(operands: Any, rows: jax.Array, i: jax.Array) -> jax.Array:
    operator, vectors = operands
    return rows.at[i].set(product(operator, vectors[i]))
