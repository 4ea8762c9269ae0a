"""Thresholds and preconditioners against optax's own steps with the second moments held."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import regjax
from regjax import curvature, diagnostics
from tests import oracles

RATE = 0.01
KEY = jax.random.key(0)


def companion(momentum, rate, eigenvalue, *, nesterov, averages, decay):
    """(x, m) -> (x, m) after a step on eigenvalue x^2 / 2, as optax writes it."""
    share = 1 - momentum if averages else 1.0
    mean = np.array([share * eigenvalue, momentum])
    direction = momentum * mean + np.array([share * eigenvalue, 0]) if nesterov else mean
    return np.array([np.array([1 - rate * decay, 0]) - rate * direction, mean])


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw"])
def test_thresholds_are_those_of_the_companion_matrix(optimizer, momentum, nesterov):
    averages, decay = optimizer == "adamw", 0.3 if optimizer == "adamw" else 0.0
    numbers = {"nesterov": nesterov, "b1" if averages else "momentum": momentum}
    numbers |= {"weight_decay": decay} if averages else {}
    for rate in (1e-3, 0.1):
        threshold = float(
            diagnostics.stability_threshold(
                optimizer=optimizer, learning_rate=rate, hyperparams=numbers
            )
        )
        radii = [
            np.abs(np.linalg.eigvals(companion(
                momentum, rate, factor * threshold,
                nesterov=nesterov, averages=averages, decay=decay,
            ))).max()
            for factor in (0.999, 1.001)
        ]  # fmt: skip
        assert radii[0] < 1 < radii[1]


def test_the_thresholds_that_papers_print():
    of = lambda optimizer, **numbers: float(
        diagnostics.stability_threshold(
            optimizer=optimizer, learning_rate=RATE, hyperparams=numbers
        )
    )
    assert of("sgd") == pytest.approx(2 / RATE)
    assert of("sgd", momentum=0.9) == pytest.approx(3.8 / RATE)
    assert of("sgd", momentum=0.9, nesterov=True) == pytest.approx(3.8 / 2.8 / RATE)
    assert of("adam") == pytest.approx(38 / RATE)
    assert of("nadam") == pytest.approx(38 / 2.8 / RATE)


def before(name, state, grads):
    """The state whose next one has the second moments of `state`, as if they were held."""
    of = lambda function, tree: jax.tree.map(function, tree, grads)
    if name == "adagrad":
        return state._replace(sum_of_squares=of(lambda v, g: v - g**2, state.sum_of_squares))
    if name.startswith("rmsprop"):
        return state._replace(nu=of(lambda v, g: (v - 0.1 * g**2) / 0.9, state.nu))
    state = state._replace(count=state.count - 1)
    if name == "adamax":
        return state._replace(nu=of(lambda v, g: v / 0.999, state.nu))
    if name == "yogi":
        return state._replace(nu=of(lambda v, g: v + 1e-3 * g**2, state.nu))
    if name == "amsgrad":
        return state._replace(nu=of(lambda v, g: 0 * v, state.nu))
    if name == "adabelief":
        means = of(lambda m, g: 0.9 * m + 0.1 * g, state.mu)
        errors = jax.tree.map(lambda g, m: (g - m) ** 2, grads, means)
        nu = jax.tree.map(lambda v, e: (v - 1e-3 * e - 1e-16) / 0.999, state.nu, errors)
        return state._replace(nu=nu)
    return state._replace(nu=of(lambda v, g: (v - 1e-3 * g**2) / 0.999, state.nu))


METHODS = {
    "sgd": (optax.sgd, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (optax.rmsprop, {"eps": 1e-3}),
    "rmsprop, out": (optax.rmsprop, {"eps": 1e-3, "eps_in_sqrt": False, "momentum": 0.8}),
    "adagrad": (optax.adagrad, {"eps": 1e-3}),
    "adam": (optax.adam, {"b1": 0.8, "eps": 1e-3, "eps_root": 1e-4}),
    "adamw": (optax.adamw, {"eps": 1e-3, "weight_decay": 0.1}),
    "nadam": (optax.nadam, {}),
    "amsgrad": (optax.amsgrad, {"eps": 1e-2}),
    "adabelief": (optax.adabelief, {"eps": 1e-3}),
    "yogi": (optax.yogi, {}),
    "adamax": (optax.adamax, {}),
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_frozen_method_converges_below_and_diverges_above(name, default_promotion):
    factory, numbers = METHODS[name]
    optimizer = name.split(",")[0]
    # Not all of optax's functions take all of their chain's numbers.
    told = {key: value for key, value in numbers.items() if key != "initial_scale"}
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        grads = jnp.asarray(random.normal(size=6) * 10.0 ** random.uniform(-2, 1, 6))
        tx, w = factory(RATE, **numbers), jnp.zeros(6)
        state = tx.init(w)
        for scale in (1.0, 0.5, 2.0):
            _, state = tx.update(scale * grads, state, w)
        if name == "nadam":  # whose means are corrected as those of two steps
            state = (state[0]._replace(count=jnp.int32(400)), *state[1:])
        inverse_root = jnp.ones(6)
        if optimizer != "sgd":
            inverse_root = diagnostics.preconditioner(
                state, w, optimizer=optimizer, hyperparams=told
            ).inverse_root
        threshold = diagnostics.stability_threshold(
            optimizer=optimizer, learning_rate=RATE, hyperparams=told
        )
        matrix = oracles.symmetric(np.r_[np.linspace(0.2, 0.5, 5), 1.0], 0)
        matrix = jnp.asarray(matrix) * threshold / np.outer(inverse_root, inverse_root)

        # So small that squares of gradients are nothing beside what is held, as far as it grows.
        def size_after(factor):
            def step(_, carry):
                w, state = carry
                grads = factor * matrix @ w
                inner = list(state)
                if optimizer != "sgd":
                    inner[0] = before(name, inner[0], grads)
                updates, state = tx.update(grads, tuple(inner), w)
                return w + updates, state

            start = (inverse_root * 1e-100, held(state))
            return jnp.max(jnp.abs(jax.lax.fori_loop(0, 200, step, start)[0] / inverse_root))

        sizes = np.asarray(jax.jit(jax.vmap(size_after))(jnp.asarray([0.97, 1.03]))) / 1e-100
    assert sizes[0] < 1e-2
    assert sizes[1] > 1e2


def held(state):
    """The state with momentum at rest."""
    still = lambda part: (
        part._replace(**{
            name: jax.tree.map(jnp.zeros_like, getattr(part, name))
            for name in ("mu", "trace") if hasattr(part, name)
        }) if hasattr(part, "_fields") else part
    )  # fmt: skip
    return tuple(map(still, state))


def test_centered_rmsprop_has_the_variance():
    w, grads = jnp.zeros(3), jnp.asarray([1.0, 2.0, 3.0])
    tx = optax.rmsprop(RATE, centered=True, eps=1e-2)
    state = tx.init(w)
    for sign in (1.0, -0.5, 2.0):
        _, state = tx.update(sign * grads, state, w)
    found = diagnostics.preconditioner(state, w, optimizer="rmsprop", hyperparams={"eps": 1e-2})
    expected = (state[0].nu - state[0].mu ** 2 + 1e-2) ** -0.25
    np.testing.assert_allclose(found.inverse_root, expected, rtol=1e-6)


PARAMS = {"a": jnp.asarray([[0.3, -0.2], [0.5, 0.1]]), "b": jnp.asarray([0.4, -0.7, 0.2])}


def loss(params, x):
    w = jnp.concatenate([params["a"].ravel(), params["b"]])
    return jnp.mean(jnp.cos(x @ w) + (x @ w) ** 2)


X = jnp.asarray(np.random.default_rng(0).normal(size=(9, 7)), jnp.float32)
MASK = {"a": True, "b": False}


def after(tx, num_steps=4):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(num_steps):
        updates, state = tx.update(jax.grad(loss)(params, X), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


ADAM = optax.adam(RATE)
CHAINS = {
    "clip": optax.chain(optax.clip_by_global_norm(1e3), ADAM),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=RATE),
    "steps": optax.MultiSteps(ADAM, 1),
    "finite": optax.apply_if_finite(ADAM, 3),
    "groups": optax.partition({"x": ADAM, "y": ADAM}, {"a": "x", "b": "y"}),
}


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_the_state_is_found_in_any_chain(name, default_promotion):
    params, state = after(ADAM)
    plain = diagnostics.preconditioner(state, params, optimizer="adam")
    params, state = after(CHAINS[name])
    found = diagnostics.preconditioner(state, params, optimizer="adam")
    assert bool(found.covers_all)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        found.inverse_root, plain.inverse_root,
    )  # fmt: skip


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(ADAM, MASK),
        optax.partition({"x": ADAM, "y": optax.set_to_zero()}, {"a": "x", "b": "y"}),
    ],
    ids=["masked", "partition"],
)
def test_what_has_no_second_moments_is_held(tx, default_promotion):
    params, state = after(tx)
    found = diagnostics.preconditioner(state, params, optimizer="adam")
    assert not bool(found.covers_all)
    np.testing.assert_array_equal(found.inverse_root["b"], np.zeros(3))
    assert np.all(found.inverse_root["a"] > 0)


def test_edge_of_adam_is_that_of_the_dense_matrix(default_promotion):
    params, state = after(ADAM)
    edge = diagnostics.edge_of_stability(
        loss, params, X, key=KEY, optimizer="adam", optimizer_state=state, learning_rate=RATE
    )
    numbers = state[0]
    divisor = (1 - 0.9**4) * (jnp.sqrt(ravel(numbers.nu) / (1 - 0.999**4)) + 1e-8)
    dense = oracles.dense_hessian(loss, params, X) / np.sqrt(np.outer(divisor, divisor))
    largest = np.linalg.eigvalsh(dense)[-1]
    assert float(edge.sharpness) == pytest.approx(largest, rel=1e-3)
    assert float(edge.threshold) == pytest.approx(38 / RATE)
    assert float(edge.stability_ratio) == pytest.approx(largest * RATE / 38, rel=1e-3)
    assert bool(edge.converged)
    assert float(edge.floor_mass) == 0
    again = diagnostics.edge_of_stability(
        loss, params, X, key=KEY, optimizer="adam", optimizer_state=state, learning_rate=RATE,
        start=edge,
    )  # fmt: skip
    assert float(again.sharpness) == pytest.approx(largest, rel=1e-3)


def ravel(tree):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def test_mass_at_the_floor_is_told(default_promotion):
    params, state = after(ADAM)
    square = jnp.asarray([1e-4, 1.0, 1.0], jnp.float32)
    moments = {"a": jnp.ones((2, 2), jnp.float32), "b": square * (1 - 0.999**4)}
    state = (state[0]._replace(nu=moments), *state[1:])
    numbers = {"eps": 2e-3}  # sqrt(v) is 0.01 on one parameter, below 10 eps
    found = diagnostics.preconditioner(state, params, optimizer="adam", hyperparams=numbers)
    np.testing.assert_array_equal(found.at_floor["b"], [True, False, False])
    hessian = curvature.hessian(loss, params, X).scaled(found.inverse_root)
    edge = diagnostics.edge_of_stability(
        loss, params, X, key=KEY, optimizer="adam", optimizer_state=state, learning_rate=RATE,
        hyperparams=numbers, tol=1e-5,
    )  # fmt: skip
    columns = [hessian.space.ravel(hessian.matvec(hessian.space.unravel(e))) for e in np.eye(7)]
    vector = np.linalg.eigh(np.asarray(columns))[1][:, -1]
    assert float(edge.floor_mass) == pytest.approx(vector[4] ** 2, rel=1e-3)
    assert float(edge.floor_mass) > 0.5


def test_learning_rate_and_numbers_are_read_where_they_are_kept(default_promotion):
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.02, b1=0.8)
    params, state = after(tx)
    measure = lambda **options: diagnostics.edge_of_stability(
        loss, params, X, key=KEY, optimizer="adam", optimizer_state=state, **options
    )
    assert float(measure().threshold) == pytest.approx(3.6 / 0.2 / 0.02)
    with pytest.raises(ValueError, match="`hyperparams` must agree with `optimizer_state`, whose"):
        measure(hyperparams={"b1": 0.9})


def test_descent_needs_no_state_and_its_sharpness_is_plain():
    edge = diagnostics.edge_of_stability(
        loss, PARAMS, X, key=KEY, optimizer="sgd", learning_rate=0.1
    )
    dense = oracles.dense_hessian(loss, PARAMS, X)
    assert float(edge.stability_ratio) == pytest.approx(
        0.05 * np.linalg.eigvalsh(dense)[-1], rel=1e-3
    )


def test_an_eigenvalue_that_has_overtaken_that_of_the_start_is_found_or_the_flag_tells():
    values = jnp.concatenate([jnp.asarray([3.76, 3.39]), 3 * jnp.linspace(0, 1, 400) ** 2])
    bowl = lambda w, scale: jnp.mean(scale) * jnp.sum(values * w**2) / 2
    measure = lambda **options: diagnostics.edge_of_stability(
        bowl, jnp.ones(402), jnp.ones(1), key=jax.random.key(1), optimizer="sgd",
        learning_rate=0.5, tol=1e-2, start=jnp.eye(402)[1:2], **options,
    )  # fmt: skip
    edge = measure()
    assert float(edge.sharpness) == pytest.approx(3.76, rel=1e-3)
    assert bool(edge.complete)
    short = measure(search=False)
    assert float(short.sharpness) == pytest.approx(3.39, rel=1e-2)
    assert bool(short.converged)
    assert not bool(short.complete)


REFUSED = {
    "lion": (optax.lion(RATE), "adam", "must hold second moments of adam .* got ScaleByLionState"),
    "two": (optax.chain(optax.scale_by_adam(), ADAM), "adam", "must hold one second moment"),
    "averaged": (optax.chain(optax.ema(0.9), ADAM), "adam", ".* got EmaState in it"),
    "rms": (optax.chain(optax.scale_by_rms(), ADAM), "adam", ".* got ScaleByRmsState in it"),
    "momentum": (optax.sgd(RATE, 0.9), "sgd", "must have no momentum unless"),
    "adam": (ADAM, "sgd", "must be that of sgd, .* got ScaleByAdamState in it"),
    "fresh": (ADAM, "adam", "must have seen an update, got 0"),
    "free": (optax.contrib.schedule_free(ADAM, RATE), "adam", ".* got ScheduleFreeState in it"),
    "mechanic": (optax.contrib.mechanize(ADAM), "adam", ".* got MechanicState in it"),
    "free descent": (optax.contrib.schedule_free_sgd(RATE), "sgd", ".* got ScheduleFreeState"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_chain_without_a_known_threshold_is_refused(name, default_promotion):
    tx, optimizer, text = REFUSED[name]
    params, state = after(tx, 0 if name == "fresh" else 2)
    with pytest.raises(ValueError, match=f"`optimizer_state` {text}"):
        diagnostics.edge_of_stability(
            loss, params, X, key=KEY, optimizer=optimizer, optimizer_state=state,
            learning_rate=RATE,
        )  # fmt: skip


def test_bad_arguments_are_refused_by_name(default_promotion):
    threshold = lambda optimizer, numbers: diagnostics.stability_threshold(
        optimizer=optimizer, learning_rate=RATE, hyperparams=numbers
    )
    with pytest.raises(ValueError, match="`optimizer` must have a threshold, got 'lion'"):
        threshold("lion", None)
    with pytest.raises(ValueError, match=r"`optimizer` must be one of sgd, .*, got 'muon'"):
        threshold("muon", None)
    with pytest.raises(ValueError, match=r"`hyperparams` of adam must be among b1, .*, got 'b3'"):
        threshold("adam", {"b3": 0.1})
    with pytest.raises(ValueError, match=r"`hyperparams\['b1'\]` must be between 0 and 1"):
        threshold("adam", {"b1": 1.5})
    params, state = after(ADAM)
    with pytest.raises(ValueError, match=r"`optimizer_state` must be of `params\['b'\]` of shape"):
        diagnostics.preconditioner(state, {**params, "b": jnp.zeros(4)}, optimizer="adam")
    with pytest.raises(ValueError, match="`optimizer_state` must have the tree structure"):
        diagnostics.preconditioner(state, {"a": params["a"]}, optimizer="adam")
    with pytest.raises(ValueError, match="`optimizer` must have second moments, got 'sgd'"):
        diagnostics.preconditioner(state, params, optimizer="sgd")
    measure = lambda **options: diagnostics.edge_of_stability(
        loss, params, X, key=KEY, optimizer="adam", **options
    )
    with pytest.raises(ValueError, match="`learning_rate` must be given"):
        measure(optimizer_state=state)
    with pytest.raises(ValueError, match="`optimizer_state` must be given for adam, got None"):
        measure(learning_rate=RATE)


def test_inside_jit(default_promotion):
    params, state = after(ADAM)
    measure = lambda params, state: diagnostics.edge_of_stability(
        loss, params, X, key=KEY, optimizer="adam", optimizer_state=state, learning_rate=RATE
    )
    compiled, driven = jax.jit(measure)(params, state), measure(params, state)
    for one, other in itertools.islice(zip(compiled, driven, strict=True), 3):
        assert float(one) == pytest.approx(float(other), rel=1e-3)


@pytest.mark.usefixtures("default_promotion")  # optax promotes
@pytest.mark.parametrize("other", ["lamb", "adamw"])
def test_more_behind_the_second_moments_is_refused(other):
    """LAMB's trust ratio has no state of its own: its number of transformations tells."""
    params = {"w": jnp.ones((3, 2))}
    tx = getattr(optax, other)(RATE)
    state = tx.update(params, tx.init(params), params)[1]
    with pytest.raises(ValueError, match=r"that of adam alone, got \d transformations behind"):
        diagnostics.preconditioner(state, params, optimizer="adam")
    # In front of them, and around, they do no harm.
    for tx in (
        optax.chain(optax.clip(1.0), optax.adam(RATE), optax.identity()),
        optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.scale(-RATE)),
        optax.inject_hyperparams(optax.adam)(RATE),
        optax.adam(optax.constant_schedule(RATE)),
    ):
        state = tx.update(params, tx.init(params), params)[1]
        assert diagnostics.preconditioner(state, params, optimizer="adam").covers_all


