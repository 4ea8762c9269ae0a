"""A perceptron with hand-written gates behind its activation, and its data."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


def outputs(params, gates, x):
    """Outputs (N, 3); the gates multiply what the hidden units hand on."""
    hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
    return (hidden * gates["hidden"][None]) @ params["out"]


def gate_loss(params, gates, x, y):
    return 0.5 * jnp.mean(jnp.sum((outputs(params, gates, x) - y) ** 2, 1))


def problem(num_units=6, num_examples=24, dtype=np.float32, seed=0):
    """The loss of the gates as a `Partial` of arrays, the gates, and a batch."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    params = {"in": normal(4, num_units), "bias": normal(num_units), "out": normal(num_units, 3)}
    batch = normal(num_examples, 4), normal(num_examples, 3)
    gates = {"hidden": jnp.ones(num_units, dtype)}
    return Partial(gate_loss, params), gates, batch


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])
