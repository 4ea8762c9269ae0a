"""Jacobians that are known: linear maps, NumPy, homogeneity, and what noise in the inputs says."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import regjax
from regjax import regularizers
from regjax._base import applied

RANDOM = np.random.default_rng(0)
exact = regularizers.geometric_complexity
estimate = regularizers.geometric_complexity_estimate


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def linear_fn(kernel, x):
    return x @ kernel


def layers(sizes, seed=0):
    """Kernels and biases, in the dtype that is the default."""
    random = np.random.default_rng(seed)
    return [
        (jnp.asarray(random.normal(size=(n, m)) / np.sqrt(n)), jnp.asarray(random.normal(size=m)))
        for n, m in itertools.pairwise(sizes)
    ]


def network(activation, params, x):
    *hidden, (kernel, bias) = params
    for weights, shift in hidden:
        x = activation(x @ weights + shift[None])
    return x @ kernel + bias[None]


def tanh_network(params, x):
    return network(jnp.tanh, params, x)


def tanh_jacobian(params, x):
    """The Jacobian (k, d) of one example of a network with one hidden layer, by NumPy."""
    (first, shift), (second, _) = (tuple(map(np.asarray, layer)) for layer in params)
    slope = 1 - np.tanh(np.asarray(x) @ first + shift) ** 2
    return second.T @ (slope[:, None] * first.T)


# Exact.


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])  # by reverse passes, by forward passes
def test_linear_map(shape, double):
    kernel = jnp.asarray(RANDOM.normal(size=shape))
    value = exact(linear_fn, kernel, jnp.asarray(RANDOM.normal(size=(5, shape[0]))))
    np.testing.assert_allclose(value, np.sum(np.asarray(kernel) ** 2), rtol=1e-12)


@pytest.mark.parametrize("sizes", [(5, 7, 3), (3, 7, 5)])
def test_dense_jacobian_of_each_example(sizes, double):
    params, x = layers(sizes), jnp.asarray(RANDOM.normal(size=(6, sizes[0])))
    norms = [np.sum(tanh_jacobian(params, row) ** 2) for row in x]
    assert np.std(norms) > 0.1 * np.mean(norms)
    np.testing.assert_allclose(exact(tanh_network, params, x), np.mean(norms), rtol=1e-12)


def test_batch_is_the_mean_over_its_examples(double):
    params, x = layers((5, 7, 3)), jnp.asarray(RANDOM.normal(size=(4, 5)))
    each = jax.vmap(lambda row: exact(tanh_network, params, row[None]))(x)
    np.testing.assert_allclose(exact(tanh_network, params, x), jnp.mean(each), rtol=1e-12)
    copies = jnp.broadcast_to(x[:1], (9, 5))
    np.testing.assert_allclose(exact(tanh_network, params, copies), each[0], rtol=1e-12)


def test_homogeneous_networks_scale_by_a_power(double):
    sizes, factor = (6, 8, 8, 8, 4), 1.3
    params = [(kernel, 0 * bias) for kernel, bias in layers(sizes)]
    model_fn = functools.partial(network, jax.nn.relu)
    x = jnp.asarray(RANDOM.normal(size=(10, 6)))
    value = exact(model_fn, params, x)
    scaled = exact(model_fn, jax.tree.map(lambda leaf: factor * leaf, params), x)
    np.testing.assert_allclose(scaled, factor**8 * value, rtol=1e-5)
    bound = min(sizes) * np.prod([np.linalg.norm(kernel, 2) ** 2 for kernel, _ in params])
    assert 0 < float(value) <= bound
    # Inputs in other units.
    other = exact(lambda p, x: model_fn(p, 5.0 * x), params, x / 5.0)
    np.testing.assert_allclose(other, 25 * value, rtol=1e-10)


def test_softmax_is_not_the_quantity_but_bounded_by_it(double):
    params, x = layers((5, 7, 3)), jnp.asarray(RANDOM.normal(size=(8, 5)))
    after = exact(lambda p, x: jax.nn.softmax(tanh_network(p, x)), params, x)
    assert 0 < float(after) <= float(exact(tanh_network, params, x)) / 4


@pytest.mark.parametrize("seed", range(3))
def test_transfer_inequality(seed, double):
    """|df/dx|^2 T <= |df/d params|^2 in each example, T from the layers that x passes through."""
    params, x = layers((4, 6, 5, 3), seed), jnp.asarray(RANDOM.normal(size=(8, 4)))
    flat, unravel = ravel_pytree(params)
    of_weights = jax.jacrev(lambda vector: tanh_network(unravel(vector), x))
    parameter_jacobians = np.asarray(jax.jit(of_weights)(flat))
    values = jax.jit(jax.vmap(lambda row: exact(tanh_network, params, row[None])))(x)
    for row, value, jacobian in zip(np.asarray(x), values, parameter_jacobians, strict=True):
        hidden, derivative, transfer = row, np.eye(4), 0.0
        for kernel, bias in params:
            norm = np.linalg.norm(kernel, 2) * np.linalg.norm(derivative, 2)
            transfer += (1 + hidden @ hidden) / norm**2
            hidden = np.tanh(hidden @ np.asarray(kernel) + np.asarray(bias))
            derivative = (1 - hidden**2)[:, None] * (np.asarray(kernel).T @ derivative)
        assert float(value) * transfer <= np.sum(jacobian**2)
        assert float(value) * transfer > 0.01 * np.sum(jacobian**2)  # not empty


def test_noise_in_the_inputs_sees_it(double):
    params, x, scale = layers((5, 7, 3)), jnp.asarray(RANDOM.normal(size=(1, 5))), 1e-2
    noise = jax.random.normal(jax.random.key(0), (100_000, 5))
    moved = tanh_network(params, x + scale * noise) - tanh_network(params, x)
    values = np.sum(np.asarray(moved) ** 2, 1) / scale**2
    error = values.std() / np.sqrt(len(values))
    value = float(exact(tanh_network, params, x))
    assert abs(values.mean() - value) < 5 * error
    assert 5 * error < 0.03 * value


# Estimates.


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_estimate_and_its_standard_error(side, double):
    params, x = layers((5, 7, 3)), jnp.asarray(RANDOM.normal(size=(4, 5)))
    run = jax.jit(
        lambda key, number: estimate(
            tanh_network, params, x, key=key, num_probes=number, side=side
        ),
        static_argnums=1,
    )
    many, few = run(jax.random.key(1), 2000), run(jax.random.key(2), 50)
    value = float(exact(tanh_network, params, x))
    for result in (many, few):
        assert abs(float(result.value) - value) < 5 * float(result.standard_error)
    assert float(many.standard_error) < 0.02 * value
    np.testing.assert_allclose(few.standard_error / many.standard_error, 40**0.5, rtol=0.3)
    # For normal v the variance of |J'v|^2 is 2 |J J'|_F^2.
    grams = [j @ j.T for j in (tanh_jacobian(params, row) for row in x)]
    error = np.sqrt(sum(2 * np.sum(gram**2) for gram in grams) / 2000) / len(x)
    np.testing.assert_allclose(many.standard_error, error, rtol=0.1)
    # The spread over keys is what it says.
    values = jax.jit(
        jax.vmap(
            lambda key: estimate(tanh_network, params, x, key=key, num_probes=2, side=side).value
        )
    )(jax.random.split(jax.random.key(3), 500))
    np.testing.assert_allclose(np.std(values), error * np.sqrt(1000), rtol=0.15)


def test_examples_and_projections_draw_their_own():
    kernel, key = jnp.asarray(RANDOM.normal(size=(4, 3)), jnp.float32), jax.random.key(0)

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, number):
        return estimate(linear_fn, kernel, x, key=key, num_probes=number)

    one, two = (run(jnp.ones((1, 4)), number) for number in (1, 2))
    # Equal examples differ.
    assert abs(float(run(jnp.ones((2, 4)), 1).value) - float(one.value)) > 1e-2
    assert np.isnan(one.standard_error)
    # The second projection is another one, and the first of them stays.
    other = 2 * float(two.value) - float(one.value)
    assert abs(other - float(one.value)) > 1e-2
    np.testing.assert_allclose(two.standard_error, abs(other - float(one.value)) / 2, rtol=1e-4)


# As a penalty.


def directional(function, params):
    """The derivative along a random direction: by the gradient, and by central differences."""
    flat, unravel = ravel_pytree(params)
    direction, step = jnp.asarray(RANDOM.normal(size=flat.size)), 1e-5
    of = jax.jit(lambda vector: function(unravel(vector)))
    along = (of(flat + step * direction) - of(flat - step * direction)) / (2 * step)
    return jax.jit(jax.grad(of))(flat) @ direction, along


@pytest.mark.parametrize("sizes", [(5, 4, 3), (3, 4, 5)])
def test_gradient_agrees_with_finite_differences(sizes, double):
    params, x = layers(sizes), jnp.asarray(RANDOM.normal(size=(4, sizes[0])))
    slopes = directional(lambda p: exact(tanh_network, p, x), params)
    np.testing.assert_allclose(*slopes, rtol=1e-6)


@pytest.mark.parametrize("side", ["outputs", "inputs"])
def test_gradient_of_the_estimate(side, double):
    params, x = layers((4, 5, 3)), jnp.asarray(RANDOM.normal(size=(3, 4)))
    of = lambda p: (
        estimate(tanh_network, p, x, key=jax.random.key(0), num_probes=2, side=side).value
    )
    np.testing.assert_allclose(*directional(of, params), rtol=1e-6)


def test_the_standard_error_has_no_gradient():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layers((3, 2)))
    x, key = jnp.ones((2, 3)), jax.random.key(0)

    def penalty(params, weight):
        result = estimate(tanh_network, params, x, key=key, num_probes=2)
        return result.value + weight * result.standard_error

    both = jax.jit(jax.grad(penalty))
    for one, other in zip(
        *map(jax.tree.leaves, (both(params, 0.0), both(params, 1.0))), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_sides_are_a_reverse_and_a_forward_pass():
    """A function with a reverse rule of its own has no forward mode."""

    @jax.custom_vjp
    def double(x):
        return 2 * x

    double.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (2 * cotangent,))
    model = lambda kernel, x: double(x @ kernel)
    kernel, x, key = jnp.eye(3), jnp.ones((2, 3)), jax.random.key(0)
    assert float(estimate(model, kernel, x, key=key, side="outputs").value) > 0
    with pytest.raises(TypeError, match="can't apply forward-mode"):
        estimate(model, kernel, x, key=key, side="inputs")


def test_gradient_is_finite_where_the_jacobian_vanishes():
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), layers((4, 5, 3)))
    x = jnp.ones((2, 4))
    key = jax.random.key(0)
    for of in (
        lambda p: exact(tanh_network, p, x),
        lambda p: estimate(tanh_network, p, x, key=key, num_probes=2).value,
    ):
        value, grads = jax.jit(jax.value_and_grad(of))(params)
        assert float(value) == 0
        assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(grads))


# Chunks, types, models.


def test_chunks_change_nothing():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layers((5, 4, 3)))
    x = jnp.asarray(RANDOM.normal(size=(7, 5)), jnp.float32)
    whole = exact(tanh_network, params, x)
    np.testing.assert_allclose(exact(tanh_network, params, x, chunk_size=3), whole, rtol=1e-5)
    inside = jax.jit(lambda p, x: exact(tanh_network, p, x, chunk_size=3))(params, x)
    np.testing.assert_allclose(inside, whole, rtol=1e-5)
    for side in ("outputs", "inputs"):
        run = functools.partial(
            estimate, tanh_network, params, x, key=jax.random.key(0), num_probes=2, side=side
        )
        np.testing.assert_allclose(run(chunk_size=3), run(), rtol=1e-4)


def test_narrow_types_sum_in_float32():
    kernel = jnp.asarray(RANDOM.normal(size=(40, 30)), jnp.bfloat16)
    x = jnp.ones((3, 40), jnp.bfloat16)
    value = exact(linear_fn, kernel, x)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.sum(np.asarray(kernel, np.float64) ** 2), rtol=1e-5)
    result = estimate(linear_fn, kernel, x, key=jax.random.key(0), num_probes=2)
    assert result.value.dtype == result.standard_error.dtype == jnp.float32


def test_flax_models_of_images():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            x = linen.BatchNorm(use_running_average=not train)(linen.Conv(2, (3, 3))(x))
            return linen.Dense(3)(x.reshape(len(x), -1))

    class Nnx(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
            self.dense = nnx.Linear(24, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.dense(self.norm(self.conv(x)).reshape(len(x), -1))

    module, x = Linen(), jnp.asarray(RANDOM.normal(size=(5, 4, 3, 1)), jnp.float32)
    models = regjax.from_linen(module, module.init(jax.random.key(0), x)), regjax.from_nnx(Nnx())
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for model in models:
            function = regjax.model_function(model)
            one = lambda row, function=function, model=model: function(model.params, row[None])[0]
            jacobians = jax.jit(jax.vmap(jax.jacrev(one)))(x)
            expected = np.sum(np.asarray(jacobians) ** 2) / len(x)
            np.testing.assert_allclose(exact(function, model.params, x), expected, rtol=1e-5)
            with pytest.raises(ValueError, match="`model_fn` must not couple the examples"):
                exact(regjax.model_function(model, mode="train"), model.params, x)


def test_bad_arguments_are_named():
    kernel, x, key = jnp.ones((4, 3)), jnp.ones((2, 4)), jax.random.key(0)
    for options, error, message in (
        ({"side": "both"}, ValueError, "`side` must be one of outputs, inputs, got 'both'"),
        ({"num_probes": 0}, ValueError, "`num_probes` must be at least 1, got 0"),
        ({"key": 0}, TypeError, "`key` must be a typed key"),
    ):
        with pytest.raises(error, match=message):
            estimate(linear_fn, kernel, x, **{"key": key, **options})
    for call in (exact, functools.partial(estimate, key=key)):
        with pytest.raises(TypeError, match="`inputs` must be one array of real floating point"):
            call(linear_fn, kernel, jnp.ones((2, 4), jnp.int32))
        with pytest.raises(TypeError, match="`inputs` must be one array of real floating point"):
            call(linear_fn, kernel, [x])
        with pytest.raises(ValueError, match="`model_fn` must return an array with the leading"):
            call(lambda p, x: jnp.sum(x @ p), kernel, x)
        with pytest.raises(ValueError, match="must hold at least one example, got 0"):
            call(linear_fn, kernel, jnp.ones((0, 4)))
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        exact(linear_fn, kernel, x, chunk_size=0)


def test_bound_state_is_an_argument():
    """A model with its arrays bound compiles once for all of them, and has no memory."""

    def scaled(state, kernel, x):
        return state * (x @ kernel)

    kernel, x = jnp.ones((4, 3)), jnp.ones((2, 4))
    assert float(exact(Partial(scaled, jnp.float32(1.0)), kernel, x)) == 12.0
    count = applied._cache_size()
    values = [float(exact(Partial(scaled, jnp.float32(s)), kernel, x)) for s in (2.0, 3.0)]
    assert values == [48.0, 108.0]
    assert applied._cache_size() == count
