"""Margins of classifiers against closed forms and points on the boundary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import diagnostics, models

RANDOM = np.random.default_rng(0)
KERNEL, BIAS = RANDOM.normal(size=(5, 4)), RANDOM.normal(size=4)
INPUTS, LABELS = RANDOM.normal(size=(13, 5)), RANDOM.integers(4, size=13)


def linear(params, inputs):
    return inputs @ params[0] + params[1][None]


def of_linear():
    """Over the classes, one by one."""
    logits, found = INPUTS @ KERNEL + BIAS, []
    for row, y in zip(logits, LABELS, strict=True):
        others = [j for j in range(4) if j != y]
        lengths = [np.linalg.norm(KERNEL[:, y] - KERNEL[:, j]) for j in others]
        found.append(min((row[y] - row[others]) / lengths))
    return np.asarray(found)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_a_linear_classifier(chunk_size):
    params = jnp.asarray(KERNEL, jnp.float32), jnp.asarray(BIAS, jnp.float32)
    margins = diagnostics.decision_margin(
        linear, params, jnp.asarray(INPUTS, jnp.float32), LABELS, chunk_size=chunk_size
    )
    np.testing.assert_allclose(margins, of_linear(), rtol=1e-5, atol=1e-6)
    is_right = np.argmax(INPUTS @ KERNEL + BIAS, 1) == LABELS
    assert is_right.any()
    assert not is_right.all()
    np.testing.assert_array_equal(margins > 0, is_right)


def test_the_boundary_is_at_the_margin_of_a_deeper_classifier():
    with jax.enable_x64(True):
        second = jnp.asarray(RANDOM.normal(size=(4, 3)))
        params = jnp.asarray(KERNEL), jnp.asarray(BIAS)
        model_fn = lambda params, x: jax.nn.relu(linear(params, x)) @ second
        inputs = jnp.asarray(RANDOM.normal(size=(300, 5)))
        labels = jnp.argmax(model_fn(params, inputs), 1)
        margins = diagnostics.decision_margin(model_fn, params, inputs, labels)
        distances = diagnostics.boundary_distances(linear, params, inputs)
        i = int(jnp.argmax(distances.min(1) - 1.1 * margins))
        assert distances[i].min() > 1.1 * margins[i]
        logits = lambda x: model_fn(params, x[None])[0]
        ways = jax.jacrev(logits)(inputs[i])
        ways = ways - ways[labels[i]][None]
        ways = ways / jnp.maximum(jnp.linalg.norm(ways, axis=1), 1e-9)[:, None]
        ends = jax.vmap(logits)(inputs[i][None] + margins[i] * ways)
        gaps = ends[:, labels[i]] - jnp.diagonal(ends)
        # One other class is met there, the others are not met yet.
        gaps = jnp.delete(gaps, labels[i])
        np.testing.assert_allclose(jnp.min(gaps), 0, atol=1e-10)


def test_logits_without_a_boundary_between_them():
    params = jnp.zeros((5, 3)), jnp.asarray([1.0, 0.0, 1.0])
    inputs = jnp.asarray(INPUTS[:3], jnp.float32)
    margins = diagnostics.decision_margin(linear, params, inputs, jnp.asarray([0, 1, 2]))
    np.testing.assert_array_equal(margins, [np.inf, -np.inf, np.inf])


@pytest.mark.parametrize("wrong", [np.uint8(9), np.int32(4), np.int32(-1)])
def test_labels_that_are_traced_cannot_be_refused(wrong):
    params = jnp.asarray(KERNEL, jnp.float32), jnp.asarray(BIAS, jnp.float32)
    labels = LABELS.astype(wrong.dtype)
    labels[3] = wrong
    find = jax.jit(functools.partial(diagnostics.decision_margin, linear))
    margins = find(params, jnp.asarray(INPUTS, jnp.float32), labels)
    assert np.isnan(margins[3])
    np.testing.assert_allclose(np.delete(margins, 3), np.delete(of_linear(), 3), rtol=1e-5)


def test_a_flax_model(default_promotion):
    model = regjax.from_nnx(
        models.MLP((1, 5, 1), 4, depth=0, normalization="batch", rngs=nnx.Rngs(0))
    )
    params = {"head": {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)}}
    margins = diagnostics.decision_margin(
        regjax.model_function(model), params, jnp.asarray(INPUTS), LABELS
    )
    np.testing.assert_allclose(margins, of_linear(), rtol=1e-5, atol=1e-6)


def test_bad_input():
    params, inputs = (jnp.ones((5, 4)), jnp.ones(4)), jnp.ones((13, 5))
    find = functools.partial(diagnostics.decision_margin, linear, params, inputs)
    with pytest.raises(ValueError, match=r"must be between 0 and 3 \(the outputs .*\), got 0 to 4"):
        find(np.arange(13) % 5)
    with pytest.raises(ValueError, match=r"`targets` must have shape \(13,\), got \(12,\)"):
        find(LABELS[:12])
    with pytest.raises(TypeError, match="`targets` must be integers, got float32"):
        find(jnp.ones(13))
    with pytest.raises(ValueError, match=r"`model_fn` must return logits of shape \(13, classes\)"):
        diagnostics.decision_margin(lambda p, x: x[:, :1], params, inputs, LABELS)
    mlp = models.MLP((1, 5, 1), 4, width=3, normalization="batch", rngs=nnx.Rngs(0))
    model = regjax.from_nnx(mlp)
    coupled = regjax.model_function(model, mode="train")
    with pytest.raises(ValueError, match="`model_fn` must not couple the examples"):
        diagnostics.decision_margin(coupled, model.params, inputs, LABELS)
