"""Batch norm and its kin against NumPy, flax and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from regjax import _jaxprs
from regjax.normalization import BatchNorm, GhostBatchNorm, MeanOnlyBatchNorm, NoisyBatchNorm
from regjax.normalization._layer import Layer

RANDOM = np.random.default_rng(0)


def start(layer, channels):
    return layer.init_params(channels), layer.init_state(channels)


def normal(*shape, mean=0.0, scale=1.0):
    return jnp.asarray(RANDOM.normal(mean, scale, size=shape), jnp.float32)


@pytest.mark.parametrize("shape", [(9, 3), (4, 5, 5, 3)])
def test_outputs_have_mean_zero_and_the_variance_of_the_formula(shape):
    x = normal(*shape, mean=2, scale=0.1)
    layer = BatchNorm(epsilon=1e-2)
    y, _ = layer.apply(*start(layer, 3), x, train=True)
    flat, values = np.asarray(y, np.float64).reshape(-1, 3), np.asarray(x).reshape(-1, 3)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-6)
    variance = values.var(0)
    np.testing.assert_allclose(flat.var(0), variance / (variance + 1e-2), rtol=1e-4)


@pytest.mark.parametrize("unbiased", [True, False])
def test_three_updates_of_the_running_statistics(unbiased, default_promotion):
    layer = BatchNorm(momentum=0.7, unbiased_running_variance=unbiased)
    params, state = start(layer, 3)
    module = linen.BatchNorm(momentum=0.7, use_running_average=False)
    variables = module.init(jax.random.key(0), normal(4, 3))
    mean, variance = np.zeros(3), np.ones(3)
    for _ in range(3):
        x = normal(6, 2, 3, mean=1, scale=2)
        y, state = layer.apply(params, state, x, train=True)
        flat = np.asarray(x, np.float64).reshape(-1, 3)
        mean = 0.7 * mean + 0.3 * flat.mean(0)
        variance = 0.7 * variance + 0.3 * flat.var(0, ddof=int(unbiased))
        theirs, new = module.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **new}
        np.testing.assert_allclose(y, theirs, atol=1e-5)
    np.testing.assert_allclose(state["mean"], mean, atol=1e-6)
    np.testing.assert_allclose(state["var"], variance, rtol=1e-5)
    same = np.allclose(state["var"], variables["batch_stats"]["var"], rtol=1e-4)
    assert same is not unbiased
    expected = (np.asarray(x) - mean) / np.sqrt(variance + 1e-5)
    evaluated, after = layer.apply(params, state, x, train=False)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_gradient_identity():
    """The form with 1/m on the second inner product is exact; 1/sqrt(m), as printed, is not."""
    with jax.enable_x64(True):
        m, scale = 16, 1.7
        x, g = (jnp.asarray(RANDOM.normal(size=(m, 1))) for _ in range(2))
        layer = BatchNorm(epsilon=0.0, use_bias=False)
        forward = lambda x: layer.apply(
            {"scale": jnp.full(1, scale)}, layer.init_state(1), x, train=True
        )[0]
        y, pull_back = jax.vjp(forward, x)
        slope, normalized = pull_back(g)[0], y / scale
        sigma = np.asarray(x).std()
        square = lambda a: float(jnp.sum(a**2))
        terms = square(g) - float(jnp.sum(g)) ** 2 / m
        inner = float(jnp.sum(g * normalized)) ** 2
        exact = scale**2 / sigma**2 * (terms - inner / m)
        assert square(slope) == pytest.approx(exact, rel=1e-10)
        printed = scale**2 / sigma**2 * (terms - inner / np.sqrt(m))
        assert abs(square(slope) / printed - 1) > 1e-3
        assert float(jnp.sum(slope)) == pytest.approx(0, abs=1e-10)
        assert float(jnp.sum(slope * normalized)) == pytest.approx(0, abs=1e-10)


def test_one_value_gives_the_bias_and_nan_leaves_the_statistics():
    layer = BatchNorm()
    params, state = start(layer, 3)
    params = {**params, "bias": jnp.asarray([1.0, 2.0, 3.0])}
    y, new = layer.apply(params, state, normal(1, 3), train=True)
    np.testing.assert_array_equal(y[0], params["bias"])
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in new.values())
    x = normal(4, 3).at[0, 1].set(jnp.nan).at[0, 2].set(jnp.inf)
    y, new = layer.apply(params, state, x, train=True)
    assert jnp.all(jnp.isnan(y[:, 1]))
    assert jnp.all(jnp.isfinite(y[:, 0]))
    for name in ("mean", "var"):
        np.testing.assert_array_equal(new[name][1:], state[name][1:])
    assert new["mean"][0] != state["mean"][0]


def test_a_constant_feature_has_finite_outputs_and_gradients():
    layer = BatchNorm()
    x = jnp.full((8, 2), 1234.5)
    forward = lambda x: jnp.sum(layer.apply(*start(layer, 2), x, train=True)[0] ** 2)
    assert forward(x) == 0
    assert jnp.all(jnp.isfinite(jax.grad(forward)(x)))


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_types_of_outputs_and_statistics(dtype):
    layer = BatchNorm(dtype=dtype, param_dtype=jnp.bfloat16)
    y, state = layer.apply(*start(layer, 3), normal(4, 3).astype(jnp.bfloat16), train=True)
    assert y.dtype == jnp.bfloat16
    assert state["var"].dtype == jnp.float32


def test_options_leave_parameters_out():
    layer = BatchNorm(use_scale=False, use_bias=False)
    assert layer.init_params(3) == {}
    y, _ = layer.apply(*start(layer, 3), normal(50, 3, scale=4), train=True)
    np.testing.assert_allclose(np.asarray(y).std(0), 1, rtol=1e-4)


def test_ghosts_are_normalized_by_themselves():
    x = normal(12, 5, 3) * jnp.arange(1.0, 13.0).reshape(12, 1, 1)
    ghost = GhostBatchNorm(ghost_size=4, momentum=0.0, tick_per_ghost=False)
    whole = BatchNorm(momentum=0.0)
    y, state = ghost.apply(*start(ghost, 3), x, train=True)
    parts = [whole.apply(*start(whole, 3), x[i : i + 4], train=True) for i in (0, 4, 8)]
    np.testing.assert_allclose(y, np.concatenate([part[0] for part in parts]), atol=1e-5)
    for name in ("mean", "var"):
        expected = np.mean([part[1][name] for part in parts], axis=0)
        np.testing.assert_allclose(state[name], expected, rtol=1e-5)
    everything, _ = whole.apply(*start(whole, 3), x, train=True)
    assert jnp.abs(everything - y).max() > 0.1
    one = GhostBatchNorm(ghost_size=12)
    np.testing.assert_allclose(one.apply(*start(one, 3), x, train=True)[0], everything, atol=1e-6)
    evaluated = [layer.apply(*start(layer, 3), x[:5], train=False)[0] for layer in (ghost, whole)]
    np.testing.assert_array_equal(*evaluated)


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_tick_once_for_each_ghost(unbiased):
    """A batch of eight ghosts moves them as eight batches do: 3.05 where one tick gives 0.54."""
    x = normal(32, 2, 3, mean=5)
    options = {"momentum": 0.9, "unbiased_running_variance": unbiased}
    ghost, plain = GhostBatchNorm(ghost_size=4, **options), BatchNorm(**options)
    _, ticked = ghost.apply(*start(ghost, 3), x, train=True)
    params, state = start(plain, 3)
    for i in range(0, 32, 4):
        _, state = plain.apply(params, state, x[i : i + 4], train=True)
    for name in ("mean", "var"):
        np.testing.assert_allclose(ticked[name], state[name], rtol=1e-5)
    once = GhostBatchNorm(ghost_size=4, tick_per_ghost=False, **options)
    _, slow = once.apply(*start(once, 3), x, train=True)
    np.testing.assert_allclose(ticked["mean"] / slow["mean"], (1 - 0.9**8) / 0.1, rtol=0.1)


@pytest.mark.parametrize("tick_per_ghost", [True, False])
def test_a_spoilt_ghost_moves_nothing(tick_per_ghost):
    x = normal(12, 3).at[5, 1].set(jnp.nan)
    ghost = GhostBatchNorm(ghost_size=4, momentum=0.5, tick_per_ghost=tick_per_ghost)
    params, state = start(ghost, 3)
    y, new = ghost.apply(params, state, x, train=True)
    assert jnp.all(jnp.isnan(y[4:8, 1]))
    assert jnp.sum(jnp.isnan(y)) == 4
    _, without = ghost.apply(params, state, jnp.concatenate([x[:4], x[8:]]), train=True)
    np.testing.assert_allclose(new["mean"][1], without["mean"][1], rtol=1e-6)
    _, none = ghost.apply(params, state, x[4:8], train=True)
    np.testing.assert_array_equal(none["var"][1], 1)


@pytest.mark.parametrize("tick_per_ghost", [True, False])
def test_ghosts_on_devices_share_running_statistics(tick_per_ghost):
    x = normal(4, 6, 3) + jnp.arange(4.0).reshape(4, 1, 1)
    options = {"ghost_size": 3, "momentum": 0.5, "tick_per_ghost": tick_per_ghost}
    layer = GhostBatchNorm(axis_name="d", **options)
    params, state = start(layer, 3)
    _, parted = jax.vmap(lambda x: layer.apply(params, state, x, train=True), axis_name="d")(x)
    alone = GhostBatchNorm(**options)
    _, whole = alone.apply(params, state, x.reshape(24, 3), train=True)
    for name in ("mean", "var"):
        np.testing.assert_allclose(parted[name][2], whole[name], rtol=1e-5)


def test_noise_has_the_moments_of_the_paper():
    layer = NoisyBatchNorm()
    x = normal(64, 4000)
    y, state = layer.apply(*start(layer, 4000), x, train=True, key=jax.random.key(0))
    clean = BatchNorm()
    plain, ticked = clean.apply(*start(clean, 4000), x, train=True)
    # Over the channels: means mu have variance 0.5^2 / 3 = 0.0833; with the noise of one value
    # averaged over 64 that is 0.0834, and the product with s adds nothing on average.
    means, variances = np.asarray(y).mean(0), np.asarray(y).var(0)
    sigma = np.linspace(1, 1.25, 10001)
    inner = np.mean(sigma**2) + 0.1**2 + 0.1**2 / 3
    error = variances.std() / np.sqrt(4000)
    assert abs(variances.mean() - inner) < 3 * error + inner / 64
    between = 0.5**2 / 3
    assert abs(means.var() - between) < 3 * between * np.sqrt(0.8 / 4000) + 2e-3
    np.testing.assert_array_equal(state["mean"], ticked["mean"])
    other, _ = layer.apply(*start(layer, 4000), x, train=True, key=jax.random.key(1))
    assert jnp.abs(other - y).max() > 0.1
    quiet, _ = layer.apply(*start(layer, 4000), x, train=False)
    np.testing.assert_array_equal(quiet, clean.apply(*start(clean, 4000), x, train=False)[0])
    assert jnp.abs(plain - y).max() > 0.1


def test_the_two_noises_are_independent():
    layer, key = NoisyBatchNorm(use_bias=False), jax.random.key(0)
    params, state, x = {"scale": jnp.ones(1)}, layer.init_state(1), normal(20_000, 1)
    outputs = [
        np.asarray(layer.apply({"scale": c * params["scale"]}, state, x, train=True, key=key)[0])
        for c in (0.0, 1.0)
    ]
    clean, _ = BatchNorm(use_bias=False).apply(params, state, x, train=True)
    far = np.abs(np.asarray(clean)) > 0.1
    m, s = outputs[0][far], (outputs[1] - outputs[0])[far] / np.asarray(clean)[far]
    assert m.std() == pytest.approx(0.1 / np.sqrt(3), rel=0.02)
    assert s.std() == pytest.approx(0.1, rel=0.02)
    assert abs(np.corrcoef(m, s)[0, 1]) < 4 / np.sqrt(far.sum())


def test_both_noises_come_from_one_run_of_the_generator():
    """It makes two words for each value: two draws would take twice the time."""
    layer, x = NoisyBatchNorm(), normal(8, 5)
    run = lambda x, key: layer.apply(*start(layer, 5), x, train=True, key=key)[0]
    traced = jax.make_jaxpr(run)(x, jax.random.key(0)).jaxpr
    names = [
        equation.primitive.name
        for equation in _jaxprs.equations(traced)
        if equation.outvars[0].aval.shape == x.shape
    ]
    assert names.count("threefry2x32") + names.count("random_bits") == 1
    other = jax.random.key(0, impl="rbg")  # which has no such words
    assert jnp.abs(run(x, other) - run(x, jax.random.key(0))).max() > 0.1


def test_mean_only():
    layer = MeanOnlyBatchNorm(momentum=0.5)
    params, state = {"bias": jnp.asarray([1.0, -2.0])}, layer.init_state(2)
    x = normal(32, 2, mean=3, scale=2)
    y, new = layer.apply(params, state, x, train=True)
    np.testing.assert_allclose(y.mean(0), params["bias"], atol=1e-5)
    np.testing.assert_allclose(np.asarray(y).std(0), np.asarray(x).std(0), rtol=1e-5)
    g = normal(32, 2)
    slope = jax.vjp(lambda x: layer.apply(params, state, x, train=True)[0], x)[1](g)[0]
    np.testing.assert_allclose(slope, g - g.mean(0, keepdims=True), atol=1e-6)
    for _ in range(40):
        _, new = layer.apply(params, new, x, train=True)
    np.testing.assert_allclose(layer.apply(params, new, x, train=False)[0], y, atol=1e-5)


@pytest.mark.parametrize("layer", [BatchNorm, MeanOnlyBatchNorm])
def test_a_mapped_axis_gives_the_statistics_of_the_whole_batch(layer):
    x = normal(4, 6, 3) * 2 + jnp.arange(4.0).reshape(4, 1, 1)
    alone, spread = layer(), layer(axis_name="d")
    params, state = start(alone, 3)
    y, new = alone.apply(params, state, x.reshape(24, 3), train=True)
    parted, ticked = jax.vmap(lambda x: spread.apply(params, state, x, train=True), axis_name="d")(
        x
    )
    np.testing.assert_allclose(parted.reshape(24, 3), y, atol=1e-5)
    for name, value in new.items():
        np.testing.assert_allclose(ticked[name][1], value, rtol=1e-5)


def test_error_texts():
    with pytest.raises(ValueError, match=r"`momentum` must be between 0 and 1, got 1.5"):
        BatchNorm(momentum=1.5)
    with pytest.raises(ValueError, match=r"`epsilon` must be non-negative, got -1"):
        BatchNorm(epsilon=-1)
    layer = GhostBatchNorm(ghost_size=4)
    with pytest.raises(ValueError, match=r"`ghost_size` must divide the batch, got 4 for"):
        layer.apply(*start(layer, 3), normal(6, 3), train=True)
    noisy = NoisyBatchNorm()
    with pytest.raises(ValueError, match=r"`key` must be given in training, got None"):
        noisy.apply(*start(noisy, 3), normal(6, 3), train=True)
    with pytest.raises(ValueError, match=r"`scale_range` must be at least 1, got 0.5"):
        NoisyBatchNorm(scale_range=0.5)
    with pytest.raises(ValueError, match=r"`inputs` must have shape \(batch, ..., channels\)"):
        noisy.apply(*start(noisy, 3), normal(3), train=True)
    plain = BatchNorm()
    with pytest.raises(ValueError, match="must have no empty axis in training, got shape"):
        plain.apply(*start(plain, 3), jnp.ones((0, 3)), train=True)
    for train in (True, False):
        with pytest.raises(
            ValueError, match=r"`params\['scale'\]` must have the channels of the inputs, 1"
        ):
            plain.apply(*start(plain, 3), normal(6, 1), train=train)
    with pytest.raises(ValueError, match="`axis` must be one of the inputs' 2 axes, got 2"):
        BatchNorm(axis=2).apply(*start(plain, 3), normal(6, 3), train=True)
    with pytest.raises(TypeError, match=r"`axis` must be a Python integer, got 0\.5"):
        BatchNorm(axis=0.5)
    with pytest.raises(ValueError, match=r"`axis_index_groups` must be of one size"):
        BatchNorm(axis_name="d", axis_index_groups=[[0, 1], [2]])
    with pytest.raises(ValueError, match="`axis_name` must be given with `axis_index_groups`"):
        BatchNorm(axis_index_groups=[[0, 1]])
    with pytest.raises(ValueError, match="`epsilon` must be finite, got inf"):
        BatchNorm(epsilon=float("inf"))
    with pytest.raises(ValueError, match="`mask` must be broadcastable to the inputs' "):
        plain.apply(*start(plain, 3), normal(6, 3), train=True, mask=jnp.ones(6, bool))
    with pytest.raises(TypeError, match="`mask` must be boolean, got float32"):
        plain.apply(*start(plain, 3), normal(6, 3), train=True, mask=jnp.ones((6, 1)))
    assert isinstance(layer, Layer)
