"""Curvature matrices that follow from a function at its parameters and data.

Every one is the linear map v -> A v of a *linearisation* at the parameters. `jax.linearize` splits
it into residuals, computed once, and the linear part, run once a product: of a multi-layer
perceptron's Hessian product a quarter is saved (operation counts in benchmarks/speed).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.tree_util import Partial

from regjax import _checks, _chunks, _jaxprs, _loops, _losses, _meshes, _programs
from regjax._base import (
    Batch,
    Params,
    Tree,
    couples_examples,
)
from regjax._meshes import on_one_mesh
from regjax._one_program import one_program
from regjax._programs import Program
from regjax._sharding import Placement, find
from regjax._space import Space
from regjax._subsets import of_leaves
from regjax.curvature._operators._kept import slim
from regjax.curvature._operators._operator import Operator
from regjax.curvature._operators._traced import TracedOperator, image
from regjax.curvature._precision import precision

# Residuals above this many bytes are recomputed in each product instead of kept: 8 KB an example
# for a 269k-parameter MLP, 1 MB an example for a small convnet.
CACHE_BYTES = 2**30
# So few are computed in no time by code that was compiled in no time.
_SMALL_BYTES = 2**22


class Linearization(NamedTuple):
    """How a curvature matrix follows from a function, as static functions.

    Attributes:
      linearize: (function, params, *batch) -> the linear map v -> A v as a `Partial`, for the mean
        over the examples of that batch; None: nothing can be kept.
      multiply: (function, params, vector, *batch) -> A v in one go, for when nothing is kept.
      of_part: (function of some leaves, these) -> what is linearised, where the function gives more
        than it is asked for; None: it does not.
    """

    linearize: Partial | None
    multiply: Partial
    of_part: Partial | None = None

    @property
    def coarser(self) -> "Linearization | None":
        """The same with steps of differences twice as long; None: there are none."""
        multiply = _doubled(self.multiply)
        return None if multiply is self.multiply else self._replace(multiply=multiply)


def _doubled(function: Any) -> Any:
    """A `Partial`, and those that it holds, with twice the `step` where it has one."""
    if not isinstance(function, Partial):
        return function
    arguments = [_doubled(argument) for argument in function.args]
    keywords = dict(function.keywords)
    if "step" in keywords:
        keywords["step"] = 2 * keywords["step"]
    elif all(new is old for new, old in zip(arguments, function.args, strict=True)):
        return function
    return Partial(function.func, *arguments, **keywords)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["linearization", "function", "params", "batch", "linear_map"],
    meta_fields=["chunk_size", "placement"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class CurvatureOperator(TracedOperator):
    """A matrix that follows from a function at its parameters, with its data on the device.

    `hessian`, `gauss_newton`, `fisher` and `empirical_fisher` make it.

    Example:
      >>> hessian = curvature.hessian(lambda w: 2 * w[0] ** 2 + w[0] * w[1], jnp.zeros(2))
      >>> print(hessian)
      CurvatureOperator(shape=(2, 2), dtype=float32)
      >>> print(hessian.dense())
      [[4. 1.]
       [1. 0.]]

    Attributes:
      linearization: how the matrix follows from `function`.
      function: the program of the loss or the model.
      params: the parameters.
      batch: the arrays with a leading axis of examples.
      linear_map: the linear map at `params`, kept if its residuals fit `CACHE_BYTES`; else None.
      chunk_size: number of examples per pass over the network, on each device; None for all at
        once.
      placement: where the arrays lie if they are on several devices; else None.
    """

    linearization: Linearization
    function: Callable[..., Tree]
    params: Params
    batch: Batch
    linear_map: Partial | None
    chunk_size: int | None
    placement: Placement | None

    @property
    def space(self) -> Space:
        return Space.at(self.params, self.placement)

    @property
    def eps(self) -> float:
        # The whole batch at once on one device: it is traced, not computed.
        whole = dataclasses.replace(self, chunk_size=None, placement=None)
        return super(CurvatureOperator, whole).eps

    @property
    def home(self) -> Mesh | None:
        return None if self.placement is None else self.placement.home

    @on_one_mesh
    def at(self, params: Params) -> "CurvatureOperator":
        """Makes the same matrix at other parameters, with the data of this one.

        Inside of `jax.jit` nobody sees how arrays are divided over devices. There it is made of an
        operator that was built outside, and all vectors are divided as that one's parameters are.

        Example:
          >>> hessian = curvature.hessian(lambda w: jnp.sum(w**3), jnp.ones(1))
          >>> print(hessian.at(jnp.array([2.0])).dense())
          [[12.]]

        Args:
          params: a tree like the parameters of this one.

        Returns:
          A `CurvatureOperator`.

        Raises:
          ValueError: `params` has another structure or other shapes.
          TypeError: it is not real.
        """
        _checks.same_tree("params", params, self.params)
        _checks.real_tree("params", params)
        params, linear_map = self.space.place(self.space.put(params)), None
        if self.linear_map is not None:
            linear_map = _linear_map(self.linearization, self.function, params, self.batch)
        return dataclasses.replace(self, params=params, linear_map=linear_map)

    @property
    def coarser(self) -> "CurvatureOperator | None":
        linearization = self.linearization.coarser
        return linearization and dataclasses.replace(self, linearization=linearization)

    def apply(self, tree: Params) -> Params:
        if self.linear_map is not None:
            return self.linear_map(tree)
        return self.linearization.multiply(self.function, self.params, tree, *self.batch)

    def product(self, vector: jax.Array) -> jax.Array:
        if self.chunk_size is None:
            return super().product(vector)
        return _vector_of(self.space, self._over_chunks(_tree_of(self.space, vector)))

    def block_product(self, rows: jax.Array) -> jax.Array:
        if self.chunk_size is not None and _loops.is_concrete(self, rows):
            return jnp.stack([self.product(vector) for vector in rows])
        return super().block_product(rows)

    @on_one_mesh
    def matvec(self, vector: Params) -> Params:
        if self.chunk_size is None:
            return super().matvec(vector)
        self._check_vector(vector)
        return _typed(self.space, self._over_chunks(self.space.put(vector)))

    def _over_chunks(self, tree: Params) -> Params:
        """A v of a tree, of which each device has what it has of the parameters."""
        one = dataclasses.replace(self, batch=(), chunk_size=None, placement=None)
        return _chunks.mean(_of_chunk, (one, tree), self.batch, self.chunk_size, self.placement)

    def facts(self) -> dict[str, Tree]:
        return {
            "params": self.params, "batch": self.batch, "function": self.function,
            "linearization": self.linearization, "program": program(self, self.batch),
        }  # fmt: skip

    def product_bytes(self, count: int) -> int:
        if self.chunk_size is None:
            return super().product_bytes(count)
        # One chunk on one device, one vector at a time: slices of the data, sums over the chunks.
        row = lambda leaf: jax.ShapeDtypeStruct((self.chunk_size, *leaf.shape[1:]), leaf.dtype)
        batch = jax.tree.map(row, self.batch)
        # Several follow one another, and are put together at the end.
        num_vectors = 1 if count == 1 else 2 * count
        extra = self.space.num_bytes(batch) + num_vectors * self.size * self.dtype.itemsize
        whole = dataclasses.replace(self, chunk_size=None, placement=None)
        whole = jax.eval_shape(lambda same: same, whole)
        return dataclasses.replace(whole, batch=batch).product_bytes(1) + extra

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        of_part, block = of_leaves(self.function, self.params, inside)
        own = self.linearization.of_part
        function: Any = of_part if own is None else Partial(own.func, of_part)
        return assemble(self.linearization, function, block, self.batch, self.chunk_size)


class Form(NamedTuple):
    """How a matrix follows from data of the shapes of a batch and of what it is split into.

    Attributes:
      linearization: how it follows from `function`; may hold a loss of the outputs.
      function: the program of the loss or the model.
      weights: (params, *batch) -> the weights of a loss of weighted means, over the number of
        examples; None for plain means.
    """

    linearization: Linearization
    function: Callable[..., Tree]
    weights: Partial | None = None


def parts_of(
    function: Callable[..., Tree], params: Params, batch: Batch, chunk_size: int | None
) -> tuple[tuple[Batch, ...], int | None]:
    """Shapes of the batch and of all that it is split into, on its devices, and whether it is."""
    return _chunks.parts_of(function, batch, chunk_size, find(batch, params))


def trace(function: Callable[..., Tree], *signatures: Batch) -> Program:
    """The program of a loss or a model, with full float32 products, shared with equal ones."""
    with precision():
        coupled = couples_examples(function)
        return _programs.share(_programs.trace(function, *signatures, couples_examples=coupled))


def build(form: Form, params: Params, batch: Batch, chunk_size: int | None) -> CurvatureOperator:
    """The operator of all data."""
    linearization, function, weights = form
    if weights is not None:
        factors = _losses.factors_of(weights, params, batch)
        if chunk_size is not None:
            size = min(chunk_size, _checks.num_examples(batch))
            _losses.check_parts(weights, params, batch, size)
        linearization, function = _losses.with_factors((linearization, function), factors)
    return assemble(linearization, function, params, batch, chunk_size)


def program(operator: CurvatureOperator, batch: Batch) -> str:
    """What a product of `batch` computes, in a few letters, the same ones in each process."""
    linearization, function, params, batch = _programs.structs(
        (operator.linearization, operator.function, operator.params, batch)
    )

    def multiply(linearization: Linearization, function: Partial, *arguments: Tree) -> Tree:
        return linearization.multiply(function, *arguments)

    with precision():
        traced = jax.make_jaxpr(multiply)(linearization, function, params, params, *batch)
    return _jaxprs.describe(traced, lasting=True).text[:16]


def assemble(
    linearization: Linearization,
    function: Callable[..., Tree],
    params: Params,
    batch: Batch,
    chunk_size: int | None,
) -> CurvatureOperator:
    """An operator from its parts: puts them where they belong, keeps the residuals if they fit."""
    linear_map, num_parts = None, 1
    params = _meshes.whole(params)
    # Of chunks each device has all: inside of `jax.jit` explicit axes leave no other way.
    batch = batch if chunk_size is None else _meshes.whole(batch)
    placement = find(batch, params, function, linearization)
    if placement is not None:
        linearization, function, params = placement.replicate((linearization, function, params))
        batch, num_parts = placement.shard(batch), placement.num_parts
    if chunk_size is not None:
        chunk_size = min(chunk_size, _checks.num_examples(batch) // num_parts)
    elif linearization.linearize is not None and (placement is None or placement.takes_parts):
        # Made apart from the products, what is kept would lie where they send it elsewhere: of
        # parameters divided with the examples twice as many bytes as the gradient sends twice.
        of = linearization, function, params, batch
        residuals = jax.tree.leaves(_large_linear_map.eval_shape(*of))
        num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in residuals)
        if num_bytes <= CACHE_BYTES * num_parts:
            is_small = num_bytes <= _SMALL_BYTES
            linear_map = (_small_linear_map if is_small else _large_linear_map)(*of)
    return CurvatureOperator(
        linearization, function, params, batch, linear_map, chunk_size, placement
    )


def _linear_map(
    linearization: Linearization, function: Callable[..., Tree], params: Params, batch: Batch
) -> Partial:
    with precision():
        return slim(_linearized, linearization, function, params, batch)


def _linearized(
    linearization: Linearization, function: Callable[..., Tree], params: Params, batch: Batch
) -> Partial:
    assert linearization.linearize is not None
    return linearization.linearize(function, params, *batch)


_small_linear_map = _programs.bounded(one_program()(_linear_map))
_large_linear_map = _programs.bounded(jax.jit(_linear_map))


def _of_chunk(operands: tuple[CurvatureOperator, Params], *batch: Tree) -> Params:
    operator, tree = operands
    found = image(dataclasses.replace(operator, batch=batch), tree)
    # Chunks are added up as wide as vectors are.
    return jax.tree.map(lambda leaf: leaf.astype(operator.dtype), found)


@functools.partial(jax.jit, static_argnums=0)
def _tree_of(space: Space, vector: jax.Array) -> Params:
    return space.unravel(vector)


@functools.partial(jax.jit, static_argnums=0)
def _typed(space: Space, tree: Params) -> Params:
    typed = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, space.like())
    return space.place(typed)


@functools.partial(jax.jit, static_argnums=0)
def _vector_of(space: Space, tree: Params) -> jax.Array:
    return space.ravel(tree)
