"""Small exact answers: dense matrices by plain autodiff, and matrices of known spectrum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial


class Problem(NamedTuple):
    """A tiny classifier on plain trees."""

    params: Any
    inputs: jax.Array
    targets: jax.Array

    @property
    def batch(self) -> tuple[jax.Array, jax.Array]:
        return self.inputs, self.targets


def model_fn(params, inputs):
    """Logits (N, classes) of a tanh network with one hidden layer."""
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["second"]["kernel"] + params["second"]["bias"][None]


def cross_entropy(outputs, targets):
    """Mean softmax cross-entropy over the examples."""
    log_probabilities = jax.nn.log_softmax(outputs)
    return -jnp.mean(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1))


def squared_error(outputs, targets):
    """Mean over the examples of half the squared error against one-hot targets."""
    difference = outputs - jax.nn.one_hot(targets, outputs.shape[1], dtype=outputs.dtype)
    return 0.5 * jnp.mean(jnp.sum(difference**2, axis=1))


def loss_fn(params, inputs, targets):
    return cross_entropy(model_fn(params, inputs), targets)


def problem(num_examples=23, num_inputs=5, width=6, num_classes=3, dtype=np.float32, seed=0):
    """A `Problem` with random weights and data; 57 parameters by default."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    params = {
        "first": {"kernel": normal(num_inputs, width), "bias": normal(width)},
        "second": {"kernel": normal(width, num_classes), "bias": normal(num_classes)},
    }
    targets = jnp.asarray(random.integers(num_classes, size=num_examples), jnp.int32)
    return Problem(params, normal(num_examples, num_inputs), targets)


def in_double(tree):
    """`tree` with its floating-point arrays in float64; all other leaves as they are."""

    def convert(leaf):
        is_floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf, np.float64) if is_floating else leaf

    return jax.tree.map(convert, tree)


def dense_hessian(loss, params, *batch):
    """The Hessian (n, n) by `jax.hessian` on the flat parameters, all of it in float64."""
    with jax.enable_x64(True):
        loss, params, batch = in_double((loss, params, batch))
        flat, unravel = ravel_pytree(params)
        return np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v), *batch)))(flat))


def dense_jacobian(model, params, inputs):
    """The Jacobian (N, outputs, n) of the outputs by `jax.jacrev`, all of it in float64."""
    with jax.enable_x64(True):
        model, params, inputs = in_double((model, params, inputs))
        flat, unravel = ravel_pytree(params)
        return np.asarray(jax.jit(jax.jacrev(lambda v: model(unravel(v), inputs)))(flat))


def symmetric(eigenvalues, seed=0):
    """A random symmetric matrix (n, n) in float64 with the given eigenvalues."""
    eigenvalues = np.asarray(eigenvalues, np.float64)
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(eigenvalues.size, eigenvalues.size)))[0]
    return (basis * eigenvalues) @ basis.T


def multiply(matrix, vector):
    return matrix @ vector


def matvec_of(matrix, dtype=jnp.float32):
    """v -> matrix v as a `Partial`, so that the matrix is an argument and not a constant."""
    return Partial(multiply, jnp.asarray(matrix, dtype))
