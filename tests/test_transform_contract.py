"""What every transformation of the library promises, row by row of `registry.py`."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from regjax import _files, transforms
from tests.registry import ROWS
from tests.transforms.modules import assert_same

NAMES = list(ROWS)
WITH_KEY = [name for name in NAMES if ROWS[name].has_key]
DATA = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
LABELS = jnp.asarray(np.random.default_rng(1).normal(size=(8, 2)), jnp.float32)


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The chains around ours are optax's, which promote."""


def parameters(dtype=jnp.float32):
    random = np.random.default_rng(2)
    shapes = {"kernel": (3, 4), "bias": (4,), "head": (4, 2)}
    return {name: jnp.asarray(random.normal(size=s), dtype) for name, s in shapes.items()}


def loss_fn(params, inputs, targets):
    hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"])
    return jnp.mean((hidden @ params["head"] - targets) ** 2)


def gradient(params, i, inputs=DATA, targets=LABELS):
    del i
    inputs = inputs.astype(params["kernel"].dtype)
    return jax.grad(loss_fn)(params, inputs, targets.astype(inputs.dtype))


def chain(row, tx, descent=None):
    descent = optax.sgd(0.1, momentum=0.9) if descent is None else descent
    return optax.chain(descent, tx) if row.is_last else optax.chain(tx, descent)


def run(tx, params, num_steps=3, state=None, grad_fn=gradient, **extra):
    """Parameters and state after some updates."""
    state = tx.init(params) if state is None else state
    for _ in range(num_steps):
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def types(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.asarray(leaf).dtype), tree)


def skip_where(name, check):
    if check in ROWS[name].skipped:
        pytest.skip(ROWS[name].skipped[check])


@pytest.mark.parametrize("name", NAMES)
def test_jit_is_eager_scans_and_compiles_once(name):
    row, params = ROWS[name], parameters()
    tx = chain(row, row.make())

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params, 0), state, params, grad_fn=gradient)
        return (optax.apply_updates(params, updates), state), None

    state = tx.init(params)
    # What a jitted step returns is what it was compiled for: it takes that next.
    before = jax.eval_shape(lambda carry: carry, (params, state))
    after, _ = jax.eval_shape(step, (params, state), None)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    describe = lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type)
    assert jax.tree.map(describe, after) == jax.tree.map(describe, before)
    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=3))((params, state))
    expected, _ = run(tx, params)
    assert_same(scanned, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_any_tree(name):
    row = ROWS[name]
    matrix = jnp.asarray(np.random.default_rng(3).normal(size=(3, 2)), jnp.float32)
    trees = (
        {"a": matrix},
        (matrix, [matrix + 1, jnp.float32(2)]),
        nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param),
    )
    grad_fn = lambda params, i: jax.tree.map(lambda leaf: jnp.sin(leaf) + 0.1, params)
    for params in trees:
        after, _ = run(row.make(), params, 1, grad_fn=grad_fn)
        assert jax.tree.structure(after) == jax.tree.structure(params)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_updates_have_the_dtype_of_the_parameters(name, dtype):
    row, params = ROWS[name], parameters(dtype)
    tx = row.make()
    state = tx.init(params)
    updates, after = tx.update(gradient(params, 0), state, params, grad_fn=gradient)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(updates))
    assert types(after) == types(state)


@pytest.mark.parametrize("name", NAMES)
def test_double_precision_stays_double(name):
    with jax.enable_x64(True):
        row, params = ROWS[name], parameters(jnp.float64)
        updates = row.make().update(
            gradient(params, 0), row.make().init(params), params, grad_fn=gradient
        )[0]
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", NAMES)
def test_unknown_extra_arguments_change_nothing(name):
    row = ROWS[name]
    assert_same(
        run(row.make(), parameters(), 2, value=1.0, other="x"), run(row.make(), parameters(), 2)
    )


