"""Means over micro-batches and devices against the whole batch, and gradients for an update."""

import os
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from regjax import transforms
from tests import oracles
from tests.transforms import modules
from tests.transforms.modules import assert_same

pytestmark = pytest.mark.usefixtures("default_promotion")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def regression(num=12, seed=0):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    params = {"w": draw(3, 2), "b": draw(2)}
    mask = (np.arange(num) % 5 != 1).astype(np.float32) * (np.arange(num) < 9)
    return params, draw(num, 3), draw(num, 2), jnp.asarray(mask)


def errors(params, x, y):
    return jnp.sum(jnp.sin(x @ params["w"] + params["b"] - y) ** 2, 1)


def plain(params, x, y):
    return jnp.mean(errors(params, x, y))


def masked(params, x, y, mask):
    return jnp.sum(mask * errors(params, x, y)) / jnp.sum(mask)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("compiled", [False, True])
def test_parts_make_the_whole(num_shards, compiled):
    params, x, y, _ = regression()
    evaluate = jax.value_and_grad(plain)
    mean = transforms.mean_gradient(evaluate, num_shards=num_shards)
    mean = jax.jit(mean) if compiled else mean
    assert_same(mean(params, x, y), evaluate(params, x, y), **CLOSE)
    # The data may be a dict of NumPy's, and what is passed by name is whole.
    named = lambda p, batch, *, factor: factor * plain(p, batch["x"], batch["y"])
    mean = transforms.mean_gradient(jax.value_and_grad(named), num_shards=num_shards)
    batch = {"x": np.asarray(x), "y": np.asarray(y)}
    expected = jax.value_and_grad(named)(params, batch, factor=2.0)
    assert_same(mean(params, batch, factor=2.0), expected, **CLOSE)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_masked_means_are_weighted_and_empty_parts_add_nothing(num_shards, dtype):
    params, x, y, mask = regression()
    assert num_shards < 4 or mask[9:].sum() == 0
    mask = mask.astype(dtype)
    evaluate = jax.value_and_grad(masked)
    weight_fn = lambda x, y, mask: jnp.sum(mask)
    mean = transforms.mean_gradient(evaluate, num_shards=num_shards, weight_fn=weight_fn)
    expected = evaluate(params, x, y, mask)
    assert_same(mean(params, x, y, mask), expected, **CLOSE)
    assert_same(jax.jit(mean)(params, x, y, mask), expected, **CLOSE)
    if num_shards == 2:  # the named wrong version: the mean of means
        wrong = transforms.mean_gradient(evaluate, num_shards=2)(params, x, y, mask)
        assert abs(wrong[0] / expected[0] - 1) > 1e-2


def test_weights_that_cannot_be_are_refused():
    params, x, y, mask = regression()
    evaluate = jax.value_and_grad(masked)
    weight_of = lambda value: lambda x, y, mask: value
    mean = lambda value, **options: transforms.mean_gradient(
        evaluate, num_shards=2, weight_fn=weight_of(value), **options
    )(params, x, y, mask)
    for value, rule in ((-1.0, "non-negative"), (np.nan, "non-neg|finite"), (np.inf, "finite")):
        with pytest.raises(ValueError, match=rf"`weight_fn\(\*batch\)` must be ({rule})"):
            mean(jnp.float32(value))
    with pytest.raises(ValueError, match=r"`weight_fn\(\*batch\)` must be a single number"):
        mean(jnp.ones(2))
    with pytest.raises(TypeError, match=r"`weight_fn\(\*batch\)` must be a real number"):
        mean(jnp.bool_(True))
    with pytest.raises(TypeError, match=r"`weight_fn\(\*batch\)` must be of an integer type or"):
        mean(jnp.bfloat16(3))
    with pytest.raises(ValueError, match=r"`weight_fn\(\*batch\)` must be positive for some part"):
        mean(jnp.float32(0))
    # Where nobody knows the numbers: NaN.
    for value in (0.0, -1.0, np.nan):
        run = jax.jit(
            lambda w: transforms.mean_gradient(evaluate, num_shards=2, weight_fn=weight_of(w))(
                params, x, y, mask
            )
        )
        assert jnp.isnan(run(jnp.float32(value))[0])
    with pytest.raises(ValueError, match="`num_shards` must divide the number of examples, 12"):
        transforms.mean_gradient(evaluate, num_shards=5)(params, x, y, mask)
    with pytest.raises(ValueError, match=r"`batch` must have one leading.*pass it by keyword"):
        transforms.mean_gradient(evaluate, num_shards=2)(params, x, y, jax.random.key(0))
    with pytest.raises(ValueError, match="`num_shards` must be at least 1"):
        transforms.mean_gradient(evaluate, num_shards=0)
    with pytest.raises(TypeError, match="`axis_name` must be a string"):
        transforms.mean_gradient(evaluate, axis_name=3)


