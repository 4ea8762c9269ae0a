"""The Jacobian of a model's outputs with respect to its parameters, known by its products.

Row (i, c) is the gradient of output c of example i. The C outputs of an example are the numbers in
all of its floating-point arrays, in the order of the tree.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from regjax import _checks, _chunks, _meshes, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Mask, ModelFn, Params, Tree, couples_examples
from regjax._differentiation import Mode, choose, jaxpr_of, linearized, pull, push
from regjax._meshes import on_one_mesh
from regjax._programs import Program
from regjax._sharding import Placement, find
from regjax._space import Space
from regjax._subsets import part_of
from regjax.curvature._operators._curvature import parts_of
from regjax.curvature._operators._operator import Operator, Submatrix
from regjax.curvature._operators._sandwich import (
    ensure_own_outputs,
    split,
    there_and_back,
    traced_model,
)
from regjax.curvature._operators._traced import TracedOperator
from regjax.curvature._precision import precision

# Of a dense Jacobian, as of a dense operator.
_MAX_BYTES = 2**32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["function", "params", "inputs"],
    meta_fields=["linearization", "chunk_size", "placement"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class JacobianOperator:
    """The Jacobian J (N C, n) of a model's outputs: C for each of N examples; a pytree.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> jacobian = curvature.jacobian(lambda w, x: x @ w, jnp.zeros(2), x)
      >>> print(jacobian.matvec(jnp.ones(2)), jacobian.rmatvec(jnp.ones(2)))  # X 1 and X' 1
      [1. 3.] [2. 2.]

    Attributes:
      function: the program of the model.
      params: the parameters.
      inputs: what the model sees.
      linearization: how derivatives of the model are taken.
      chunk_size: number of examples per pass, on each device; None for all at once.
      placement: where the arrays lie if they are on several devices; else None.
    """

    function: Program
    params: Params
    inputs: Tree
    linearization: Mode
    chunk_size: int | None
    placement: Placement | None

    def __repr__(self) -> str:
        return f"JacobianOperator(shape={self.shape})"

    @property
    def home(self) -> Mesh | None:
        """The mesh with explicit axes that the arrays come from; None: they are as given."""
        return None if self.placement is None else self.placement.home

    @property
    def space(self) -> Space:
        """The space of the parameters."""
        return Space.of(self.params)

    @property
    def outputs(self) -> Tree:
        """Shapes of the floating-point outputs (N, ...), None in the places of others."""
        return split(self.function.outputs(self.params, self.inputs))[0]

    @property
    def num_examples(self) -> int:
        """The number of examples N."""
        return _checks.num_examples(self.inputs)

    @property
    def num_outputs(self) -> int:
        """The number of outputs C of an example."""
        return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(self.outputs))

    @property
    def shape(self) -> tuple[int, int]:
        """(N C, n)."""
        return (self.num_examples * self.num_outputs, self.space.size)

    @on_one_mesh
    def matvec(self, vector: Params) -> Tree:
        """Computes J v for a tree like the parameters; returns one like the outputs.

        Raises:
          ValueError: `vector` has another structure or other shapes than the parameters.
          TypeError: it is complex.
        """
        vector = _as("vector", vector, self.space.like())
        vector = Space.at(self.params, self.placement).put(vector)
        operands = (dataclasses.replace(self, inputs=None), vector)
        return _chunks.each(_forward, operands, (self.inputs,), self.chunk_size)

    @on_one_mesh
    def rmatvec(self, vector: Tree) -> Params:
        """Computes J' u for a tree like the outputs; returns one like the parameters.

        Sums over the examples are of float32 at least.

        Raises:
          ValueError: `vector` has another structure or other shapes than the outputs.
          TypeError: it is complex.
        """
        vector = _as("vector", vector, self.outputs)
        whole, batch = dataclasses.replace(self, inputs=None), (self.inputs, vector)
        if self.placement is not None:
            batch = self.placement.shard(batch)
        mean = _chunks.mean(_backward, whole, batch, self.chunk_size, self.placement)
        total = jax.tree.map(lambda leaf: self.num_examples * leaf, mean)
        typed = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), total, self.space.like())
        return Space.at(self.params, self.placement).place(typed)

    def gram(self) -> Operator:
        """Makes J J' as an `Operator` on trees like the outputs, which needs no dense matrix.

        Its products are one of `rmatvec` and one of `matvec`. The other Gram matrix J'J is N times
        the `gauss_newton` of half the squared error, summed over the outputs of an example.
        """
        return GramOperator(self)

    @on_one_mesh
    def dense(self) -> jax.Array:
        """Computes the matrix (N C, n), the rows of an example beside each other.

        Raises:
          ValueError: it takes more than 4 GiB.
        """
        num_rows, size = self.shape
        num_bytes = num_rows * size * self.space.dtype.itemsize
        if num_bytes > _MAX_BYTES:
            raise ValueError(
                f"`dense` must take at most {_MAX_BYTES} bytes, got {num_bytes} for ({num_rows}, "
                f"{size}); `gram` needs no dense matrix."
            )
        whole = dataclasses.replace(self, inputs=None)
        rows = _chunks.each(example_rows, whole, (self.inputs,), self.chunk_size)
        trees = jax.tree.map(lambda leaf: leaf.reshape(num_rows, *leaf.shape[2:]), rows)
        return self.space.ravel_rows(trees)

    @on_one_mesh
    def singular_values(self) -> jax.Array:
        """Computes the singular values (min(N C, n),), falling, from the dense matrix.

        Their squares are the eigenvalues of the kernel J J'. In the kernel itself those below a
        unit of rounding of the largest are lost; here only those below its square are.

        Raises:
          ValueError: the dense matrix takes more than 4 GiB.
        """
        return _numerics.finite_svd(self.dense())[0]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["jacobian"], meta_fields=[])
@dataclasses.dataclass(frozen=True, repr=False)
class GramOperator(TracedOperator):
    """J J' on trees like the outputs."""

    jacobian: JacobianOperator

    @property
    def space(self) -> Space:
        return Space.of(self.jacobian.outputs)

    @property
    def home(self) -> Mesh | None:
        return self.jacobian.home

    @property
    def eps(self) -> float:
        # All examples at once: it is traced, not computed.
        whole = dataclasses.replace(self.jacobian, chunk_size=None)
        return super(GramOperator, GramOperator(whole)).eps

    def apply(self, tree: Tree) -> Tree:
        return self.jacobian.matvec(self.jacobian.rmatvec(tree))

    def product(self, vector: jax.Array) -> jax.Array:
        if self.jacobian.chunk_size is None:
            return super().product(vector)
        return self.space.ravel(self.apply(self.space.unravel(vector)))

    def matvec(self, vector: Tree) -> Tree:
        if self.jacobian.chunk_size is None:
            return super().matvec(vector)
        return Operator.matvec(self, vector)

    def facts(self) -> dict[str, Tree]:
        jacobian = self.jacobian
        return {"params": jacobian.params, "inputs": jacobian.inputs, "function": jacobian.function}

    def submatrix(self, inside: tuple[bool, ...]) -> Operator:
        return Submatrix(self, inside)


