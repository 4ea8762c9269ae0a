"""The controller on quadratics of known spectrum, and on small networks against dense Hessians."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import regjax
from benchmarks.claims._printed import paper_nesterov_rule
from regjax import _platforms, curvature, models, schedules, transforms
from regjax.curvature._operators import _traced
from regjax.transforms import _spectral_controller
from tests import oracles
from tests.transforms.runs import scan

RANDOM = np.random.default_rng(0)
SPECTRUM = np.linspace(1.0, 100.0, 12)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def make(**options):
    defaults = {"key": jax.random.key(0), "initial_learning_rate": 0.1, "every": 1000}
    return transforms.spectral_controller(**{**defaults, **options})


def quadratic(scale=1.0):
    """The gradient of a quadratic with that multiple of `SPECTRUM`, on a tree."""

    def grad_fn(params, i):
        del i
        flat, unravel = ravel_pytree(params)
        return unravel(jnp.asarray(scale * SPECTRUM, flat.dtype) * flat)

    return grad_fn


def ones(dtype=np.float64):
    return {"a": jnp.ones((2, 3), dtype), "b": jnp.ones(6, dtype)}


def gradient(data, params):
    return jax.grad(oracles.loss_fn)(params, *data)


def diagonal(values):
    """The gradient of a quadratic; all are of one size, so that little is compiled again."""
    values = np.resize(np.asarray(values, np.float32), 12)
    return Partial(multiply, jnp.asarray(values))


def multiply(values, params):
    return values * params


def measured(curvature_grad_fn, params, **options):
    """The state after a refresh."""
    state = make().init(params)
    return transforms.refresh_spectral_controller(state, curvature_grad_fn, params, **options)


def test_polyak_is_optimal_on_a_quadratic(double):
    tx = make(rule=schedules.polyak_rule, nesterov=False)
    run = jax.jit(lambda params, state: scan(tx, params, quadratic(), 60, state))
    params, state = run(ones(), tx.init(ones()))
    np.testing.assert_allclose((state.largest, state.smallest), (100.0, 1.0), rtol=1e-10)
    np.testing.assert_allclose(state.learning_rate, 4 / 121, rtol=1e-10)
    later, _ = run(params, state)
    distances = [np.linalg.norm(ravel_pytree(tree)[0]) for tree in (params, later)]
    shrinkage = (distances[1] / distances[0]) ** (1 / 60)
    assert abs(shrinkage - 9 / 11) < 0.02 * 9 / 11


def test_the_printed_rate_diverges(double):
    params, state = scan(make(rule=paper_nesterov_rule), ones(), quadratic(), 60)
    np.testing.assert_allclose(state.learning_rate, 0.1, rtol=1e-10)
    assert np.abs(params["b"]).max() > 1e6


@pytest.mark.parametrize(
    "rule", [schedules.nesterov_rule, schedules.polyak_rule, paper_nesterov_rule]
)
def test_a_loss_times_ten_has_the_same_trajectory(rule, double):
    tx = make(rule=rule, nesterov=rule is not schedules.polyak_rule, every=4)
    problem = oracles.problem(dtype=np.float64)

    def scaled(factor):
        return lambda params, i: jax.tree.map(
            lambda leaf: factor * leaf, gradient(problem.batch, params)
        )

    run = jax.jit(lambda factor: scan(tx, problem.params, scaled(factor), 10))
    (one, first), (ten, second) = run(1.0), run(10.0)
    distance = np.abs(ravel_pytree(one)[0] - ravel_pytree(ten)[0]).max()
    assert (distance < 1e-6) == (rule is not paper_nesterov_rule)
    if rule is not paper_nesterov_rule:
        np.testing.assert_allclose(10 * second.learning_rate, first.learning_rate, rtol=1e-6)
        np.testing.assert_allclose(second.momentum, first.momentum, rtol=1e-6)


def test_an_invariant_subspace_ends_the_run(double):
    values = jnp.zeros(30).at[:2].set(jnp.asarray([5.0, 2.0]))
    w = jnp.ones(30)
    state = measured(Partial(multiply, values), w, num_steps=10)
    np.testing.assert_allclose(state.largest, 5.0, rtol=1e-10)
    assert float(state.residual_norm) < 1e-10
    run = curvature.lanczos(curvature.from_matvec(Partial(multiply, values), w), w, 10)
    values, _, weights, _ = curvature.ritz_pairs(run)
    assert int(run.num_steps) == int(jnp.sum(weights > 0)) == 3
    np.testing.assert_allclose(values[weights > 0], [0, 2, 5], atol=1e-10)
    np.testing.assert_allclose(weights[weights > 0], [28 / 30, 1 / 30, 1 / 30], rtol=1e-10)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_the_largest_is_that_of_the_hessian_within_its_residual(kind):
    inputs = jnp.asarray(RANDOM.normal(size=(9, 1, 5, 1)), jnp.float32)
    targets = jnp.asarray(RANDOM.integers(3, size=9), jnp.int32)
    if kind == "nnx":
        model = regjax.from_nnx(models.MLP((1, 5, 1), 3, width=4, depth=1, rngs=nnx.Rngs(0)))
    else:
        module = linen.Sequential([lambda x: x.reshape(len(x), -1), linen.Dense(4), linen.tanh,
                                   linen.Dense(3)])  # fmt: skip
        model = regjax.from_linen(module, module.init(jax.random.key(0), inputs))
    loss_fn = regjax.model_loss(model, oracles.cross_entropy)
    flat, unravel = ravel_pytree(model.params)
    one = lambda w: loss_fn(unravel(w), inputs, targets)
    values = np.linalg.eigvalsh(jax.jit(jax.hessian(one))(flat))
    grad_fn = lambda params: jax.grad(loss_fn)(params, inputs, targets)
    for num_steps in (3, 12):
        state = jax.jit(lambda p, n=num_steps: measured(grad_fn, p, num_steps=n))(model.params)
        distance = np.abs(np.abs(values) - float(state.largest)).min()
        assert distance <= float(state.residual_norm) + 1e-5
    np.testing.assert_allclose(state.largest, np.abs(values).max(), rtol=1e-4)
    np.testing.assert_allclose(state.lowest, values[0], rtol=0.1)


def test_the_residual_of_low_precision_has_a_floor():
    """All twelve steps leave a residual of rounding in float32, though products are in bfloat16."""
    values = jnp.asarray(np.linspace(1.0, 100.0, 12), jnp.float32)

    def loss_fn(params, dtype):
        return 0.5 * jnp.sum((values.astype(dtype) * params.astype(dtype) ** 2).astype(jnp.float32))

    found = {
        dtype: measured(jax.grad(functools.partial(loss_fn, dtype=dtype)), jnp.ones(12))
        for dtype in (jnp.bfloat16, jnp.float32)
    }
    for dtype, state in found.items():
        assert state.residual_norm >= 7 * float(jnp.finfo(dtype).eps) * state.largest
        assert abs(state.largest - 100) <= state.residual_norm
    assert found[jnp.float32].residual_norm < 0.01 * found[jnp.bfloat16].residual_norm
    # As large inside of a compiled update.
    grad_fn = jax.grad(functools.partial(loss_fn, dtype=jnp.bfloat16))
    tx = make()
    state = jax.jit(lambda w, state: tx.update(w, state, w, curvature_grad_fn=grad_fn)[1])(
        jnp.ones(12), tx.init(jnp.ones(12))
    )
    assert state.residual_norm >= 7 * float(jnp.finfo(jnp.bfloat16).eps) * state.largest


def test_a_saddle_shows_in_the_state():
    state = measured(diagonal([-7.0, -0.5, 0.3, 1.0, 2.0, 4.0]), jnp.ones(12))
    np.testing.assert_allclose(state.largest, 7.0, rtol=1e-5)
    np.testing.assert_allclose(state.lowest, -7.0, rtol=1e-5)
    np.testing.assert_allclose(state.smallest, 0.3, rtol=1e-4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_updates_by_hand_with_a_velocity_in_units_of_updates(nesterov, double):
    # The curvature 3 w^2 falls as w does, and the rate grows: old velocity is not rescaled.
    tx = make(every=2, nesterov=nesterov, num_steps=6)
    grad_fn = lambda params, i: params**3
    w = jnp.linspace(1.0, 3.0, 9)
    step = jax.jit(lambda w, state: tx.update(grad_fn(w, 0), state, w, grad_fn=grad_fn))
    state, expected, velocity, rates = tx.init(w), np.asarray(w), np.zeros(9), set()
    for _ in range(5):
        updates, state = step(w, state)
        w = optax.apply_updates(w, updates)
        rate, momentum = float(state.learning_rate), float(state.momentum)
        slope = rate * expected**3
        velocity = momentum * velocity - slope
        expected = expected + (momentum * velocity - slope if nesterov else velocity)
        np.testing.assert_allclose(w, expected, rtol=1e-12)
        rates.add(rate)
        assert momentum > 0.01
    assert len(rates) == 3


def test_refreshes_come_when_they_are_due_and_compile_once():
    tx, problem = make(every=3), oracles.problem()
    grad_fn = lambda params, i: gradient(problem.batch, params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params, state, keys = problem.params, tx.init(problem.params), []
    structure = jax.tree.map(jnp.shape, state)
    for _ in range(7):
        params, state = step(params, state)
        keys.append(state.key_data.tolist())
        assert jax.tree.map(jnp.shape, state) == structure
    changes = [i for i in range(1, 7) if keys[i] != keys[i - 1]]
    assert changes == [3, 6]
    assert keys[0] != jax.random.key_data(jax.random.key(0)).tolist()
    assert step._cache_size() == 1
    assert int(state.num_updates) == 7


def test_a_curvature_gradient_of_its_own():
    tx = make(every=1)
    grads, w, own = jnp.ones(12), jnp.ones(12), diagonal([1.0, 3.0, 6.0, 8.0])
    update = functools.partial(tx.update, grads, tx.init(w), w)
    np.testing.assert_allclose(update(curvature_grad_fn=own)[1].largest, 8.0, rtol=1e-5)
    # It goes before grad_fn, of which it takes batch 0.
    other = lambda params, i: jnp.where(i == 0, 5.0, jnp.nan) * own(params)
    np.testing.assert_allclose(update(grad_fn=other)[1].largest, 40.0, rtol=1e-5)
    state = update(grad_fn=other, curvature_grad_fn=own)[1]
    np.testing.assert_allclose(state.largest, 8.0, rtol=1e-5)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_unusable_curvature_leaves_the_rates_as_they_are(bad):
    w = jnp.ones(12)
    state = measured(diagonal([bad]), w)
    assert (float(state.learning_rate), float(state.momentum)) == (np.float32(0.1), 0)
    assert not state.refresh_ok
    assert float(state.largest) == 0
    good = transforms.refresh_spectral_controller(state, diagonal([1.0, 3.0, 6.0, 8.0]), w)
    assert good.refresh_ok
    after = transforms.refresh_spectral_controller(good, diagonal([bad]), w)
    assert not after.refresh_ok
    for name in ("learning_rate", "momentum", "largest", "smallest", "residual_norm", "lowest"):
        assert float(getattr(after, name)) == float(getattr(good, name))


def test_bounds_of_momentum_and_of_the_smallest():
    grad_fn, w = diagonal(np.geomspace(1.0, 100.0, 12)), jnp.ones(12)
    plain = measured(grad_fn, w)
    assert 0.5 < float(plain.momentum) < 0.82
    assert float(measured(grad_fn, w, max_momentum=0.5).momentum) == 0.5
    bounded = measured(grad_fn, w, smallest_ratio=0.25)
    np.testing.assert_allclose(bounded.smallest, 25.0, rtol=1e-4)
    np.testing.assert_allclose(bounded.momentum, 1 / 3, rtol=1e-4)
    by_numbers = measured(grad_fn, w, rule=lambda largest, smallest: (0.25, 0))
    assert (float(by_numbers.learning_rate), float(by_numbers.momentum)) == (0.25, 0)


def test_the_host_may_refresh_and_compiles_nothing_again():
    problem = oracles.problem()
    hosted = make(every=None)
    state = hosted.init(problem.params)
    assert not hosted.update(problem.params, state)[1].refresh_ok  # without params and grad_fn
    grad_fn = Partial(gradient, problem.batch)
    refreshed = transforms.refresh_spectral_controller(state, grad_fn, problem.params)
    sizes = lambda: (
        _traced._product._cache_size(),
        _spectral_controller._read._cache_size(),
    )
    before = sizes()
    other = Partial(gradient, oracles.problem(seed=1).batch)
    again = transforms.refresh_spectral_controller(refreshed, other, problem.params)
    assert sizes() == before
    assert float(again.largest) != float(refreshed.largest)
    # The branch inside jit does the same.
    tx = make()
    update = jax.jit(lambda state: tx.update(
        problem.params, state, problem.params, curvature_grad_fn=grad_fn)[1])  # fmt: skip
    inside = update(tx.init(problem.params))
    for name in ("learning_rate", "momentum", "largest"):
        np.testing.assert_allclose(getattr(inside, name), getattr(refreshed, name), rtol=1e-3)


def convolve(params, images):
    return jax.lax.conv(images, params, (1, 1), "SAME")


def test_convolutions_inside_jit_on_cpu_warn_and_the_host_does_not():
    kernel = jnp.asarray(RANDOM.normal(size=(1, 1, 3, 3)), jnp.float32)
    images = jnp.asarray(RANDOM.normal(size=(4, 1, 5, 5)), jnp.float32)
    grad_fn = jax.grad(lambda params: jnp.mean(jnp.tanh(convolve(params, images)) ** 2))
    tx = make(num_steps=2)
    update = lambda state: tx.update(kernel, state, kernel, curvature_grad_fn=grad_fn)[1]
    _platforms._told.clear()
    with pytest.warns(
        UserWarning, match="branch with convolutions inside jit.*let the host decide"
    ):
        inside = jax.jit(update)(tx.init(kernel))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outside = transforms.refresh_spectral_controller(
            tx.init(kernel), grad_fn, kernel, num_steps=2
        )
    np.testing.assert_allclose(inside.largest, outside.largest, rtol=1e-3)


def test_error_texts():
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        make(key=0)
    with pytest.raises(ValueError, match="`initial_learning_rate` must be positive, got 0"):
        make(initial_learning_rate=0)
    with pytest.raises(ValueError, match="`every` must be at least 1, got 0"):
        make(every=0)
    with pytest.raises(ValueError, match="`max_momentum` must be below 1, got 1"):
        make(max_momentum=1)
    w, refresh = jnp.ones(3), transforms.refresh_spectral_controller
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, got 0"):
        refresh(make().init(w), lambda p: p, w, num_steps=0)
    with pytest.raises(ValueError, match="`smallest_ratio` must be non-negative, got -1"):
        refresh(make().init(w), lambda p: p, w, smallest_ratio=-1)
    tx = make()
    with pytest.raises(ValueError, match="`grad_fn` must be given, got None"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update(w, tx.init(w), curvature_grad_fn=functools.partial(jnp.multiply, 2))
