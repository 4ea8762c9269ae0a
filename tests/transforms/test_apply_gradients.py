"""A step of a TrainState that hands on what flax drops, against the same step by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, struct
from flax.training.train_state import TrainState

from regjax import transforms
from tests.registry import ROWS
from tests.test_transform_contract import (
    NAMES,
    assert_same,
    chain,
    gradient,
    loss_fn,
    parameters,
    run,
)

pytestmark = pytest.mark.usefixtures("default_promotion")


class WithStatistics(TrainState):
    batch_stats: Any = None
    averaged: Any = struct.field(default=None)

    def apply_gradients(self, *, grads, **kwargs):
        new = super().apply_gradients(grads=grads, **kwargs)
        return new.replace(averaged=jax.tree.map(lambda a, b: (a + b) / 2, self.params, new.params))


def state_of(tx, kind=TrainState, **fields):
    return kind.create(apply_fn=loss_fn, params=parameters(), tx=tx, **fields)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_are_those_of_the_transformation(name, compiled):
    row = ROWS[name]
    tx = chain(row, row.make())
    state = state_of(tx)
    step = lambda state: transforms.apply_gradients(
        state, gradient(state.params, 0), grad_fn=gradient, value=1.0
    )
    step = jax.jit(step) if compiled else step
    for _ in range(2):
        state = step(state)
    params, opt_state = run(tx, parameters(), 2)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if compiled else {}
    assert_same(state.params, params, **tolerance)
    assert_same(state.opt_state, opt_state, **tolerance)
    assert int(state.step) == 2
    assert state.tx is tx


def test_fields_are_replaced_and_subclasses_do_what_they_do():
    state = state_of(
        optax.chain(transforms.sam(0.1), optax.sgd(0.1)), WithStatistics, batch_stats=1
    )
    grads = gradient(state.params, 0)
    new = transforms.apply_gradients(state, grads, grad_fn=gradient, batch_stats=2)
    assert new.batch_stats == 2
    mean = jax.tree.map(lambda a, b: (a + b) / 2, state.params, new.params)
    assert_same(new.averaged, mean)
    loss = lambda params: jnp.sum(params["head"] ** 2)
    by_value = transforms.apply_gradients(state, grads, value_fn=loss)
    assert_same(by_value.params["kernel"], state.params["kernel"])


def test_flax_alone_is_refused_in_words():
    state = state_of(optax.chain(transforms.sam(0.1), optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"TrainState.apply_gradients drops it.*apply_gradients"):
        state.apply_gradients(grads=gradient(state.params, 0), grad_fn=gradient)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for wrong in (None, {"params": 1}, optimizer, TrainState):
        with pytest.raises(TypeError, match=r"`state` must be a TrainState.*nnx.Optimizer.update"):
            transforms.apply_gradients(wrong, {}, grad_fn=gradient)
    with pytest.raises(ValueError, match="`options` must not hold `tx`"):
        transforms.apply_gradients(state, {}, tx=optax.sgd(0.1))