@checked
def jacobian(
    model_fn: ModelFn,
    params: Params,
    inputs: Tree,
    *,
    chunk_size: int | None = None,
    wrt: Mask = None,
) -> JacobianOperator:
    """Makes the Jacobian of a model's outputs with respect to its parameters.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> jacobian = curvature.jacobian(lambda w, x: x @ w, jnp.zeros(2), x)
      >>> print(jacobian.dense())  # X, one row for each output of each example
      [[1. 0.]
       [1. 2.]]

    Args:
      model_fn: (params, inputs) -> outputs: an array, or a tree of arrays, with a leading axis of
        examples. The outputs of an example must depend on its own inputs alone.
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of N examples.
      chunk_size: number of examples per pass, None for all at once (see `hessian`).
      wrt: which leaves of the parameters it is with respect to (see `hessian`).

    Returns:
      A `JacobianOperator` of shape (N C, n), with `matvec`, `rmatvec`, `gram` and
      `singular_values`; integer outputs are left out.

    Raises:
      ValueError: the model couples the examples of a batch (batch norm in train mode), or an output
        does not have the examples in front.
      TypeError: an output is complex, or none is floating point, or the model cannot be
        differentiated.
    """
    model_fn, params = part_of(model_fn, params, wrt)
    if couples_examples(model_fn):
        raise ValueError(
            "`model_fn` must not couple the examples of a batch (batch norm or dropout in train "
            "mode), got one that does: no example has a Jacobian of its own; use "
            'mode="evaluation".'
        )
    params = _meshes.whole(params)
    inputs = inputs if chunk_size is None else _meshes.whole(inputs)
    # Chunks of each device, of all examples, and single ones.
    parts, size = parts_of(model_fn, params, (inputs,), chunk_size)
    more = [_chunks.parts_of(model_fn, (inputs,), count)[0] for count in (size, 1)]
    model = traced_model(model_fn, params, (*parts, *more[0], *more[1]))
    check_outputs(model.outputs(params, inputs), _checks.num_examples(inputs))
    ensure_own_outputs(model_fn, model, params, inputs, size or 1)
    mode = choose(
        there_and_back, jaxpr_of(model), (model, params, inputs),
        name="model_fn", differences=False,
    )  # fmt: skip
    placement = find((inputs,), params, model)
    if placement is not None:
        model, params = placement.replicate((model, params))
        (inputs,) = placement.shard((inputs,))
    return JacobianOperator(model, params, inputs, mode, size, placement)


