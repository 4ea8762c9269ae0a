import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from tests import oracles

CHUNKS = [None, 7]


def jacobian_and_probabilities(problem):
    jacobian = oracles.dense_jacobian(oracles.model_fn, problem.params, problem.inputs)
    outputs = oracles.model_fn(problem.params, problem.inputs)
    return jacobian, np.asarray(jax.nn.softmax(outputs))


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gauss_newton_of_cross_entropy(chunk_size):
    problem = oracles.problem()
    operator = curvature.gauss_newton(
        oracles.model_fn,
        oracles.cross_entropy,
        problem.params,
        *problem.batch,
        chunk_size=chunk_size,
    )  # fmt: skip
    jacobian, p = jacobian_and_probabilities(problem)
    middle = np.einsum("ic,cd->icd", p, np.eye(3)) - np.einsum("ic,id->icd", p, p)
    expected = np.einsum("icn,icd,idm->nm", jacobian, middle, jacobian) / 23
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gauss_newton_of_squared_error_is_the_gram_matrix(chunk_size):
    problem = oracles.problem()
    operator = curvature.gauss_newton(
        oracles.model_fn,
        oracles.squared_error,
        problem.params,
        *problem.batch,
        chunk_size=chunk_size,
    )  # fmt: skip
    jacobian, _ = jacobian_and_probabilities(problem)
    expected = np.einsum("icn,icm->nm", jacobian, jacobian) / 23
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_empirical_fisher_is_the_mean_outer_product_of_example_gradients(chunk_size):
    problem = oracles.problem()
    operator = curvature.empirical_fisher(
        oracles.model_fn,
        oracles.cross_entropy,
        problem.params,
        *problem.batch,
        chunk_size=chunk_size,
    )  # fmt: skip
    jacobian, p = jacobian_and_probabilities(problem)
    scores = np.einsum("ic,icn->in", p - np.eye(3)[np.asarray(problem.targets)], jacobian)
    np.testing.assert_allclose(operator.dense(), scores.T @ scores / 23, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
def test_exact_fisher_is_gauss_newton_of_its_loss(likelihood):
    problem = oracles.problem()
    loss = {"categorical": oracles.cross_entropy, "normal": oracles.squared_error}[likelihood]
    fisher = curvature.fisher(
        oracles.model_fn, problem.params, problem.inputs, key=None, num_samples=None,
        likelihood=likelihood,
    )  # fmt: skip
    gauss_newton = curvature.gauss_newton(oracles.model_fn, loss, problem.params, *problem.batch)
    np.testing.assert_allclose(fisher.dense(), gauss_newton.dense(), rtol=1e-4, atol=1e-6)


def enumerated_fisher(jacobian, outputs, likelihood):
    """The Fisher in float64 from all targets of a finite model, or the moments of the normal one.

    `jacobian` (examples, predictions, outputs of a prediction, n) and `outputs` without n.
    """
    total = 0.0
    for own, rows in zip(outputs.reshape(-1, outputs.shape[-1]), merged(jacobian), strict=True):
        if likelihood == "categorical":
            chances = np.exp(own - own.max()) / np.sum(np.exp(own - own.max()))
            cases = [(chances[c], chances - np.eye(len(own))[c]) for c in range(len(own))]
        elif likelihood == "bernoulli":
            p = 1 / (1 + np.exp(-own))
            cases = [
                (np.prod(np.where(y, p, 1 - p)), p - y)
                for y in np.ndindex(*[2] * len(own))
            ]  # fmt: skip
        else:
            cases = [(1.0, unit) for unit in np.eye(len(own))]
        for chance, score in cases:
            total = total + chance * np.outer(score @ rows, score @ rows)
    return total / len(outputs)


def merged(jacobian):
    return jacobian.reshape(-1, *jacobian.shape[-2:])


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        ("categorical", (3, 2)),
        ("categorical", (3, 4)),
        ("categorical", (3, 2, 3)),
        ("bernoulli", (3,)),
        ("bernoulli", (3, 1)),
        ("bernoulli", (3, 4)),
        ("bernoulli", (3, 2, 2)),
        ("normal", (3,)),
        ("normal", (3, 1)),
        ("normal", (3, 2, 2)),
    ],
)
def test_fisher_of_any_shape_is_the_enumerated_one(likelihood, shape):
    random = np.random.default_rng(len(shape))
    with jax.enable_x64(True):
        weights = jnp.asarray(random.normal(size=(4, int(np.prod(shape[1:])))))
        inputs, params = jnp.asarray(random.normal(size=(3, 4))), {"w": weights}
        model_fn = lambda p, x: jnp.tanh(x @ p["w"]).reshape(-1, *shape[1:]) * 3
        outputs = np.asarray(model_fn(params, inputs))
        jacobian = np.asarray(jax.jacobian(model_fn)(params, inputs)["w"])
        jacobian = jacobian.reshape(*shape, -1)
        if len(shape) == 1:
            outputs, jacobian = outputs[:, None], jacobian[:, None]
        expected = enumerated_fisher(jacobian, outputs, likelihood)
        options = {"likelihood": likelihood}
        exact = curvature.fisher(
            model_fn, params, inputs, key=None, num_samples=None, **options
        ).dense()
        np.testing.assert_allclose(exact, expected, atol=1e-12)
        sampled = curvature.fisher(
            model_fn, params, inputs, key=jax.random.key(3), num_samples=20_000, **options
        ).dense()
    np.testing.assert_allclose(sampled, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_logit_is_no_softmax(shape):
    params, inputs = {"w": jnp.ones((4, 1))}, jnp.ones((3, 4))
    model_fn = lambda p, x: (x @ p["w"]).reshape(shape)
    for num_samples in (None, 2):
        with pytest.raises(ValueError, match=r'at least two classes, got shape .*"bernoulli"'):
            curvature.fisher(
                model_fn, params, inputs, key=jax.random.key(0), num_samples=num_samples
            )


def test_outputs_that_are_no_array_of_examples_are_refused():
    params, inputs = {"w": jnp.ones((4, 6))}, jnp.ones((3, 4))
    flat = lambda p, x: (x @ p["w"]).reshape(-1, 2)
    pair = lambda p, x: (x @ p["w"], x @ p["w"])
    targets, loss = jnp.zeros(3), lambda o, y: jnp.mean(jax.tree.leaves(o)[0])
    builders = [
        lambda f: curvature.fisher(f, params, inputs, key=jax.random.key(0)),
        lambda f: curvature.empirical_fisher(f, loss, params, inputs, targets),
    ]
    for build in builders:
        with pytest.raises(ValueError, match=r"leading axis is the 3 examples, got shape \(9, 2\)"):
            build(flat)
    with pytest.raises(TypeError, match="must return one real floating-point array"):
        builders[0](pair)


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
def test_sampled_fisher_is_unbiased(likelihood):
    problem = oracles.problem()
    vector = jax.tree.map(jnp.ones_like, problem.params)

    def quadratic_form(key, num_samples):
        operator = curvature.fisher(
            oracles.model_fn, problem.params, problem.inputs, key=key, num_samples=num_samples,
            likelihood=likelihood,
        )  # fmt: skip
        image = operator.matvec(vector)
        return sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(image))

    exact = quadratic_form(None, None)
    samples = [quadratic_form(jax.random.key(seed), 20) for seed in range(40)]
    error = np.std(samples, ddof=1) / np.sqrt(len(samples))
    # Labels taken from the arg-max instead of drawn miss this by tens of standard errors.
    assert abs(np.mean(samples) - exact) < 5 * error
    assert error < 0.05 * exact


def test_sampled_fisher_has_the_same_draws_for_every_chunk_size_and_product():
    problem = oracles.problem()
    operators = [
        curvature.fisher(
            oracles.model_fn, problem.params, problem.inputs, key=jax.random.key(0), chunk_size=c
        )
        for c in (None, 7, 1)
    ]
    first, *others = [np.asarray(operator.dense()) for operator in operators]
    np.testing.assert_array_equal(first, np.asarray(operators[0].dense()))
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-6)
    different = curvature.fisher(
        oracles.model_fn, problem.params, problem.inputs, key=jax.random.key(1)
    )
    assert np.abs(different.dense() - first).max() > 1e-3


def test_error_texts():
    problem = oracles.problem()
    with pytest.raises(
        ValueError, match="`likelihood` must be one of categorical, bernoulli, normal"
    ):
        curvature.fisher(
            oracles.model_fn, problem.params, problem.inputs, key=None, likelihood="poisson"
        )
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        curvature.fisher(oracles.model_fn, problem.params, problem.inputs, key=None)
    with pytest.raises(ValueError, match=r"`output_loss_fn` must return a scalar.*\(23, 3\)"):
        curvature.gauss_newton(oracles.model_fn, lambda o, y: o, problem.params, *problem.batch)
