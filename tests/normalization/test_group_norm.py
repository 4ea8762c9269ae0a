"""GroupNorm+ against NumPy, at the ends of its mix, and where statistics run out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.normalization import _group_norm
from regjax.normalization._group_norm import (
    BatchNormGroupNorm,
    GroupNormPlus,
    ParallelGroupBatchNorm,
)

RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(1, 2, size=(8, 5, 5, 16)), jnp.float32)
LAYERS = [GroupNormPlus, BatchNormGroupNorm, ParallelGroupBatchNorm]
EPSILON = 1e-5


def apply(layer, x=X, logit=None, train=True, state=None):
    params = layer.init_params(x.shape[-1])
    if logit is not None:
        params["mix_logit"] = jnp.float32(logit)
    state = layer.init_state(x.shape[-1]) if state is None else state
    return layer.apply(params, state, x, train=train)


def group_part(x, num_groups=4):
    """NumPy: unbiased standard deviation, epsilon added to it."""
    grouped = np.asarray(x, np.float64).reshape(*x.shape[:-1], num_groups, -1)
    axes = (*range(1, grouped.ndim - 2), grouped.ndim - 1)
    mean = grouped.mean(axes, keepdims=True)
    std = grouped.std(axes, ddof=1, keepdims=True)
    return ((grouped - mean) / (std + EPSILON)).reshape(x.shape)


def batch_part(x, axes=(0,)):
    x = np.asarray(x, np.float64)
    std = x.std(axes, ddof=1, keepdims=True)
    return (x - x.mean(axes, keepdims=True)) / (std + EPSILON)


@pytest.mark.parametrize("axes", [(0,), (0, 1, 2), None])
@pytest.mark.parametrize("kind", LAYERS)
def test_numpy_reference(kind, axes):
    y, _ = apply(kind(num_groups=4, batch_axes=axes))
    axes = (0, 1, 2) if axes is None else axes
    a = group_part(X)
    b = batch_part(a, axes)
    if kind is BatchNormGroupNorm:
        b = batch_part(X, axes)
        a = group_part(b)
    elif kind is ParallelGroupBatchNorm:
        b = batch_part(X, axes)
    share = 1 / (1 + np.exp(-1.0))
    assert share == pytest.approx(0.731, abs=1e-3)
    np.testing.assert_allclose(y, share * a + (1 - share) * b, atol=2e-5)


def test_ends_of_the_mix():
    only_group, _ = apply(GroupNormPlus(num_groups=4), logit=50)
    np.testing.assert_allclose(only_group, group_part(X), atol=1e-5)
    only_batch, _ = apply(GroupNormPlus(num_groups=4), logit=-50)
    np.testing.assert_allclose(only_batch, batch_part(group_part(X)), atol=1e-5)
    raw, _ = apply(ParallelGroupBatchNorm(num_groups=4), logit=-50)
    np.testing.assert_allclose(raw, batch_part(X), atol=1e-5)


def test_parallel_form_does_not_see_an_affine_change():
    layer = ParallelGroupBatchNorm(num_groups=4)
    np.testing.assert_allclose(apply(layer, 3 * X + 2)[0], apply(layer)[0], atol=1e-4)


def test_gradient_of_the_mix():
    layer, g = GroupNormPlus(num_groups=4), jnp.asarray(RANDOM.normal(size=X.shape), jnp.float32)
    scale = jnp.asarray(RANDOM.normal(size=16), jnp.float32)

    def inner(logit):
        params = {**layer.init_params(16), "scale": scale, "mix_logit": logit}
        return jnp.sum(g * layer.apply(params, {}, X, train=True)[0])

    a = group_part(X)
    share = 1 / (1 + np.exp(-0.3))
    expected = share * (1 - share) * np.sum(np.asarray(g) * (a - batch_part(a)) * np.asarray(scale))
    assert float(jax.grad(inner)(jnp.float32(0.3))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_example_is_group_norm_alone(kind):
    y, _ = apply(kind(num_groups=4), X[:1])
    np.testing.assert_allclose(y, group_part(X[:1]), atol=2e-5)


def test_constant_inputs_are_finite():
    forward = lambda x: jnp.sum(apply(GroupNormPlus(num_groups=4), x)[0] ** 2)
    value, slope = jax.value_and_grad(forward)(jnp.ones((4, 3, 3, 8)))
    assert value == 0
    assert jnp.all(jnp.isfinite(slope))


def test_usable_variant_evaluates_each_example_by_itself():
    layer = GroupNormPlus(num_groups=4, batch_axes=None, track_running=True, momentum=0.5)
    _, state = apply(layer)
    assert state["var"].shape == (16,)
    a = group_part(X)
    np.testing.assert_allclose(state["mean"], 0.5 * a.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(state["var"], 0.5 + 0.5 * a.var((0, 1, 2), ddof=1), rtol=1e-4)
    whole, after = apply(layer, train=False, state=state)
    one, _ = apply(layer, X[:1], train=False, state=state)
    np.testing.assert_array_equal(one, whole[:1])
    jax.tree.map(np.testing.assert_array_equal, after, state)
    # The literal one depends on the others.
    literal = GroupNormPlus(num_groups=4)
    two, all_of_them = (apply(literal, x, train=False)[0] for x in (X[:2], X))
    assert jnp.abs(two - all_of_them[:2]).max() > 0.1


def test_vectors_have_groups_of_channels():
    y = _group_norm.group_normalize(X[:, 0, 0], num_groups=4, epsilon=EPSILON)
    np.testing.assert_allclose(y, group_part(X[:, 0, 0]), atol=1e-5)


def test_error_texts():
    with pytest.raises(ValueError, match=r"`num_groups` must divide .* channels, 16, got 5"):
        GroupNormPlus(num_groups=5).init_params(16)
    with pytest.raises(ValueError, match="must leave more than 1 values to a group, got 16"):
        _group_norm.group_normalize(X[:, 0, 0], num_groups=16, epsilon=EPSILON)
    with pytest.raises(ValueError, match=r"`batch_axes` must be None with `track_running`"):
        GroupNormPlus(track_running=True)
    layer = GroupNormPlus(num_groups=4, batch_axes=(0, 1), track_running=True)
    with pytest.raises(ValueError, match="must be all axes but the channels with `track_running`"):
        apply(layer)
