"""Networks whose transversal behaviour is known: linear maps, and what training cannot reach."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import regjax
from regjax import diagnostics, regularizers

D, K, N = 8, 3, 64
RANDOM = np.random.default_rng(0)
ROTATION = np.linalg.qr(RANDOM.normal(size=(D, D)))[0]
BASIS, COMPLEMENT = ROTATION[:, :K], ROTATION[:, K:]
OFF = COMPLEMENT @ COMPLEMENT.T
COORDINATES = RANDOM.normal(size=(N, K)) + 1.0  # not centred
TARGETS = RANDOM.normal(size=(N, 2))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def network(depth, dtype, seed=0):
    """Kernels and biases of a ReLU network from R^8 to R^2; one hidden layer is depth 2."""
    random = np.random.default_rng(seed)
    sizes = (D, *(10,) * (depth - 1), 2)
    return [
        (
            jnp.asarray(random.normal(size=(n, m)) * np.sqrt(2 / n), dtype),
            jnp.asarray(0.1 * random.normal(size=m), dtype),
        )
        for n, m in itertools.pairwise(sizes)
    ]


def model_fn(params, x):
    for kernel, bias in params[:-1]:
        x = jax.nn.relu(x @ kernel + bias[None])
    return x @ params[-1][0] + params[-1][1][None]


def linear_fn(kernel, x):
    return x.reshape(len(x), -1) @ kernel


def loss_fn(params, x, y):
    return jnp.mean(jnp.sum((model_fn(params, x) - y) ** 2, 1)) / 2


@functools.partial(jax.jit, static_argnums=0)
def train(tx, params, x, y):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params, x, y), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), length=300)[0][0]


def trained(tx, depth, dtype, basis=BASIS):
    params = network(depth, dtype)
    x = jnp.asarray(COORDINATES @ basis.T, dtype)
    end = train(tx, params, x, jnp.asarray(TARGETS, dtype))
    report = diagnostics.frozen_component(end[0][0], params[0][0], jnp.asarray(basis, dtype))
    return report, end, params


# The transversal part of the first kernel.


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.usefixtures("default_promotion")
def test_gradient_descent_cannot_reach_the_transversal_part(depth, momentum, double):
    tx = optax.sgd(0.01, momentum=momentum)
    report, end, start = trained(tx, depth, jnp.float64)
    assert float(report.change) < 1e-12
    assert float(report.norm_ratio) == pytest.approx(1, abs=1e-12)
    assert np.max(np.abs(end[0][0] - start[0][0])) > 0.05  # along the data it moved
    # The same numbers, by NumPy.
    moved = OFF @ np.asarray(end[0][0] - start[0][0])
    assert float(report.change) == pytest.approx(np.max(np.abs(moved)), abs=1e-14)


@pytest.mark.usefixtures("default_promotion")
def test_in_float32_it_moves_by_rounding():
    report, *_ = trained(optax.sgd(0.01), 4, jnp.float32)
    assert float(report.change) < 1e-5


@pytest.mark.usefixtures("default_promotion")
def test_weight_decay_shrinks_it_at_a_known_rate(double):
    tx = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.05))
    report, *_ = trained(tx, 2, jnp.float64)
    assert float(report.norm_ratio) == pytest.approx((1 - 5e-4) ** 300, abs=1e-12)
    assert float(report.norm_ratio) == pytest.approx(0.860676, abs=1e-6)


@pytest.mark.usefixtures("default_promotion")
def test_adam_moves_it_unless_the_subspace_follows_the_axes():
    tx = optax.adam(1e-2)
    rotated, *_ = trained(tx, 2, jnp.float32)
    aligned, end, start = trained(tx, 2, jnp.float32, np.eye(D)[:, :K])
    assert float(rotated.change) > 0.1
    assert float(aligned.change) == 0
    assert float(aligned.norm_ratio) == 1
    assert np.max(np.abs(end[0][0] - start[0][0])) > 0.1


def test_frozen_component_of_known_parts(double):
    start = BASIS @ RANDOM.normal(size=(K, 4)) + 2 * COMPLEMENT @ RANDOM.normal(size=(D - K, 4))
    along, off = BASIS @ RANDOM.normal(size=(K, 4)), COMPLEMENT @ RANDOM.normal(size=(D - K, 4))
    report = diagnostics.frozen_component(start + along + 0.1 * off, start, BASIS)
    np.testing.assert_allclose(report.change, np.max(np.abs(0.1 * off)), rtol=1e-12)
    ratio = np.linalg.norm(OFF @ start + 0.1 * off) / np.linalg.norm(OFF @ start)
    np.testing.assert_allclose(report.norm_ratio, ratio, rtol=1e-12)
    # A convolution's kernel, on patches of two by two pixels with two channels.
    shaped = [a.reshape(2, 2, 2, 4) for a in (start + along + 0.1 * off, start)]
    again = jax.jit(diagnostics.frozen_component)(*shaped, BASIS)
    np.testing.assert_allclose(again, report, rtol=1e-12)
    nothing = diagnostics.frozen_component(np.eye(D)[:, :2], np.zeros((D, 2)), np.eye(D)[:, :3])
    assert float(nothing.change) == 0
    assert np.isnan(nothing.norm_ratio)


def test_noise_in_the_complement_decays_it_slowly(double):
    rate, scale, steps = 0.1, 0.3, 50
    covariance = BASIS @ BASIS.T + scale**2 * OFF
    target = BASIS @ np.array([[1.0], [-2.0], [0.5]])
    population_loss = lambda w: jnp.sum(w * (covariance @ w)) / 2 - jnp.sum(w * target)
    start = jnp.asarray(RANDOM.normal(size=(D, 1)))
    w = start
    for _ in range(steps):
        w = w - rate * jax.grad(population_loss)(w)
    report = diagnostics.frozen_component(w, start, BASIS)
    assert float(report.norm_ratio) == pytest.approx((1 - rate * scale**2) ** steps, abs=1e-10)


# The function off the data.


def test_fresh_transversal_weights_leave_a_known_complexity(double):
    params, draws, scale = network(2, jnp.float64), 20_000, 0.4
    x = jnp.asarray(COORDINATES[:1] @ BASIS.T)
    fresh = scale * jax.random.normal(jax.random.key(1), (draws, D, 10))
    kernels = (BASIS @ BASIS.T @ params[0][0])[None] + jnp.asarray(OFF) @ fresh

    @jax.jit
    @jax.vmap
    def complexity(kernel):
        own = [(kernel, params[0][1]), *params[1:]]
        return diagnostics.transversal_complexity(model_fn, own, x, BASIS)

    values = np.asarray(complexity(kernels))
    hidden = x @ params[0][0] + params[0][1][None]
    behind = lambda z: jax.nn.relu(z) @ params[1][0]
    sensitivity = np.sum(np.asarray(jax.jacrev(behind)(hidden)) ** 2)
    expected = (D - K) * scale**2 * sensitivity
    assert abs(values.mean() - expected) < 5 * values.std() / np.sqrt(draws)
    assert 5 * values.std() / np.sqrt(draws) < 0.03 * expected


def test_complexity_of_linear_maps(double):
    kernel, x = jnp.asarray(RANDOM.normal(size=(D, 4))), jnp.asarray(RANDOM.normal(size=(5, D)))
    value = diagnostics.transversal_complexity(linear_fn, kernel, x, BASIS)
    np.testing.assert_allclose(value, np.sum((OFF @ kernel) ** 2), rtol=1e-12)
    along = diagnostics.transversal_complexity(linear_fn, BASIS @ BASIS.T @ kernel, x, BASIS)
    np.testing.assert_allclose(along, 0, atol=1e-20)
    # More outputs than inputs: by forward passes.
    wide = jnp.asarray(RANDOM.normal(size=(D, 12)))
    value = diagnostics.transversal_complexity(linear_fn, wide, x, BASIS)
    np.testing.assert_allclose(value, np.sum((OFF @ wide) ** 2), rtol=1e-12)


def test_complexity_without_a_subspace_is_the_whole(double):
    params, x = network(3, jnp.float64), jnp.asarray(RANDOM.normal(size=(7, D)))
    whole = regularizers.geometric_complexity(model_fn, params, x)
    empty = jnp.zeros((D, 0))
    parts = [
        diagnostics.transversal_complexity(model_fn, params, x, basis)
        for basis in (empty, BASIS, COMPLEMENT)
    ]
    np.testing.assert_allclose(parts[0], whole, rtol=1e-12)
    np.testing.assert_allclose(parts[1] + parts[2], whole, rtol=1e-12)
    assert min(parts[1:]) > 0.1 * whole


def test_label_noise_is_amplified_by_small_input_noise():
    """Linear regression with a Gaussian design: a closed form that grows as the noise shrinks."""
    n, d, k, scale, label_noise, draws = 60, 20, 5, 0.3, 0.5, 20_000
    random, basis = np.random.default_rng(2), np.eye(d)[:, :k]
    truth = np.r_[random.normal(size=k), np.zeros(d - k)]
    weights, clean = [], []
    for _ in range(10):
        x = random.normal(size=(draws // 10, n, d)) * np.r_[np.ones(k), np.full(d - k, scale)]
        y = (x @ truth)[..., None]
        gram = x.transpose(0, 2, 1) @ x
        right = x.transpose(0, 2, 1) @ np.concatenate(
            [y + label_noise * random.normal(size=y.shape), y], 2
        )
        solved = np.linalg.solve(gram, right)
        weights.append(solved[..., :1])
        clean.append(solved[..., 1:])
    complexity = jax.jit(
        jax.vmap(
            lambda w: diagnostics.transversal_complexity(linear_fn, w, jnp.ones((1, d)), basis)
        )
    )
    values = np.asarray(complexity(jnp.asarray(np.concatenate(weights), jnp.float32)))
    expected = label_noise**2 * (d - k) / (scale**2 * (n - d - 1))
    assert expected == pytest.approx(1.068, abs=1e-3)
    assert abs(values.mean() - expected) < 5 * values.std() / np.sqrt(draws)
    assert np.max(complexity(jnp.asarray(np.concatenate(clean), jnp.float32))) < 1e-10


def test_variation_of_a_linear_function(double):
    """|a'y| over a sphere in n dimensions: the mean and the variance of a coordinate."""
    kernel, x = jnp.asarray(RANDOM.normal(size=(D, 1))), jnp.asarray(RANDOM.normal(size=(40, D)))
    n, radius, samples = D - K, 0.7, 100
    length = radius * np.linalg.norm(OFF @ kernel)
    mean = math.gamma(n / 2) / (math.sqrt(math.pi) * math.gamma((n + 1) / 2))
    result = diagnostics.transversal_variation(
        linear_fn, kernel, x, BASIS, key=jax.random.key(0), radius=radius, num_samples=samples
    )
    error = length * math.sqrt((1 / n - mean**2) / (40 * samples))
    np.testing.assert_allclose(result.standard_error, error, rtol=0.1)
    assert abs(float(result.value) - length * mean) < 5 * error
    assert 5 * error < 0.06 * length * mean
    # The length of a step is exact: two outputs that are a rotation of one transversal plane.
    plane = jnp.asarray(ROTATION[:, K:])
    steps = diagnostics.transversal_variation(
        linear_fn, plane, x, BASIS, key=jax.random.key(0), radius=radius, num_samples=2
    )
    np.testing.assert_allclose(steps.value, radius, rtol=1e-12)
    np.testing.assert_allclose(steps.standard_error, 0, atol=1e-12)
    along = diagnostics.transversal_variation(
        linear_fn, BASIS @ BASIS.T @ kernel, x, BASIS,
        key=jax.random.key(0), radius=radius, num_samples=2,
    )  # fmt: skip
    np.testing.assert_allclose(along.value, 0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_variation_is_bounded_by_the_transversal_part(seed, double):
    params, radius = network(3, jnp.float64, seed), 0.5
    # Large along the data, so that a step that is not transversal breaks the bound.
    kernel = jnp.asarray((20 * BASIS @ BASIS.T + 0.1 * OFF) @ params[0][0])
    params = [(kernel, params[0][1]), *params[1:]]
    x = jnp.asarray(COORDINATES[:1] @ BASIS.T)
    one_step = lambda key: (
        diagnostics.transversal_variation(
            model_fn, params, x, BASIS, key=key, radius=radius, num_samples=1
        ).value
    )
    values = jax.vmap(one_step)(jax.random.split(jax.random.key(seed), 200))
    norms = [np.linalg.norm(np.asarray(kernel), 2) for kernel, _ in params[1:]]
    bound = radius * np.linalg.norm(OFF @ kernel, 2) * np.prod(norms)
    assert jnp.all((values > 0) & (values <= bound))
    assert jnp.max(values) > 0.02 * bound


def test_chunks_jit_and_draws():
    params, key = network(2, jnp.float32), jax.random.key(3)
    x, basis = jnp.asarray(COORDINATES[:7] @ BASIS.T, jnp.float32), jnp.asarray(BASIS, jnp.float32)
    complexity = diagnostics.transversal_complexity
    whole = complexity(model_fn, params, x, basis)
    np.testing.assert_allclose(
        complexity(model_fn, params, x, basis, chunk_size=3), whole, rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.jit(functools.partial(complexity, model_fn))(params, x, basis), whole, rtol=1e-5
    )
    variation = functools.partial(
        diagnostics.transversal_variation, model_fn, radius=0.5, num_samples=3
    )
    whole = variation(params, x, basis, key=key)
    np.testing.assert_allclose(variation(params, x, basis, key=key, chunk_size=3), whole, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(variation)(params, x, basis, key=key), whole, rtol=1e-5)
    assert variation(params, x, basis, key=jax.random.key(4)).value != whole.value
    # Every example draws steps of its own: equal examples vary.
    same = jnp.broadcast_to(x[:1], x.shape)
    one = variation(params, x[:1], basis, key=key).value
    assert abs(float(variation(params, same, basis, key=key).value - one)) > 1e-4
    assert np.isnan(
        diagnostics.transversal_variation(
            model_fn, params, x, basis, key=key, radius=0.5, num_samples=1
        ).standard_error
    )


def test_flax_models_and_images():
    images = jnp.asarray(RANDOM.normal(size=(6, 2, 4, 1)), jnp.float32)
    found = diagnostics.subspace_from_data(images[:3])
    assert found.basis.shape == (D, 3)

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(x.reshape(len(x), -1))

    class Nnx(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(D, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.dense(x.reshape(len(x), -1))

    module = Linen()
    models = (
        regjax.from_linen(module, module.init(jax.random.key(0), images)),
        regjax.from_nnx(Nnx()),
    )
    for model in models:
        value = diagnostics.transversal_complexity(
            regjax.model_function(model), model.params, images, found.basis
        )
        kernel = np.asarray(next(leaf for leaf in jax.tree.leaves(model.params) if leaf.ndim == 2))
        off = kernel - found.basis @ (found.basis.T @ kernel)
        np.testing.assert_allclose(value, np.sum(off**2), rtol=1e-5)


# The subspace.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_subspace_is_found_in_a_rotation(dtype, double):
    x = jnp.asarray(COORDINATES @ BASIS.T, dtype)
    found = diagnostics.subspace_from_data(x)
    assert found.basis.shape == (D, K)
    assert found.basis.dtype == dtype
    # Principal angles: the sine of the largest.
    assert np.linalg.norm(OFF @ np.asarray(found.basis, np.float64), 2) < 1e-6
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(K), atol=1e-6)
    expected = np.linalg.svd(COORDINATES, compute_uv=False)
    np.testing.assert_allclose(found.singular_values[:K], expected, rtol=1e-5)
    fixed = jax.jit(functools.partial(diagnostics.subspace_from_data, num_directions=2))(x)
    np.testing.assert_allclose(fixed.basis @ fixed.basis.T @ found.basis[:, :2],
                               found.basis[:, :2], atol=1e-5)  # fmt: skip
    assert fixed.basis.shape == (D, 2)


def test_subspace_is_linear_and_its_size_follows_the_tolerance(double):
    line = COORDINATES[:, :1] @ BASIS[:, :1].T
    rank = lambda x, **options: diagnostics.subspace_from_data(
        jnp.asarray(x), **options
    ).basis.shape[1]
    assert rank(line) == 1
    # Centred data would say 1 for the affine line, and 1 for points at two multiples of a vector.
    assert rank(line + BASIS[:, 1]) == 2
    assert rank(np.tile(BASIS[:, :1].T, (5, 1))) == 1
    uneven = (COORDINATES * [1, 1e-3, 1e-5]) @ BASIS.T
    assert [rank(uneven, tol=t) for t in (1e-1, 1e-4, 1e-7)] == [1, 2, 3]
    # Fewer examples than dimensions; and all directions.
    assert rank(RANDOM.normal(size=(4, D))) == 4
    assert rank(RANDOM.normal(size=(N, D))) == D


def test_directions_beyond_the_rank_show_in_the_singular_values():
    x = jnp.asarray(COORDINATES @ BASIS.T, jnp.float32)
    found = diagnostics.subspace_from_data(x, num_directions=5)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(5), atol=1e-5)
    assert np.all(found.singular_values[K:] < 1e-6 * found.singular_values[0])


def test_a_concrete_subspace_may_be_found_and_used_while_tracing():
    x = jnp.asarray(COORDINATES @ BASIS.T, jnp.float32)

    @jax.jit
    def inside(kernel):
        basis = diagnostics.subspace_from_data(x).basis
        return diagnostics.transversal_complexity(linear_fn, kernel, x, basis)

    kernel = jnp.asarray(RANDOM.normal(size=(D, 2)), jnp.float32)
    np.testing.assert_allclose(inside(kernel), np.sum((OFF @ kernel) ** 2), rtol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (np.zeros((4, D)), {}, "`inputs` must span a subspace, got zeros only"),
        (np.full((4, D), np.nan), {}, "`inputs` must be finite, got NaN or infinity"),
        (np.full((4, D), np.inf), {}, "`inputs` must be finite"),
        (np.ones((4, D)), {"tol": -1.0}, "`tol` must be non-negative"),
        (np.ones((4, D)), {"num_directions": 5}, "`num_directions` must be between 1 and 4"),
        (np.ones((0, D)), {}, "`inputs` must hold at least one example"),
    ],
)
def test_subspace_refuses(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.subspace_from_data(jnp.asarray(inputs, jnp.float32), **options)


def test_subspace_refuses_tracers_and_integers():
    with pytest.raises(ValueError, match=r"`inputs` must be concrete.* give `num_directions`"):
        jax.jit(diagnostics.subspace_from_data)(jnp.ones((4, D)))
    with pytest.raises(TypeError, match="`inputs` must be real floating point, got int32"):
        diagnostics.subspace_from_data(jnp.ones((4, D), jnp.int32))


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (np.eye(D)[:, 0], r"`basis` must have shape \(8, k\), k at most 8.* got \(8,\)"),
        (np.eye(D - 1), r"`basis` must have shape \(8, k\).* got \(7, 7\)"),
        (np.eye(D, D + 1), r"`basis` must have shape \(8, k\).* got \(8, 9\)"),
        (2 * np.eye(D)[:, :2], "`basis` must have orthonormal columns.* by 3"),
        (np.full((D, 1), np.nan), "`basis` must be finite, got NaN"),
        (np.ones((D, 2)) / np.sqrt(D), "`basis` must have orthonormal columns.* by 1"),
    ],
)
def test_bad_bases_are_refused(basis, message):
    kernel, x = jnp.ones((D, 2)), jnp.ones((3, D))
    with pytest.raises(ValueError, match=message):
        diagnostics.transversal_complexity(linear_fn, kernel, x, basis)
    with pytest.raises(ValueError, match=message):
        diagnostics.frozen_component(kernel, kernel, basis)