def test_what_comes_with_the_loss_is_stacked_and_dtypes_stay():
    params, x, y, _ = regression()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    loss = lambda p, x, y: (plain(p, x.astype(jnp.bfloat16), y), {"first": x[0, 0], "n": len(x)})
    evaluate = jax.value_and_grad(loss, has_aux=True)
    (value, aux), grads = transforms.mean_gradient(evaluate, num_shards=3)(params, x, y)
    np.testing.assert_array_equal(aux["first"], x[::4, 0])
    np.testing.assert_array_equal(aux["n"], [4, 4, 4])
    (_, aux), clean = transforms.mean_gradient(evaluate)(params, x, y)
    assert aux["first"].shape == ()
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((grads, clean)))
    assert value.dtype == jax.eval_shape(loss, params, x, y)[0].dtype


@pytest.mark.parametrize("num_shards", [2, 4])
def test_the_order_with_the_ascent_is_one_climb_or_m_sharpness(num_shards):
    params, x, y, _ = regression()
    evaluate = jax.value_and_grad(plain)
    whole = transforms.sharpness_aware_gradient(
        transforms.mean_gradient(evaluate, num_shards=num_shards), 0.3
    )
    expected = transforms.sharpness_aware_gradient(evaluate, 0.3)(params, x, y)
    assert_same(whole(params, x, y), expected, **CLOSE)
    each = transforms.mean_gradient(
        transforms.sharpness_aware_gradient(evaluate, 0.3), num_shards=num_shards
    )
    tx = transforms.sam(0.3, num_shards=num_shards)
    grad_fn = transforms.gradient_function(evaluate, params, x, y, num_shards=num_shards)
    updates = tx.update(expected[1], tx.init(params), params, grad_fn=grad_fn)[0]
    assert_same(each(params, x, y)[1], updates, **CLOSE)
    gap = jax.tree.map(jnp.subtract, updates, expected[1])
    assert optax.tree.norm(gap) > 1e-3 * optax.tree.norm(updates)


def test_nnx_modules_change_as_by_so_many_calls():
    x, y = modules.data()
    model, other = modules.Net(nnx.Rngs(0)), modules.Net(nnx.Rngs(0))
    evaluate = nnx.value_and_grad(modules.nnx_loss, has_aux=True)
    (value, aux), grads = transforms.mean_gradient(evaluate, num_shards=2)(model, x, y)
    pairs = [evaluate(other, x[half], y[half]) for half in (slice(4), slice(4, 8))]
    assert_same(nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(other)))
    assert float(value) == pytest.approx(float(sum(pair[0][0] for pair in pairs) / 2), rel=1e-6)
    assert aux.shape == (2, 4, 1)
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *(pair[1] for pair in pairs))
    assert_same(grads, expected, **CLOSE)


def gradients_of(model, evaluate, params, *batch):
    grad_fn = transforms.gradient_function(evaluate, model, *batch)
    moved = lambda i: jax.tree.map(lambda w: w + 0.1 * i, params)
    return [grad_fn(moved(i), i) for i in range(3)]


