"""What the other public functions of transforms refuse; the factories' rows are in the contract."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import transforms

KEY = jax.random.key(0)
W = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
MASK = {"w": True, "b": False}

perturbed = functools.partial(transforms.perturbed_gradient, 0.1, key=KEY)
entropy = functools.partial(transforms.entropy_sgd, 0.1, key=KEY)
controller = functools.partial(
    transforms.spectral_controller, key=KEY, initial_learning_rate=0.1, every=2
)

CASES = {
    "legacy key": (lambda: perturbed(key=jax.random.PRNGKey(0)), "`key` must be a typed key"),
    "several keys": (lambda: perturbed(key=jax.random.split(KEY)), "`key` must be a single key"),
    "a word for a bool": (lambda: perturbed(layerwise="no"), "`layerwise` must be True or False"),
    "one for a bool": (lambda: perturbed(cyclic=1), "`cyclic` must be True or False"),
    "negative group": (lambda: perturbed(groups={"w": -1, "b": 0}).init(W), "`groups` must be at"),
    "part of a group": (lambda: perturbed(groups={"w": 0.5, "b": 0}).init(W), "`groups` must be a"),
    "group of nothing": (lambda: perturbed(groups={"w": None, "b": 0}).init(W), "`groups` must"),
    "a million shards": (lambda: transforms.sam(0.1, num_shards=10**6), "`num_shards` must be at"),
    "half a shard": (lambda: transforms.sam(0.1, num_shards=1.5), "`num_shards` must be a Pyth"),
    "inner steps": (lambda: entropy(num_inner_steps=10**9), "`num_inner_steps` must be at most"),
    "averaging": (lambda: entropy(averaging=jnp.float32(2)), "`averaging` must be at most 1"),
    "scheduled rate": (lambda: entropy(learning_rate=lambda i: 0.1), "`learning_rate` must be a"),
    "schedule of None": (
        lambda: transforms.soft_threshold(lambda i: None).update(W, *_state(W), W),
        "`threshold` must be a real number, got None",
    ),
    "schedule of vectors": (
        lambda: transforms.soft_threshold(lambda i: jnp.ones(2)).update(W, *_state(W), W),
        "`threshold` must be a single number",
    ),
    "gate": (lambda: transforms.coherent_regularization(0.1, gate=0.5), "`gate` must be a Gate"),
    "cosine": (lambda: transforms.cosine_gate(1.5), "`threshold` must be at most 1, got 1.5"),
    "ratio": (lambda: transforms.ratio_gate(np.inf), "`threshold` must be finite"),
    "hold": (lambda: transforms.ratio_gate(1.0, hold=0), "`hold` must be at least 1, got 0"),
    "delay": (lambda: transforms.delayed_gate(2.5), "`delay` must be a Python integer, got 2.5"),
    "penalty": (
        lambda: _penalised(lambda w: None),
        r"`penalty_gradient\(weights\)` must have the tree",
    ),
    "scalar penalty": (
        lambda: _penalised(jnp.sum),
        r"`penalty_gradient\(weights\)` must have shape",
    ),
    "every": (lambda: transforms.rescale_weights(mask=MASK, every=0), "`every` must be at least 1"),
    "per filter": (
        lambda: transforms.rescale_weights(mask=MASK, per_filter=None),
        "`per_filter` must be True",
    ),
    "vectors": (lambda: transforms.rescale_weights(mask=True).init(W), "`mask` must leave out"),
    "zero factor": (lambda: transforms.rescale_velocity(W, factor=0), "`factor` must be positive"),
    "factors": (
        lambda: transforms.rescale_velocity(W, factor=np.ones(2)),
        r"`factor` must be a number",
    ),
    "tree of factors": (
        lambda: transforms.rescale_velocity(W, factor={"w": 1.0}),
        "`factor` must have the tree",
    ),
    "masks": (
        lambda: transforms.hold_masks({"w": True, "b": False}).init(W),
        r"`masks\['b'\]` must have",
    ),
    "numbers as masks": (lambda: transforms.hold_masks(W).init(W), r"`masks\['b'\]` must be"),
    "no masks": (
        lambda: transforms.hold_masks(lambda params: {"w": None}).init(W),
        "`masks` must have",
    ),
    "no learners": (
        lambda: transforms.mean_params({"w": jnp.ones((0, 2))}),
        "`params` must have one",
    ),
    "learners": (lambda: transforms.mean_params(W), "`params` must have one leading axis"),
    "mixing": (lambda: transforms.gossip_average(None), "`mixing` must be a function"),
    "what a mixing gives": (
        lambda: _mixed(lambda params, count, axis_name: None),
        r"`mixing\(params, count",
    ),
    "matrix": (lambda: transforms.dense_mixing(np.full((2, 2), np.nan)), "`matrix` must be"),
    "axis": (
        lambda: transforms.gossip_average(transforms.ring_mixing(), axis_name=3),
        "`axis_name` must",
    ),
    "no transformation": (lambda: transforms.skip_nonfinite(None), "`tx` must be a transformation"),
    "factory": (lambda: transforms.only_extra(optax.sgd, "value"), "`tx` must be a transformation"),
    "name": (lambda: transforms.only_extra(optax.sgd(0.1), 3), "`names` must be names"),
    "AdamP of nothing": (lambda: transforms.remove_radial(0.1), "`tx` must be a transformation"),
    "state": (lambda: transforms.denoise_params(W, ()), "`state` must be an Anti"),
    "state of others": (
        lambda: transforms.denoise_params(
            {"w": W["w"]}, transforms.anticorrelated_noise(0.1, key=KEY).init(W)
        ),
        "`params` must have the tree structure",
    ),
    "nesterov": (lambda: controller(nesterov="yes"), "`nesterov` must be True or False"),
    "rate at first": (
        lambda: controller(initial_learning_rate=0.0),
        "`initial_learning_rate` must be positive",
    ),
    "Lanczos steps": (lambda: controller(num_steps=0), "`num_steps` must be at least 1, got 0"),
    "momentum": (lambda: controller(max_momentum=1.0), "`max_momentum` must be below 1, got 1.0"),
}


def _state(params):
    return (transforms.soft_threshold(0.1).init(params),)


def _penalised(penalty):
    tx = transforms.coherent_regularization(
        0.1, gate=transforms.always_gate(), penalty_gradient=penalty
    )
    tx.update(W, tx.init(W), W)


def _mixed(mixing):
    tx = transforms.gossip_average(mixing)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), W)
    jax.vmap(lambda w: tx.update(w, tx.init(w), w)[0], axis_name="learner")(stacked)


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments_are_named(name):
    call, message = CASES[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_factors_are_numbers_of_any_kind():
    for factor in (2, 2.0, np.float32(2), np.full(3, 2.0), {"w": jnp.full(3, 2.0), "b": 2}):
        new = transforms.rescale_velocity(W, factor=factor)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b / 2), new, W)
