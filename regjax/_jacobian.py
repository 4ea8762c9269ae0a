"""Jacobians of a model's outputs with respect to its inputs, example by example.

The examples of a batch do not influence each other's outputs, so that one reverse pass with the
same unit vector in every example gives a row of every Jacobian at once: k passes for k outputs
instead of a Jacobian of the whole batch, most of which is zero.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from regjax import _checks, _loops, _numerics, _tree
from regjax._base import ModelFn, Tree, couples_examples


def check_model(name: str, model_fn: ModelFn, inputs: Tree) -> None:
    """Checks that Jacobians of single examples can be taken.

    Raises:
      ValueError: the model couples the examples (batch norm in train mode), or there is none.
      TypeError: `inputs` is not one array of real floating point.
    """
    _checks.function(name, model_fn)
    if couples_examples(model_fn):
        raise ValueError(
            f"`{name}` must not couple the examples of a batch (batch norm or dropout in train "
            'mode), got one that does; use mode="evaluation".'
        )
    if not hasattr(inputs, "dtype") or not jnp.issubdtype(inputs.dtype, jnp.floating):
        found = getattr(inputs, "dtype", type(inputs).__name__)
        raise TypeError(f"`inputs` must be one array of real floating point, got {found}.")
    _checks.num_examples(inputs)


def linearize(function: Callable[..., Tree], inputs: jax.Array) -> Tree:
    """Outputs (N, k) of `function` at inputs (N, ...), and the pull-back of cotangents (N, k)."""
    outputs, pull_back = jax.vjp(lambda x: flat(function(x), x.shape[0]), inputs)
    return outputs, lambda cotangents: pull_back(cotangents)[0].reshape(inputs.shape[0], -1)


def rows(function: Callable[..., Tree], inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The outputs (N, k), and the rows of the Jacobians (k, N, d) by k reverse passes."""
    outputs, pull_back = linearize(function, inputs)
    num_examples, num_outputs = outputs.shape
    basis = jnp.eye(num_outputs, dtype=outputs.dtype)[:, None]
    basis = jnp.broadcast_to(basis, (num_outputs, num_examples, num_outputs))
    return outputs, _loops.map(pull_back, basis)


def columns(function: Callable[..., Tree], inputs: jax.Array, directions: jax.Array) -> jax.Array:
    """The Jacobians times the rows of `directions` (r, d), (r, N, k) by r forward passes."""
    return _loops.map(
        lambda direction: push_forward(
            function, inputs, jnp.broadcast_to(direction, (inputs.shape[0], direction.size))
        ),
        directions.astype(inputs.dtype),
    )


def push_forward(
    function: Callable[..., Tree], inputs: jax.Array, tangents: jax.Array
) -> jax.Array:
    """The Jacobian of each example times its tangent, (N, d) -> (N, k)."""
    return jax.jvp(
        lambda x: flat(function(x), x.shape[0]), (inputs,), (tangents.reshape(inputs.shape),)
    )[1]


def squared_norms(
    function: Callable[..., Tree], inputs: jax.Array, *, without: jax.Array | None = None
) -> jax.Array:
    """||J P||_F^2 of each example (N,), in float32 at least.

    Args:
      function: inputs (N, ...) -> outputs (N, ...), example by example.
      inputs: (N, ...), of size d each.
      without: orthonormal columns (d, r) of the subspace that P projects out; None: P = I.
    """
    size = math.prod(inputs.shape[1:])
    outputs = jax.eval_shape(lambda x: flat(function(x), x.shape[0]), inputs)
    if size < outputs.shape[1]:
        basis = jnp.eye(size, dtype=inputs.dtype)
        images = columns(function, inputs, _without(basis, without))
    else:
        images = _without(rows(function, inputs)[1], without)
    return jnp.sum(_tree.wide(images) ** 2, (0, 2))


def flat(outputs: Tree, num_examples: int) -> jax.Array:
    """`outputs` (N, ...) as (N, k), or an error that names them."""
    shape = getattr(outputs, "shape", None)
    if not shape or shape[0] != num_examples:
        raise ValueError(
            f"`model_fn` must return an array with the leading axis of its inputs, {num_examples}, "
            f"got shape {shape}."
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise TypeError(f"`model_fn` must return real floating point, got {outputs.dtype}.")
    return outputs.reshape(num_examples, -1)


def _without(vectors: jax.Array, basis: jax.Array | None) -> jax.Array:
    """`vectors` (..., d) less their components in the span of the columns of `basis`."""
    if basis is None:
        return vectors
    return _numerics.part_outside(vectors, basis.T)
