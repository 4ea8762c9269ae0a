"""What a transformation refuses, and that the error names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.registry import ROWS
from tests.test_transform_contract import NAMES, gradient, parameters, run


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The chains around ours are optax's, which promote."""


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].reads_gradient])
def test_behind_the_optimiser_a_gradient_is_refused(name):
    row, params = ROWS[name], parameters()
    for descent in (optax.sgd(0.1, momentum=0.9), optax.adam(0.01)):
        tx = optax.chain(descent, row.make())
        with pytest.raises(ValueError, match=r"`updates` must be the gradient.*optax\.chain"):
            run(tx, params, 1)
    # Not one that is unlike the function's, or that nobody reads.
    for grads in (lambda params, i: jax.tree.map(jnp.zeros_like, params), gradient):
        run(row.make(), params, 1, grad_fn=grads)


def test_a_jitted_step_is_tried_without_jit():
    """Inside of `jit` nobody can be told."""
    tx, params = optax.chain(optax.sgd(0.1), ROWS["sam"].make()), parameters()
    step = jax.jit(lambda params: run(tx, params, 1))
    step(params)
    with jax.disable_jit(), pytest.raises(ValueError, match="`updates` must be the gradient"):
        step(params)


@pytest.mark.parametrize("name", NAMES)
def test_other_trees_are_refused_by_name(name):
    row, params = ROWS[name], parameters()
    tx = row.make()
    state, grads = tx.init(params), gradient(params, 0)
    for wrong in (
        {name: leaf for name, leaf in grads.items() if name != "bias"},
        list(grads.values()),
        {**grads, "bias": None},
        {**grads, "bias": grads["bias"][None]},
        {**grads, "bias": grads["bias"][:2]},
        None,
    ):
        with pytest.raises((ValueError, TypeError), match=r"`(updates|params)"):
            tx.update(wrong, state, params, grad_fn=gradient)
    for dtype in (jnp.complex64, jnp.int32, jnp.bool_):
        wrong = jax.tree.map(lambda leaf: leaf.astype(dtype), params)  # noqa: B023
        with pytest.raises(TypeError, match=r"`params\[.*\]` must be real floating point, got"):
            tx.init(wrong)


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].needs_grad_fn])
def test_gradient_functions_that_give_something_else_are_refused(name):
    row, params = ROWS[name], parameters()
    tx = row.make()
    for wrong in (
        lambda params, i: None,
        lambda params, i: jnp.float32(0),
        lambda params, i: list(params.values()),
        lambda params, i: {**params, "bias": jnp.zeros(7)},
        lambda params, i: jax.tree.map(lambda leaf: jnp.int32(leaf), params),
        lambda params, i: jax.tree.map(lambda leaf: leaf + 0j, params),
        7,
    ):
        with pytest.raises((ValueError, TypeError), match=r"`(curvature_)?grad_fn"):
            tx.update(gradient(params, 0), tx.init(params), params, grad_fn=wrong)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_single_finite_and_not_negative(name):
    row = ROWS[name]
    for argument in row.numbers:
        for wrong in (-1.0, np.nan, np.inf, jnp.float32(-1), jnp.ones(2), 1j, True, "a", None):
            with pytest.raises((ValueError, TypeError), match=f"`{argument}` must be"):
                row.make(**{argument: wrong})
