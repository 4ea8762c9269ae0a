"""Runs of a transformation on one loss."""

import jax
import jax.numpy as jnp
import optax


def scan(tx, params, grad_fn, num_steps, state=None):
    """Parameters and state after `num_steps` updates in one compiled loop."""
    state = tx.init(params) if state is None else state

    def step(carry, _):
        params, state = carry
        grads = grad_fn(params, 0)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=num_steps)[0])
    return run((params, state))


def once(tx, params, grad_fn, state=None):
    """The updates of a first step."""
    state = tx.init(params) if state is None else state
    return tx.update(grad_fn(params, jnp.int32(0)), state, params, grad_fn=grad_fn)[0]