@pytest.mark.parametrize("name", NAMES)
def test_numbers_become_data_in_inject_hyperparams(name):
    row, params = ROWS[name], parameters()
    arguments = {**row.numbers, **row.static}
    if row.has_key:
        arguments["key"] = jax.random.key(0)
    tx = optax.inject_hyperparams(row.factory, static_args=row.factory.static_args)(**arguments)
    state = tx.init(params)
    assert set(row.numbers) <= set(state.hyperparams)
    assert_same(run(tx, params)[0], run(row.make(), params)[0], rtol=1e-4, atol=1e-5)
    # As data they change without a new program.
    step = jax.jit(lambda params, state: run(tx, params, 1, state))
    step(params, state)
    changed = {k: jnp.asarray(0.5 * v, jnp.float32) for k, v in row.numbers.items()}
    after, _ = step(params, state._replace(hyperparams={**state.hyperparams, **changed}))
    assert step._cache_size() == 1
    halved = row.make(**{k: 0.5 * v for k, v in row.numbers.items()})
    assert_same(after, run(halved, params, 1)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_static_args_are_the_arguments_that_are_no_numbers(name):
    row = ROWS[name]
    static = set(row.factory.static_args)
    assert static <= set(inspect.signature(row.factory).parameters)
    assert static.isdisjoint(row.numbers)
    assert static >= {*row.static, *({"key"} if row.has_key else ()), *filter(None, [row.traced])}


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].traced])
def test_a_traced_integer_names_static_args(name):
    row = ROWS[name]
    arguments = {**row.numbers, **row.static, row.traced: jnp.int32(2)}
    if row.has_key:
        arguments["key"] = jax.random.key(0)
    with pytest.raises(TypeError, match=rf"`{row.traced}` must be a Python integer.*static_args"):
        row.factory(**arguments)


HALVES = (slice(0, 4), slice(4, 8))


def accumulated(tx, params, grad_fns):
    """Parameters after a step of two micro-batches; `grad_fns` gives `grad_fn` of each half."""
    state = tx.init(params)
    for half in HALVES:
        grads = gradient(params, 0, DATA[half], LABELS[half])
        updates, state = tx.update(grads, state, params, grad_fn=grad_fns(half))
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_steps_are_one_step_on_the_joined_batch(name):
    row, params = ROWS[name], parameters()
    tx = chain(row, row.make(), optax.sgd(0.1))
    joined = transforms.assume_joined(gradient)
    after = accumulated(optax.MultiSteps(tx, 2), params, lambda half: joined)
    assert_same(after, run(tx, params, 1)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].needs_grad_fn])
