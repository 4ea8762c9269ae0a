"""Probes along the gradient and covariate shift against quadratics and a linear net."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import regjax
from regjax import diagnostics, models
from tests import oracles

RANDOM = np.random.default_rng(0)
STEPS = np.geomspace(0.01, 1.0, 5)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def quadratic(params, rows):
    """Mean over the rows a of (a'w)^2 / 2, whose Hessian is their second moment."""
    return 0.5 * jnp.mean((rows @ params["w"]) ** 2)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_probe_of_a_quadratic(chunk_size, double):
    rows, w = RANDOM.normal(size=(11, 3)), RANDOM.normal(size=3)
    matrix = rows.T @ rows / 11
    g = matrix @ w
    report = diagnostics.line_probe(
        quadratic, {"w": jnp.asarray(w)}, rows, learning_rates=STEPS, chunk_size=chunk_size
    )
    losses = [0.5 * w @ matrix @ w - s * g @ g + 0.5 * s**2 * g @ matrix @ g for s in STEPS]
    np.testing.assert_allclose(report.losses, losses, rtol=1e-10)
    distance = np.linalg.norm(matrix @ g)
    np.testing.assert_allclose(report.gradient_distances, STEPS * distance, rtol=1e-10)
    # The same for every step size, and bounded by the largest eigenvalue.
    np.testing.assert_allclose(report.smoothness, distance / np.linalg.norm(g), rtol=1e-10)
    assert float(report.smoothness.max()) <= np.linalg.eigvalsh(matrix)[-1]
    np.testing.assert_allclose(report.gradient_norm, np.linalg.norm(g), rtol=1e-12)
    np.testing.assert_allclose(report.loss, 0.5 * w @ g, rtol=1e-12)


@pytest.mark.optimized
def test_float32_is_good_for_steps_that_are_not_tiny():
    rows, w = RANDOM.normal(size=(11, 3)), RANDOM.normal(size=3)
    matrix = rows.T @ rows / 11
    report = diagnostics.line_probe(
        quadratic, {"w": jnp.float32(w)}, jnp.float32(rows), learning_rates=jnp.float32(STEPS)
    )
    g = matrix @ w
    np.testing.assert_allclose(
        report.smoothness, np.linalg.norm(matrix @ g) / np.linalg.norm(g), rtol=1e-4
    )


def test_no_gradient_no_smoothness():
    report = diagnostics.line_probe(
        quadratic, {"w": jnp.zeros(2)}, jnp.ones((3, 2)), learning_rates=jnp.ones(2)
    )
    assert np.all(np.isnan(report.smoothness))
    np.testing.assert_array_equal(report.gradient_distances, 0)


@pytest.mark.usefixtures("default_promotion")
def test_probe_and_shift_of_models_in_train_mode():
    """Batch norm in train mode, under jit, in nnx and linen; statistics stay where they are."""
    x, y = jnp.asarray(RANDOM.normal(size=(12, 4, 4, 1)), jnp.float32), jnp.arange(12) % 3
    module = models.MLP((4, 4, 1), 3, width=5, normalization="batch", rngs=nnx.Rngs(0))
    adapted = regjax.from_nnx(module)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, inputs, train=False):
            hidden = linen.Dense(5)(inputs.reshape(inputs.shape[0], -1))
            hidden = linen.BatchNorm(use_running_average=not train)(hidden)
            return linen.Dense(3)(linen.relu(hidden))

    other = regjax.from_linen(Net(), Net().init(jax.random.key(0), x))
    for model, layers in (
        (adapted, ("layer_0", "layer_1", "head")),
        (other, (("Dense_0", "BatchNorm_0"), "Dense_1")),
    ):
        before = jax.tree.map(np.asarray, model.state)
        loss = regjax.model_loss(model, oracles.cross_entropy, mode="train")
        probe = jax.jit(
            lambda loss, p: diagnostics.line_probe(loss, p, x, y, learning_rates=STEPS[:2])
        )
        report = probe(loss, model.params)
        g = jax.grad(loss)(model.params, x, y)
        moved = jax.tree.map(lambda w, g: w - STEPS[1] * g, model.params, g)
        np.testing.assert_allclose(report.losses[1], loss(moved, x, y), rtol=1e-5)
        difference = optax.tree.sub(jax.grad(loss)(moved, x, y), g)
        np.testing.assert_allclose(
            report.gradient_distances[1], optax.tree.norm(difference), rtol=1e-3
        )
        shift = diagnostics.internal_covariate_shift(loss, model.params, moved, x, y, layers=layers)
        assert float(shift.distances[0]) == 0
        assert float(shift.distances[-1]) > 0
        jax.tree.map(np.testing.assert_array_equal, model.state, before)
        with pytest.raises(ValueError, match="`chunk_size` must not split a batch"):
            diagnostics.line_probe(loss, model.params, x, y, learning_rates=STEPS, chunk_size=5)
        # Statistics of each chunk are another loss, which is asked for by name.
        by_chunk = regjax.model_loss(model, oracles.cross_entropy, mode="train_per_chunk")
        report = diagnostics.line_probe(
            by_chunk, model.params, x, y, learning_rates=STEPS[:1], chunk_size=8
        )
        parts = (8 * loss(model.params, x[:8], y[:8]) + 4 * loss(model.params, x[8:], y[8:])) / 12
        np.testing.assert_allclose(report.loss, parts, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_covariate_shift_of_a_linear_net(chunk_size, double):
    """Layer 2 sees the updated first layer and its own old weights."""
    x, y = RANDOM.normal(size=(9, 3)), RANDOM.normal(size=(9, 2))
    w1, v1 = RANDOM.normal(size=(2, 3, 4))
    w2, v2 = RANDOM.normal(size=(2, 4, 2))

    def loss(params, x, y):
        outputs = params["scale"] * x @ params["a"]["kernel"] @ params["b"]["kernel"]
        return 0.5 * jnp.mean(jnp.sum((outputs - y) ** 2, 1))

    def tree(one, two, scale=1.0):
        kernels = {"a": {"kernel": jnp.asarray(one)}, "b": {"kernel": jnp.asarray(two)}}
        return {**kernels, "scale": jnp.asarray(scale)}

    # The scale belongs to no layer: its new value is not looked at.
    report = diagnostics.internal_covariate_shift(
        loss, tree(w1, w2), tree(v1, v2, 5.0), x, y, layers=("a", "b"), chunk_size=chunk_size
    )
    old = (x @ w1).T @ (x @ w1 @ w2 - y) / 9
    new = (x @ v1).T @ (x @ v1 @ w2 - y) / 9
    np.testing.assert_allclose(report.distances, [0, np.linalg.norm(new - old)], rtol=1e-10)
    cosine = np.sum(new * old) / np.linalg.norm(new) / np.linalg.norm(old)
    np.testing.assert_allclose(report.cosines, [1, cosine], rtol=1e-10)
    # With the layers in the other order it is the first that sees the second.
    turned = diagnostics.internal_covariate_shift(
        loss, tree(w1, w2), tree(v1, v2), x, y, layers=("b", "a")
    )
    old, new = (x.T @ ((x @ w1 @ w - y) @ w.T) / 9 for w in (w2, v2))
    np.testing.assert_allclose(turned.distances, [0, np.linalg.norm(new - old)], rtol=1e-10)


def test_bad_input():
    params, rows = {"a": jnp.ones(2), "b": jnp.ones(2)}, jnp.ones((4, 2))

    def loss(params, rows):
        return jnp.mean(rows @ (params["a"] + params["b"]))

    def shift(new=params, layers=("a", "b"), **options):
        diagnostics.internal_covariate_shift(loss, params, new, rows, layers=layers, **options)

    with pytest.raises(ValueError, match=r"`layers` must be paths in the parameters.*'c'"):
        shift(layers=["c"])
    with pytest.raises(ValueError, match="`layers` must be disjoint, got a in more than one"):
        shift(layers=["a", "a"])
    with pytest.raises(ValueError, match="`other_params` must have the tree structure"):
        shift(new={"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="`learning_rates` must be a vector"):
        diagnostics.line_probe(loss, params, rows, learning_rates=0.1)
    summed = lambda params, rows: 4 * loss(params, rows) * rows.shape[0]
    with pytest.raises(ValueError, match="`loss_fn` must be the mean over independent examples"):
        diagnostics.line_probe(summed, params, rows, learning_rates=STEPS, chunk_size=2)
    with pytest.raises(ValueError, match="`loss_fn` must return a scalar"):
        diagnostics.line_probe(lambda p, x: x @ p["a"], params, rows, learning_rates=STEPS)
