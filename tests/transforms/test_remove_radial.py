"""AdamP against a replica of the authors' code, and on a network with batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import transforms

RATE, DECAY, RATIO, DELTA, B1, B2, EPSILON = 0.01, 0.05, 0.1, 0.1, 0.9, 0.999, 1e-8


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """Adam is optax's, which promotes."""


def adamp(**options):
    """The transformation in the order of the docstring."""
    return optax.chain(
        transforms.remove_radial(optax.scale_by_adam(B1, B2, EPSILON), **options),
        optax.scale_by_learning_rate(RATE),
    )


def views(w):
    """Rows of the channels, and the leaf as one row."""
    return np.moveaxis(w, -1, 0).reshape(w.shape[-1], -1), w.reshape(1, -1)


def replica(w, grads, *, decay=0.0):
    """AdamP as the authors wrote it, in NumPy; also whether each step was projected."""
    mean, square, projected = np.zeros_like(w), np.zeros_like(w), []
    for t, grad in enumerate(grads, 1):
        mean, square = B1 * mean + (1 - B1) * grad, B2 * square + (1 - B2) * grad**2
        step = mean / (1 - B1**t) / (np.sqrt(square / (1 - B2**t)) + EPSILON)
        ratio, done = 1.0, False
        for number, (g, p) in enumerate(zip(views(grad), views(w), strict=True)):
            lengths = np.linalg.norm(g, axis=1) * np.linalg.norm(p, axis=1)
            cosine = np.abs(np.sum(g * p, 1)) / lengths
            if w.ndim > 1 and not done and cosine.max() < DELTA / np.sqrt(p.shape[1]):
                unit = p / np.linalg.norm(p, axis=1, keepdims=True)
                rows = views(step)[number]
                rows = rows - unit * np.sum(unit * rows, 1, keepdims=True)
                step = np.moveaxis(rows.reshape(-1, *w.shape[:-1]), 0, -1) if not number else rows
                step, ratio, done = step.reshape(w.shape), RATIO, True
        projected.append(done)
        w = w * (1 - RATE * decay * ratio) - RATE * step
    return w, projected


def off(grad, w, *, per_filter):
    """The gradient less its part along the weights, by channel or as a whole."""
    axes = tuple(range(w.ndim - 1)) if per_filter else None
    along = np.sum(grad * w, axes, keepdims=True) / np.sum(w**2, axes, keepdims=True)
    return grad - along * w


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("kind", ["channels", "leaf", "neither"])
def test_steps_are_those_of_the_authors_code(kind, decay):
    random = np.random.default_rng(3)
    with jax.enable_x64(True):
        start = random.normal(size=(5, 4, 3))
        tx = adamp(weight_decay=decay)
        params = {"k": jnp.asarray(start), "b": jnp.asarray(start[0, 0])}
        state, seen = tx.init(params), []
        for _ in range(8):
            w = np.asarray(params["k"])
            grad = random.normal(size=w.shape) + 0.5
            if kind == "channels":
                grad = off(grad, w, per_filter=True)
            elif kind == "leaf":
                grad = off(grad + w * [3, -3, 0], w, per_filter=False)
            seen.append(grad)
            updates, state = tx.update({"k": grad, "b": grad[0, 0]}, state, params)
            params = optax.apply_updates(params, updates)
        expected, projected = replica(start, seen, decay=decay)
        vector, _ = replica(start[0, 0], [grad[0, 0] for grad in seen], decay=decay)
    assert all(projected) == (kind != "neither")
    assert any(projected) == (kind != "neither")
    np.testing.assert_allclose(params["k"], expected, atol=1e-12)
    np.testing.assert_allclose(params["b"], vector, atol=1e-12)


def loss_fn(params, x, y):
    hidden = x @ params["dense"]
    hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-8)
    return jnp.mean((jax.nn.relu(hidden) @ params["head"] - y) ** 2)


def test_weights_before_a_batch_norm_are_found_behind_adam():
    random = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    x, y = draw(64, 10), draw(64, 2)
    params = {"dense": draw(10, 8), "head": draw(8, 2)}
    tx, plain = adamp(), adamp(threshold=0.0)
    state, other = tx.init(params), plain.init(params)
    for _ in range(30):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        unprojected, other = plain.update(grads, other, params)
        assert np.abs(jnp.sum(updates["dense"] * params["dense"], 0)).max() < 1e-6
        np.testing.assert_array_equal(updates["head"], unprojected["head"])
        along = np.abs(jnp.sum(unprojected["dense"] * params["dense"], 0)).max()
        params = optax.apply_updates(params, updates)
    assert along > 1e-3


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("of_weights", [False, True])
def test_gradients_and_weights_of_any_size(scale, of_weights):
    random = np.random.default_rng(7)
    w = random.normal(size=(6, 3))
    grad = off(random.normal(size=w.shape), w, per_filter=True)
    grad, params = (grad, scale * w) if of_weights else (scale * grad, w)
    tree = lambda leaf: {"k": jnp.asarray(leaf, jnp.float32)}
    ones = optax.stateless(lambda grads, params: jax.tree.map(jnp.ones_like, grads))
    tx = transforms.remove_radial(ones)
    updates, _ = tx.update(tree(grad), tx.init(tree(params)), tree(params))
    np.testing.assert_allclose(updates["k"], off(np.ones(w.shape), w, per_filter=True), atol=1e-6)


def test_masked_and_zero_leaves_are_left_alone():
    w = {"a": jnp.ones((3, 2)), "b": jnp.zeros((3, 2))}
    grads = {"a": jnp.asarray([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]), "b": jnp.ones((3, 2))}
    tx = transforms.remove_radial(optax.trace(0.0), mask={"a": False, "b": True}, weight_decay=0.5)
    updates, _ = tx.update(grads, tx.init(w), w)
    np.testing.assert_array_equal(updates["a"], grads["a"])
    np.testing.assert_array_equal(updates["b"], grads["b"])


def test_error_texts():
    with pytest.raises(ValueError, match="`threshold` must be non-negative, got -1"):
        transforms.remove_radial(optax.identity(), threshold=-1.0)
    with pytest.raises(ValueError, match="`weight_decay_ratio` must be non-negative"):
        transforms.remove_radial(optax.identity(), weight_decay_ratio=-1.0)
    tx = transforms.remove_radial(optax.identity())
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update({"a": jnp.ones((2, 2))}, tx.init({"a": jnp.ones((2, 2))}))