@pytest.mark.parametrize("name", ["noisy_sgd", "adafactor"])
def test_what_is_no_descent_is_not_taken_for_it(name):
    params = jnp.ones(3)
    tx = optax.noisy_sgd(RATE, key=0) if name == "noisy_sgd" else optax.adafactor(RATE)
    with pytest.raises(ValueError, match=r"must be that of sgd, .* in it"):
        diagnostics.edge_of_stability(
            lambda w: jnp.sum(w**2), params, key=KEY, optimizer="sgd", learning_rate=RATE,
            optimizer_state=tx.init(params),
        )  # fmt: skip


@pytest.mark.usefixtures("default_promotion")
def test_the_state_of_an_nnx_optimizer_is_taken():
    module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    trainer = nnx.Optimizer(module, optax.adam(RATE), wrt=nnx.Param)
    loss_fn = lambda module, x: jnp.mean(module(x) ** 2)
    x = jnp.ones((3, 2))
    grads = nnx.grad(loss_fn)(module, x)
    trainer.update(module, grads)
    tx = optax.adam(RATE)
    plain = nnx.to_pure_dict(grads)
    state = tx.update(plain, tx.init(plain))[1]
    expected = diagnostics.preconditioner(state, plain, optimizer="adam").inverse_root
    for params in (regjax.from_nnx(module).params, nnx.state(module, nnx.Param)):
        found = diagnostics.preconditioner(trainer.opt_state, params, optimizer="adam")
        assert jax.tree.structure(found.inverse_root) == jax.tree.structure(params)
        for one, other in zip(*map(jax.tree.leaves, (found.inverse_root, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)
