"""Batch entropy against closed forms, its penalty and both taps against the formulas by hand."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
from regjax import regularizers

RANDOM = np.random.default_rng(0)
PI_E = math.pi * math.e
OPTIONS = {"strength": 0.1, "min_target_entropy": 0.2}


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def with_variance(variance):
    """A batch of four with this unbiased variance and mean zero."""
    return jnp.asarray(np.sqrt(0.75 * variance) * np.array([[1.0], [-1.0], [1.0], [-1.0]]))


def test_closed_forms(double):
    known = {0.23998: 0.2, 0.44856: 0.5, 2.50526: 2.0, 4.59454: 2.6}  # standard deviations
    for sigma, entropy in {1.0: 1.127733, math.sqrt(0.340845): 0.681862, **known}.items():
        found = regularizers.batch_entropy(with_variance(sigma**2))
        np.testing.assert_allclose(found, 0.5 * math.log(1 + PI_E * sigma**2), rtol=1e-12)
        np.testing.assert_allclose(found, entropy, atol=1e-5)  # the digits of sigma
    population = regularizers.batch_entropy(with_variance(4.0), degrees_of_freedom=0)
    np.testing.assert_allclose(population, 0.5 * math.log(1 + 3 * PI_E), rtol=1e-12)


@pytest.mark.parametrize(("name", "variance"), [("normal", 1.0), ("relu", 0.340845)])
def test_random_units_agree_with_their_variance(name, variance):
    draws = np.random.default_rng(1).normal(size=200_000)
    draws = np.maximum(draws, 0) if name == "relu" else draws
    found = regularizers.batch_entropy(jnp.asarray(draws, jnp.float32))
    kurtosis = np.mean((draws - draws.mean()) ** 4) / draws.var() ** 2
    # Of log(1 + pi e v) / 2, with the error of v that the fourth moment gives.
    error = 0.5 * PI_E * variance / (1 + PI_E * variance) * math.sqrt((kurtosis - 1) / len(draws))
    assert abs(found - 0.5 * math.log1p(PI_E * variance)) < 5 * error


def test_units_are_averaged_one_by_one_and_shifts_change_nothing(double):
    x = RANDOM.normal(size=(7, 3, 2)) * np.array([0.1, 3.0]) + 5
    variances = x.reshape(7, 6).var(0, ddof=1)
    expected = np.mean(0.5 * np.log(1 + PI_E * variances))
    np.testing.assert_allclose(regularizers.batch_entropy(x), expected, rtol=1e-12)
    shift = RANDOM.normal(size=(1, 3, 2))
    np.testing.assert_allclose(regularizers.batch_entropy(x + 100 * shift), expected, rtol=1e-12)
    scaled = np.mean(0.5 * np.log(1 + 9 * PI_E * variances))
    np.testing.assert_allclose(regularizers.batch_entropy(3 * x), scaled, rtol=1e-12)


def test_constant_units_have_no_entropy_and_no_gradient():
    # The mean of thirteen times 0.1 is not 0.1 in float32.
    x = jnp.full((13, 2), 0.1, jnp.float32).at[:, 1].set(jnp.linspace(0.0, 1.0, 13))
    value, slope = jax.value_and_grad(regularizers.batch_entropy)(x)
    alone = regularizers.batch_entropy(x[:, 1])
    assert regularizers.batch_entropy(x[:, 0]) == 0
    np.testing.assert_allclose(value, alone / 2, rtol=1e-6)
    np.testing.assert_array_equal(slope[:, 0], 0)
    assert jnp.abs(slope[:, 1]).max() > 0.01
    assert jnp.isnan(regularizers.batch_entropy(x.at[0, 1].set(jnp.nan)))


@pytest.mark.optimized
def test_tiny_variances_survive_in_float32():
    x = with_variance(1e-30).astype(jnp.float32)
    value, slope = jax.jit(jax.value_and_grad(regularizers.batch_entropy))(x)
    np.testing.assert_allclose(value, 0.5 * PI_E * 1e-30, rtol=1e-6)
    np.testing.assert_allclose(slope, PI_E * x / 3, rtol=1e-6)


def test_bfloat16_is_summed_in_float32():
    x = (100 + jnp.arange(512.0) % 2).astype(jnp.bfloat16)  # values that bfloat16 has
    found = regularizers.batch_entropy(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0.5 * math.log(1 + PI_E * 0.25 * 512 / 511), rtol=1e-6)
    assert jax.grad(regularizers.batch_entropy)(x).dtype == jnp.bfloat16


def test_a_batch_in_parts_is_the_batch(double):
    x = jnp.asarray(RANDOM.normal(size=(8, 1, 3)) + np.arange(8)[:, None, None])  # one each
    parts = jax.vmap(lambda x: regularizers.batch_entropy(x, axis_name="data"), axis_name="data")
    np.testing.assert_allclose(parts(x), np.full(8, regularizers.batch_entropy(x)), rtol=1e-12)
    same = jnp.full((3, 5, 1), 0.1)
    np.testing.assert_array_equal(parts(same), 0)


_SHARDED = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from regjax.regularizers import batch_entropy
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.random.default_rng(0).normal(3, 2, size=(64, 4)).astype("float32")
x += np.arange(64, dtype="float32")[:, None]
spread = jax.shard_map(
    lambda x: batch_entropy(x, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P())
one = jax.value_and_grad(batch_entropy)(x)
two = jax.jit(jax.value_and_grad(spread))(x)
three = jax.jit(jax.value_and_grad(batch_entropy))(
    jax.device_put(x, NamedSharding(mesh, P("data"))))
for other in (two, three):
    np.testing.assert_allclose(other[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(other[1], one[1], atol=1e-6 * np.abs(one[1]).max())
print("same")
"""


