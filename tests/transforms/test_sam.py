"""SAM and its kin on quadratics and small networks, where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import transforms
from tests import oracles
from tests.transforms import runs

pytestmark = pytest.mark.usefixtures("default_promotion")


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def norm(tree):
    return float(optax.tree.norm(tree))


def test_quadratic(double):
    matrix = oracles.symmetric([3.0, 1.0, -0.5, 0.2])
    grad_fn = lambda w, i: {"a": (matrix @ flat(w))[:1], "b": (matrix @ flat(w))[1:]}
    flat = lambda w: jnp.concatenate([w["a"], w["b"]])
    point = np.random.default_rng(0).normal(size=4)
    params = {"a": jnp.asarray(point[:1]), "b": jnp.asarray(point[1:])}
    gradient = matrix @ point
    expected = matrix @ (point + 0.3 * gradient / np.linalg.norm(gradient))
    # One norm over all leaves: each leaf by itself would climb farther.
    np.testing.assert_allclose(
        flat(runs.once(transforms.sam(0.3), params, grad_fn)), expected, atol=1e-12
    )


def test_two_cycle(double):
    h, rate, rho = 3.0, 0.2, 0.1
    tx = optax.chain(transforms.sam(rho), optax.sgd(rate))
    grad_fn = lambda w, i: h * w
    end, _ = runs.scan(tx, jnp.float64(1.0), grad_fn, 500)
    assert abs(float(end)) == pytest.approx(rate * h * rho / (2 - rate * h), abs=1e-6)


def network(seed=0):
    problem = oracles.problem(seed=seed, dtype=np.float64)
    grad_fn = lambda p, i: jax.grad(oracles.loss_fn)(p, *problem.batch)
    return problem, grad_fn


def test_gsam_takes_off_the_part_orthogonal_to_the_perturbed_gradient(double):
    problem, grad_fn = network()
    above = runs.once(transforms.sam(0.3), problem.params, grad_fn)
    ours = runs.once(transforms.gsam(0.3, alpha=0.4), problem.params, grad_fn)
    clean, gp, new = (
        np.asarray(jax.flatten_util.ravel_pytree(tree)[0])
        for tree in (grad_fn(problem.params, 0), above, ours)
    )
    taken = (gp - new) / 0.4
    assert abs(taken @ gp) < 1e-12
    np.testing.assert_allclose(taken, clean - (clean @ gp) / (gp @ gp) * gp, atol=1e-12)
    assert np.linalg.norm(taken) > 1e-2


def test_gsam_without_alpha_is_sam(double):
    problem, grad_fn = network()
    one = runs.once(transforms.gsam(0.3, alpha=0.0), problem.params, grad_fn)
    other = runs.once(transforms.sam(0.3), problem.params, grad_fn)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def rise(tx, params, grad_fn, loss):
    """Loss at the point where the gradient was taken, less the loss."""
    seen = []

    def recorded(p, i):
        seen.append(p)
        return grad_fn(p, i)

    tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=recorded)
    return float(loss(seen[-1]) - loss(params))


def test_asam_does_not_see_a_rescaling_that_leaves_the_function(double):
    random = np.random.default_rng(1)
    x, y = random.normal(size=(40, 6)), random.normal(size=(40, 2))
    loss = lambda p: jnp.mean((jax.nn.relu(x @ p["one"] + p["b"]) @ p["two"] - y) ** 2)
    grad_fn = lambda p, i: jax.grad(loss)(p)
    params = {
        "one": jnp.asarray(random.normal(size=(6, 8)) / 2),
        "b": jnp.zeros(8),
        "two": jnp.asarray(random.normal(size=(8, 2)) / 2),
    }
    scaled = {**params, "one": 3 * params["one"], "two": params["two"] / 3}
    adaptive = transforms.sam(0.5, adaptive=True, eta=0.0)
    assert rise(adaptive, scaled, grad_fn, loss) == pytest.approx(
        rise(adaptive, params, grad_fn, loss), abs=1e-5
    )
    plain = [rise(transforms.sam(0.5), p, grad_fn, loss) for p in (params, scaled)]
    assert abs(plain[1] / plain[0] - 1) > 0.2
    # Only where asked for: T = 1 on the other leaves.
    partly = transforms.sam(0.5, adaptive={"one": True, "b": False, "two": True}, eta=0.1)
    g = grad_fn(params, 0)
    scale = {"one": jnp.abs(params["one"]) + 0.1, "b": 1.0, "two": jnp.abs(params["two"]) + 0.1}
    tg = jax.tree.map(lambda t, leaf: t * leaf, scale, g)
    expected = jax.tree.map(lambda w, t, leaf: w + 0.5 * t * leaf / norm(tg), params, scale, tg)
    assert rise(partly, params, grad_fn, loss) == pytest.approx(
        float(loss(expected) - loss(params)), rel=1e-9
    )


def test_two_valleys():
    def loss(w):
        wide = jnp.exp(-((w[0] - 2) ** 2) - w[1] ** 2)
        return -wide - jnp.exp(-(w[0] ** 2) - 100 * w[1] ** 2)

    grad_fn = lambda w, i: jax.grad(loss)(w)
    end_of = lambda tx, start: runs.scan(tx, start, grad_fn, 10_000)[0]
    start, descent = jnp.asarray([-0.4, -0.4]), optax.sgd(0.01)
    # The valleys pull at each other: their bottoms are near (0, 0) and (2, 0).
    sharp, wide = (end_of(descent, jnp.asarray([x, 0.0])) for x in (0.0, 2.0))
    np.testing.assert_allclose(end_of(descent, start), sharp, atol=1e-2)
    above = optax.chain(transforms.sam(0.1), descent)
    np.testing.assert_allclose(end_of(above, start), wide, atol=1e-2)
    np.testing.assert_allclose(wide, [2, 0], atol=0.05)


def test_shards():
    problem = oracles.problem()
    params = problem.params
    x, y = (leaf[:20].reshape(4, 5, *leaf.shape[1:]) for leaf in problem.batch)

    def on_shard(p, i):
        return jax.grad(oracles.loss_fn)(p, x[i], y[i])

    whole = lambda p, i: jax.tree.map(
        lambda *leaves: sum(leaves) / 4, *(on_shard(p, j) for j in range(4))
    )
    same = runs.once(transforms.sam(0.3, num_shards=4), params, whole)
    one = runs.once(transforms.sam(0.3), params, whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, one)

    ours = jax.jit(lambda p: runs.once(transforms.sam(0.3, num_shards=4), p, on_shard))(params)
    each = []
    for i in range(4):
        g = on_shard(params, i)
        each.append(on_shard(jax.tree.map(lambda w, e: w + 0.3 * e / norm(g), params, g), i))  # noqa: B023
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 4, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)
    assert norm(jax.tree.map(jnp.subtract, ours, one)) > 1e-4 * norm(one)


def test_a_masked_leaf_stays_and_leaves_the_norm(double):
    problem, grad_fn = network()
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, problem.params)
    seen = []

    def recorded(p, i):
        seen.append(p)
        return grad_fn(p, i)

    tx, params = transforms.sam(0.3, mask=mask), problem.params
    tx.update(grad_fn(params, 0), tx.init(params), params, grad_fn=recorded)
    moved = jax.tree.map(jnp.subtract, seen[0], params)
    assert norm(moved) == pytest.approx(0.3, rel=1e-12)
    np.testing.assert_array_equal(moved["first"]["bias"], 0)


@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e-20, 1e25, 1e36])
@pytest.mark.parametrize("adaptive", [False, True])
def test_gradients_of_any_size_climb_alike(size, adaptive):
    params = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([[-3.0]])}
    grads = {"a": jnp.asarray([2.0, -1.0]), "b": jnp.asarray([[2.0]])}

    def top(size):
        seen = []

        def grad_fn(p, i):
            seen.append(p)
            return jax.tree.map(lambda leaf: size * leaf, grads)

        for tx in (
            transforms.sam(0.3, adaptive=adaptive),
            transforms.gsam(0.3, alpha=0.4, adaptive=adaptive),
        ):
            incoming = jax.tree.map(lambda leaf: size * leaf, grads)
            new = tx.update(incoming, tx.init(params), params, grad_fn=grad_fn)[0]
            # Parallel to the clean gradient: nothing is orthogonal to it.
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new, incoming)
        return seen

    for one, other in zip(top(size), top(1.0), strict=True):
        assert norm(jax.tree.map(jnp.subtract, one, params)) > 0.2
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)


@pytest.mark.parametrize("size", [1e-20, 1e25])
def test_the_surrogate_gap_is_taken_off_at_any_size(size):
    params, top = jnp.zeros(2), jnp.asarray([3.0, 4.0])
    tx = transforms.gsam(0.1, alpha=0.5)
    clean = jnp.asarray([1.0, 0.0]) * size
    new = tx.update(clean, tx.init(params), params, grad_fn=lambda p, i: size * top)[0]
    # (1, 0) less its part 0.6 along (0.6, 0.8).
    expected = top - 0.5 * jnp.asarray([0.64, -0.48])
    np.testing.assert_allclose(new / size, expected, rtol=1e-6)


def test_radius_follows_a_schedule():
    seen = []

    def grad_fn(w, i):
        seen.append(float(w))
        return w

    tx = transforms.sam(lambda count: 0.1 * (1 + count))
    state = tx.init(jnp.float32(1))
    for _ in range(2):
        _, state = tx.update(jnp.float32(1), state, jnp.float32(1), grad_fn=grad_fn)
    np.testing.assert_allclose(seen, [1.1, 1.2], rtol=1e-6)


def test_chains_that_break_the_alternating_form():
    problem = oracles.problem()
    grad_fn = lambda p, i: jax.grad(oracles.loss_fn)(p, *problem.batch)
    tx = optax.chain(
        transforms.sam(0.05),
        optax.add_noise(0.01, 0.5, jax.random.key(0)),
        optax.sgd(0.1),
        optax.contrib.reduce_on_plateau(patience=1),
    )
    params, state = problem.params, tx.init(problem.params)
    losses = []
    for _ in range(20):
        losses.append(oracles.loss_fn(params, *problem.batch))
        updates, state = tx.update(
            grad_fn(params, 0), state, params, grad_fn=grad_fn, value=losses[-1]
        )
        params = optax.apply_updates(params, updates)
    assert losses[-1] < 0.8 * losses[0]


def test_error_texts():
    with pytest.raises(ValueError, match=r"`rho` must be non-negative, got -0.1"):
        transforms.sam(-0.1)
    with pytest.raises(ValueError, match=r"`alpha` must be non-negative, got -1"):
        transforms.gsam(0.1, alpha=-1)
    with pytest.raises(ValueError, match=r"`num_shards` must be at least 1, got 0"):
        transforms.sam(0.1, num_shards=0)
    with pytest.raises(ValueError, match=r"`num_shards` must be at most 4096, got 1000000"):
        transforms.sam(0.1, num_shards=10**6)
    params = {"a": jnp.ones(2)}
    tx = transforms.sam(0.1, mask={"b": True})
    with pytest.raises(ValueError, match=r"`mask` must have the tree structure"):
        tx.update(params, tx.init(params), params, grad_fn=lambda p, i: p)
    with pytest.raises(TypeError, match=r"`params\['a'\]` must be real floating point, got int32"):
        transforms.sam(0.1).init({"a": jnp.ones(2, jnp.int32)})
