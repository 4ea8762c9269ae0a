import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from regjax._space import Space
from regjax.curvature import _hutchinson
from tests import oracles

METHODS = ["hutchinson", "hutch++"]
MATRIX = oracles.symmetric(
    np.concatenate([[50, 30, 20, 10, -5], np.random.default_rng(0).normal(size=75)])
)


def operator():
    return curvature.from_matvec(oracles.matvec_of(MATRIX), jnp.zeros(80))


@pytest.mark.parametrize("method", METHODS)
def test_trace_is_unbiased_and_its_standard_error_holds(method):
    scores = []
    for seed in range(40):
        result = curvature.trace(
            operator(), key=jax.random.key(seed), num_matvecs=45, method=method
        )
        scores.append((float(result.value) - np.trace(MATRIX)) / float(result.standard_error))
        assert int(result.num_matvecs) == 45
    assert abs(np.mean(scores)) < 5 / np.sqrt(40)
    assert 0.6 < np.std(scores) < 1.6


@pytest.mark.parametrize("num_matvecs", [44, 45, 46])
def test_blocks_of_probes_give_unbiased_estimates_too(monkeypatch, num_matvecs):
    """Hutch++ in rounds of 14 or 15: the last one is not full."""
    monkeypatch.setattr(curvature.Operator, "takes_blocks", True)
    solve = jax.jit(
        lambda key: curvature.trace(operator(), key=key, num_matvecs=num_matvecs, method="hutch++")
    )
    results = [solve(jax.random.key(seed)) for seed in range(60)]
    scores = [float((r.value - np.trace(MATRIX)) / r.standard_error) for r in results]
    assert abs(np.mean(scores)) < 5 / np.sqrt(60)
    assert 0.6 < np.std(scores) < 1.6
    assert all(int(result.num_matvecs) == num_matvecs for result in results)
    calls = []
    curvature.trace(
        operator(), key=jax.random.key(0), num_matvecs=num_matvecs, method="hutch++",
        callback=lambda *call: calls.append(call[:2]),
    )  # fmt: skip
    block = num_matvecs // 3
    assert calls == [(min(i * block, num_matvecs), num_matvecs) for i in range(1, len(calls) + 1)]
    assert calls[-1][0] == num_matvecs


def test_samples_of_a_block_are_those_of_numpy():
    """The mean and its error, in one round and in two, the second of one probe or of two."""
    matrix = jnp.asarray([[2.0, 1], [1, 3]])
    for total, rounds in ((5, 1), (3, 2), (4, 2)):
        seen = _hutchinson.no_samples(Space.of(jnp.zeros(2)), of_trace=True)
        block = total if rounds == 1 else 2
        signs = np.random.default_rng(0).choice([-1.0, 1], size=(rounds * block, 2))
        for i in range(rounds):
            vectors = jnp.asarray(signs[i * block : (i + 1) * block], jnp.float32)
            num_new = jnp.int32(min(block, total - i * block))
            seen = _hutchinson.with_samples(seen, vectors * (vectors @ matrix), num_new)
        moments = seen.sums
        samples = np.einsum("bi,ij,bj->b", signs, matrix, signs)[:total]
        assert int(moments.num_samples) == total
        assert float(moments.mean) == pytest.approx(samples.mean(), rel=1e-6)
        error = samples.std(ddof=1) / np.sqrt(total)
        assert float(_hutchinson.standard_error(moments)) == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_diagonal_is_unbiased_and_its_standard_error_holds(method):
    scores = []
    for seed in range(10):
        result = curvature.diagonal(
            operator(), key=jax.random.key(seed), num_matvecs=45, method=method
        )
        scores.append(
            (np.asarray(result.value) - np.diag(MATRIX)) / np.asarray(result.standard_error)
        )
    assert abs(np.mean(scores)) < 5 / np.sqrt(np.size(scores) / 10)
    assert 0.8 < np.std(scores) < 1.3


def test_hutch_plus_plus_gains_where_few_eigenvalues_dominate():
    def error(method):
        values = [
            float(
                curvature.trace(
                    operator(), key=jax.random.key(s), num_matvecs=45, method=method
                ).value
            )
            for s in range(20)
        ]
        return np.sqrt(np.mean((np.array(values) - np.trace(MATRIX)) ** 2))

    # The five outliers carry 99 % of the squared Frobenius norm.
    assert error("hutch++") < 0.6 * error("hutchinson")


def test_diagonal_matrix_is_exact_with_one_probe():
    diagonal = jnp.arange(1.0, 9.0)
    like = {"a": jnp.zeros(3), "b": jnp.zeros(5)}

    def matvec(tree):
        return {"a": tree["a"] * diagonal[:3], "b": tree["b"] * diagonal[3:]}

    tree_operator = curvature.from_matvec(matvec, like)
    result = curvature.diagonal(tree_operator, key=jax.random.key(0), num_matvecs=1)
    np.testing.assert_allclose(result.value["b"], diagonal[3:], rtol=1e-6)
    assert np.all(np.isnan(result.standard_error["a"]))
    total = curvature.trace(tree_operator, key=jax.random.key(0), num_matvecs=2)
    assert float(total.value) == pytest.approx(36)
    assert float(total.standard_error) == 0


def test_low_rank_is_exact_under_hutch_plus_plus():
    matrix = oracles.symmetric([4.0, -2.0, 1.0] + [0.0] * 37)
    low_rank = curvature.from_matvec(oracles.matvec_of(matrix), jnp.zeros(40))
    options = {"key": jax.random.key(0), "num_matvecs": 24, "method": "hutch++"}
    assert float(curvature.trace(low_rank, **options).value) == pytest.approx(3, abs=1e-4)
    np.testing.assert_allclose(
        curvature.diagonal(low_rank, **options).value, np.diag(matrix), atol=1e-5
    )


@pytest.mark.parametrize("method", METHODS)
def test_compiled_loop_and_steps_give_the_plain_result(method):
    def run(operator, key):
        return curvature.trace(operator, key=key, num_matvecs=9, method=method)

    plain = run(operator(), jax.random.key(0))
    compiled = jax.jit(run)(operator(), jax.random.key(0))
    solver = curvature.trace_solver(operator(), key=jax.random.key(0), num_matvecs=9, method=method)
    state = solver.init()
    for _ in range(solver.max_steps):  # an accelerator takes several probes in a step
        state = solver.step(state)
    assert float(compiled.value) == pytest.approx(float(plain.value), rel=1e-5)
    assert float(solver.result(state).value) == float(plain.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_spectrum(dtype):
    with jax.enable_x64(dtype == np.float64):
        problem = oracles.problem(dtype=dtype)
        hessian = curvature.hessian(oracles.loss_fn, problem.params, *problem.batch)
        dense = oracles.dense_hessian(oracles.loss_fn, problem.params, *problem.batch)
        spectrum = curvature.exact_spectrum(hessian)
        assert spectrum.dtype == dtype
        tolerance = 1e-11 if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(spectrum, np.linalg.eigvalsh(dense), atol=tolerance)


def test_error_texts():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`method` must be one of hutchinson, hutch\+\+"):
        curvature.trace(operator(), key=key, num_matvecs=3, method="hutch")
    with pytest.raises(
        ValueError, match=r"`num_matvecs` must be at least 3 \(for hutch\+\+\), got 2"
    ):
        curvature.diagonal(operator(), key=key, num_matvecs=2, method="hutch++")
