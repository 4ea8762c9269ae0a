"""Training on data in a subspace, with or without noise off it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.claims import _networks

RATE, ADAM_RATE = 0.05, 1e-3


def linear(params: Any, x: jax.Array) -> jax.Array:
    """The outputs of a linear network."""
    return functools.reduce(jnp.matmul, [layer["kernel"] for layer in params], x)


def off(x: jax.Array, basis: jax.Array) -> jax.Array:
    """The part of each row outside of the span of the basis."""
    return x - (x @ basis) @ basis.T


def orthonormal(random: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Random orthonormal columns (size, count)."""
    return np.linalg.qr(random.normal(size=(size, count)))[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
    is_adam: bool, is_linear: bool, params: Any, x: Any, y: Any, basis: Any, orders: Any,
    decay: Any, fresh: Any, stop: Any, key: jax.Array,
) -> Any:  # fmt: skip
    """The parameters at the end and after the first epoch that ends below `stop`; loss, step."""
    tx = optax.adam(ADAM_RATE) if is_adam else optax.sgd(RATE)
    model_fn = linear if is_linear else _networks.outputs

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return _networks.cross_entropy(model_fn(params, x), y)

    def step(carry: Any, inputs: Any) -> Any:
        (params, state), (rows, key) = carry, inputs
        noise = fresh * off(jax.random.normal(key, x[rows].shape), basis)
        grads = jax.grad(loss_fn)(params, x[rows] + noise, y[rows])
        grads = jax.tree.map(lambda grad, param: grad + decay * param, grads, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry: Any, inputs: Any) -> Any:
        (trained, at_stop, reached), (i, order) = carry, inputs
        keys = jax.random.split(jax.random.fold_in(key, i), len(order))
        trained, _ = jax.lax.scan(step, trained, (order, keys))
        loss = loss_fn(trained[0], x, y)
        is_now = (loss < stop) & (reached == 0)
        at_stop = jax.tree.map(functools.partial(jnp.where, is_now), trained[0], at_stop)
        return (trained, at_stop, jnp.where(is_now, (i + 1) * len(order), reached)), loss

    carry = (params, tx.init(params)), params, jnp.int32(0)
    over = jnp.arange(len(orders)), orders
    (trained, at_stop, reached), losses = jax.lax.scan(epoch, carry, over)
    return trained[0], at_stop, losses[-1], reached
