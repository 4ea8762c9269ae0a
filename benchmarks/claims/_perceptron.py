"""A perceptron with batch norm whose statistics are arguments: those of any batch, or none.

A network is (params, states): layers of kernel, scale and bias and a linear head, and the mean and
variance of each hidden layer.
"""

import functools
from typing import Any

import jax
import optax

from benchmarks.claims import _networks
from regjax import normalization

WIDTH, _RATE = 128, 0.1
# Its new state is the statistics of the batch.
_NORM = normalization.BatchNorm(momentum=0.0, unbiased_running_variance=False)
_TX = optax.sgd(_RATE)


@functools.partial(jax.jit, static_argnums=(0, 1))
def initial(num_inputs: int, depth: int, key: jax.Array) -> Any:
    """Parameters with `depth` hidden layers; scales one, biases zero."""
    params = _networks.he_network((num_inputs, *[WIDTH] * depth, 10), key)
    return [*({**layer, **_NORM.init_params(WIDTH)} for layer in params[:-1]), params[-1]]


def no_states(params: Any) -> Any:
    """Means 0 and variances 1: no normalization."""
    return [_NORM.init_state(WIDTH) for _ in params[:-1]]


@jax.jit
def statistics(params: Any, x: jax.Array) -> Any:
    """The means and variances of all layers on one batch."""
    return _forward(_NORM, params, x, no_states(params), True)[2]


def preactivations(network: Any, x: jax.Array) -> Any:
    """What goes into the activations, a list of (N, 128)."""
    return _forward(_NORM, network[0], x, network[1], False)[0]


@jax.jit
def outputs(network: Any, x: jax.Array) -> jax.Array:
    """Logits."""
    return _forward(_NORM, network[0], x, network[1], False)[1]


@functools.partial(jax.jit, static_argnames="num_together")
def descend(params: Any, x: jax.Array, y: jax.Array, rows: jax.Array, *, num_together: int) -> Any:
    """Parameters after plain descent on batches `rows`, statistics of so many at a time."""
    norm = normalization.GhostBatchNorm(ghost_size=num_together)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = _forward(norm, params, x[rows], no_states(params), True)[1]
        return _networks.cross_entropy(logits, y[rows])

    def step(carry: Any, rows: jax.Array) -> Any:
        params, state = carry
        updates, state = _TX.update(jax.grad(loss)(params, rows), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, _TX.init(params)), rows)[0][0]


def _forward(norm: Any, params: Any, x: jax.Array, states: Any, train: bool) -> Any:
    """Pre-activations of all layers, logits, and the states behind this batch."""
    found, new = [], []
    for layer, state in zip(params[:-1], states, strict=True):
        affine = {name: layer[name] for name in ("scale", "bias")}
        h, state = norm.apply(affine, state, x @ layer["kernel"], train=train)
        found.append(h)
        new.append(state)
        x = jax.nn.relu(h)
    return found, x @ params[-1]["kernel"] + params[-1]["bias"], new
