"""Taylor importance: exact on quadratics, means over batches, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.tree_util import Partial

import regjax
from regjax import pruning
from regjax.models import ConvNet
from regjax.pruning import _oracle, _taylor
from tests.pruning import gated
from tests.pruning.gated import flat


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def quadratic(matrix, linear, gates):
    z = jnp.concatenate([gates["a"], gates["b"]])
    return 0.5 * z @ matrix @ z + linear @ z


def quadratic_problem():
    """A loss of 3 + 4 gates without data, and its matrix and vector in NumPy."""
    random = np.random.default_rng(1)
    matrix = random.normal(size=(7, 7))
    matrix, linear = matrix + matrix.T, random.normal(size=7)
    gates = {"a": jnp.ones(3), "b": jnp.ones(4)}
    return Partial(quadratic, jnp.asarray(matrix), jnp.asarray(linear)), gates, matrix, linear


def test_second_order_is_the_oracle_on_a_quadratic(double):
    loss, gates, matrix, linear = quadratic_problem()
    # The change on moving gate c from 1 to 0, by hand.
    grads = matrix.sum(1) + linear
    expected = (-grads + np.diag(matrix) / 2) ** 2
    oracle = pruning.oracle_importance(loss, gates, block_size=3)
    np.testing.assert_allclose(flat(oracle), expected, atol=1e-9)
    diagonal = _oracle.gate_hessian_diagonal(loss, gates, block_size=3)
    np.testing.assert_allclose(flat(diagonal), np.diag(matrix), atol=1e-12)
    found = jax.grad(loss)(gates)
    second = _taylor.taylor_importance_second_order(found, diagonal)
    np.testing.assert_allclose(flat(second), expected, atol=1e-9)
    np.testing.assert_allclose(flat(pruning.taylor_importance(found)), grads**2, atol=1e-9)
    assert jax.tree.structure(second) == jax.tree.structure(gates)


def test_second_order_of_gates_that_are_not_one(double):
    loss, gates, matrix, linear = quadratic_problem()
    gates = {"a": jnp.asarray([1.0, 0.0, 0.5]), "b": jnp.asarray([2.0, 1.0, 0.0, 1.0])}
    z = flat(gates)
    expected = (z * (matrix @ z + linear) - z**2 * np.diag(matrix) / 2) ** 2
    oracle = pruning.oracle_importance(loss, gates)
    np.testing.assert_allclose(flat(oracle), expected, atol=1e-9)
    batch_loss = Partial(with_data, loss)
    scores = pruning.taylor_scores_second_order(
        batch_loss, gates, jnp.zeros(4), batch_size=2
    ).scores
    np.testing.assert_allclose(flat(scores), expected, atol=1e-9)
    first = pruning.taylor_scores(batch_loss, gates, jnp.zeros(4), batch_size=2).scores
    np.testing.assert_allclose(flat(first), (z * (matrix @ z + linear)) ** 2, atol=1e-9)


def with_data(loss, gates, x):
    return loss(gates) + 0 * jnp.mean(x)


def linear_loss(gates, x):
    """The gradient of an example is the example."""
    return jnp.mean(x @ gates["a"])


def test_scores_are_means_of_squares_and_not_squares_of_means():
    random = np.random.default_rng(2)
    x = 0.5 + random.normal(size=(2**15, 16)).astype(np.float32)
    gates, mean, variance = {"a": jnp.ones(16)}, 0.5, 1.0
    for size in (1, 4, 16):
        scores = jax.jit(functools.partial(pruning.taylor_scores, linear_loss, batch_size=size))
        found = scores(gates, x)
        squares = x[: len(x) // size * size].reshape(-1, size, 16).mean(1).astype(float) ** 2
        np.testing.assert_allclose(found.scores["a"], squares.mean(0), rtol=1e-4)
        error = squares.std(0, ddof=1) / np.sqrt(len(squares))
        np.testing.assert_allclose(found.standard_error["a"], error, rtol=1e-3)
        # E(g_B^2) = g^2 + Var / B; the mean over the gates has a quarter of their errors.
        total = float(jnp.mean(found.scores["a"]))
        assert total == pytest.approx(mean**2 + variance / size, rel=0.01)


def test_scores_of_a_network_on_the_host_and_under_jit():
    loss, gates, batch = gated.problem(num_examples=26)
    grads = [
        flat(jax.grad(loss)(gates, *(leaf[start : start + 8] for leaf in batch)))
        for start in (0, 8, 16)
    ]
    expected = np.mean(np.square(grads), 0)
    found = pruning.taylor_scores(loss, gates, *batch, batch_size=8)
    np.testing.assert_allclose(flat(found.scores), expected, rtol=1e-5)
    compiled = jax.jit(functools.partial(pruning.taylor_scores, batch_size=8))
    np.testing.assert_allclose(flat(compiled(loss, gates, *batch).scores), expected, rtol=1e-5)
    single = pruning.taylor_scores(loss, gates, *batch, batch_size=26)
    assert np.all(np.isnan(flat(single.standard_error)))
    whole = flat(jax.grad(loss)(gates, *batch)) ** 2
    np.testing.assert_allclose(flat(single.scores), whole, rtol=1e-5)
    assert not np.allclose(whole, expected, rtol=0.1)
    second = functools.partial(pruning.taylor_scores_second_order, batch_size=13)
    host, traced = second(loss, gates, *batch, block_size=4), jax.jit(second)(loss, gates, *batch)
    np.testing.assert_allclose(flat(host.scores), flat(traced.scores), rtol=1e-4)
    np.testing.assert_allclose(
        flat(host.standard_error), flat(traced.standard_error), rtol=1e-3, atol=1e-7
    )


def test_removed_units_score_zero():
    loss, gates, batch = gated.problem()
    gates = {"hidden": gates["hidden"].at[2].set(0)}
    # The gradient at the gate itself is not zero.
    assert abs(float(jax.grad(loss)(gates, *batch)["hidden"][2])) > 1e-3
    for scores in (
        pruning.taylor_scores(loss, gates, *batch, batch_size=8).scores,
        pruning.taylor_scores_second_order(loss, gates, *batch, batch_size=8).scores,
        pruning.oracle_importance(loss, gates, *batch),
    ):
        assert float(scores["hidden"][2]) == 0
        assert np.count_nonzero(scores["hidden"]) == 5


def classification_loss(params, gates, x, labels):
    logits = gated.outputs(params, gates, x)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


@pytest.mark.optimized
def test_correlation_with_the_oracle_of_a_toy(double):
    loss, gates, (x, _) = gated.problem(num_units=8, num_examples=64, dtype=np.float64, seed=2)
    loss = Partial(classification_loss, *loss.args)
    batch = x, jnp.asarray(np.random.default_rng(7).integers(3, size=64))
    oracle = flat(pruning.oracle_importance(loss, gates, *batch))
    by_hand = [
        float(loss({"hidden": gates["hidden"].at[c].set(0)}, *batch) - loss(gates, *batch))
        for c in range(8)
    ]
    np.testing.assert_allclose(oracle, np.square(by_hand), rtol=1e-9)
    first = flat(pruning.taylor_scores(loss, gates, *batch, batch_size=64).scores)
    second = flat(pruning.taylor_scores_second_order(loss, gates, *batch, batch_size=64).scores)
    correlation = lambda scores: np.corrcoef(scores, oracle)[0, 1]
    assert correlation(first) == pytest.approx(0.83, abs=0.02)
    assert correlation(second) == pytest.approx(0.9995, abs=2e-4)


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


def adapted(kind):
    x = jnp.asarray(np.random.default_rng(5).normal(size=(12, 5, 5, 1)), jnp.float32)
    if kind == "nnx":
        network = ConvNet((5, 5, 1), 3, width=4, normalization="batch", rngs=nnx.Rngs(0))
        return regjax.from_nnx(network), x
    layers = [linen.Conv(4, (3, 3)), linen.relu, lambda x: x.mean((1, 2)), linen.Dense(3)]
    network = linen.Sequential(layers)
    return regjax.from_linen(network, network.init(jax.random.key(0), x)), x


@pytest.mark.parametrize(("kind", "mode"), [("nnx", "train"), ("linen", "evaluation")])
def test_scores_of_convolutional_networks(kind, mode):
    model, x = adapted(kind)
    labels = jnp.arange(12) % 3
    structure = pruning.find_structure(regjax.model_function(model), model.params, x)
    gates = pruning.unit_gates(structure, model.params)
    loss = regjax.model_loss(model, cross_entropy, mode=mode)
    gate_loss = pruning.gated_loss(structure, loss, model.params)
    found = pruning.taylor_scores(gate_loss, gates, x, labels, batch_size=6).scores
    gradient = jax.jit(jax.grad(loss))
    squares = [
        pruning.taylor_importance(
            pruning.gate_gradients(
                structure, model.params, gradient(model.params, x[part], labels[part])
            )
        )
        for part in (slice(0, 6), slice(6, 12))
    ]
    for name, scores in found.items():
        expected = (squares[0][name] + squares[1][name]) / 2
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-9)
        assert float(expected.max()) > 1e-6
    if mode == "train":
        with pytest.raises(ValueError, match="whose examples the loss couples"):
            pruning.oracle_importance(gate_loss, gates, x, labels, chunk_size=4)
        with pytest.raises(ValueError, match="`gate_loss` must not couple"):
            pruning.gradient_matrix(gate_loss, gates, x, labels)


def test_low_precision_is_squared_in_float32():
    grads = {"a": jnp.asarray([3e-30], jnp.bfloat16)}
    assert pruning.taylor_importance(grads)["a"].dtype == jnp.float32


def test_error_texts():
    loss, gates, batch = gated.problem()
    with pytest.raises(
        ValueError,
        match=r"`batch_size` must be between 1 and 24 \(the number of examples\), got 25",
    ):
        pruning.taylor_scores(loss, gates, *batch, batch_size=25)
    with pytest.raises(TypeError, match=r"`gate_grads\['a'\]` must be real floating point"):
        pruning.taylor_importance({"a": jnp.arange(3)})
    with pytest.raises(ValueError, match=r"`gate_hessian_diagonal\['a'\]` must have shape \(3,\)"):
        _taylor.taylor_importance_second_order({"a": jnp.ones(3)}, {"a": jnp.ones(2)})
