"""GradInit against autodiff of its objective and a NumPy replica of its Adam."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import _loops, initializers, models
from regjax.initializers import _gradinit
from tests import oracles

T, HALF = 6, 5


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def problem(dtype=np.float64, num_iterations=T):
    source = oracles.problem(num_examples=3 * HALF * num_iterations, dtype=dtype)
    cut = lambda leaf: leaf.reshape(num_iterations, 3, HALF, *leaf.shape[1:])
    return source.params, tuple(cut(leaf) for leaf in source.batch)


def split(batches, i):
    join = lambda j: tuple(jnp.concatenate([leaf[i, 0], leaf[i, j]]) for leaf in batches)
    return join(1), join(2)


def scaled(alpha, params):
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [a * p for a, p in zip(alpha, leaves, strict=True)])


def norm_of(grads, order):
    flat = jax.flatten_util.ravel_pytree(grads)[0]
    return jnp.linalg.norm(flat, order)


def derivative(alpha, params, batches, i, *, bound, step, order, step_rate, second_order):
    """By autodiff of alpha -> objective(alpha)."""
    batch, other = split(batches, i)
    grad = lambda p: jax.grad(oracles.loss_fn)(p, *batch)
    n = lambda alpha: norm_of(grad(scaled(alpha, params)), order)

    def ahead(alpha):
        p = scaled(alpha, params)
        direction = step(grad(p))
        if not second_order:
            direction = jax.lax.stop_gradient(direction)
        moved = jax.tree.map(lambda a, b: a - step_rate * b, p, direction)
        return oracles.loss_fn(moved, *other) / step_rate

    over = bool(n(alpha) > bound)
    return over, np.asarray(jax.grad(n if over else ahead)(alpha)), float(n(alpha))


def replica(
    params, batches, *, rate, bound, clip=1.0, lower=0.01, b2=0.999, shared=True, **options
):
    """Adam in NumPy: a first moment for each case, and one second moment or one for each."""
    size = len(jax.tree.leaves(params))
    alpha, m, v, counts = np.ones(size), np.zeros((2, size)), np.zeros((2, size)), [0, 0]
    cases, norms = [], []
    for i in range(batches[0].shape[0]):
        over, d, n = derivative(jnp.asarray(alpha), params, batches, i, bound=bound, **options)
        d = np.clip(d, -clip, clip)
        case = int(over)
        counts[case] += 1
        row, count = (0, sum(counts)) if shared else (case, counts[case])
        m[case] = 0.9 * m[case] + 0.1 * d
        v[row] = b2 * v[row] + (1 - b2) * d**2
        mean = m[case] / (1 - 0.9 ** counts[case])
        alpha = alpha - rate * mean / (np.sqrt(v[row] / (1 - b2**count)) + 1e-8)
        alpha = np.maximum(alpha, lower)
        cases.append(over)
        norms.append(n)
    return alpha, cases, norms


# What the authors' codes for convolutions and for transformers do.
SGD = {"step": _gradinit._sgd_step, "order": 2, "step_rate": 0.1}
ADAM = {"step": _gradinit._adam_step, "order": 1, "step_rate": 1e-3}
ADAM |= {"clip": 1e8, "b2": 0.98, "shared": False}


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize(("name", "options"), [("sgd", SGD), ("adam", ADAM)])
def test_scales_are_those_of_the_replica(name, options, second_order, double):
    params, batches = problem()
    options = {**options, "second_order": second_order}
    middle = replica(params, batches, rate=0.05, bound=np.inf, **options)[2]
    bound = float(np.median(middle))
    alpha, cases, norms = replica(params, batches, rate=0.05, bound=bound, **options)
    assert 0 < sum(cases) < T  # both cases are met
    result = initializers.gradinit(
        oracles.loss_fn, params, batches, gradient_norm_bound=bound, learning_rate=0.05,
        first_step=name, second_order=second_order, min_scale=0.01,
    )  # fmt: skip
    np.testing.assert_allclose(jax.tree.leaves(result.scales), alpha, atol=1e-6)
    np.testing.assert_array_equal(result.constrained, cases)
    np.testing.assert_allclose(result.gradient_norms, norms, rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(result.objectives), cases)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        result.params,
        scaled(alpha, params),
    )


def test_second_order_changes_only_the_unconstrained_case(double):
    params, batches = problem()
    run = functools.partial(
        initializers.gradinit, oracles.loss_fn, params, batches, learning_rate=0.05
    )
    for bound, same in ((0.0, True), (np.inf, False)):
        one, other = (
            run(gradient_norm_bound=bound, second_order=second_order).scales
            for second_order in (False, True)
        )
        difference = np.abs(np.subtract(jax.tree.leaves(one), jax.tree.leaves(other))).max()
        assert (difference < 1e-12) == same


def test_bounds_of_the_norm_decide_the_case():
    params, batches = problem(np.float32)
    run = functools.partial(
        initializers.gradinit, oracles.loss_fn, params, batches, learning_rate=0.01
    )
    assert not run(gradient_norm_bound=np.inf).constrained.any()
    assert run(gradient_norm_bound=0.0).constrained.all()


def test_without_a_rate_nothing_moves_and_zero_arrays_stay():
    params, batches = problem(np.float32)
    still = initializers.gradinit(
        oracles.loss_fn, params, batches, gradient_norm_bound=1.0, learning_rate=0.0
    )
    jax.tree.map(np.testing.assert_array_equal, still.params, params)
    params["first"]["bias"] = jnp.zeros_like(params["first"]["bias"])
    params["second"]["bias"] = -params["second"]["bias"]
    moved = initializers.gradinit(
        oracles.loss_fn, params, batches, gradient_norm_bound=0.0, learning_rate=5.0
    )
    assert moved.scales["first"]["bias"] == 1
    assert jnp.all(moved.params["first"]["bias"] == 0)
    # Such steps lead to the bounds: 0 for biases, 0.01 for kernels.
    assert moved.scales["second"]["bias"] == 0
    kernels = [float(layer["kernel"]) for layer in moved.scales.values()]
    assert min(kernels) == pytest.approx(0.01)


def test_a_scale_that_came_to_zero_stays_there():
    params = {"kernel": jnp.ones(()), "bias": jnp.ones(())}
    # The bias is bad in the first batches and good in the later ones.
    x = jnp.concatenate([jnp.ones((3, 3, 2)), -jnp.ones((30, 3, 2))])
    loss = lambda p, x: jnp.mean((p["kernel"] + x * p["bias"] - 1) ** 2)
    for min_scale, stays in ((None, True), (1e-3, False)):
        found = initializers.gradinit(
            loss, params, (x,), gradient_norm_bound=np.inf, learning_rate=0.4, min_scale=min_scale
        )
        assert (found.scales["bias"] == 0) == stays
        assert stays or found.scales["bias"] > 0.1


def test_scales_of_normalizations_end_at_their_bound():
    params = {"norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)}, "kernel": jnp.ones(2)}
    loss = lambda p, x: -jnp.mean(x) * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(p))
    run = functools.partial(
        initializers.gradinit,
        loss,
        params,
        (jnp.ones((8, 3, 2)),),
        gradient_norm_bound=np.inf,
        learning_rate=50.0,
    )
    for first_step, bound in (("adam", 100), ("sgd", np.inf)):
        scales = run(first_step=first_step).scales
        assert float(scales["norm"]["scale"]) == min(bound, float(scales["kernel"]))
        assert float(scales["norm"]["bias"]) == float(scales["kernel"]) > 300
    assert jax.tree.leaves(run(max_scale=2.0).scales) == [2.0] * 3
    with pytest.raises(ValueError, match="`max_scale` must not be below `min_scale`"):
        run(max_scale=0.001, min_scale=0.01)


def test_chain_of_scalar_layers_comes_down_to_the_bound(double):
    # loss = (c^8 - 0)^2 / 2 with c = 1.5: the gradient is enormous at the start.
    params = [jnp.full((), 1.5) for _ in range(8)]
    loss = lambda p, x: jnp.mean((x * functools.reduce(jnp.multiply, p)) ** 2) / 2
    batches = (jnp.ones((400, 3, 2)),)
    result = initializers.gradinit(
        loss, params, batches, gradient_norm_bound=1.0, learning_rate=0.02, min_scale=0.01
    )
    grads = jax.grad(loss)(result.params, jnp.ones(4))
    assert float(norm_of(grads, 2)) <= 1.05
    assert result.gradient_norms[0] > 100
    assert result.constrained[0]


def test_zero_gradient_and_nan_leave_finite_scales():
    params = {"w": jnp.ones(3)}
    batches = (jnp.zeros((4, 3, 2, 3)),)
    loss = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
    for bound in (0.0, 1.0):
        result = initializers.gradinit(
            loss, params, batches, gradient_norm_bound=bound, learning_rate=0.1
        )
        assert jnp.isfinite(result.scales["w"])
    poisoned = (jnp.ones((4, 3, 2, 3)).at[1].set(jnp.nan),)
    result = initializers.gradinit(
        loss, params, poisoned, gradient_norm_bound=1.0, learning_rate=0.1
    )
    assert jnp.isfinite(result.scales["w"])
    assert jnp.isnan(result.gradient_norms[1])
    assert jnp.all(jnp.isfinite(result.gradient_norms[2:]))


def test_same_shapes_compile_once_and_jit_agrees():
    params, batches = problem(np.float32)
    # A new function each time, of the same program.
    run = lambda *args, **options: initializers.gradinit(
        lambda p, *batch: oracles.loss_fn(p, *batch), *args, learning_rate=0.05, **options
    )
    one = run(params, batches, gradient_norm_bound=1.0)
    count = _loops._compiled_scan._cache_size()
    run(params, batches, gradient_norm_bound=2.0)
    assert _loops._compiled_scan._cache_size() == count > 0
    inside = jax.jit(lambda p, b: run(p, b, gradient_norm_bound=1.0))(params, batches)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        one.scales,
        inside.scales,
    )


def test_convnet_with_batch_norm_in_train_mode(default_promotion):
    model = regjax.from_nnx(
        models.ConvNet((6, 6, 1), 3, width=4, normalization="batch", rngs=nnx.Rngs(0))
    )
    random = np.random.default_rng(0)
    images = jnp.asarray(random.normal(size=(3, 3, 8, 6, 6, 1)), jnp.float32)
    labels = jnp.asarray(random.integers(3, size=(3, 3, 8)), jnp.int32)
    loss = regjax.model_loss(model, oracles.cross_entropy, mode="train")
    result = initializers.gradinit(
        loss, model.params, (images, labels), gradient_norm_bound=0.5, learning_rate=0.1
    )
    assert float(jnp.abs(result.scales["head"]["kernel"] - 1)) > 0.05
    # Shifts start at zero and stay; a scale of a kernel before a batch norm hardly matters.
    assert result.scales["layer_0"]["norm"]["bias"] == 1


def test_steps():
    grads = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([-4.0])}
    np.testing.assert_allclose(_gradinit._sgd_step(grads)["b"], [-0.8])
    np.testing.assert_array_equal(_gradinit._adam_step(grads)["a"], [1, 0])
    zero = jax.tree.map(jnp.zeros_like, grads)
    assert jnp.all(_gradinit._sgd_step(zero)["a"] == 0)


def test_error_texts():
    params, batches = problem(np.float32)
    run = functools.partial(initializers.gradinit, oracles.loss_fn, params)
    options = {"gradient_norm_bound": 1.0, "learning_rate": 0.1}
    with pytest.raises(ValueError, match="`gradient_norm_bound` must be non-negative, got -1"):
        run(batches, gradient_norm_bound=-1, learning_rate=0.1)
    with pytest.raises(ValueError, match="`first_step_learning_rate` must be positive, got 0"):
        run(batches, **options, first_step_learning_rate=0)
    flat = tuple(leaf[:, 0] for leaf in batches)
    with pytest.raises(ValueError, match=r"axes \(iterations, 3, half batch, ...\), got shapes"):
        run(flat, **options)
    with pytest.raises(ValueError, match="`first_step` must be one of sgd, adam, got 'sgd_step'"):
        run(batches, **options, first_step="sgd_step")
    with pytest.raises(ValueError, match="`min_scale` must have the tree structure"):
        run(batches, **options, min_scale={"w": 0.1})
    assert _gradinit._MIN_SCALE == 0.01
