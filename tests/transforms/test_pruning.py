"""Weights masked out are exactly 0 from the first step on, whatever is in front in the chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import regjax
from regjax import pruning, transforms
from regjax.models import MLP

pytestmark = pytest.mark.usefixtures("default_promotion")

PARAMS = {"w": jnp.asarray([[1.0, -2.0], [3.0, 4.0]]), "b": jnp.asarray([0.5, -0.7])}
MASKS = {"w": jnp.asarray([[True, False], [False, True]]), "b": jnp.asarray([True, False])}


def gradient(params):
    return jax.tree.map(lambda leaf: jnp.cos(leaf) + 0.3, params)


CHAINS = {
    "momentum": (optax.sgd(0.1, momentum=0.9),),
    "nesterov": (optax.sgd(0.1, momentum=0.9, nesterov=True),),
    "adam with decay": (optax.adamw(0.1, weight_decay=0.5),),
    "decay last": (optax.scale(-0.1), optax.add_decayed_weights(-0.3)),
    "noise": (optax.sgd(0.1), optax.add_noise(0.5, 0.1, 0)),
    "our noise": (transforms.anticorrelated_noise(0.3, key=jax.random.key(0)),),
}


@pytest.mark.parametrize("name", CHAINS)
def test_masked_weights_are_zero_from_the_first_step_on(name):
    plain = optax.chain(*CHAINS[name])
    tx = optax.chain(*CHAINS[name], transforms.hold_masks(MASKS))
    params, others = PARAMS, PARAMS
    state, plain_state = tx.init(params), plain.init(others)
    for _ in range(4):
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        # The others move as without masks, bit for bit: here the gradient of each is its own.
        updates, plain_state = plain.update(gradient(others), plain_state, others)
        others = optax.apply_updates(others, updates)
        for leaf, free, mask in zip(*map(jax.tree.leaves, (params, others, MASKS)), strict=True):
            np.testing.assert_array_equal(leaf[~mask], 0)
            np.testing.assert_array_equal(leaf[mask], free[mask])


def test_masks_in_front_of_momentum_do_not_hold():
    """What the transformation is for: the usual way fails on the same chain."""
    zeroed = lambda tree: jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf, 0), tree, MASKS)
    tx = optax.sgd(0.1, momentum=0.9)
    params, state = PARAMS, tx.init(PARAMS)
    updates, state = tx.update(gradient(params), state, params)
    params = zeroed(optax.apply_updates(params, updates))
    updates, state = tx.update(zeroed(gradient(params)), state, params)
    resurrected = optax.apply_updates(params, updates)
    assert abs(float(resurrected["w"][0, 1])) > 0.01


def test_masks_change_without_another_program():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), transforms.hold_masks())

    @jax.jit
    def step(params, state, masks):
        updates, state = tx.update(gradient(params), state, params, masks=masks)
        return optax.apply_updates(params, updates), state

    full = jax.tree.map(jnp.ones_like, MASKS)
    other = {**full, "b": jnp.asarray([False, True])}
    params, state = step(PARAMS, tx.init(PARAMS), full)
    assert all(jnp.all(leaf != 0) for leaf in jax.tree.leaves(params))
    params, state = step(params, state, MASKS)
    np.testing.assert_array_equal(params["w"] == 0, ~MASKS["w"])
    params, state = step(params, state, other)
    np.testing.assert_array_equal(params["b"] == 0, [True, False])
    assert jnp.all(params["w"] != 0)  # unmasked again, and moving
    assert step._cache_size() == 1
    # What was given once is held on.
    updates, state = tx.update(gradient(params), state, params)
    assert float(optax.apply_updates(params, updates)["b"][0]) == 0


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def test_from_scores_to_a_smaller_model_that_was_trained_on():
    network = MLP((4, 1, 1), 2, width=6, normalization="batch", rngs=nnx.Rngs(0))
    model = regjax.from_nnx(network)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4, 1, 1)), jnp.float32)
    batch = x, jnp.stack([x.sum((1, 2, 3)), x[:, 0, 0, 0] ** 2], 1)
    structure = pruning.find_structure(regjax.model_function(model), model.params, x)
    loss_fn = regjax.model_loss(model, squared_error)
    gates = pruning.unit_gates(structure, model.params)
    gate_loss = pruning.gated_loss(structure, loss_fn, model.params)
    scores = pruning.taylor_scores(gate_loss, gates, *batch, batch_size=4).scores
    masks = pruning.mask_lowest(scores, pruning.full_masks(scores), 5)
    held = pruning.parameter_masks(structure, model.params, masks)
    tx = optax.chain(optax.adamw(0.01), transforms.hold_masks(held))
    params, state = model.params, tx.init(model.params)
    step = jax.jit(
        lambda params, state: tx.update(jax.grad(loss_fn)(params, *batch), state, params)
    )
    losses = []
    for _ in range(20):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss_fn(params, *batch)))
    assert losses[-1] < losses[0]
    trained = model._replace(params=params)
    small = pruning.remove_units(structure, trained, masks)
    size = lambda model: sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert size(small) < size(trained)
    outputs = [regjax.model_function(m)(m.params, x) for m in (trained, small)]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_masks_from_a_function_are_those_of_the_start():
    tx = transforms.hold_masks(lambda params: jax.tree.map(lambda leaf: leaf > 0, params))
    state = tx.init(PARAMS)
    np.testing.assert_array_equal(state.masks["w"], [[True, False], [True, True]])
    updates, after = tx.update(jax.tree.map(lambda leaf: -2 * leaf, PARAMS), state, PARAMS)
    np.testing.assert_array_equal(after.masks["w"], state.masks["w"])
    np.testing.assert_array_equal((PARAMS["w"] + updates["w"])[0], [-1, 0])


def test_narrow_updates_still_reach_zero():
    tx = transforms.hold_masks(MASKS)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    params = {**PARAMS, "b": jnp.asarray([0.1, 0.7000001])}
    updates, _ = tx.update(narrow, tx.init(params), params)
    assert float(optax.apply_updates(params, updates)["b"][1]) == 0


def test_error_texts():
    tx = transforms.hold_masks(MASKS)
    with pytest.raises(ValueError, match="`masks` must have the tree structure"):
        tx.init({"other": PARAMS["w"]})
    with pytest.raises(ValueError, match=r"`masks\['b'\]` must have shape \(2,\), got \(3,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, masks={**MASKS, "b": jnp.ones(3, bool)})
    with pytest.raises(TypeError, match=r"`masks\['b'\]` must be boolean, .* got float32"):
        transforms.hold_masks(PARAMS).init(PARAMS)
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update(PARAMS, tx.init(PARAMS))
