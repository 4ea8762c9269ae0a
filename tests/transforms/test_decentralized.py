"""Gossip: the matrix form of its steps, where they are stable, how far learners stray."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import regjax
from regjax import models, transforms
from tests import processes

NUM, RATE = 8, 0.1
RING = transforms.ring_mixing()
MIXINGS = {
    "ring": RING,
    "pairs": transforms.random_pair_mixing(key=jax.random.key(3)),
    "exponential": transforms.exponential_mixing(),
    "full": transforms.full_mixing(),
}


def matrix_of(mixing, num, count=0):
    mix = lambda own: mixing(own, jnp.int32(count), "learner")
    return np.asarray(jax.vmap(mix, axis_name="learner")(jnp.eye(num)))


def scan(tx, grad_fn, params, num_steps, *own):
    """Stacked params after steps; grad_fn(params, *own, t) is that of one learner."""

    def learner(params, *own):
        def step(carry, t):
            params, state = carry
            updates, state = tx.update(grad_fn(params, *own, t), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(num_steps))[0][0]

    return jax.jit(jax.vmap(learner, axis_name="learner"))(params, *own)


def quadratic(params, targets, t):
    del t
    return jax.tree.map(jnp.subtract, params, targets)


def stacked(seed=0, num=NUM):
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(random.normal(size=(num, *shape)), jnp.float32)
        for name, shape in (("kernel", (3, 2)), ("scale", ()))
    }


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("name", list(MIXINGS))
def test_momentum_steps_are_the_matrix_form(name):
    tx = optax.chain(optax.sgd(RATE, momentum=0.9), transforms.gossip_average(MIXINGS[name]))
    params, targets = stacked(0), stacked(1)
    found = scan(tx, quadratic, params, 4, targets)
    for leaf, w, target in zip(*map(jax.tree.leaves, (found, params, targets)), strict=True):
        w, target = (np.asarray(a, np.float64).reshape(NUM, -1) for a in (w, target))
        velocity = np.zeros_like(w)
        for count in range(4):
            # The gradient is at the learner's own weights, before the mixing; velocity stays local.
            velocity = 0.9 * velocity + (w - target)
            w = matrix_of(MIXINGS[name], NUM, count) @ w - RATE * velocity
        np.testing.assert_allclose(np.reshape(leaf, (NUM, -1)), w, rtol=1e-5, atol=1e-5)


def test_the_mean_does_not_depend_on_the_mixing():
    params, updates = stacked(0), stacked(1)
    for mixing in MIXINGS.values():
        tx = transforms.gossip_average(mixing)
        state = jax.vmap(tx.init)(params)
        new, _ = jax.vmap(tx.update, axis_name="learner")(updates, state, params)
        for ours, plain in zip(jax.tree.leaves(new), jax.tree.leaves(updates), strict=True):
            np.testing.assert_allclose(ours.mean(0), plain.mean(0), atol=1e-6)
            assert np.abs(ours - plain).max() > 0.1


def test_from_consensus_the_first_step_of_the_mean_is_synchronous_and_the_second_is_not():
    curved = lambda params, target, t: jax.tree.map(lambda w, c: jnp.tanh(w - c), params, target)
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), stacked(0))
    targets = stacked(1)
    tx = optax.chain(optax.scale(-0.5), transforms.gossip_average(RING))
    one, two = (transforms.mean_params(scan(tx, curved, params, k, targets)) for k in (1, 2))

    def synchronous(w, targets):
        gradients = jax.vmap(lambda c: curved(w, c, 0))(targets)
        return jax.tree.map(lambda w, g: w - 0.5 * g.mean(0), w, gradients)

    first = synchronous(transforms.mean_params(params), targets)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(first), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    second = synchronous(first, targets)
    assert np.abs(two["kernel"] - second["kernel"]).max() > 1e-3


def test_full_mixing_of_one_shared_batch_is_sgd():
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), stacked(0))
    target = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), stacked(1))
    tx = optax.chain(optax.scale(-RATE), transforms.gossip_average(MIXINGS["full"]))
    found = scan(tx, quadratic, params, 10, target)
    plain = scan(optax.scale(-RATE), quadratic, params, 10, target)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("share", "is_stable"), [(0.6, True), (0.7, False)])
def test_an_even_ring_is_stable_up_to_two_thirds_over_the_curvature(share, is_stable):
    # The mode (+, -, +, -) is multiplied by -1/3 - lr h in each step; averaging behind the step,
    # W (w - lr g), multiplies it by -(1 - lr h) / 3, which is stable up to lr h = 2.
    curvature = 1.7
    start = jnp.asarray([1.0, -1.0, 1.0, -1.0])
    gradient = lambda w, t: curvature * w
    tx = optax.chain(optax.scale(-share / curvature), transforms.gossip_average(RING))
    found = scan(tx, gradient, start, 30)
    np.testing.assert_allclose(found, start * (-1 / 3 - share) ** 30, rtol=1e-4)
    assert bool(jnp.abs(found).max() < 1) == is_stable


@pytest.mark.optimized
def test_learners_with_noisy_gradients_spread_as_far_as_they_should():
    rate, curvature, size, seeds = 0.3, 1.7, 4096, jnp.arange(NUM)
    key = jax.random.key(0)

    def gradient(w, seed, t):
        noise_key = jax.random.fold_in(jax.random.fold_in(key, t), seed)
        return curvature * w + jax.random.normal(noise_key, w.shape)

    tx = optax.chain(optax.scale(-rate), transforms.gossip_average(RING))
    found = np.asarray(scan(tx, gradient, jnp.zeros((NUM, size)), 60, seeds), np.float64)
    modes = (1 + 2 * np.cos(2 * np.pi * np.arange(NUM) / NUM)) / 3
    variances = rate**2 / (1 - (modes - rate * curvature) ** 2)
    mean = found.mean(0)
    spread = np.sum((found - mean) ** 2, 0)
    for samples, expected, printed in (
        (spread, variances[1:].sum(), 1.0049),
        (mean**2, variances[0] / NUM, 0.014805),
    ):
        assert expected == pytest.approx(printed, rel=5e-4)
        assert abs(samples.mean() - expected) < 5 * samples.std() / np.sqrt(size)


@pytest.mark.parametrize("name", ["ring", "pairs", "exponential", "full", "nobody"])
def test_a_single_learner_and_a_mixing_that_does_nothing_change_no_bit(name):
    num = NUM if name == "nobody" else 1
    mixing = MIXINGS.get(name, lambda params, count, axis_name: params)
    tx, params, updates = transforms.gossip_average(mixing), stacked(0, num), stacked(1, num)
    new, state = jax.vmap(tx.update, axis_name="learner")(
        updates, jax.vmap(tx.init)(params), params
    )
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(updates), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(state.num_updates, np.ones(num))


def test_one_branch_runs_though_each_learner_has_a_count():
    tx = transforms.gossip_average(MIXINGS["pairs"])
    params = stacked()
    update = jax.vmap(tx.update, axis_name="learner")
    text = str(jax.make_jaxpr(update)(params, jax.vmap(tx.init)(params), params))
    assert "cond[" in text  # a mapped index would have made it a selection from all branches


def test_mean_params():
    params = stacked()
    mean = transforms.mean_params(params)
    np.testing.assert_allclose(mean["kernel"], np.mean(params["kernel"], 0), rtol=1e-6, atol=1e-7)
    assert mean["scale"].shape == ()
    narrow = {"w": jnp.asarray([256.0, 1, 1, 1], jnp.bfloat16)}
    assert transforms.mean_params(narrow)["w"] == jnp.bfloat16(259 / 4)
    with pytest.raises(ValueError, match=r"one leading axis of learners.*\(8, 3, 2\), \(4,\)"):
        transforms.mean_params({**params, "scale": jnp.ones(4)})
    with pytest.raises(ValueError, match="one leading axis of learners"):
        transforms.mean_params(jnp.float32(1))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(3)(x.reshape(len(x), -1)))
        return linen.Dense(2)(x)


def network(kind):
    images = jnp.asarray(np.random.default_rng(4).normal(1, 2, size=(6, 12, 1, 5, 1)), jnp.float32)
    if kind == "linen":
        module = Linen()
        variables = module.init(jax.random.key(0), images[0], train=False)
        return regjax.from_linen(module, variables), images
    norm = "none" if kind == "plain" else "batch"
    mlp = models.MLP((1, 5, 1), 2, width=3, depth=1, normalization=norm, rngs=nnx.Rngs(0))
    return regjax.from_nnx(mlp), images


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_networks_train_and_are_evaluated_at_the_mean_with_its_own_statistics(kind):
    model, images = network(kind)
    tx = optax.chain(optax.sgd(0.5), transforms.gossip_average(RING))
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), (model.params, model.state))

    def step(params, state, opt_state, inputs):
        def loss_fn(params):
            outputs, new = model.apply(params, state, inputs, train=True)
            return jnp.mean(outputs**2), new

        grads, state = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state

    step = jax.jit(jax.vmap(step, axis_name="learner"))
    params, state, opt_state = *copies, jax.vmap(tx.init)(copies[0])
    for t in range(2):
        params, state, opt_state = step(params, state, opt_state, jnp.roll(images, t, 0)[:4])
    consensus = transforms.consensus_model(model, params, images)
    mean = jax.tree.map(lambda leaf: np.mean(leaf, 0), params)
    expected = regjax.population_statistics(model, mean, images)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), consensus.params, mean)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4), consensus.state, expected
    )
    # Neither one learner's statistics nor their mean belong to the mean weights.
    for wrong in (lambda leaf: leaf[0], lambda leaf: leaf.mean(0)):
        other = model._replace(params=consensus.params, state=jax.tree.map(wrong, state))
        difference = jnp.abs(outputs(other, images[0]) - outputs(consensus, images[0]))
        assert difference.max() > 1e-2


def outputs(model, inputs):
    return regjax.model_function(model)(model.params, inputs)


def test_a_model_without_batch_statistics_reads_no_batch():
    model, _ = network("plain")
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 3 * leaf]), model.params)
    consensus = transforms.consensus_model(model, params, [])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-6), consensus.params, model.params
    )
    with pytest.raises(ValueError, match=r"`params.*must have shape \(2, 2\), got \(2, 1\)"):
        transforms.consensus_model(model, jax.tree.map(lambda leaf: leaf[:, :1], params), [])


def test_errors():
    with pytest.raises(TypeError, match="`mixing` must be a function such as ring_mixing"):
        transforms.gossip_average("ring")
    for name in (3, ("a", "b", "c"), ("a", 1)):
        with pytest.raises(TypeError, match="`axis_name` must be a name or a pair of names"):
            transforms.gossip_average(RING, axis_name=name)
    tx = transforms.gossip_average(RING)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="`axis_name` must be bound where `update` is called"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match="must be real floating point"):
        tx.init({"w": jnp.ones(2, jnp.int32)})


learners = functools.partial(processes.run, "tests.transforms.learners")


def test_on_a_mesh_as_under_vmap():
    (printed,) = learners("ring,exponential,full,dense,pairs", 8)
    for name in ("ring", "exponential", "full", "dense"):
        assert f"{name} on 4 devices is as under vmap" in printed, printed[
            -3000:
        ]  # in blocks of two
        assert f"{name} on 8 devices is as under vmap" in printed
    assert "pairs on 8 devices is as under vmap" in printed


@pytest.mark.parametrize(
    ("names", "num_devices", "num_processes"), [("pairs", 4, 2), ("ring", 1, 4)]
)
def test_across_processes_as_under_vmap(names, num_devices, num_processes):
    for printed in learners(names, num_devices, num_processes=num_processes):
        text = f"{names} on {num_devices * num_processes} devices is as under vmap"
        assert text in printed, printed[-3000:]
