"""What the wrappers let through, and what they leave out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import transforms
from tests import oracles

pytestmark = pytest.mark.usefixtures("default_promotion")


def test_only_extra_shares_a_chain_with_a_line_search():
    problem = oracles.problem()
    loss = lambda p: oracles.loss_fn(p, *problem.batch)
    grad_fn = lambda p, i: jax.grad(loss)(p)
    search = optax.scale_by_backtracking_linesearch(15)
    bare = optax.chain(transforms.sam(0.05), optax.sgd(1.0), search)
    shared = optax.chain(
        transforms.only_extra(transforms.sam(0.05), "grad_fn"),
        optax.sgd(1.0),
        transforms.only_extra(search, "value", "grad", "value_fn"),
    )
    params = problem.params
    both = {"grad_fn": grad_fn, "value_fn": loss}
    with pytest.raises(ValueError, match=r"only one of.*got grad_fn and value_fn.*only_extra"):
        bare.update(grad_fn(params, 0), bare.init(params), params, **both)
    # One function serves both, or each is let through to its own.
    ends = []
    for tx, functions in ((bare, {"value_fn": loss}), (shared, both)):
        params, state = problem.params, tx.init(problem.params)
        for _ in range(5):
            grads = grad_fn(params, 0)
            searched = {"value": loss(params), "grad": grads}
            updates, state = tx.update(grads, state, params, **searched, **functions)
            params = optax.apply_updates(params, updates)
        assert loss(params) < loss(problem.params)
        ends.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *ends)


def test_skip_nonfinite_sees_what_apply_if_finite_does_not():
    params = {"a": jnp.asarray([1.0, 2.0])}
    grad_fn = lambda p, i: {"a": jnp.log(p["a"] - 1.0)}  # finite at no climbed point
    grads = {"a": jnp.asarray([-1.0, 0.0])}
    tx = optax.chain(transforms.sam(0.5), optax.sgd(0.1, momentum=0.9))
    blind = optax.apply_if_finite(tx, max_consecutive_errors=5)
    updates, _ = blind.update(grads, blind.init(params), params, grad_fn=grad_fn)
    assert not jnp.all(jnp.isfinite(updates["a"]))
    ours = transforms.skip_nonfinite(tx)
    step = jax.jit(lambda g, state: ours.update(g, state, params, grad_fn=grad_fn))
    updates, state = step(grads, ours.init(params))
    np.testing.assert_array_equal(updates["a"], 0)
    assert int(state.num_skipped) == 1
    updates, state = step({"a": jnp.asarray([1.0, 1.0])}, state)
    assert jnp.all(updates["a"] != 0)
    assert int(state.num_skipped) == 1