def test_gradient_functions_of_modules_leave_them_alone():
    x, y = modules.data()
    model = modules.Net(nnx.Rngs(0))
    evaluate = nnx.value_and_grad(modules.nnx_loss, has_aux=True)
    before = nnx.as_pure(nnx.state(model))
    for params in (
        nnx.as_pure(nnx.state(model, nnx.Param)),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        nnx.state(model, nnx.Param),
    ):
        found = gradients_of(model, evaluate, params, x, y)
        assert_same(nnx.as_pure(nnx.state(model)), before)
        for i, grads in enumerate(found):
            other = nnx.clone(model)
            own = nnx.as_pure(nnx.state(model, nnx.Param))
            nnx.update(other, jax.tree.map(lambda w: w + 0.1 * i, own))  # noqa: B023
            expected = nnx.as_pure(evaluate(other, x, y)[1])
            assert jax.tree.structure(grads) == jax.tree.structure(params)
            assert_same(jax.tree.leaves(grads), jax.tree.leaves(expected))
    with pytest.raises(ValueError, match=r"`params` must hold what there is a gradient for.*third"):
        transforms.gradient_function(evaluate, model, x, y)({"third": jnp.ones(2)}, 0)


def test_gradient_functions_of_equinox_and_of_shards():
    x, y = modules.data()
    model = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    loss = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)
    evaluate = eqx.filter_value_and_grad(loss)
    params = eqx.filter(model, eqx.is_inexact_array)
    for i, grads in enumerate(gradients_of(model, evaluate, params, x, y)):
        moved = jax.tree.map(lambda w: w + 0.1 * i, params)  # noqa: B023
        assert_same(grads, evaluate(eqx.combine(moved, model), x, y)[1])
    on_shard = transforms.gradient_function(evaluate, model, x, y, num_shards=4)
    for i in (0, jnp.int32(3)):
        rows = slice(2 * int(i), 2 * int(i) + 2)
        assert_same(on_shard(params, i), evaluate(model, x[rows], y[rows])[1], **CLOSE)
    with pytest.raises(ValueError, match="`arguments` must begin with the parameters"):
        transforms.gradient_function(evaluate)
    with pytest.raises(ValueError, match="`params` must have the structure of the gradient"):
        transforms.gradient_function(evaluate, {"a": x}, x, y)({"b": x}, 0)


def test_a_mapped_axis_in_one_process():
    problem = oracles.problem(num_examples=24)
    evaluate = jax.value_and_grad(oracles.loss_fn)
    expected = transforms.sharpness_aware_gradient(evaluate, 0.2)(problem.params, *problem.batch)
    parts = [leaf.reshape(4, 6, *leaf.shape[1:]) for leaf in problem.batch]
    whole = transforms.sharpness_aware_gradient(
        transforms.mean_gradient(evaluate, axis_name="batch"), 0.2
    )
    found = jax.vmap(whole, in_axes=(None, 0, 0), axis_name="batch")(problem.params, *parts)
    for i in range(4):
        assert_same(jax.tree.map(lambda leaf: leaf[i], found), expected, **CLOSE)  # noqa: B023


