"""Second passes that leave no trace: modules that share, nest or change, and states used once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from regjax import transforms
from regjax.transforms import _passes
from tests.transforms import modules
from tests.transforms.modules import assert_same

pytestmark = pytest.mark.usefixtures("default_promotion")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def top_by_hand(loss, params, rho):
    """(loss, gradient at the top) of a pure function of a tree."""
    value, grads = jax.value_and_grad(loss)(params)
    norm = optax.tree.norm(grads)
    return value, jax.grad(loss)(jax.tree.map(lambda w, g: w + rho * g / norm, params, grads))


def squared(out, y):
    return jnp.mean((out - y) ** 2)


def test_what_is_shared_stays_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Linear(3, 3, rngs=rngs)
            self.other = self.one
            self.last = nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.other(jnp.tanh(self.one(x)))))

    x, y = modules.data()
    model = Tied(nnx.Rngs(0))
    evaluate = nnx.value_and_grad(lambda model, x, y: squared(model(x), y))
    _, grads = transforms.sharpness_aware_gradient(evaluate, 0.2)(model, x, y)
    apply = lambda layer, h: h @ layer["kernel"] + layer["bias"]

    def loss(w):
        twice = jnp.tanh(apply(w["one"], jnp.tanh(apply(w["one"], x))))
        return squared(apply(w["last"], twice), y)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_same(nnx.to_pure_dict(nnx.as_pure(grads)), top_by_hand(loss, params, 0.2)[1], **CLOSE)
    one, other = _passes.copied((model, {"again": model.one}))
    assert one.other is one.one is other["again"] is not model.one


def test_trees_of_modules():
    x, y = modules.data()
    both = {"e": nnx.Linear(3, 4, rngs=nnx.Rngs(0)), "h": modules.Net(nnx.Rngs(1)).last}
    evaluate = nnx.value_and_grad(lambda both, x, y: squared(both["h"](jnp.tanh(both["e"](x))), y))
    clean = evaluate(both, x, y)
    value, grads = transforms.sharpness_aware_gradient(evaluate, 0.2)(both, x, y)
    assert value == clean[0]
    assert jax.tree.structure(grads) == jax.tree.structure(clean[1])

    def loss(w):
        apply = lambda layer, h: h @ layer["kernel"] + layer["bias"]
        return squared(apply(w["h"], jnp.tanh(apply(w["e"], x))), y)

    params = {name: nnx.to_pure_dict(nnx.state(module)) for name, module in both.items()}
    expected = top_by_hand(loss, params, 0.2)[1]
    assert_same(jax.tree.leaves(grads), jax.tree.leaves(expected), **CLOSE)
    grad_fn = transforms.gradient_function(evaluate, both, x, y)
    assert_same(grad_fn(params, 0), jax.grad(loss)(params), **CLOSE)


@pytest.mark.parametrize("options", [{"graph": False}, {"graph_updates": False}])
def test_modules_as_trees(options):
    x, y = modules.data()
    model, other = modules.Net(nnx.Rngs(0)), modules.Net(nnx.Rngs(0))
    plain = lambda model, x, y: squared(model(x), y)
    evaluate = nnx.value_and_grad(plain, allow_int=True, **options)
    value, grads = transforms.sharpness_aware_gradient(evaluate, 0.2)(model, x, y)
    clean = evaluate(other, x, y)
    assert value == clean[0]
    assert int(model.dropout.rngs.count[...]) == 1
    np.testing.assert_array_equal(model.norm.mean[...], other.norm.mean[...])
    assert jax.tree.structure(grads) == jax.tree.structure(clean[1])
    assert np.any(grads.last.kernel[...] != clean[1].last.kernel[...])


def test_states_of_equinox_are_used_once():
    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear
        dropout: eqx.nn.Dropout

        def __init__(self, key):
            one, other = jax.random.split(key)
            self.first = eqx.nn.Linear(3, 4, key=one)
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
            self.last = eqx.nn.Linear(4, 1, key=other)
            self.dropout = eqx.nn.Dropout(0.5)

        def __call__(self, x, state, key):
            hidden, state = self.norm(self.first(x), state)
            return self.last(self.dropout(jnp.tanh(hidden), key=key)), state

    def loss(model, state, x, y, key):
        run = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
        out, state = run(x, state, jax.random.split(key, len(x)))
        return squared(out, y), state

    x, y = modules.data()
    key = jax.random.key(2)
    make = lambda: eqx.nn.make_with_state(Net)(jax.random.key(0))
    evaluate = eqx.filter_value_and_grad(loss, has_aux=True)
    (value, after), grads = transforms.sharpness_aware_gradient(evaluate, 0.2)(*make(), x, y, key)
    model, state = make()
    grad_fn = transforms.gradient_function(evaluate, model, state, x, y, key)
    (expected, expected_after), clean = evaluate(model, state, x, y, key)
    params, tx = eqx.filter(model, eqx.is_inexact_array), transforms.sam(0.2)
    updates, _ = tx.update(clean, tx.init(params), params, grad_fn=grad_fn)
    assert value == expected
    assert_same(jax.tree.leaves(after), jax.tree.leaves(expected_after))
    assert_same(grads, updates)


def test_integers_go_along():
    params = {"w": jnp.ones(3), "n": jnp.int32(2)}
    loss = lambda p: jnp.sum(jnp.sin(p["w"] * p["n"]))
    evaluate = jax.value_and_grad(loss, allow_int=True)
    _, grads = transforms.sharpness_aware_gradient(evaluate, 0.3)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    slope = np.full(3, 2 * np.cos(2.0))
    top = 1 + 0.3 * slope / np.linalg.norm(slope)
    np.testing.assert_allclose(grads["w"], 2 * np.cos(2 * top), rtol=1e-5)