def check_outputs(outputs: Tree, num_examples: int) -> None:
    """Checks that a model's outputs have a Jacobian for each example.

    Raises:
      ValueError: a leaf has not the examples in front.
      TypeError: a leaf is complex, or none is floating point.
    """
    _checks.real_tree("model_fn(...)", outputs)
    floats = jax.tree.leaves(split(outputs)[0])
    if not floats:
        raise TypeError("`model_fn` must return real floating point, got none.")
    for leaf in floats:
        if leaf.shape[:1] != (num_examples,):
            raise ValueError(
                "`model_fn` must return arrays with the leading axis of its inputs, "
                f"{num_examples}, got shape {leaf.shape}."
            )


def example_rows(jacobian: JacobianOperator, inputs: Tree) -> Params:
    """The Jacobians of single examples, a tree of (N, C, *leaf), of float32 at least."""

    def of_example(example: Tree) -> Params:
        one = jax.tree.map(lambda leaf: leaf[None], example)
        function = lambda params: split(jacobian.function(params, one))
        outputs, back, _ = jax.vjp(function, jacobian.params, has_aux=True)
        basis = jnp.eye(_tree.size(outputs))
        rows = jax.vmap(lambda row: back(_unflat(row, outputs))[0])(basis)
        return jax.tree.map(_tree.wide, rows)

    with precision():
        return jax.vmap(of_example)(inputs)


def _unflat(row: jax.Array, like: Tree) -> Tree:
    """A tree like the outputs of one example, of their numbers (C,)."""
    leaves, treedef = jax.tree.flatten(like)
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.size)
    parts = [
        row[start:stop].reshape(leaf.shape).astype(leaf.dtype)
        for leaf, start, stop in zip(leaves, ends[:-1], ends[1:], strict=True)
    ]
    return jax.tree.unflatten(treedef, parts)


def _as(name: str, tree: Tree, like: Tree) -> Tree:
    """`tree` in the types of another one."""
    _checks.same_tree(name, tree, like)
    _checks.real_tree(name, tree)
    return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), tree, like)


def _linearized(jacobian: JacobianOperator, inputs: Tree) -> Tree:
    function = lambda params: split(jacobian.function(params, inputs))
    return linearized(jacobian.linearization, function, jacobian.params, 1.0)[2]


def _forward(operands: tuple[JacobianOperator, Params], inputs: Tree) -> Tree:
    jacobian, vector = operands
    with precision():
        return push(jacobian.linearization, _linearized(jacobian, inputs), vector)


def _backward(jacobian: JacobianOperator, inputs: Tree, vector: Tree) -> Params:
    """The mean over the examples of J' u, of float32 at least."""
    with precision():
        total = pull(jacobian.linearization, _linearized(jacobian, inputs), jacobian.params, vector)
    count = _checks.num_examples(inputs)
    return jax.tree.map(lambda leaf: _tree.wide(leaf) / count, total)
