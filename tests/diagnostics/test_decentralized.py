"""The split of the mean's step: its identities, the Hessian term behind it, its edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import regjax
from regjax import diagnostics, models, transforms
from tests import oracles

NUM, RATE = 6, 0.3


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def spread(params, scale, num=NUM, seed=0):
    """Weights of learners around `params`, whose mean they are not quite."""
    random = np.random.default_rng(seed)
    noise = lambda leaf: jnp.asarray(random.normal(size=(num, *leaf.shape)), leaf.dtype)
    return jax.tree.map(lambda leaf: leaf[None] + scale * noise(leaf), params)


def local_gradients(loss_fn, params, *batch):
    return jax.vmap(lambda own: jax.grad(loss_fn)(own, *batch))(params)


def report_of(loss_fn, params, *batch, **options):
    """The report where all learners took their gradients on the full data."""
    grads = transforms.mean_params(local_gradients(loss_fn, params, *batch))
    return diagnostics.landscape_dependent_noise(
        loss_fn, params, grads, *batch, learning_rate=RATE, **options
    )


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_the_parts_are_those_of_the_definition(double):
    problem = oracles.problem(dtype=np.float64)
    params = spread(problem.params, 0.3)
    random = np.random.default_rng(1)
    grads = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), problem.params)
    measure = functools.partial(
        diagnostics.landscape_dependent_noise, oracles.loss_fn, learning_rate=RATE
    )
    report = measure(params, grads, *problem.batch)
    for other in (measure, jax.jit(measure)):
        options = {"chunk_size": 9} if other is measure else {}
        found = other(params, grads, *problem.batch, **options)
        np.testing.assert_allclose(found, report, rtol=1e-10)
    center = jax.tree.map(lambda leaf: leaf.mean(0), params)
    g, g_a = flat(jax.grad(oracles.loss_fn)(center, *problem.batch)), flat(grads)
    effective = RATE * (g_a @ g) / (g @ g)
    noise = -RATE * g_a + effective * g
    deviations = np.stack([
        flat(jax.tree.map(lambda leaf, mean, j=j: leaf[j] - mean, params, center))
        for j in range(NUM)
    ])  # fmt: skip
    hessian = oracles.dense_hessian(oracles.loss_fn, center, *problem.batch)
    np.testing.assert_allclose(report.effective_learning_rate, effective, rtol=1e-10)
    np.testing.assert_allclose(report.noise_power, noise @ noise, rtol=1e-10)
    np.testing.assert_allclose(report.dispersion**2, np.mean(np.sum(deviations**2, 1)), rtol=1e-10)
    covariance = deviations.T @ deviations / NUM
    np.testing.assert_allclose(report.curvature_trace, np.trace(hessian @ covariance), rtol=1e-8)
    # Pythagoras, in which a noise that is not orthogonal to g would show.
    total = report.effective_learning_rate**2 * (g @ g) + report.noise_power
    np.testing.assert_allclose(total, RATE**2 * (g_a @ g_a), rtol=1e-10)


def test_learners_who_agree_descend_at_the_learning_rate_itself(double):
    problem = oracles.problem(dtype=np.float64)
    report = report_of(oracles.loss_fn, spread(problem.params, 0.0), *problem.batch)
    np.testing.assert_allclose(report.effective_learning_rate, RATE, rtol=1e-12)
    np.testing.assert_allclose(report[1:], 0, atol=1e-14)


def test_on_a_shared_quadratic_the_spread_changes_no_rate(double):
    matrix = jnp.asarray(oracles.symmetric([3.0, 1.0, 0.5, 0.1]))
    loss_fn = lambda w, x: 0.5 * jnp.mean(jnp.sum(((w[None] - x) @ matrix) * (w[None] - x), 1))
    data = jnp.asarray(np.random.default_rng(2).normal(size=(9, 4)))
    params = spread(jnp.ones(4), 2.0)
    report = report_of(loss_fn, params, data)
    np.testing.assert_allclose(report.effective_learning_rate, RATE, rtol=1e-12)
    np.testing.assert_allclose(report.noise_power, 0, atol=1e-24)
    deviations = params - params.mean(0)[None]
    expected = np.mean(np.sum((deviations @ matrix) * deviations, 1))
    np.testing.assert_allclose(report.curvature_trace, expected, rtol=1e-12)
    assert report.dispersion > 1


def test_a_rough_landscape_lowers_the_rate_as_its_closed_form(double):
    # L = cos: half of the learners at w + d, half at w - d have g_a = cos(d) g.
    loss_fn = lambda w, x: jnp.mean(jnp.cos(w[0] - x))
    w, d, x = 0.7, 0.9, jnp.zeros(3)
    report = report_of(loss_fn, jnp.asarray([[w + d], [w - d]]), x)
    np.testing.assert_allclose(report.effective_learning_rate, RATE * np.cos(d), rtol=1e-12)
    np.testing.assert_allclose(report.curvature_trace, -np.cos(w) * d**2, rtol=1e-12)


def test_the_gradient_of_half_the_trace_is_the_leading_effect(double):
    problem = oracles.problem(dtype=np.float64)
    unit = spread(jax.tree.map(jnp.zeros_like, problem.params), 1.0)
    unit = jax.tree.map(lambda leaf: leaf - leaf.mean(0, keepdims=True), unit)

    @jax.jit
    def away(scale):
        """How far g_a - g and its leading part are apart, and the length of g_a - g."""
        stacked = lambda center: jax.tree.map(lambda w, d: w[None] + scale * d, center, unit)
        grads = transforms.mean_params(
            local_gradients(oracles.loss_fn, stacked(problem.params), *problem.batch)
        )

        def half_trace(center):
            report = diagnostics.landscape_dependent_noise(
                oracles.loss_fn, stacked(center), grads, *problem.batch, learning_rate=RATE
            )
            return report.curvature_trace / 2

        gradient = jax.grad(oracles.loss_fn)(problem.params, *problem.batch)
        change = jax.tree.map(jnp.subtract, grads, gradient)
        error = jax.tree.map(jnp.subtract, change, jax.grad(half_trace)(problem.params))
        return optax.tree.norm(error), optax.tree.norm(change)

    errors, changes = np.asarray([away(scale) for scale in (0.1, 0.05, 0.025)]).T
    assert np.all(errors < 0.6 * changes)
    # What is left is of third order: an eighth for half the spread. Without the 1/2 it is second.
    np.testing.assert_allclose(errors[:-1] / errors[1:], 8, rtol=0.3)


def test_without_a_gradient_the_rate_is_not_a_number_and_all_is_noise():
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(jnp.zeros_like(w) * w)
    report = diagnostics.landscape_dependent_noise(
        loss_fn, jnp.ones((3, 2)), jnp.asarray([3.0, 4.0]), jnp.ones(5), learning_rate=2.0
    )
    assert jnp.isnan(report.effective_learning_rate)
    assert report.noise_power == 100
    assert report.dispersion == report.curvature_trace == 0


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x.reshape(len(x), -1))


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_networks(kind):
    images = jnp.asarray(np.random.default_rng(3).normal(size=(11, 1, 4, 1)), jnp.float32)
    labels = jnp.arange(11) % 3
    if kind == "linen":
        model = regjax.from_linen(Linen(), Linen().init(jax.random.key(0), images))
    else:
        mlp = models.MLP((1, 4, 1), 3, width=4, depth=1, rngs=nnx.Rngs(0))
        model = regjax.from_nnx(mlp)
    loss_fn = regjax.model_loss(model, oracles.cross_entropy)
    report = report_of(loss_fn, spread(model.params, 0.2), images, labels)
    assert 0 < report.effective_learning_rate < 2 * RATE
    assert report.dispersion > 0
    assert all(value.dtype == jnp.float32 and value.shape == () for value in report)


def test_errors():
    problem = oracles.problem()
    params = spread(problem.params, 0.1)
    report = functools.partial(diagnostics.landscape_dependent_noise, oracles.loss_fn)
    stray = {**params, "first": {**params["first"], "bias": params["first"]["bias"][:, 0]}}
    with pytest.raises(ValueError, match=r"`params.*` must have shape \(6, 6\), got \(6,\)"):
        report(stray, problem.params, *problem.batch, learning_rate=RATE)
    with pytest.raises(ValueError, match="`params` must have the tree structure"):
        report(params["first"], problem.params, *problem.batch, learning_rate=RATE)
    with pytest.raises(ValueError, match="`learning_rate` must be non-negative, got -1"):
        report(params, problem.params, *problem.batch, learning_rate=-1)
    with pytest.raises(ValueError, match="`loss_fn` must return a scalar"):
        diagnostics.landscape_dependent_noise(
            oracles.model_fn, params, problem.params, problem.inputs, learning_rate=RATE
        )
