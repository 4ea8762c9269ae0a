"""Boundaries of units against closed forms, dense Jacobians and a search for their zeros."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
from regjax import diagnostics, models, normalization

RANDOM = np.random.default_rng(0)
D, WIDTHS = 5, (8, 3)  # the first layer by forward passes, the second by reverse passes
WEIGHTS = {
    "first": RANDOM.normal(size=(D, WIDTHS[0])),
    "bias": RANDOM.normal(size=WIDTHS[0]),
    "second": RANDOM.normal(size=WIDTHS),
}
INPUTS = RANDOM.normal(size=(11, D))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def arrays(dtype=jnp.float64):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (WEIGHTS, INPUTS))


def preactivations(params, inputs):
    """A layer of shape (N, 4, 2), and one behind it; no bias there."""
    first = inputs @ params["first"] + params["bias"][None]
    second = jax.nn.relu(first) @ params["second"]
    return {"first": first.reshape(-1, 4, 2), "second": second}


def test_distances_of_both_layers_against_dense_jacobians(double):
    params, inputs = arrays()
    found = diagnostics.boundary_distances(preactivations, params, inputs)
    of_one = lambda x: jax.tree.map(lambda leaf: leaf[0], preactivations(params, x[None]))
    jacobian = jax.jit(jax.vmap(jax.jacfwd(of_one)))
    outputs, jacobians = preactivations(params, inputs), jacobian(inputs)
    for name in ("first", "second"):
        expected = jnp.abs(outputs[name]) / jnp.linalg.norm(jacobians[name], axis=-1)
        np.testing.assert_allclose(found[name], expected, rtol=1e-10)
    # In a closed form, without autodiff.
    plain = np.abs(INPUTS @ WEIGHTS["first"] + WEIGHTS["bias"])
    plain = plain / np.linalg.norm(WEIGHTS["first"], axis=0)
    np.testing.assert_allclose(found["first"], plain.reshape(-1, 4, 2), rtol=1e-10)


@pytest.mark.parametrize("jitted", [False, True])
def test_chunks_give_the_whole(jitted):
    params, inputs = arrays(jnp.float32)
    whole = diagnostics.boundary_distances(preactivations, params, inputs)
    function = functools.partial(diagnostics.boundary_distances, preactivations, chunk_size=4)
    chunked = (jax.jit(function) if jitted else function)(params, inputs)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
        assert a.dtype == jnp.float32


def test_the_nearest_zero_of_a_deeper_unit_is_at_its_distance(double):
    params, _ = arrays()
    inputs = jnp.asarray(RANDOM.normal(size=(200, D)))
    distances = diagnostics.boundary_distances(preactivations, params, inputs)
    is_inside = distances["first"].min((1, 2)) > 1.1 * distances["second"].min(1)
    assert is_inside.any()
    x, row = inputs[is_inside][0], distances["second"][is_inside][0]
    unit, distance = int(jnp.argmin(row)), float(row.min())

    def h(points):
        return preactivations(params, points)["second"][..., unit]

    gradient = jax.jit(jax.grad(lambda x: h(x[None])[0]))(x)
    ahead = -jnp.sign(h(x[None])) * gradient / jnp.linalg.norm(gradient)
    np.testing.assert_allclose(h((x + distance * ahead)[None]), 0, atol=1e-10)
    # Along all other ways, and on this one until then, there is no zero that is nearer.
    ways = np.concatenate([RANDOM.normal(size=(5000, D)), ahead[None]])
    ways *= distance / np.linalg.norm(ways, axis=1, keepdims=True)
    steps = [x[None] + t * ways for t in np.linspace(0, 0.9999, 20)]
    assert np.all(h(jnp.concatenate(steps)) * h(x[None]) > 0)


def batch_norm_unit(params, inputs):
    """A unit behind batch norm whose statistics are those of the fixed `data`."""
    outputs, data = (x @ params["w"] + params["raw"] for x in (inputs, params["data"]))
    layer = normalization.BatchNorm(epsilon=0.0, momentum=0.0, unbiased_running_variance=False)
    of_norm = {"scale": params["scale"], "bias": params["bias"]}
    _, state = layer.apply(of_norm, layer.init_state(outputs.shape[1]), data, train=True)
    return layer.apply(of_norm, state, outputs, train=False)[0]


def test_shift_and_scale_of_batch_norm_move_the_boundary(double):
    params, inputs = arrays()
    w, scale, bias = params["first"][:, :3], jnp.asarray([2.0, -0.5, 1.3]), params["bias"][:3]
    start = {"w": w, "raw": 0.0, "data": inputs, "scale": scale, "bias": 0 * bias}
    projected = inputs @ w
    sigma, length = jnp.std(projected, 0), jnp.linalg.norm(w, axis=0)
    signed = (projected - projected.mean(0)[None]) / length[None]
    find = lambda **change: diagnostics.boundary_distances(
        batch_norm_unit, {**start, **change}, inputs
    )
    np.testing.assert_allclose(find(), jnp.abs(signed), atol=1e-6)
    shifted = signed + (sigma / length * bias / scale)[None]
    np.testing.assert_allclose(find(bias=bias), jnp.abs(shifted), atol=1e-6)
    # The bias before the norm does nothing at all.
    np.testing.assert_allclose(find(raw=7.0), find(), atol=1e-6)


def test_units_without_a_boundary_are_at_infinity():
    params, inputs = arrays(jnp.float32)
    unit = {"w": params["first"][:, :2], "raw": 0.0, "data": inputs}
    unit |= {"scale": jnp.asarray([1.0, 0.0]), "bias": jnp.asarray([0.3, -0.2])}
    found = diagnostics.boundary_distances(batch_norm_unit, unit, inputs)
    assert np.all(np.isinf(found[:, 1]))
    assert np.all(np.isfinite(found[:, 0]))
    dead = {**params, "bias": jnp.full(WIDTHS[0], -100.0)}
    found = diagnostics.boundary_distances(preactivations, dead, inputs)
    assert np.all(np.isinf(found["second"]))  # 0 / 0 without the double where
    assert np.all(np.isfinite(found["first"]))
    report = diagnostics.boundary_density(preactivations, dead, inputs, radius=1e9)
    assert float(report.shares["second"]) == 0
    assert np.all(report.counts == WIDTHS[0])


def test_what_is_no_number_does_not_hide_as_a_unit_without_a_boundary():
    params, inputs = arrays(jnp.float32)
    find = jax.jit(functools.partial(diagnostics.boundary_distances, preactivations))
    for leaf in jax.tree.leaves(find(params, inputs.at[2, 0].set(jnp.nan))):
        assert np.all(np.isnan(leaf[2]))
        assert not np.any(np.isnan(leaf[3]))
    found = find({**params, "second": params["second"].at[0, 1].set(jnp.nan)}, inputs)
    assert np.all(np.isnan(found["second"][:, 1]))
    assert np.all(np.isfinite(found["first"]))
    # A value of 1 with a gradient of 0 times infinity.
    root = lambda params, x: jnp.where(x > 0, jnp.sqrt(x), 1.0)
    assert np.isnan(diagnostics.boundary_distances(root, {}, jnp.zeros((1, 1)))[0, 0])


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_density_counts_what_is_near(chunk_size):
    params, inputs = arrays(jnp.float32)
    distances = diagnostics.boundary_distances(preactivations, params, inputs)
    find = functools.partial(diagnostics.boundary_density, preactivations, chunk_size=chunk_size)
    report = jax.jit(find)(params, inputs, radius=0.5)
    total = 0
    for name, width in zip(("first", "second"), WIDTHS, strict=True):
        near = (np.asarray(distances[name]) < 0.5).reshape(len(inputs), -1).sum(1)
        total = total + near
        share = near / width
        np.testing.assert_allclose(report.shares[name], share.mean(), rtol=1e-6)
        error = share.std(ddof=1) / np.sqrt(len(inputs))
        np.testing.assert_allclose(report.shares_standard_error[name], error, rtol=1e-5)
    np.testing.assert_array_equal(report.counts, total)
    single = diagnostics.boundary_density(preactivations, params, inputs[:1], radius=0.5)
    assert np.isnan(single.shares_standard_error["first"])


def perceptron(params, inputs):
    found = []
    for kernel, bias in params:
        found.append(inputs @ kernel + bias[None])
        inputs = jax.nn.relu(found[-1])
    return found


def initialized_from(x, kernels):
    """The kernels scaled, with biases, so that pre-activations on x have mean 0 and deviation 1."""
    params = []
    for kernel in kernels:
        deviation = jnp.std(x @ kernel, 0)
        kernel = kernel / deviation[None]
        params.append((kernel, -jnp.mean(x @ kernel, 0)))
        x = jax.nn.relu(x @ kernel + params[-1][1][None])
    return params


@pytest.mark.optimized
def test_statistics_gather_the_boundaries_around_the_data():
    random, mean, sizes = np.random.default_rng(1), 4 * np.eye(10)[:1], (10, 64, 64, 64)
    data = [random.normal(size=(500, 10)) + sign * mean for sign in (1, 1, -1)]
    x, on, off = (jnp.asarray(part, jnp.float32) for part in data)
    density = jax.jit(functools.partial(diagnostics.boundary_density, perceptron, radius=0.5))
    found = []
    for _ in range(6):
        kernels = [
            jnp.asarray(random.normal(size=(n, m)) * np.sqrt(2 / n), jnp.float32)
            for n, m in itertools.pairwise(sizes)
        ]
        nets = initialized_from(x, kernels), [(kernel, jnp.zeros(64)) for kernel in kernels]
        found.append([[density(p, d).shares for d in (on, off)] for p in nets])
    (on_data, off_data), plain = np.mean(found, 0)
    assert np.all(on_data > 2 * off_data)
    # Means of twelve other networks in plain NumPy; single ones spread by 0.006 and by 0.03.
    np.testing.assert_allclose(on_data, [0.38, 0.46, 0.54], atol=0.02)
    np.testing.assert_allclose(off_data, [0.13, 0.16, 0.17], atol=0.06)
    np.testing.assert_allclose(plain[0] / plain[1], 1, atol=0.15)


def on_a_line(offsets, points):
    return [points - offsets[None, :17], points - offsets[None, 17:]]


def test_pieces_of_a_line_are_counted_exactly():
    offsets = jnp.linspace(-3, 3, 61)  # two words; 0.1 apart
    count = functools.partial(
        diagnostics.region_count, on_a_line, offsets, key=jax.random.key(0), num_samples=1000
    )
    center, jitted = jnp.full(1, 0.95), jax.jit(count)
    chunked = jax.jit(functools.partial(count, chunk_size=300))
    for report in (jitted(center, radius=0.9), chunked(center, radius=0.9)):
        assert int(report.num_regions) == 19  # from 0.05 to 1.85
        assert float(report.unseen_share) == 0
    assert int(jitted(center, radius=1e-3).num_regions) == 1


def shells(radii, points):
    """Of equal volume: each point is in one."""
    return jnp.sqrt(jnp.sum(points**2, 1))[:, None] - radii[None]


def test_points_are_uniform_in_the_ball_and_no_pattern_is_counted_twice():
    num, radius = 400, 2.0
    radii = jnp.asarray(radius * (np.arange(1, num) / num) ** (1 / 3), jnp.float32)
    report = diagnostics.region_count(
        shells, radii, jnp.zeros(3), key=jax.random.key(2), radius=radius, num_samples=num
    )
    # Of balls thrown into as many boxes 1 - 1/e are hit; a radius drawn uniformly hits 160.
    error = np.sqrt(num * (np.exp(-1) - 2 * np.exp(-2)))
    assert abs(int(report.num_regions) - num * (1 - np.exp(-1))) < 5 * error
    assert float(report.unseen_share) == pytest.approx(np.exp(-1), abs=0.1)


class Preactivations(nnx.Module):
    """What goes into the activations of a perceptron of `regjax.models`."""

    def __init__(self, model):
        self.model = model

    def __call__(self, inputs):
        first = self.model.layer_0(inputs)
        return [first, self.model.layer_1(nnx.relu(first))]


class Linen(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        hidden = linen.relu(linen.Dense(6, name="first")(inputs))
        return linen.Dense(2, name="second")(hidden)


def test_flax_models(default_promotion):
    inputs = arrays(jnp.float32)[1]
    mlp = models.MLP((1, D, 1), 2, width=4, normalization="batch", rngs=nnx.Rngs(0))
    mlp.layer_0.norm.mean[...] = jnp.arange(4.0)
    model = regjax.from_nnx(Preactivations(mlp))
    found = diagnostics.boundary_distances(regjax.model_function(model), model.params, inputs)
    kernel = model.params["model"]["layer_0"]["layer"]["kernel"]
    plain = jnp.abs(inputs @ kernel - jnp.arange(4.0)) / jnp.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(found[0], plain, rtol=1e-4)
    assert found[1].shape == (11, 4)
    coupled = regjax.model_function(model, mode="train")
    with pytest.raises(ValueError, match="`preactivations_fn` must not couple the examples"):
        diagnostics.boundary_distances(coupled, model.params, inputs)

    module = Linen()
    params = module.init(jax.random.key(0), inputs)["params"]

    def of_linen(params, inputs):
        is_layer = lambda part, _: isinstance(part, linen.Dense)
        _, found = module.apply({"params": params}, inputs, capture_intermediates=is_layer)
        return found["intermediates"]

    found = diagnostics.boundary_distances(of_linen, params, inputs)
    kernel = params["first"]["kernel"]
    plain = jnp.abs(inputs @ kernel) / jnp.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(found["first"]["__call__"][0], plain, rtol=1e-4)
    assert found["second"]["__call__"][0].shape == (11, 2)


def test_bad_input():
    params, inputs = arrays(jnp.float32)
    with pytest.raises(ValueError, match="`radius` must be positive, got 0"):
        diagnostics.boundary_density(preactivations, params, inputs, radius=0.0)
    with pytest.raises(
        ValueError, match=r"arrays with the leading axis of its inputs, 11, .*\(2,\)"
    ):
        diagnostics.boundary_distances(lambda p, x: [x, jnp.ones(2)], params, inputs)
    with pytest.raises(TypeError, match=r"`preactivations_fn\[0\]` must be real floating point"):
        diagnostics.boundary_distances(lambda p, x: [x > 0], params, inputs)
    with pytest.raises(TypeError, match="`inputs` must be one array of real floating point"):
        diagnostics.boundary_distances(preactivations, params, jnp.ones((3, D), jnp.int32))
    count = functools.partial(diagnostics.region_count, preactivations, params)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="`radius` must be positive, got -1"):
        count(inputs[0], key=key, radius=-1.0, num_samples=3)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        count(inputs[0], key=key, radius=1.0, num_samples=0)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        count(inputs[0], key=0, radius=1.0, num_samples=3)
    with pytest.raises(TypeError, match="`center` must be real floating point, got int32"):
        count(jnp.arange(D), key=key, radius=1.0, num_samples=3)
