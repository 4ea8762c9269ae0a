"""What stands for `grad_fn` in an update, and what is refused in words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import regjax
from regjax import transforms
from regjax.transforms import _given
from tests.registry import ROWS
from tests.test_transform_contract import (
    DATA,
    LABELS,
    NAMES,
    assert_same,
    gradient,
    loss_fn,
    parameters,
)

pytestmark = pytest.mark.usefixtures("default_promotion")
NEEDY = [name for name in NAMES if ROWS[name].needs_grad_fn]
WHOLE = [name for name in NEEDY if name != "m_sharpness"]


def loss(params):
    return loss_fn(params, DATA, LABELS)


def updates_with(name, **functions):
    row, params = ROWS[name], parameters()
    tx = row.make()
    return tx.update(gradient(params, 0), tx.init(params), params, **functions)[0]


@pytest.mark.parametrize("name", WHOLE)
def test_a_loss_stands_for_its_gradient(name):
    expected = updates_with(name, grad_fn=gradient)
    for functions in (
        {"value_fn": loss},
        {"obj_fn": loss, "loss": loss(parameters())},  # as Levanter calls
        {"value_fn": lambda params: (loss(params), {"batch_stats": 0})},
        {"value_fn": jax.tree_util.Partial(lambda x, params: loss_fn(params, x, LABELS), DATA)},
        {"value_fn": lambda params: regjax.WeightedMean(3 * loss(params), jnp.float32(3))},
        # Optax hands on what a line search's function names.
        {"value_fn": lambda params, inputs: loss_fn(params, inputs, LABELS), "inputs": DATA},
        {"value_fn": loss, "value": loss(parameters()), "grad": gradient(parameters(), 0)},
    ):
        assert_same(updates_with(name, **functions), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NEEDY)
def test_two_functions_are_refused_and_so_is_what_is_no_loss(name):
    for two in (
        {"grad_fn": gradient, "value_fn": loss},
        {"grad_fn": gradient, "obj_fn": loss},
        {"value_fn": loss, "obj_fn": loss},
    ):
        with pytest.raises(ValueError, match=" and ".join(two)):
            updates_with(name, **two)
    if name == "m_sharpness":
        with pytest.raises(ValueError, match=r"`num_shards` must be 1 with `value_fn`.*got 2"):
            updates_with(name, value_fn=loss)
        return
    for wrong in (lambda p: p, lambda p: jnp.ones(2), lambda p: None, lambda p: jnp.int32(1), 7):
        with pytest.raises((ValueError, TypeError), match="`obj_fn` must"):
            updates_with(name, obj_fn=wrong)


def test_a_gradient_function_without_an_index_is_told_so():
    alone = lambda params: gradient(params, 0)
    with pytest.raises(TypeError, match=r"`grad_fn` .* \(params, i\) -> .* takes \(params\): with"):
        updates_with(NEEDY[0], grad_fn=alone)
    with pytest.raises(TypeError, match=r"takes \(params\): with"):
        updates_with(NEEDY[0], grad_fn=jax.jit(alone))


@pytest.mark.parametrize("name", NEEDY)
def test_other_forms_of_a_gradient_are_understood(name):
    expected = updates_with(name, grad_fn=gradient)
    for form in (
        lambda grads: (loss(parameters()), grads),
        lambda grads: ((1.0, {"batch_stats": jnp.ones(3)}), grads),
        lambda grads: nnx.State({n: nnx.Param(leaf) for n, leaf in grads.items()}),
        lambda grads: {n: nnx.Param(leaf) for n, leaf in grads.items()},
        lambda grads: (jnp.float32(1), nnx.State(grads)),
        FrozenDict,
    ):
        # Behind a name of its own: `form` changes.
        found = updates_with(name, grad_fn=lambda p, i: form(gradient(p, i)))  # noqa: B023
        assert_same(found, expected, rtol=1e-5, atol=1e-6)


def test_nnx_variables_of_a_larger_filter_lose_what_is_not_asked_for():
    grads = nnx.State({"a": nnx.Param(jnp.ones(2)), "b": nnx.Param(jnp.ones(3))})
    understood = _given.understood("grad_fn", grads, {"a": jnp.zeros(2)})
    assert_same(understood, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="`grad_fn` must have the tree structure"):
        _given.understood("grad_fn", grads, {"c": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"`grad_fn\['b'\]` must have shape \(2,\), got \(3,\)"):
        _given.understood("grad_fn", grads, {"b": jnp.zeros(2)})
    # A dict of arrays says that it is the whole.
    with pytest.raises(ValueError, match="`grad_fn` must have the tree structure"):
        _given.understood("grad_fn", {"a": jnp.ones(2), "b": jnp.ones(3)}, {"a": jnp.zeros(2)})


def test_pairs_that_could_be_read_in_two_ways_are_refused():
    params = jnp.float32(1)
    tx = transforms.sam(0.1)
    for wrong in (lambda p, i: (p, p), lambda p, i: ({"a": p}, p)):
        with pytest.raises(ValueError, match=r"`grad_fn.*got a pair of"):
            tx.update(params, tx.init(params), params, grad_fn=wrong)
    vector = jnp.ones(2)
    with pytest.raises(ValueError, match=r"`grad_fn.*got a pair of"):  # jax.grad with has_aux
        tx.update(vector, tx.init(vector), vector, grad_fn=lambda p, i: (p, {"aux": 1}))
    pair = (jnp.ones(()), jnp.ones(2))  # parameters that are a pair themselves
    assert_same(tx.update(pair, tx.init(pair), pair, grad_fn=lambda p, i: pair)[0], pair)


@pytest.mark.parametrize("name", NEEDY)
def test_a_missing_function_names_the_ways_to_pass_one(name):
    with pytest.raises(ValueError, match=r"value_fn.*apply_gradients.*sharpness_aware_gradient"):
        updates_with(name)


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_called_by_keywords_too(name):
    row, params = ROWS[name], parameters()
    tx, grads = row.make(), gradient(params, 0)
    given = {"grad_fn": gradient} if row.needs_grad_fn else {}
    found = tx.update(updates=grads, state=tx.init(params), params=params, **given)
    assert_same(found, tx.update(grads, tx.init(params), params, **given))


def test_functions_that_cover_all_micro_batches_say_so():
    joined = transforms.assume_joined(gradient)
    assert_same(joined(parameters(), 0), gradient(parameters(), 0))
    with pytest.raises(TypeError, match="`grad_fn` must be callable"):
        transforms.assume_joined(None)
    accumulated = optax.MultiSteps(optax.chain(transforms.sam(0.1), optax.sgd(0.1)), 1)
    params = parameters()
    step = functools.partial(
        accumulated.update, gradient(params, 0), accumulated.init(params), params
    )
    with pytest.raises(ValueError, match=r"`value_fn` must cover all micro-batches"):
        step(value_fn=loss)
    found = step(value_fn=transforms.assume_joined(loss))[0]
    assert_same(found, step(grad_fn=joined)[0], rtol=1e-5, atol=1e-7)
    assert np.isfinite(float(optax.tree.norm(found)))
