"""GroupNorm+ against NumPy, at the ends of its mix, and where statistics run out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from regjax.normalization import _group_norm, _statistics
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


def test_long_rows_are_summed_as_products_of_the_same_value(monkeypatch):
    layer = GroupNormPlus(num_groups=2)
    params, state = layer.init_params(4), layer.init_state(4)
    random = np.random.default_rng(0)
    x, weight = (jnp.asarray(random.normal(3, 2, (6, 5, 4)), jnp.float32) for _ in range(2))

    def loss(params, x):
        return jnp.sum(weight * layer.apply(params, state, x, train=True)[0] ** 2)

    sums = jax.grad(loss, argnums=(0, 1))(params, x)
    monkeypatch.setattr(_statistics, "_LONG_ROW", 1)
    # The layer remembers its program for these shapes.
    jax.clear_caches()
    products = jax.grad(loss, argnums=(0, 1))(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), sums, products
    )
    assert "dot_general" in str(jax.make_jaxpr(jax.grad(loss, argnums=1))(params, x))


def test_vectors_have_groups_of_channels():
    y = _group_norm.group_normalize(X[:, 0, 0], num_groups=4, epsilon=EPSILON)
    np.testing.assert_allclose(y, group_part(X[:, 0, 0]), atol=1e-5)


MASKS = [
    RANDOM.random((8, 5, 5, 1)) < 0.6,
    RANDOM.random((8, 5, 5, 16)) < 0.6,
    np.arange(8)[:, None, None, None] < 5,  # three examples of padding
]


def masked_part(x, mask, axes, num_groups=None):
    """NumPy, value by value: those that share statistics have the same indices but for `axes`."""
    x, mask = np.asarray(x, np.float64), np.broadcast_to(mask, x.shape)
    size = 1 if num_groups is None else x.shape[-1] // num_groups
    y, has = np.zeros_like(x), np.zeros(x.shape, bool)
    kept = [i for i in range(x.ndim - 1) if i not in axes]
    for index in np.ndindex(*[x.shape[i] for i in kept], x.shape[-1] // size):
        at = [slice(None)] * x.ndim
        for axis, i in zip(kept, index[:-1], strict=True):
            at[axis] = slice(i, i + 1)
        at[-1] = slice(index[-1] * size, (index[-1] + 1) * size)
        values = x[tuple(at)][mask[tuple(at)]]
        if len(values) > 1:
            has[tuple(at)] = True
            y[tuple(at)] = (x[tuple(at)] - values.mean()) / (values.std(ddof=1) + EPSILON)
    return y, has


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("axes", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("kind", LAYERS)
def test_masked_statistics_against_numpy(kind, axes, mask):
    layer = kind(num_groups=4, batch_axes=axes)
    x = jnp.where(mask, X, 1e3)  # what does not count has no part in the statistics
    y, _ = layer.apply(layer.init_params(16), {}, x, train=True, mask=mask)
    share = 1 / (1 + np.exp(-1.0))
    group = lambda x: masked_part(x, mask, (1, 2), 4)[0]
    if kind is BatchNormGroupNorm:
        b, has = masked_part(x, mask, axes)
        b = np.where(has, b, x)
        a = group(b)
    else:
        a = group(x)
        b, has = masked_part(a if kind is GroupNormPlus else x, mask, axes)
    expected = np.where(has, share * a + (1 - share) * b, a)
    counts = np.broadcast_to(mask, x.shape)
    np.testing.assert_allclose(np.asarray(y)[counts], expected[counts], atol=5e-5)
    slope = jax.grad(
        lambda x: jnp.sum(
            jnp.where(mask, layer.apply(layer.init_params(16), {}, x, train=True, mask=mask)[0], 0)
            ** 3
        )
    )(x)
    assert jnp.all(jnp.isfinite(slope))


def test_a_mask_that_leaves_nothing_gives_the_bias_and_moves_nothing():
    layer = GroupNormPlus(num_groups=4, batch_axes=None, track_running=True)
    params, state = layer.init_params(16), layer.init_state(16)
    y, new = layer.apply(params, state, X, train=True, mask=jnp.zeros((1, 1, 1, 1), bool))
    np.testing.assert_array_equal(y, 0)
    jax.tree.map(np.testing.assert_array_equal, new, state)
    whole = layer.apply(params, state, X, train=True)
    masked = layer.apply(params, state, X, train=True, mask=jnp.ones((1, 1, 1, 1), bool))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), masked, whole)


@pytest.mark.parametrize("mask", [None, *MASKS[:2]])
@pytest.mark.parametrize(
    "options",
    [{"num_groups": 4}, {"num_groups": None, "group_size": 2}, {"reduction_axes": (2, -1)}],
)
def test_the_group_part_is_flax_group_norm(options, mask, default_promotion):
    """Without epsilon, which stands elsewhere, and with the biased variance."""
    options = {"num_groups": 8, **options}
    scale, bias = (jnp.asarray(RANDOM.normal(size=16), jnp.float32) for _ in range(2))
    theirs = linen.GroupNorm(**options, epsilon=0.0)
    full = None if mask is None else jnp.asarray(np.broadcast_to(mask, X.shape))  # theirs needs it
    expected = theirs.apply({"params": {"scale": scale, "bias": bias}}, X, mask=full)
    for more in ({}, {"use_fast_variance": False}):
        layer = GroupNormPlus(**options, epsilon=0.0, degrees_of_freedom=0, **more)
        params = {"scale": scale, "bias": bias, "mix_logit": jnp.float32(50)}
        y, _ = layer.apply(params, {}, X, train=True, mask=mask)
        np.testing.assert_allclose(y, expected, atol=2e-5)


def test_error_texts():
    with pytest.raises(ValueError, match="`num_groups` must be None with `group_size`, and only"):
        GroupNormPlus(group_size=4)
    with pytest.raises(ValueError, match=r"`group_size` must divide .* channels, 16, got 5"):
        GroupNormPlus(num_groups=None, group_size=5).init_params(16)
    with pytest.raises(ValueError, match=r"`reduction_axes` must include the channels, got \(1,\)"):
        apply(GroupNormPlus(num_groups=4, reduction_axes=1))
    with pytest.raises(ValueError, match=r"`num_groups` must divide .* channels, 16, got 5"):
        GroupNormPlus(num_groups=5).init_params(16)
    with pytest.raises(ValueError, match="must leave more than 1 values to a group, got 16"):
        _group_norm.group_normalize(X[:, 0, 0], num_groups=16, epsilon=EPSILON)
    with pytest.raises(ValueError, match=r"`batch_axes` must be None with `track_running`"):
        GroupNormPlus(track_running=True)
    layer = GroupNormPlus(num_groups=4, batch_axes=(0, 1), track_running=True)
    with pytest.raises(ValueError, match="must be all axes but the channels with `track_running`"):
        apply(layer)
