"""The penalty and its derivatives against plain automatic differentiation, reverse over reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import regjax
from regjax import regularizers
from tests import oracles

IMAGES = np.random.default_rng(1).normal(size=(4, 5, 5, 2))
LABELS = np.array([0, 2, 1, 0])


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def plain(loss_fn, params, *batch):
    """The same number, differentiated as it stands."""
    grads = jax.grad(loss_fn)(params, *batch)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads))


def penalty(loss_fn, params, *batch):
    return regularizers.gradient_norm_penalty(loss_fn, params, *batch)


def scaled_loss(state, params, inputs, targets):
    """A loss with a state bound; "count" has no derivative."""
    return oracles.loss_fn(params, state["scale"] * inputs, targets % (state["count"] + 3))


def convolution_loss(params, images, labels):
    numbers = ("NHWC", "HWIO", "NHWC")
    hidden = jnp.tanh(
        jax.lax.conv_general_dilated(
            images, params["kernel"], (1, 1), "SAME", dimension_numbers=numbers
        )
    )
    return oracles.cross_entropy(hidden.reshape(len(images), -1) @ params["dense"], labels)


def convolution_params(dtype=jnp.float64):
    random = np.random.default_rng(2)
    return {
        "kernel": jnp.asarray(0.3 * random.normal(size=(3, 3, 2, 4)), dtype),
        "dense": jnp.asarray(0.3 * random.normal(size=(100, 3)), dtype),
    }


def assert_same(one, other, tolerance=1e-11):
    one, other = (np.asarray(ravel_pytree(tree)[0]) for tree in (one, other))
    assert np.max(np.abs(other)) > 1e-3
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.max(np.abs(other)))


def test_value_and_gradient_are_g_squared_and_2hg(double):
    p = oracles.problem(dtype=np.float64)
    value, grads = jax.jit(jax.value_and_grad(functools.partial(penalty, oracles.loss_fn)))(
        p.params, *p.batch
    )
    flat, unravel = ravel_pytree(p.params)
    of = lambda vector: oracles.loss_fn(unravel(vector), *p.batch)
    gradient, hessian = jax.jit(lambda vector: (jax.grad(of)(vector), jax.hessian(of)(vector)))(
        flat
    )
    assert float(value) == pytest.approx(float(gradient @ gradient), rel=1e-12)
    assert_same(ravel_pytree(grads)[0], 2 * hessian @ gradient)
    expected = jax.jit(jax.grad(functools.partial(plain, oracles.loss_fn)))(p.params, *p.batch)
    assert_same(grads, expected)


def test_derivatives_by_everything_at_once(double):
    p = oracles.problem(num_examples=5, dtype=np.float64)

    def of(function, params, scale, inputs):
        state = {"scale": scale, "count": jnp.int32(0)}
        return function(Partial(scaled_loss, state), params, inputs, p.targets)

    at = p.params, jnp.asarray(1.3), p.inputs
    ours, theirs = (functools.partial(of, function) for function in (penalty, plain))
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*at) for f in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    # One at a time, the others constant; and forward mode.
    for i in range(3):
        assert_same(jax.jit(jax.grad(ours, i))(*at), expected[i])
    tangents = jax.tree.map(jnp.cos, at)
    slopes = [jax.jit(lambda f=f: jax.jvp(f, at, tangents)[1])() for f in (ours, theirs)]
    assert_same(*slopes)


def test_second_derivatives(double):
    p = oracles.problem(num_examples=5, num_inputs=2, width=3, dtype=np.float64)
    flat, unravel = ravel_pytree(p.params)
    hessians, mixed = [], []
    for function in (penalty, plain):
        of = lambda vector, inputs, function=function: function(
            oracles.loss_fn, unravel(vector), inputs, p.targets
        )
        hessians.append(jax.jit(jax.hessian(of))(flat, p.inputs))
        mixed.append(jax.jit(jax.jacfwd(jax.grad(of), 1))(flat, p.inputs))
    assert_same(*hessians)
    assert_same(*mixed)


@pytest.mark.optimized
def test_convolutions_and_what_they_cost(double):
    batch = jnp.asarray(IMAGES), jnp.asarray(LABELS)
    compiled = {}
    for name, function in (
        ("ours", functools.partial(penalty, convolution_loss)),
        ("plain", functools.partial(plain, convolution_loss)),
        ("gradient", convolution_loss),
    ):
        lowered = jax.jit(jax.value_and_grad(function)).lower(convolution_params(), *batch)
        compiled[name] = lowered.compile()
    ours, theirs = (compiled[name](convolution_params(), *batch) for name in ("ours", "plain"))
    assert_same(ours, theirs)
    flops = {name: executable.cost_analysis()["flops"] for name, executable in compiled.items()}
    # One gradient for the value, and a Hessian product of twice as much for the derivative.
    assert flops["ours"] < 3.1 * flops["gradient"]
    assert flops["ours"] < 1.01 * flops["plain"]


def test_derivative_with_respect_to_parameters_asks_for_nothing_else():
    p = oracles.problem()
    calls = []

    def loss(params, inputs, targets):
        calls.append(1)
        return oracles.loss_fn(params, inputs, targets)

    jax.make_jaxpr(jax.grad(functools.partial(penalty, loss)))(p.params, *p.batch)
    # The check of its shape, the gradient, how it can be differentiated, and the one under the
    # product; none with respect to the data.
    assert len(calls) <= 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_types_sum_in_float32(dtype):
    p = oracles.problem()
    params, inputs = jax.tree.map(lambda leaf: leaf.astype(dtype), (p.params, p.inputs))
    found = jax.jit(jax.value_and_grad(functools.partial(penalty, oracles.loss_fn)))(
        params, inputs, p.targets
    )
    assert found[0].dtype == jnp.float32
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found[1]))
    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    expected = jax.jit(jax.value_and_grad(functools.partial(plain, oracles.loss_fn)))(
        single(params), single(inputs), p.targets
    )
    found, expected = (np.asarray(ravel_pytree(single(t))[0]) for t in (found, expected))
    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_a_sum_of_many_small_squares_keeps_them():
    """Added up in bfloat16, 4096 equal squares stop at 256 of them."""
    size, grad = 4096, 0.5
    loss = lambda w: jnp.sum(jnp.asarray(grad, w.dtype) * w)
    value = penalty(loss, jnp.ones(size, jnp.bfloat16))
    assert float(value) == size * grad**2


def test_many_at_once_and_at_a_minimum(double):
    p = oracles.problem(num_examples=6, dtype=np.float64)
    of = lambda scale: penalty(
        oracles.loss_fn, jax.tree.map(lambda leaf: scale * leaf, p.params), *p.batch
    )
    scales, each = jnp.asarray([0.0, 0.5, 2.0]), jax.jit(jax.value_and_grad(of))
    together = jax.jit(jax.vmap(each))(scales)
    np.testing.assert_allclose(np.stack(together, 1), [each(scale) for scale in scales], rtol=1e-10)
    # Zero gradient: zero, not NaN.
    value, grads = jax.value_and_grad(functools.partial(penalty, lambda w: jnp.sum(w**2)))(
        jnp.zeros(3)
    )
    assert float(value) == 0
    assert not np.any(grads)


def test_flax_models_with_coupled_examples():
    """Batch norm in train mode: the penalty does not ask for independent examples."""

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train)(linen.Dense(4)(x))
            return linen.Dense(3)(jnp.tanh(x))

    class Nnx(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(4, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.second(jnp.tanh(self.norm(self.first(x))))

    p, module = oracles.problem(), Linen()
    variables = module.init(jax.random.key(0), p.inputs, train=True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for model in (regjax.from_linen(module, variables), regjax.from_nnx(Nnx())):
            loss = regjax.model_loss(model, oracles.cross_entropy, mode="train")
            ours, theirs = (
                jax.jit(jax.value_and_grad(function, 1))(loss, model.params, *p.batch)
                for function in (penalty, plain)
            )
            assert_same(ours, theirs, 1e-4)


def test_bad_losses_are_refused():
    p = oracles.problem()
    with pytest.raises(ValueError, match=r"`loss_fn` must return a scalar, .* got shape \(23, 3\)"):
        penalty(lambda params, x, y: oracles.model_fn(params, x), p.params, *p.batch)
    with pytest.raises(TypeError, match="`params` must be real floating point, got int32"):
        penalty(lambda w: jnp.sum(w), jnp.ones(3, jnp.int32))
