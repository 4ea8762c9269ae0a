"""Least-squares hyperplanes on a grid, and jitter against NumPy and the theory of means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import diagnostics, models, normalization

RANDOM = np.random.default_rng(0)
D, K = 4, 6
ROOT, MEAN = RANDOM.normal(size=(D, D)), RANDOM.normal(size=D)
KERNEL, HEAD = RANDOM.normal(size=(D, K)), RANDOM.normal(size=(K, 2))
DATA = RANDOM.normal(size=(60, D)) @ ROOT + MEAN
SHIFT = np.asarray([0.0, 1.5, -0.7, 0.5, 1.0, 0.2])


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def test_the_offset_is_the_least_squares_fit(double):
    report = diagnostics.least_squares_offset(jnp.asarray(KERNEL), jnp.asarray(DATA))
    report = jax.tree.map(np.asarray, report)
    outputs, squares = DATA @ KERNEL, np.sum(KERNEL**2, 0)
    mean_square = lambda mu: np.mean((outputs - mu) ** 2, 0) / squares
    np.testing.assert_allclose(report.mean_squared_distance, mean_square(report.offset), rtol=1e-10)
    np.testing.assert_allclose(
        report.mean_squared_distance, np.var(outputs, 0) / squares, rtol=1e-10
    )
    for step in np.linspace(-2, 2, 41):
        # Exactly a parabola, with its minimum there.
        expected = report.mean_squared_distance + step**2 / squares
        np.testing.assert_allclose(mean_square(report.offset + step), expected, rtol=1e-10)
    # What batch norm gives out is the signed distance in units of the RMS distance.
    layer = normalization.BatchNorm(epsilon=0.0, param_dtype=jnp.float64)
    params, state = layer.init_params(K), layer.init_state(K)
    normalized, _ = layer.apply(params, state, jnp.asarray(outputs), train=True)
    signed = (outputs - report.offset) / np.sqrt(squares)
    expected = signed / np.sqrt(report.mean_squared_distance)
    np.testing.assert_allclose(normalized, expected, rtol=1e-10)


@pytest.mark.optimized
def test_random_hyperplanes_through_the_origin_and_through_the_mean():
    x, spread = jnp.asarray(DATA, jnp.float32), np.trace(np.cov(DATA.T, bias=True)) / D
    kernel = jax.random.normal(jax.random.key(1), (D, 40_000))
    centred = diagnostics.least_squares_offset(kernel, x).mean_squared_distance
    error = float(jnp.std(centred)) / 200
    assert float(jnp.mean(centred)) == pytest.approx(spread, abs=5 * error)
    plain = jnp.mean((x @ kernel) ** 2, 0) / jnp.sum(kernel**2, 0)
    error = float(jnp.std(plain)) / 200
    expected = spread + np.sum(DATA.mean(0) ** 2) / D
    assert float(jnp.mean(plain)) == pytest.approx(expected, abs=5 * error)


def standardized(values, batch):
    return (values - jnp.mean(batch, 0)[None]) / jnp.std(batch, 0)[None]


def network(params, inputs, batch):
    """Two layers with the statistics of the batch; scale 1, a shift behind the first norm."""
    h, of_batch = inputs @ params["kernel"], batch @ params["kernel"]
    first = standardized(h, of_batch) + params["shift"][None]
    before = jax.nn.relu(standardized(of_batch, of_batch) + params["shift"][None])
    second = standardized(jax.nn.relu(first) @ params["head"], before @ params["head"])
    return [first, second]


def logits(params, inputs, batch):
    return network(params, inputs, batch)[1]


def arrays(num_batches, batch_size, dtype=jnp.float32, seed=0):
    draws = np.random.default_rng(seed).normal(size=(num_batches, batch_size, D)) @ ROOT + MEAN
    trees = {"kernel": KERNEL, "head": HEAD, "shift": SHIFT}, DATA[:7], draws
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), trees)


def signed_distances(params, inputs, batches, layer):
    """(num_batches, N, units), batch by batch with a dense Jacobian."""
    of_one = lambda x, batch: network(params, x[None], batch)[layer][0]
    signed = lambda x, b: of_one(x, b) / jnp.linalg.norm(jax.jacfwd(of_one)(x, b), axis=-1)
    return np.asarray(jax.jit(jax.vmap(jax.vmap(signed, (0, None)), (None, 0)))(inputs, batches))


def test_jitter_against_all_distances_at_once(double):
    params, inputs, batches = arrays(9, 16, jnp.float64)
    find = functools.partial(diagnostics.boundary_jitter, network)
    report = jax.jit(find)(params, inputs, batches)
    for layer in (0, 1):
        distances = signed_distances(params, inputs, batches, layer)
        assert np.all(np.isfinite(distances))
        squares = np.mean((distances - distances.mean(0)) ** 2, 1)  # of each batch
        std = np.sqrt(distances.var(0, ddof=1).mean(0))
        np.testing.assert_allclose(report.std[layer], std, rtol=1e-9)
        size = np.sqrt(np.mean(distances.mean(0) ** 2, 0))
        np.testing.assert_allclose(report.relative_std[layer], std / size, rtol=1e-9)
        error = squares.std(0) / np.sqrt(9 - 2) / (2 * std)
        np.testing.assert_allclose(report.std_standard_error[layer], error, rtol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_movement_of_gaussian_batches_of_32(chunk_size):
    num_batches, size = 1500, 32
    params, inputs, batches = arrays(num_batches, size)
    find = functools.partial(diagnostics.boundary_jitter, network, chunk_size=chunk_size)
    report = jax.jit(find)(params, inputs, batches)
    sigma = np.linalg.norm(ROOT @ KERNEL, axis=0) / np.linalg.norm(KERNEL, axis=0)
    expected = sigma / np.sqrt(size) * np.sqrt(1 + SHIFT**2 / 2)
    # The second term is good to the next order, 1 / B.
    tolerance = 5 * report.std_standard_error[0] + expected * SHIFT**2 / size
    assert np.all(np.abs(report.std[0] - expected) < tolerance)
    # All inputs see the same batch: they are no independent draws.
    error = report.std[0] / np.sqrt(2 * num_batches)
    np.testing.assert_allclose(report.std_standard_error[0], error, rtol=0.2)


@pytest.mark.optimized
def test_in_units_of_the_distance_of_the_data_the_weights_do_not_matter():
    _, _, batches = arrays(1500, 32, seed=3)
    data = jnp.asarray(np.random.default_rng(4).normal(size=(500, D)) @ ROOT + MEAN, jnp.float32)
    only_first = lambda kernel, x, batch: standardized(x @ kernel, batch @ kernel)
    find = jax.jit(functools.partial(diagnostics.boundary_jitter, only_first))
    kernel = jnp.asarray(KERNEL * [1, 10, 0.1, 1, 5, 1], jnp.float32)
    report = find(kernel, data, batches)
    np.testing.assert_allclose(report.relative_std, 32**-0.5, rtol=0.12)
    # The same weights times any number: the same movement, exactly.
    again = find(3 * kernel, data, batches)
    np.testing.assert_allclose(again.std, report.std, rtol=1e-3)


def test_margins_move_as_the_margins_of_each_batch(double):
    params, inputs, batches = arrays(9, 16, jnp.float64)
    labels = np.arange(7) % 2
    of_batch = lambda batch: diagnostics.decision_margin(
        lambda params, x: logits(params, x, batch), params, inputs, labels
    )
    margins = np.asarray(jax.vmap(of_batch)(batches))
    report = diagnostics.margin_jitter(logits, params, inputs, labels, batches, chunk_size=3)
    np.testing.assert_allclose(report.mean, margins.mean(0), rtol=1e-9)
    np.testing.assert_allclose(report.std, margins.std(0, ddof=1), rtol=1e-9)
    squares = (margins - margins.mean(0)) ** 2
    error = squares.std(0) / np.sqrt(9 - 2) / (2 * margins.std(0, ddof=1))
    np.testing.assert_allclose(report.std_standard_error, error, rtol=1e-6)


def half_dead(params, inputs, batch):
    """No boundary: of unit 0 for any input, of unit 1 for the first one, with either sign."""
    shift = jnp.mean(batch)
    is_first = jnp.arange(len(inputs)) == 0
    h = inputs[:, 0] - shift
    return jnp.stack([jnp.full_like(h, -1), jnp.where(is_first, jnp.sign(shift), h)], 1)


def test_inputs_without_a_boundary_are_left_out():
    batches = jnp.asarray([[1.0], [-1.0], [3.0]])
    find = jax.jit(functools.partial(diagnostics.boundary_jitter, half_dead, {}))
    report = find(jnp.ones((4, 1)), batches)
    np.testing.assert_allclose(report.std, [np.nan, 2], rtol=1e-6)
    # A NaN in the data is not left out.
    spoiled = jnp.ones((4, 1)).at[2].set(jnp.nan)
    assert np.isnan(find(spoiled, batches).std[1])
    pair = find(jnp.ones((4, 1)), batches[:2])
    assert np.isnan(pair.std_standard_error[1])


class Preactivations(nnx.Module):
    """What goes into the first activations of a perceptron of `regjax.models`."""

    def __init__(self, model):
        self.model = model

    def __call__(self, inputs):
        return self.model.layer_0(inputs)


def test_a_flax_model_with_the_statistics_of_each_batch(default_promotion):
    mlp = models.MLP((1, D, 1), 2, width=K, depth=1, normalization="batch", rngs=nnx.Rngs(0))
    model = regjax.from_nnx(Preactivations(mlp))

    def given(params, inputs, batch):
        state = regjax.population_statistics(model, params, [batch])
        return model.apply(params, state, inputs, train=False)[0]

    _, inputs, batches = arrays(5, 16)
    find = jax.jit(functools.partial(diagnostics.boundary_jitter, given))
    report = find(model.params, inputs, batches)
    kernel = np.asarray(model.params["model"]["layer_0"]["layer"]["kernel"])
    means = np.mean(batches @ kernel, 1) / np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(report.std, means.std(0, ddof=1), rtol=1e-3)


def test_bad_input():
    params, inputs, batches = arrays(3, 8)
    with pytest.raises(ValueError, match="`batches` must hold at least two batches, got 1"):
        diagnostics.boundary_jitter(network, params, inputs, batches[:1])
    with pytest.raises(ValueError, match="`batch_preactivations_fn` must return arrays with"):
        diagnostics.boundary_jitter(lambda p, x, batch: batch, params, inputs, batches)
    coupled = lambda p, x, batch: x
    coupled.couples_examples = True
    with pytest.raises(ValueError, match="`batch_preactivations_fn` must not couple"):
        diagnostics.boundary_jitter(coupled, params, inputs, batches)
    with pytest.raises(ValueError, match=r"`targets` must be between 0 and 1 \(.*\), got 0 to 2"):
        diagnostics.margin_jitter(logits, params, inputs, np.arange(7) % 3, batches)
    with pytest.raises(
        ValueError, match=r"shapes \(d, k\) and \(N, d\), got \(4, 6\) and \(8, 3\)"
    ):
        diagnostics.least_squares_offset(params["kernel"], jnp.ones((8, 3)))
    dead = diagnostics.least_squares_offset(jnp.zeros((D, 1)), inputs)
    assert np.isinf(dead.mean_squared_distance[0])