def test_eight_devices_give_value_and_gradient_of_one():
    environment = {**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", _SHARDED], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "same", result.stderr[-2000:]


def test_penalty_at_and_off_the_targets():
    targets = jnp.asarray([0.5, -2.0, 0.1])
    penalty = lambda loss, h: regularizers.layerwise_batch_entropy(loss, h, targets, **OPTIONS)
    assert penalty(jnp.asarray(3.0), jnp.asarray([0.5, 2.0, 0.2])) == 0
    off = penalty(jnp.asarray(3.0), jnp.asarray([1.5, 0.0, 0.0]))
    np.testing.assert_allclose(off, 3 * 0.1 * (1 + 4 + 0.04) / 3, rtol=1e-6)
    value, slopes = jax.value_and_grad(penalty, (0, 1))(jnp.asarray(0.0), jnp.zeros(3))
    assert value == 0
    assert all(jnp.all(jnp.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize(
    ("target", "slope"),
    [(0.1, 0.0), (0.2, 0.0), (0.2 + 1e-6, -0.16), (-0.2 - 1e-6, 0.16), (-0.1, 0.0), (1.5, 0.1)],
)
def test_slope_of_a_target_starts_above_the_minimum(target, slope, double):
    total = lambda t: regularizers.layerwise_batch_entropy(1.0, jnp.ones(1), t[None], **OPTIONS)
    np.testing.assert_allclose(jax.grad(total)(jnp.asarray(target)), slope, atol=1e-6)


def test_the_task_loss_is_no_constant(double):
    x = jnp.asarray(RANDOM.normal(size=(9, 2)))
    params = {"weights": jnp.asarray([0.7, -1.3]), "targets": jnp.asarray([0.5, 1.2])}
    task = lambda p: jnp.mean((x @ p["weights"] - 1) ** 2)
    entropies = lambda p: jnp.stack([regularizers.batch_entropy(w * x) for w in p["weights"]])
    excess = lambda p: 0.1 * jnp.mean((entropies(p) - p["targets"]) ** 2)

    penalty = lambda p: regularizers.layerwise_batch_entropy(
        task(p), entropies(p), p["targets"], **OPTIONS
    )
    loss, of_task = jax.value_and_grad(task)(params)
    distance, of_excess = jax.value_and_grad(excess)(params)
    expected = jax.tree.map(lambda a, b: (1 + distance) * a + loss * b, of_task, of_excess)
    found = jax.jit(jax.grad(lambda p: task(p) + penalty(p)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)
    assert jnp.abs(of_excess["weights"]).min() > 1e-3


NUM_LAYERS = 11  # two digits: "tap_10" is behind "tap_2"
TARGETS = np.linspace(0.15, 1.15, NUM_LAYERS, dtype=np.float32)  # one below the minimum


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        for target in TARGETS:
            x = regularizers.linen.BatchEntropyTap(target)(jnp.tanh(linen.Dense(4)(x)))
        return x


class NnxNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in TARGETS])
        self.taps = nnx.List([regularizers.nnx.BatchEntropyTap(float(t)) for t in TARGETS])

    def __call__(self, x):
        for layer, tap in zip(self.layers, self.taps, strict=True):
            x = tap(jnp.tanh(layer(x)))
        return x


def adapted(name):
    if name == "nnx":
        return regjax.from_nnx(NnxNet())
    module = LinenNet()
    # One example is enough to make the arrays.
    return regjax.from_linen(module, module.init(jax.random.key(0), jnp.ones((1, 4))))


def layers_by_hand(name, params):
    if name == "nnx":
        return [params["layers"][i] for i in range(NUM_LAYERS)]
    return [params[f"Dense_{i}"] for i in range(NUM_LAYERS)]


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_taps_keep_entropies_that_have_gradients(name):
    model = adapted(name)
    x = jnp.asarray(RANDOM.normal(size=(6, 4)), jnp.float32)

    @jax.jit
    def step(params, state):
        def loss(params):
            outputs, new = model.apply(params, state, x, train=True)
            entropies, targets = regularizers.nnx.tapped_entropies(params, new)
            task = jnp.mean(outputs**2)
            penalty = regularizers.layerwise_batch_entropy(task, entropies, targets, **OPTIONS)
            return task + penalty, (outputs, new, entropies, targets)

        return jax.value_and_grad(loss, has_aux=True)(params)

    def by_hand(layers_and_targets):
        layers, targets = layers_and_targets
        outputs, entropies = x, []
        for layer in layers:
            outputs = jnp.tanh(outputs @ layer["kernel"] + layer["bias"][None])
            entropies.append(regularizers.batch_entropy(outputs))
        task = jnp.mean(outputs**2)
        wanted = jnp.maximum(jnp.abs(targets), 0.2)
        return task * (1 + 0.1 * jnp.mean((jnp.stack(entropies) - wanted) ** 2)), entropies

    (value, (outputs, new, entropies, targets)), slope = step(model.params, model.state)
    (expected, stored), slopes = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(
        (layers_by_hand(name, model.params), jnp.asarray(TARGETS))
    )
    np.testing.assert_array_equal(targets, TARGETS)
    np.testing.assert_allclose(entropies, stored, rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        layers_by_hand(name, slope),
        slopes[0],
    )
    # The slopes of the targets, by the same function that orders the targets.
    of_targets = regularizers.nnx.tapped_entropies(slope, new)[1]
    np.testing.assert_allclose(of_targets, slopes[1], rtol=1e-4, atol=1e-8)
    # The state goes round: same structure, shapes and dtypes, and the next step runs on it.
    assert jax.tree.structure(new) == jax.tree.structure(model.state)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(model.state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert jnp.isnan(b)
    assert step(model.params, new)[0][0] == value
    assert step._cache_size() == 1
    # Evaluation: the same outputs, the state untouched, and a batch of one will do.
    evaluated, same = model.apply(model.params, new, x[:1], train=False)
    np.testing.assert_allclose(evaluated, outputs[:1], rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same, new)
    jaxpr = jax.make_jaxpr(lambda x: model.apply(model.params, new, x, train=False))(x)
    assert "log1p" not in str(jaxpr)


def test_taps_alone_and_stacked():
    tap = regularizers.nnx.BatchEntropyTap(2.0, degrees_of_freedom=0, param_dtype=jnp.bfloat16)
    x = jnp.asarray(RANDOM.normal(size=(6, 2)), jnp.float32)
    np.testing.assert_array_equal(tap(x), x)
    # nnx states are trees with names as well; the module itself has no name.
    split = nnx.state(tap, nnx.Param), nnx.state(tap, regularizers.nnx.BatchEntropy)
    entropies, targets = regularizers.nnx.tapped_entropies(*split)
    expected = regularizers.batch_entropy(x, degrees_of_freedom=0)
    np.testing.assert_allclose(entropies, expected[None], rtol=1e-6)
    np.testing.assert_array_equal(targets, np.array([2.0]))
    assert tap.target_entropy.dtype == jnp.bfloat16
    tap.eval()
    tap(x[:1])
    stack = linen.vmap(
        regularizers.linen.BatchEntropyTap,
        variable_axes={"params": 0, "batch_entropy": 0},
        split_rngs={"params": True},
    )()
    layers = jnp.stack([x, 2 * x, 3 * x])
    variables = stack.init(jax.random.key(0), layers)
    _, new = stack.apply(variables, layers, mutable=["batch_entropy"])
    # Without the collection nothing is needed.
    stack.apply({"params": variables["params"]}, layers)
    entropies, targets = regularizers.linen.tapped_entropies(variables["params"], new)
    expected = [regularizers.batch_entropy(layer) for layer in layers]
    np.testing.assert_allclose(entropies, np.array(expected), rtol=1e-6)
    np.testing.assert_array_equal(targets, np.full(3, 0.5))


def test_a_path_that_starts_with_the_name_of_the_collection():
    leaf = {"target_entropy": jnp.ones(())}
    state = {"batch_entropy": {"batch_entropy": jnp.zeros(())}}
    for params in ({"batch_entropy": leaf}, leaf):  # nnx, with such an attribute; linen
        entropies, targets = regularizers.nnx.tapped_entropies(params, state)
        np.testing.assert_array_equal(entropies, 0)
        np.testing.assert_array_equal(targets, 1)


@pytest.mark.parametrize(
    ("activations", "options", "text"),
    [
        (jnp.ones((1, 3)), {}, "more than 1 examples, got a batch of 1"),
        (jnp.ones((2, 3)), {"degrees_of_freedom": 2}, "more than 2 examples, got a batch of 2"),
        (jnp.ones(()), {}, r"got shape \(\)"),
        (jnp.ones((4, 0)), {}, "at least one unit"),
        (jnp.ones(4), {"degrees_of_freedom": -1}, "`degrees_of_freedom` must be at least 0"),
    ],
)
def test_bad_activations(activations, options, text):
    with pytest.raises(ValueError, match=text):
        regularizers.batch_entropy(activations, **options)
    with pytest.raises(TypeError, match="`activations` must be real floating point, got int32"):
        regularizers.batch_entropy(jnp.arange(4))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_entropies": jnp.ones(3)}, r"got shapes \(2,\) and \(3,\)"),
        (
            {"entropies": jnp.ones(0), "target_entropies": jnp.ones(0)},
            "must be vectors with an entry for each layer",
        ),
        ({"task_loss": jnp.ones(2)}, "`task_loss` must be a scalar"),
        ({"strength": -0.1}, "`strength` must be non-negative"),
        ({"min_target_entropy": -0.2}, "`min_target_entropy` must be non-negative"),
    ],
)
def test_bad_penalties(options, text):
    arguments = {
        "task_loss": 1.0,
        "entropies": jnp.ones(2),
        "target_entropies": jnp.ones(2),
        **OPTIONS,
    }
    with pytest.raises(ValueError, match=text):
        regularizers.layerwise_batch_entropy(**{**arguments, **options})


@pytest.mark.parametrize(
    ("targets", "entropies", "text"),
    [
        ({}, {}, "`params` must hold the `target_entropy` of a BatchEntropyTap, got none"),
        ({"a": 0}, {}, "`state` must hold the `batch_entropy` of a BatchEntropyTap, got none"),
        ({"a": 0, "c": 0}, {"a": 0, "b": 0}, "no pair for b, c"),
        ({"a": np.ones(2)}, {"a": np.ones(3)}, "no pair for a"),
    ],
)
def test_taps_that_do_not_pair_up(targets, entropies, text):
    params = {name: {"target_entropy": value} for name, value in targets.items()}
    state = {name: {"batch_entropy": value} for name, value in entropies.items()}
    with pytest.raises(ValueError, match=text):
        regularizers.nnx.tapped_entropies({"kernel": 0, **params}, state)