DEVICES = """
    import jax
    jax.config.update("jax_num_cpu_devices", 4)
    import jax.numpy as jnp, numpy as np, optax
    from flax import nnx
    from jax import lax
    from jax.sharding import AxisType, PartitionSpec as P
    from regjax import transforms
    from tests import oracles
    from tests.transforms import modules
    from tests.transforms.test_mean_gradient import masked, plain, regression

    params, x, y, mask = regression()
    evaluate = jax.value_and_grad(masked)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    mean = lambda f: transforms.mean_gradient(
        f, axis_name="data", weight_fn=lambda x, y, mask: jnp.sum(mask)
    )
    tx = optax.chain(transforms.sam(0.3), optax.sgd(0.1))

    def alone():
        w, state = params, tx.init(params)
        for _ in range(3):
            grad_fn = lambda p, i: evaluate(p, x, y, mask)
            updates, state = tx.update(grad_fn(w, 0)[1], state, w, grad_fn=grad_fn)
            w = optax.apply_updates(w, updates)
        return w

    def with_grad_fn(w, *batch):
        state = tx.init(w)
        for _ in range(3):
            grad_fn = transforms.gradient_function(mean(evaluate), w, *batch)
            updates, state = tx.update(mean(evaluate)(w, *batch)[1], state, w, grad_fn=grad_fn)
            w = optax.apply_updates(w, updates)
        return w

    def without(w, *batch):
        for _ in range(3):
            _, grads = transforms.sharpness_aware_gradient(mean(evaluate), 0.3)(w, *batch)
            w = jax.tree.map(lambda a, g: a - 0.1 * g, w, grads)
        return w

    def forgotten(w, *batch):
        grad_fn = lambda p, i: jax.value_and_grad(plain)(p, *batch[:2])
        return tx.update(lax.pmean(grad_fn(w, 0)[1], "data"), tx.init(w), w, grad_fn=grad_fn)[0]

    same = lambda a, b: jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), a, b
    )
    expected = alone()
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), params)
    parts = [leaf.reshape(4, 3, *leaf.shape[1:]) for leaf in (x, y, mask)]
    for step in (with_grad_fn, without):
        for check in (True, False):
            mapped = jax.shard_map(
                step, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P(),
                check_vma=check,
            )
            same(jax.jit(mapped)(params, x, y, mask), expected)
        found = jax.pmap(step, axis_name="data")(copies, *parts)
        for i in range(4):
            same(jax.tree.map(lambda leaf: leaf[i], found), expected)
            exact = jax.tree.map(lambda leaf: np.array_equal(leaf[i], leaf[0]), found)
            assert all(jax.tree.leaves(exact))
    apart = jax.pmap(forgotten, axis_name="data")(copies, *parts)["w"]
    assert np.abs(apart[0] - apart[1]).max() > 1e-3  # what this is for

    # Each device climbs by itself, and the mean is the same on all.
    each = mean(transforms.sharpness_aware_gradient(evaluate, 0.3))
    here = [each_part for each_part in zip(*parts)][:3]
    weights = [float(m.sum()) for _, _, m in here]
    tops = [transforms.sharpness_aware_gradient(evaluate, 0.3)(params, *part)[1] for part in here]
    expected = jax.tree.map(lambda *g: sum(w * a for w, a in zip(weights, g)) / sum(weights), *tops)
    for check in (True, False):
        mapped = jax.shard_map(
            lambda *a: each(*a)[1], mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")),
            out_specs=P(), check_vma=check,
        )
        same(jax.jit(mapped)(params, x, y, mask), expected)

    # A module of nnx on each device; its statistics are the device's own.
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.last = nnx.Linear(4, 1, rngs=rngs)
        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))
    model = Net(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    loss = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
    whole, targets = modules.data()
    f = nnx.value_and_grad(loss)
    expected = nnx.as_pure(transforms.sharpness_aware_gradient(f, 0.2)(model, whole, targets)[1])
    for check in (True, False):
        def on_device(state, x, y):
            g = transforms.mean_gradient(f, axis_name="data")
            found = transforms.sharpness_aware_gradient(g, 0.2)(nnx.merge(graphdef, state), x, y)
            return nnx.as_pure(found[1])
        mapped = jax.shard_map(
            on_device, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(),
            check_vma=check,
        )
        same(jax.jit(mapped)(nnx.as_pure(state), whole, targets), expected)

    # Data that are divided by the compiler, or by their types.
    on_parts = transforms.mean_gradient(jax.value_and_grad(plain), num_shards=2)
    each = transforms.mean_gradient(
        transforms.sharpness_aware_gradient(jax.value_and_grad(plain), 0.3), num_shards=6
    )
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            divided = jax.device_put((x, y), jax.NamedSharding(mesh, P("data")))
            copied = jax.device_put(params, jax.NamedSharding(mesh, P()))
            for function in (on_parts, each):
                same(jax.jit(function)(copied, *divided), function(params, x, y))
                same(function(copied, *divided), function(params, x, y))
    print("all alike")
"""


def test_four_devices_stay_alike_and_are_one():
    environment = {**os.environ, "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(DEVICES)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all alike" in done.stdout
