"""The gradient at the top without a closure: SAM's numbers, in every form of a training step."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from regjax import transforms
from tests import oracles
from tests.transforms import modules, runs
from tests.transforms.modules import assert_same

pytestmark = pytest.mark.usefixtures("default_promotion")


def test_a_step_on_a_quadratic():
    with jax.enable_x64(True):
        matrix = oracles.symmetric([3.0, 1.0, -0.5, 0.2])
        w = jnp.asarray(np.random.default_rng(0).normal(size=4))
        loss = lambda w: w @ matrix @ w / 2
        top_gradient = transforms.sharpness_aware_gradient(jax.value_and_grad(loss), 0.3)
        value, grads = top_gradient(w)
        slope = matrix @ w
        expected = w - 0.1 * matrix @ (w + 0.3 * slope / jnp.linalg.norm(slope))
        np.testing.assert_allclose(w - 0.1 * grads, expected, atol=1e-12)
        assert value == loss(w)
        # The named wrong versions: the loss at the top, the clean gradient.
        assert abs(loss(w + 0.3 * slope / jnp.linalg.norm(slope)) - value) > 0.1
        assert jnp.linalg.norm(grads - slope) > 0.1


OPTIONS = (
    {},
    {"adaptive": True, "eta": 0.1},
    {"mask": lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params)},
    {"adaptive": True, "mask": {"first": True, "second": {"bias": False, "kernel": True}}},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_numbers_are_those_of_the_transformation_to_the_bit(options, dtype):
    problem = oracles.problem()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), problem.params)
    evaluate = jax.jit(jax.value_and_grad(oracles.loss_fn))
    grad_fn = lambda p, i: evaluate(p, *problem.batch)[1]
    for rho in (0.3, 0.0, jnp.float32(0.2)):
        expected = runs.once(transforms.sam(rho, **options), params, grad_fn)
        top_gradient = transforms.sharpness_aware_gradient(evaluate, rho, **options)
        value, grads = top_gradient(params, *problem.batch)
        assert_same(grads, expected)
        assert value == evaluate(params, *problem.batch)[0]


def test_inside_of_jit_and_grad_of_several_arguments():
    loss = lambda a, x, b: jnp.sum(jnp.sin(a * x)) + jnp.sum(b**3)
    a, x, b = jnp.asarray([1.0, 2.0]), jnp.asarray([0.5, 0.2]), jnp.asarray([[1.0]])
    evaluate = jax.value_and_grad(loss, argnums=(0, 2))
    top_gradient = transforms.sharpness_aware_gradient(evaluate, 0.1, argnums=(0, 2))
    _, grads = jax.jit(top_gradient)(a, x, b)
    clean = evaluate(a, x, b)[1]
    norm = optax.tree.norm(clean)
    up_a, up_b = a + 0.1 * clean[0] / norm, b + 0.1 * clean[1] / norm
    np.testing.assert_allclose(grads[0], x * jnp.cos(up_a * x), rtol=1e-5)
    np.testing.assert_allclose(grads[1], 3 * up_b**2, rtol=1e-5)
    # Parameters that are not the first argument.
    last = transforms.sharpness_aware_gradient(
        jax.value_and_grad(loss, argnums=-1), 0.1, argnums=-1
    )
    np.testing.assert_allclose(last(a, x, b)[1], 3 * (b + 0.1) ** 2, rtol=1e-5)


def test_schedules_read_the_number_of_updates():
    rho = optax.linear_schedule(0.1, 0.3, 2)
    evaluate = jax.value_and_grad(lambda w: w**2 / 2)
    top_gradient = transforms.sharpness_aware_gradient(evaluate, rho)
    step = jax.jit(lambda w, i: top_gradient(w, num_updates=i)[1])
    for i, radius in enumerate([0.1, 0.2, 0.3]):
        for count in (i, jnp.int32(i), jnp.uint32(i), np.int64(i)):
            assert float(step(jnp.float32(1), count)) == pytest.approx(1 + radius)
    with pytest.raises(ValueError, match=r"`num_updates` must be given.*schedule `rho`"):
        top_gradient(jnp.float32(1))
    with pytest.raises(TypeError, match="`num_updates` must be a single integer"):
        top_gradient(jnp.float32(1), num_updates=0.5)


def test_linen_statistics_are_those_of_the_clean_pass():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(4)(x))
            return linen.Dense(1)(linen.Dropout(0.5, deterministic=not train)(jnp.tanh(x)))

    net, (x, y) = Net(), modules.data()
    variables = net.init(jax.random.key(0), x, False)

    def loss(params, statistics, x, y, key):
        out, new = net.apply(
            {"params": params, "batch_stats": statistics}, x, True,
            mutable=["batch_stats"], rngs={"dropout": key},
        )  # fmt: skip
        return jnp.mean((out - y) ** 2), new["batch_stats"]

    evaluate = jax.value_and_grad(loss, has_aux=True)
    arguments = (variables["params"], variables["batch_stats"], x, y, jax.random.key(1))
    (value, statistics), clean = evaluate(*arguments)
    top_gradient = transforms.sharpness_aware_gradient(evaluate, 0.2)
    (top_value, top_statistics), grads = top_gradient(*arguments)
    assert_same((top_value, top_statistics), (value, statistics))
    grad_fn = lambda p, i: evaluate(p, *arguments[1:])[1]
    tx = transforms.sam(0.2)
    expected = tx.update(clean, tx.init(arguments[0]), arguments[0], grad_fn=grad_fn)[0]
    assert_same(grads, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_nnx_modules_tick_once_and_both_passes_have_the_same_dropout(compiled):
    x, y = modules.data()
    mine, theirs = modules.Net(nnx.Rngs(0)), modules.Net(nnx.Rngs(0))
    evaluate = nnx.value_and_grad(modules.nnx_loss, has_aux=True)
    optimizer = nnx.Optimizer(
        theirs, optax.chain(transforms.sam(0.2), optax.sgd(0.1)), wrt=nnx.Param
    )
    plain = nnx.Optimizer(mine, optax.sgd(0.1), wrt=nnx.Param)

    def reference(model, optimizer, x, y):
        # By hand: the state of the model before the clean pass, with other parameters in it.
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)
        rest = jax.tree.map(jnp.copy, nnx.as_pure(rest))
        (value, aux), grads = evaluate(model, x, y)
        grad_fn = lambda p, i: evaluate(nnx.merge(graphdef, p, rest), x, y)
        optimizer.update(model, grads, grad_fn=grad_fn)
        return value, aux

    def step(model, optimizer, x, y):
        (value, aux), grads = transforms.sharpness_aware_gradient(evaluate, 0.2)(model, x, y)
        optimizer.update(model, grads)
        return value, aux

    wrap = nnx.jit if compiled else (lambda function: function)
    for _ in range(3):
        ours, expected = wrap(step)(mine, plain, x, y), wrap(reference)(theirs, optimizer, x, y)
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if compiled else {}
        assert_same(ours, expected, **tolerance)
        assert_same(nnx.as_pure(nnx.state(mine)), nnx.as_pure(nnx.state(theirs)), **tolerance)
    assert int(mine.dropout.rngs.count[...]) == 3


def test_nnx_subsets_and_other_objects_that_change():
    x, y = modules.data()

    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.LoRALinear(3, 1, lora_rank=2, rngs=rngs)
            self.layer.lora.lora_b[...] += 0.5

    model, metric = Adapted(nnx.Rngs(0)), nnx.metrics.Average("loss")

    def loss(model, metric, x, y):
        value = jnp.mean((model.layer(x) - y) ** 2)
        metric.update(loss=value)
        return value

    subset = nnx.DiffState(0, nnx.LoRAParam)
    evaluate = nnx.value_and_grad(loss, argnums=subset)
    top_gradient = transforms.sharpness_aware_gradient(evaluate, 0.2, argnums=subset)
    before = nnx.as_pure(nnx.state(model))
    value, grads = top_gradient(model, metric, x, y)
    assert_same(nnx.as_pure(nnx.state(model)), before)
    assert int(metric.count[...]) == 1
    assert metric.compute() == value
    pure = nnx.as_pure(grads)
    kernel, a, b = (
        before["layer"]["kernel"],
        *(before["layer"]["lora"][n] for n in ("lora_a", "lora_b")),
    )

    def by_hand(pair):
        return jnp.mean((x @ kernel + x @ pair["lora_a"] @ pair["lora_b"] - y) ** 2)

    pair = {"lora_a": a, "lora_b": b}
    clean = jax.grad(by_hand)(pair)
    norm = optax.tree.norm(clean)
    expected = jax.grad(by_hand)(jax.tree.map(lambda w, g: w + 0.2 * g / norm, pair, clean))
    assert_same(dict(pure["layer"]["lora"]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equinox_modules(dtype):
    x, y = modules.data()
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    model = jax.tree.map(lambda w: w.astype(dtype) if eqx.is_inexact_array(w) else w, model)

    def loss(model, x, y, *, scale):
        return scale * jnp.mean((jax.vmap(model)(x) - y) ** 2), {"n": len(x)}

    evaluate = eqx.filter_value_and_grad(loss, has_aux=True)
    (value, aux), clean = evaluate(model, x, y, scale=2.0)
    top_gradient = transforms.sharpness_aware_gradient(evaluate, 0.2)
    (top_value, top_aux), grads = top_gradient(model, x, y, scale=2.0)
    assert top_value == value
    assert top_aux == aux
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = transforms.sam(0.2)
    grad_fn = lambda p, i: evaluate(eqx.combine(p, model), x, y, scale=2.0)
    expected = tx.update(clean, tx.init(params), params, grad_fn=grad_fn)[0]
    assert jax.tree.structure(grads) == jax.tree.structure(clean)
    assert_same(grads, expected)
    compiled = eqx.filter_jit(top_gradient)(model, x, y, scale=2.0)[1]
    assert_same(compiled, expected, rtol=2e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_of_bfloat16_climb_below_their_spacing(adaptive):
    random = np.random.default_rng(0)
    w = {"w": jnp.asarray(0.02 * (1 + 0.1 * random.normal(size=40_000)), jnp.bfloat16)}
    # Each weight moves by 2.5e-7, a hundredth of the spacing of bfloat16 at 0.02.
    rho = 5e-5 if not adaptive else 1e-3
    scale = jnp.asarray(random.normal(size=40_000) * 1e6, jnp.float32)
    loss = lambda p: jnp.sum(jnp.sin(scale * p["w"].astype(jnp.float32)) / scale)
    evaluate = jax.value_and_grad(loss)
    top_gradient = transforms.sharpness_aware_gradient(evaluate, rho, adaptive=adaptive)
    _, grads = top_gradient(w)
    clean = evaluate(w)[1]
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), w)
    climb = {"rho": rho, "adaptive": adaptive}
    tx = transforms.sam(**climb)
    incoming = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), clean)
    expected = tx.update(incoming, tx.init(wide), wide, grad_fn=lambda p, i: jax.grad(loss)(p))[0]
    assert grads["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(grads["w"], expected["w"].astype(jnp.bfloat16))
    # The named wrong version: climbing in bfloat16 goes nowhere.
    assert np.mean(np.asarray(grads["w"] != clean["w"])) > 0.3
    theirs = transforms.sam(**climb)
    assert_same(
        theirs.update(clean, theirs.init(w), w, grad_fn=lambda p, i: jax.grad(loss)(p))[0], grads
    )


def test_what_is_no_value_and_gradient_is_refused():
    w = jnp.ones(2)
    loss = lambda w: jnp.sum(w**2)
    for wrong in (
        jax.grad(loss),
        lambda w: None,
        lambda w: (loss(w), w, w),
        lambda w: (w, loss(w)),
    ):
        with pytest.raises(ValueError, match=r"`value_and_grad_fn` must return \(loss, gradient\)"):
            transforms.sharpness_aware_gradient(wrong, 0.1)(w)
    evaluate = jax.value_and_grad(loss)
    with pytest.raises(TypeError, match="`value_and_grad_fn` must be callable"):
        transforms.sharpness_aware_gradient(0.1, 0.1)
    with pytest.raises(ValueError, match=r"`rho` must be non-negative, got -0.1"):
        transforms.sharpness_aware_gradient(evaluate, -0.1)
    with pytest.raises(ValueError, match=r"`argnums` must be positional arguments, got 1 of 1"):
        transforms.sharpness_aware_gradient(evaluate, 0.1, argnums=1)(w)
    with pytest.raises(ValueError, match=r"`argnums` must be positional.*got 0 of 0"):
        transforms.sharpness_aware_gradient(evaluate, 0.1)(w=w)
    with pytest.raises(ValueError, match="`mask` must have the tree structure"):
        transforms.sharpness_aware_gradient(evaluate, 0.1, mask={"b": True})(w)
    with pytest.raises(TypeError, match="`params` must be real floating point, got int32"):
        transforms.sharpness_aware_gradient(lambda w: (1.0, w), 0.1)(jnp.ones(2, jnp.int32))
