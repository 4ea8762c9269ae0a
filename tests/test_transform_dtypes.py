"""What a transformation does to weights of one dtype with updates of another."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.registry import ROWS, Step, double
from tests.test_transform_contract import NAMES, gradient, parameters, types


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The chains around ours are optax's, which promote."""


KINDS = (jnp.float32, jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].exact])
def test_what_holds_exactly_holds_in_every_pairing_of_dtypes(name):
    row, random = ROWS[name], np.random.default_rng(5)
    for kind, update_kind in itertools.product(KINDS, KINDS):
        draw = lambda dtype, size=1.0: {
            name: jnp.asarray(size * random.normal(size=shape), dtype)
            for name, shape in {"a": (40, 20), "b": (30, 30), "c": (500,)}.items()
        }
        params, tx = draw(kind), row.make()
        state = tx.init(params)
        for _ in range(5):
            updates = draw(update_kind, 0.1)
            out, new_state = tx.update(updates, state, params)
            after = optax.apply_updates(params, out)
            assert types(after) == types(params)
            assert types(new_state) == types(state)
            # Relative to the rounding of a single number; errors of the formula are far larger.
            rounding = max(float(jnp.finfo(kind).eps), 1e-6)
            trees = (jax.tree.map(double, tree) for tree in (params, updates, after))
            row.exact(Step(*trees, state, new_state, rounding))
            params, state = after, new_state


@pytest.mark.parametrize("name", NAMES)
def test_updates_of_low_precision_move_the_weights_as_the_same_numbers_do(name):
    row, params = ROWS[name], parameters()
    updates = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), gradient(params, 0))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates)
    tx = row.make()
    low, _ = tx.update(updates, tx.init(params), params, grad_fn=gradient)
    high, _ = tx.update(wide, tx.init(params), params, grad_fn=gradient)
    if row.is_last and "wider" not in row.skipped:
        assert low["kernel"].dtype == jnp.float32
    for one, other in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        # A gradient has the dtype of the one that it replaces.
        tolerance = 1e-6 if one.dtype == jnp.float32 else 4e-3
        np.testing.assert_allclose(double(one), double(other), rtol=tolerance, atol=1e-7)
