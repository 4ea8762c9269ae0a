"""What optax and flax ask of a transformation: states that show what they hold, masks, wrappers."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from tests.registry import ROWS
from tests.test_transform_contract import (
    NAMES,
    assert_same,
    chain,
    parameters,
    run,
    skip_where,
    types,
)


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The chains around ours are optax's, which promote."""


@pytest.mark.parametrize("name", NAMES)
def test_trees_without_leaves(name):
    skip_where(name, "empty")
    tx = ROWS[name].make()
    for tree in ({}, [], ()):
        updates, state = tx.update(tree, tx.init(tree), tree, grad_fn=lambda params, i: params)
        assert updates == tree
        assert types(state) == types(tx.init(tree))


@pytest.mark.parametrize("name", NAMES)
def test_states_show_what_is_like_the_parameters(name):
    row, params = ROWS[name], parameters()
    own = {"mask": {"kernel": True, "bias": False, "head": True}} if "mask" in row.static else {}
    for tx in (row.make(), row.make(**own), chain(row, row.make(), optax.identity())):
        state = tx.init(params)
        marked = optax.tree_map_params(
            tx, lambda leaf: "like", state, transform_non_params=lambda leaf: "other"
        )
        assert jax.tree.structure(marked) == jax.tree.structure(state)
        assert jax.tree.leaves(marked).count("like") == row.num_copies * len(params)
        # Each with what belongs to its parameter, such as a sharding.
        optax.tree_map_params(tx, lambda leaf, name: f"like {name}", state, {n: n for n in params})


@pytest.mark.parametrize("name", NAMES)
def test_states_can_be_planned_without_arrays(name):
    skip_where(name, "abstract")
    tx, params = ROWS[name].make(), parameters()
    planned = tx.init(
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    )
    assert types(planned) == types(tx.init(params)) == types(jax.jit(tx.init)(params))


class CallableMask(dict):
    """A tree of bools that can be called, as a module of Equinox."""

    def __call__(self):
        raise AssertionError("It is a tree, not a function.")


jax.tree_util.register_pytree_with_keys(
    CallableMask,
    lambda mask: ([(jax.tree_util.DictKey(k), mask[k]) for k in sorted(mask)], tuple(sorted(mask))),
    lambda names, leaves: CallableMask(zip(names, leaves, strict=True)),
)


def masks_of_the_layer():
    """Ways to say that of {"head", "layer": {"also", "kernel"}} only the layer is meant."""
    whole = {"head": False, "layer": {"also": True, "kernel": True}}
    upper = {"head": False, "layer": True}
    return [
        upper,
        jax.tree.map(np.bool_, whole),
        jax.tree.map(jnp.asarray, upper),
        lambda params: whole,
        functools.partial(lambda mask, params: mask, upper),
        jax.tree_util.Partial(lambda params: whole),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_taken_as_optax_takes_them(name):
    row = ROWS[name]
    if "mask" not in inspect.signature(row.factory).parameters:
        assert {"own_mask", "masked"} & set(row.skipped)
        return
    random = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    params = {"head": draw(3, 2), "layer": {"also": draw(2, 3), "kernel": draw(3, 3)}}
    grad_fn = lambda params, i: jax.tree.map(lambda leaf: jnp.sin(leaf) + 0.1, params)

    def after(mask, params=params):
        tx = row.make(mask=mask)
        return tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=grad_fn)[0]

    expected = after({"head": False, "layer": {"also": True, "kernel": True}})
    assert any(map(jnp.any, jax.tree.leaves(jax.tree.map(jnp.not_equal, after(None), expected))))
    for mask in masks_of_the_layer():
        assert_same(after(mask), expected)
    tree = CallableMask(params)
    called = after(CallableMask({"head": False, "layer": True}), tree)
    assert_same(dict(called), expected)
    for wrong in ({"head": True}, {"head": True, "layer": {"also": True}}, [True, False]):
        with pytest.raises(ValueError, match="`mask` must have the tree structure"):
            after(wrong)
    for wrong in (1, 0.5, "head", jnp.ones(3, bool), None):
        with pytest.raises((TypeError, ValueError), match="`mask` must h"):
            after({"head": wrong, "layer": True})


@pytest.mark.parametrize("name", NAMES)
def test_nnx_optimizer_and_train_state(name):
    row = ROWS[name]
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grad_fn = lambda params, i: jax.tree.map(lambda leaf: jnp.sin(leaf) + 0.1, params)
    make = lambda: chain(row, row.make(), optax.sgd(0.1))
    expected = run(make(), params, 2, grad_fn=grad_fn)[0]
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    for _ in range(2):
        grads = grad_fn(nnx.state(model, nnx.Param), 0)
        optimizer.update(model, grads, grad_fn=grad_fn)
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected, rtol=1e-6)
    if not row.needs_grad_fn:  # which flax's TrainState does not hand on
        state = TrainState.create(apply_fn=None, params=params, tx=make())
        for _ in range(2):
            state = state.apply_gradients(grads=grad_fn(state.params, 0))
        assert_same(state.params, expected, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_of_optax_change_nothing(name):
    row, params = ROWS[name], parameters()
    expected = run(chain(row, row.make()), params, 2)[0]
    descent = optax.sgd(0.1, momentum=0.9)
    members = [("descent", descent), ("ours", row.make())]
    # Where an update is applied if it is finite, both branches must have its types.
    if_finite = optax.apply_if_finite(chain(row, row.make()), 3)
    types = jax.eval_shape(lambda: run(if_finite, params, 2)[0])
    assert jax.tree.map(jnp.shape, types) == jax.tree.map(jnp.shape, params)
    for tx in (
        optax.named_chain(*(members if row.is_last else members[::-1])),
        optax.chain(optax.identity(), optax.chain(chain(row, row.make()))),
    ):
        assert_same(run(tx, params, 2)[0], expected, rtol=1e-5, atol=1e-6)
