"""Groups of weights: by hand, and filters whose scale does not change the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import pruning


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def test_filters_before_a_batch_norm_in_train_mode(double):
    random = np.random.default_rng(4)
    params = {"conv": jnp.asarray(random.normal(size=(3, 3, 2, 4)))}
    x = jnp.asarray(random.normal(size=(8, 6, 6, 2)))
    y = jnp.asarray(random.normal(size=(8, 4)))

    def loss(params, epsilon):
        hidden = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        centred = hidden - hidden.mean((0, 1, 2))[None, None, None]
        deviation = jnp.sqrt(jnp.mean(centred**2, (0, 1, 2)) + epsilon)
        features = jax.nn.relu(centred / deviation[None, None, None]).mean((1, 2))
        return jnp.mean((features - y) ** 2)

    importance = functools.partial(
        pruning.group_importance, params, groups={"conv": jnp.arange(4)}, num_groups=4
    )
    for epsilon, limit in ((0.0, 1e-20), (1e-5, 1e-10)):
        grads = jax.grad(loss)(params, epsilon)
        assert importance(grads).max() < limit
        assert importance(grads, reduction="sum_of_squares").min() > 1e-7


def test_groups_over_several_leaves_by_hand():
    values = {"w": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.asarray([5.0, 6.0])}
    grads = {"w": jnp.asarray([[1.0, -1.0], [2.0, 1.0]]), "b": jnp.asarray([-1.0, 0.5])}
    # Products: column 0 has 1, 6 and bias -5; column 1 has -2, 4 and bias 3.
    groups = {"w": jnp.arange(2), "b": jnp.arange(2)}
    importance = functools.partial(pruning.group_importance, values, grads, num_groups=2)
    np.testing.assert_allclose(importance(groups=groups), [(1 + 6 - 5) ** 2, (-2 + 4 + 3) ** 2])
    np.testing.assert_allclose(
        importance(groups=groups, reduction="sum_of_squares"), [1 + 36 + 25, 4 + 16 + 9]
    )
    np.testing.assert_allclose(
        importance(groups=groups, reduction="sum_of_absolute"), [1 + 6 + 5, 2 + 4 + 3]
    )
    without_bias = {**groups, "b": jnp.asarray([-1, -1])}
    np.testing.assert_allclose(importance(groups=without_bias), [(1 + 6) ** 2, (-2 + 4) ** 2])


def test_error_texts():
    values = {"a": jnp.ones(3)}
    with pytest.raises(TypeError, match="`groups` must hold integers, got float32"):
        pruning.group_importance(values, values, groups=values, num_groups=1)
    with pytest.raises(ValueError, match="`grads` must have the tree structure"):
        pruning.group_importance(values, {"b": values["a"]}, groups=values, num_groups=1)
    with pytest.raises(ValueError, match="`num_groups` must be at least 1, got 0"):
        pruning.group_importance(values, values, groups={"a": jnp.arange(3)}, num_groups=0)
    with pytest.raises(ValueError, match=r"`reduction` must be one of .*, got 'sum'"):
        pruning.group_importance(
            values, values, groups={"a": jnp.arange(3)}, num_groups=3, reduction="sum"
        )