def test_other_bad_arguments_are_refused():
    kernel, x, key = jnp.ones((D, 2)), jnp.ones((3, D)), jax.random.key(0)
    variation = functools.partial(diagnostics.transversal_variation, linear_fn, kernel, x)
    good = {"key": key, "radius": 1.0, "num_samples": 1}
    for changes, error, message in (
        ({"radius": -1.0}, ValueError, "`radius` must be non-negative"),
        ({"num_samples": 0}, ValueError, "`num_samples` must be at least 1"),
        ({"key": 0}, TypeError, "`key` must be a typed key"),
    ):
        with pytest.raises(error, match=message):
            variation(np.eye(D)[:, :2], **{**good, **changes})
    with pytest.raises(ValueError, match=r"`basis` must leave a complement.* 8"):
        variation(np.eye(D), **good)
    with pytest.raises(ValueError, match="`basis` must leave a complement"):
        diagnostics.frozen_component(kernel, kernel, np.eye(D))
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(8, 3\), got \(8, 2\)"):
        diagnostics.frozen_component(kernel, jnp.ones((D, 3)), np.eye(D)[:, :2])
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(d, m\), got \(8,\)"):
        diagnostics.frozen_component(kernel[:, 0], kernel[:, 0], np.eye(D)[:, :2])
    with pytest.raises(TypeError, match="`inputs` must be one array of real floating point"):
        diagnostics.transversal_complexity(linear_fn, kernel, jnp.ones((3, D), int), np.eye(D))
    coupled = lambda params, x: x - jnp.mean(x, 0, keepdims=True)
    coupled.couples_examples = True
    with pytest.raises(ValueError, match="`model_fn` must not couple the examples"):
        diagnostics.transversal_complexity(coupled, kernel, x, np.eye(D)[:, :2])
    with pytest.raises(ValueError, match="`model_fn` must return an array with the leading axis"):
        diagnostics.transversal_variation(lambda p, x: jnp.sum(x), kernel, x, np.eye(D)[:, :2],
                                          **good)  # fmt: skip
