"""Training as it would be written without us: SAM by hand, and where its curvature is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import decoder
from tests import oracles

RHO = 0.05


def climbed(params, grads):
    """The point of SAM: rho along the gradient over its norm."""
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda w, g: w + RHO * g / norm, params, grads)


def trained(loss_fn, params, aux, num_steps):
    """Parameters and aux after steps on loss_fn(params, aux) -> (loss, new aux)."""
    tx = optax.sgd(0.1, momentum=0.9)
    state = tx.init(params)
    slope = jax.jit(jax.grad(loss_fn, has_aux=True))
    for _ in range(num_steps):
        grads, new_aux = slope(params, aux)
        top, _ = slope(climbed(params, grads), aux)
        updates, state = tx.update(top, state, params)
        params, aux = optax.apply_updates(params, updates), new_aux
    return params, aux


def largest_eigenvalue(loss_fn, params, *batch):
    return np.linalg.eigvalsh(oracles.dense_hessian(loss_fn, params, *batch))[-1]


def close(found, expected, tol=1e-4):
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol)
    jax.tree.map(same, found, expected)


@functools.cache
def trained_decoder(num_steps):
    """(parameters with the layers apart, largest eigenvalue there) of the masked loss."""
    model, batch = decoder.Decoder(scan=False), decoder.texts()

    def loss(params):
        total, count = decoder.masked_nll(model.apply({"params": params}, batch[0]), *batch[1:])
        return total / count

    start = decoder.Decoder().init(jax.random.key(0), batch[0])["params"]
    pair = lambda params, aux: (loss(params), aux)
    params, _ = trained(pair, decoder.unrolled(start), (), num_steps)
    return params, largest_eigenvalue(loss, params)


def check_decoder(params, eigenvalue, num_steps):
    """What a script has found for the scanned decoder against its unrolled twin."""
    expected, largest = trained_decoder(num_steps)
    close(decoder.unrolled(params), expected)
    np.testing.assert_allclose(eigenvalue, largest, rtol=1e-3)
