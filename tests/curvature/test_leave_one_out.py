"""XTrace and its kin against their definition, dense traces, and the spread over many matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from regjax._space import Space
from tests import oracles

SIZE, PROBES = 40, 8
# Name -> the estimate of the diagonal (or of the rows) and of its sum.
KINDS = {
    "xtrace": functools.partial(curvature.trace, method="xtrace"),
    "xnystrace": functools.partial(curvature.trace, method="xnystrace"),
    "xdiag": functools.partial(curvature.diagonal, method="xdiag"),
    "xnysdiag": functools.partial(curvature.diagonal, method="xnysdiag"),
    "rows": curvature.squared_row_norms,
    "frobenius": curvature.squared_frobenius_norm,
}
SEMIDEFINITE = ("xnystrace", "xnysdiag")
ENTRIES = ("xdiag", "xnysdiag", "rows")
MAPPED = [kind for kind in sorted(KINDS) if kind != "frobenius"]
# About as many outliers as probes, where the estimates are most correlated.
STEP = np.concatenate([np.ones(PROBES), np.full(SIZE - PROBES, 0.02)])


def num_matvecs(kind, probes=PROBES):
    return probes if kind in SEMIDEFINITE else 2 * probes


def exact(kind, matrix):
    matrix = matrix @ matrix if kind in ("rows", "frobenius") else matrix
    return np.diag(matrix) if kind in ENTRIES else np.trace(matrix)


# A matrix for each question, and 200 for the errors.
DECAY = oracles.symmetric(0.7 ** np.arange(SIZE) + 0.01)
LOW_RANK = oracles.symmetric(np.concatenate([[4.0, 2.0, 1.0, 0.5], np.zeros(SIZE - 4)]))
INDEFINITE = oracles.symmetric(np.linspace(-1, 1, SIZE))
SPECIAL = (DECAY, LOW_RANK, 0 * DECAY, np.nan * DECAY, INDEFINITE)
NUM_RANDOM = 200


@functools.cache
def matrices():
    return np.stack([*SPECIAL, *(oracles.symmetric(STEP, seed) for seed in range(NUM_RANDOM))])


def keys():
    return jax.random.split(jax.random.key(1), len(matrices()))


@functools.cache
def results(kind):
    """Those of all matrices by one program."""

    def one(matrix, key):
        operator = curvature.from_matvec(oracles.matvec_of(matrix), matrix[0])
        return KINDS[kind](operator, key=key, num_matvecs=num_matvecs(kind))

    with jax.debug_nans(False):
        found = jax.jit(jax.vmap(one))(jnp.asarray(matrices(), jnp.float32), keys())
    return jax.tree.map(np.asarray, found)


def by_definition(kind, matrix, probes):
    """The estimates, each with its own basis of the images of the others, in NumPy."""
    images, size, count, found = matrix @ probes, len(matrix), probes.shape[1], []
    for i in range(count):
        others = np.delete(np.arange(count), i)
        own = probes[:, i]
        if kind in SEMIDEFINITE:
            known = images[:, others]
            known = known @ np.linalg.solve(probes[:, others].T @ known, known.T)
            basis = np.linalg.qr(probes[:, others])[0]
            rest, scaled = (matrix - known) @ own, (matrix - known) @ (own - basis @ basis.T @ own)
            known = np.diag(known)
        else:
            basis = np.linalg.qr(images[:, others])[0]
            outside = np.eye(size) - basis @ basis.T
            rest, scaled = outside @ matrix @ own, matrix @ outside @ own
            known = np.diag(basis @ basis.T @ matrix)
            if kind in ("rows", "frobenius"):
                known = np.sum((matrix @ basis) ** 2, 1)
        outside = own - basis @ basis.T @ own
        factor = (size - count + 1) / (outside @ outside)
        if kind in ("xdiag", "xnysdiag"):
            found.append(known + own * rest)
        elif kind in ("rows", "frobenius"):
            found.append(known + factor * scaled**2)
        else:
            found.append(known.sum() + factor * outside @ scaled)
    return np.sum(found, 1) if kind == "frobenius" else np.asarray(found)


@pytest.mark.parametrize("kind", MAPPED)
def test_the_estimates_are_those_of_the_definition(kind):
    space, found = Space.of(jnp.zeros(SIZE)), results(kind)
    draw = space.signs if kind in ("xdiag", "xnysdiag") else space.normal
    probes = np.asarray(draw(jax.random.fold_in(keys()[0], 0), PROBES), np.float64).T
    each = by_definition(kind, DECAY, probes)
    np.testing.assert_allclose(found.value[0], each.mean(0), rtol=1e-4, atol=1e-5)
    assert int(found.num_matvecs[0]) == num_matvecs(kind)
    # The covariance comes on top of the spread, and is never taken off.
    spread = each.std(0, ddof=1) / np.sqrt(PROBES)
    assert np.all(found.standard_error[0] >= spread * (1 - 1e-3) - 1e-5)


@pytest.mark.parametrize("kind", MAPPED)
def test_values_are_unbiased_and_errors_hold_over_200_matrices(kind):
    """The spread alone would be an error two to three times too small here."""
    found, special = results(kind), len(SPECIAL)
    right = np.stack([exact(kind, matrix) for matrix in matrices()[special:]])
    off, errors = found.value[special:] - right, found.standard_error[special:]
    assert np.all(np.abs(off.mean(0)) < 5 * off.std(0) / np.sqrt(NUM_RANDOM) + 1e-5)
    ratio = np.sqrt(np.mean(errors**2) / np.mean(off**2))
    # Entries by themselves take only positive covariances, which are noisy.
    assert 0.85 < ratio < (1.4 if kind in ENTRIES else 1.15)
    # With 8 vectors and as many outliers the estimates have a long tail.
    assert np.mean(np.abs(off) < 2 * errors) > 0.8


@pytest.mark.parametrize("kind", MAPPED)
def test_what_is_exact_and_what_is_no_number(kind):
    _, low_rank, zeros, nan, indefinite = (
        (results(kind).value[i], results(kind).standard_error[i]) for i in range(len(SPECIAL))
    )
    atol = 5e-5 * 4 ** (2 if kind == "rows" else 1)  # the norm is 4
    np.testing.assert_allclose(low_rank[0], exact(kind, LOW_RANK), atol=atol)
    np.testing.assert_allclose(low_rank[1], 0, atol=atol)
    np.testing.assert_allclose(zeros, (0 * low_rank[0], 0 * low_rank[0]), atol=1e-30)
    assert np.all(np.isnan(nan))
    # Inside of jit nobody can be told, but by NaN.
    assert np.all(np.isnan(indefinite[0])) == (kind in SEMIDEFINITE)


def test_an_indefinite_matrix_is_refused():
    operator = curvature.from_matvec(oracles.matvec_of(INDEFINITE), jnp.zeros(SIZE))
    with pytest.raises(ValueError, match=r"`operator` must be positive semi-definite .* -\d"):
        KINDS["xnystrace"](operator, key=jax.random.key(0), num_matvecs=PROBES)


@pytest.mark.parametrize("kind", ["xdiag", "xnystrace", "xnysdiag"])
def test_as_many_probes_as_parameters_are_exact(kind):
    matrix = oracles.symmetric([3.0, 1.0, 0.2, 0.1])
    operator = curvature.from_matvec(oracles.matvec_of(matrix), jnp.zeros(4))
    found = KINDS[kind](operator, key=jax.random.key(0), num_matvecs=num_matvecs(kind, 9))
    np.testing.assert_allclose(found.value, exact(kind, matrix), atol=1e-4)
    np.testing.assert_array_equal(found.standard_error, 0 * found.value)
    assert int(found.num_matvecs) == num_matvecs(kind, 4)


@pytest.mark.parametrize("kind", ["xtrace", "frobenius", "xnysdiag"])
def test_blocks_give_the_same_and_half_of_them_the_probes_alone(kind, monkeypatch):
    monkeypatch.setattr(curvature.Operator, "takes_blocks", True)
    operator = curvature.from_matvec(oracles.matvec_of(DECAY), jnp.zeros(SIZE))
    seen = []
    found = KINDS[kind](
        operator, key=keys()[0], num_matvecs=num_matvecs(kind),
        callback=lambda done, total, progress: seen.append((done, progress.result)),
    )  # fmt: skip
    if kind == "frobenius":
        rows = results("rows")
        assert float(found.value) == pytest.approx(float(rows.squared_norm[0]), rel=1e-4)
        error = float(rows.squared_norm_standard_error[0])
        # From all pairs here, from some of them there.
        assert error / 3 < float(found.standard_error) < 3 * error
    else:
        np.testing.assert_allclose(found.value, results(kind).value[0], rtol=1e-4, atol=1e-5)
    done, early = seen[0]
    assert done == PROBES
    if kind != "xnysdiag":
        probes = np.asarray(Space.of(jnp.zeros(SIZE)).normal(jax.random.fold_in(keys()[0], 0), 8))
        images = probes @ DECAY
        own = images if kind == "frobenius" else probes
        samples = SIZE * np.sum(own * images, 1) / np.sum(probes**2, 1)
        assert float(early.value) == pytest.approx(samples.mean(), rel=1e-5)
        error = samples.std(ddof=1) / np.sqrt(PROBES)
        assert float(early.standard_error) == pytest.approx(error, rel=1e-4)


def test_a_single_parameter_is_exact_without_an_error():
    operator = curvature.from_matvec(lambda v: 3 * v, jnp.zeros(1))
    with jax.debug_nans(True):
        found = curvature.trace(operator, key=jax.random.key(0), num_matvecs=9, method="xtrace")
        assert (float(found.value), float(found.standard_error)) == (3, 0)
        # The error of one probe alone is NaN, and that is no accident.
        seen = []
        curvature.diagonal(
            curvature.identity(Space.of(jnp.zeros(3))), key=jax.random.key(0), num_matvecs=2,
            method="xnysdiag", callback=lambda done, total, progress: seen.append(progress.result),
        )  # fmt: skip
    assert np.all(np.isnan(seen[0].standard_error))


def test_the_trace_beside_a_diagonal_is_its_sum():
    for kind in ("xdiag", "xnysdiag"):
        found = results(kind)
        np.testing.assert_allclose(found.trace[0], np.sum(found.value[0]), rtol=1e-5)
        assert 0 < found.trace_standard_error[0] < 3


def test_trees_keep_their_structure():
    like = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(2)}
    weights = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2)}
    operator = curvature.from_matvec(lambda v: jax.tree.map(jnp.multiply, v, weights), like)
    found = curvature.squared_row_norms(operator, key=jax.random.key(0), num_matvecs=16)
    np.testing.assert_allclose(found.value["a"], weights["a"] ** 2, atol=1e-3)
    assert found.standard_error["b"].shape == (2,)


def test_error_texts():
    operator = curvature.from_matvec(lambda v: v, jnp.zeros(3))
    key = jax.random.key(0)
    for function, method, least in (
        (curvature.trace, "xtrace", 4), (curvature.trace, "xnystrace", 2),
        (curvature.diagonal, "xdiag", 4), (curvature.diagonal, "xnysdiag", 2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"must be at least {least} \(for {method}\), got 0"):
            function(operator, key=key, num_matvecs=0, method=method)
    with pytest.raises(ValueError, match="`num_matvecs` must be at least 4, got 3"):
        curvature.squared_row_norms(operator, key=key, num_matvecs=3)
    with pytest.raises(ValueError, match="`num_matvecs` must be at least 4, got 3"):
        curvature.squared_frobenius_norm(operator, key=key, num_matvecs=3)
    with pytest.raises(
        ValueError, match=r"`method` must be one of hutchinson, .*xnystrace, got 'x"
    ):
        curvature.trace(operator, key=key, num_matvecs=8, method="xdiag")
    with pytest.raises(ValueError, match=r"`method` must be one of hutchinson, .*xnysdiag, got 'x"):
        curvature.diagonal(operator, key=key, num_matvecs=8, method="xtrace")