def test_the_gradient_of_the_last_micro_batch_alone_is_refused(name):
    row, params = ROWS[name], parameters()
    on_half = lambda half: lambda p, i: gradient(p, i, DATA[half], LABELS[half])
    inside = optax.MultiSteps(chain(row, row.make(), optax.sgd(0.1)), 2)
    with pytest.raises(ValueError, match=r"`grad_fn` must cover all.*MultiSteps.*assume_joined"):
        accumulated(inside, params, on_half)
    if not row.reads_gradient or name == "spectral_controller":
        return
    # In front of it each micro-batch climbs by itself; the mean is applied.
    tx = row.make()
    outside = optax.chain(tx, optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    state, each = tx.init(params), []
    for half in HALVES:
        grad_fn = on_half(half)
        updates, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
        each.append(updates)
    expected = jax.tree.map(lambda w, one, other: w - 0.05 * (one + other), params, *each)
    assert_same(accumulated(outside, params, on_half), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_updates_are_skipped(name):
    row, params = ROWS[name], parameters()
    tx = transforms.skip_nonfinite(chain(row, row.make()))

    def broken(params, i):
        return jax.tree.map(lambda leaf: leaf * jnp.nan, gradient(params, i))

    state = tx.init(params)
    updates, after = tx.update(broken(params, 0), state, params, grad_fn=broken)
    assert_same(updates, jax.tree.map(jnp.zeros_like, params))
    assert_same(after.inner, state.inner)
    assert int(after.num_skipped) == 1
    assert_same(run(tx, params)[0], run(chain(row, row.make()), params)[0])


@pytest.mark.parametrize("name", NAMES)
def test_optax_masks(name):
    skip_where(name, "masked")
    row, params = ROWS[name], parameters()
    mask = {"kernel": True, "bias": False, "head": False}
    static = {k: v for k, v in row.static.items() if k != "mask"}
    if row.needs_grad_fn:
        tx = optax.masked(row.make(), mask)
        with pytest.raises(ValueError, match=r"`params` must be whole.*own `mask`"):
            tx.update(gradient(params, 0), tx.init(params), params, grad_fn=gradient)
    else:
        arguments = {**row.numbers, **static}
        if row.has_key:
            arguments["key"] = jax.random.key(0)
        has_mask = "own_mask" not in row.skipped
        everywhere = {"mask": lambda tree: jax.tree.map(lambda leaf: True, tree)}
        inner = row.factory(**arguments, **(everywhere if has_mask else {}))
        for outer in (
            optax.masked(inner, mask),
            optax.partition(
                {"ours": inner, "plain": optax.identity()},
                {"kernel": "ours", "bias": "plain", "head": "plain"},
            ),
        ):
            updates, _ = outer.update(gradient(params, 0), outer.init(params), params)
            assert_same({"b": updates["bias"]}, {"b": gradient(params, 0)["bias"]})
            assert jnp.any(updates["kernel"] != gradient(params, 0)["kernel"])
        if has_mask:
            own = row.factory(**arguments, mask=mask)
            updates, _ = own.update(gradient(params, 0), own.init(params), params)
            assert_same({"b": updates["bias"]}, {"b": gradient(params, 0)["bias"]})


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_give_finite_updates(name):
    row, params = ROWS[name], parameters()
    zero = lambda params, i: jax.tree.map(jnp.zeros_like, params)
    for weights in (params, zero(params, 0)):
        after, _ = run(row.make(), weights, 2, grad_fn=zero)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("name", NAMES)
def test_neutral_setting_is_the_plain_update_bit_for_bit(name):
    skip_where(name, "neutral")
    row, params = ROWS[name], parameters()
    descent = optax.sgd(0.1, momentum=0.9)
    ours = chain(row, row.make(**row.neutral))
    grad_fn = jax.jit(gradient)
    assert_same(run(ours, params, grad_fn=grad_fn)[0], run(descent, params, grad_fn=grad_fn)[0])


@pytest.mark.parametrize("name", WITH_KEY)
def test_keys_can_be_mapped_over_and_differ(name):
    row, params = ROWS[name], parameters()

    def after(key):
        return run(row.make(key), params, 2)[0]["kernel"]

    keys = jax.random.split(jax.random.key(3), 2)
    mapped = jax.vmap(after)(keys)
    assert jnp.any(mapped[0] != mapped[1])
    np.testing.assert_allclose(mapped[0], after(keys[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WITH_KEY)
def test_noise_is_fresh_in_each_step_and_the_key_survives_donation(name):
    row, params, key = ROWS[name], parameters(), jax.random.key(5)
    tx = row.make(key)
    step = jax.jit(lambda state: tx.update(gradient(params, 0), state, params, grad_fn=gradient),
                   donate_argnums=0)  # fmt: skip
    first, state = step(tx.init(params))
    second, _ = step(state)
    assert jnp.any(first["kernel"] != second["kernel"])
    assert not jax.random.key_data(key).is_deleted()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_continues_bit_for_bit(name, tmp_path):
    row, params = ROWS[name], parameters()
    tx = chain(row, row.make())
    middle, state = run(tx, params, 2)
    _files.save(tmp_path / "state.npz", (middle, state), metadata={})
    loaded, loaded_state = _files.load(tmp_path / "state.npz", (params, tx.init(params)))
    assert_same(run(tx, loaded, 2, loaded_state), run(tx, middle, 2, state))


@pytest.mark.parametrize("name", [name for name in NAMES if ROWS[name].needs_grad_fn])
def test_a_missing_gradient_function_is_named(name):
    row, params = ROWS[name], parameters()
    tx = row.make()
    with pytest.raises(ValueError, match="`grad_fn` must be given, got None"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update(params, tx.init(params), grad_fn=gradient)
