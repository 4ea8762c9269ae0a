"""Dropout's noise against the Hessian, on losses whose two matrices are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import regjax
from regjax import curvature, diagnostics
from tests import oracles

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
N = 8
SLOPES = jnp.asarray(RANDOM.uniform(0.5, 3, size=(10, N)), jnp.float32)
MIXING = jnp.asarray(RANDOM.normal(size=(N, N)), jnp.float32)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def diagonal_loss(params, slopes):
    """A diagonal Hessian, of which every random sign gives trace and norm exactly."""
    return jnp.mean(slopes @ params**2) / 2


def projected_loss(params, slopes):
    """The Hessian is the mean of the outer products of the rows of `slopes`."""
    return jnp.mean((slopes @ params) ** 2) / 2


def normal_noise(params, key, mixing):
    """A random linear function: the gradient is normal with the covariance mixing mixing'."""
    draw = jax.random.normal(key, (mixing.shape[1],), mixing.dtype)
    return jnp.dot(params, mixing @ draw)


def loss_fn(params, inputs, targets):
    return oracles.squared_error(oracles.model_fn(params, inputs), targets)


def dropout_loss(params, key, inputs, targets):
    mask = jax.random.bernoulli(key, 0.5, (1, 6)).astype(inputs.dtype) / 0.5
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"][None]) * mask
    outputs = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
    return oracles.squared_error(outputs, targets)


def problem_and_dropout(dtype=np.float64):
    problem = oracles.problem(7, 3, 6, 2, dtype)
    return problem, Partial(dropout_loss, inputs=problem.inputs, targets=problem.targets)


def on_diagonal(key=KEY, num_samples=9, num_probes=2, num_directions=3):
    return diagnostics.dropout_noise_alignment(
        diagonal_loss, Partial(normal_noise, mixing=MIXING), jnp.ones(N), SLOPES,
        key=key, num_samples=num_samples, num_directions=num_directions, num_probes=num_probes,
    )  # fmt: skip


def matrices_on_diagonal(num_samples=9):
    """H and Sigma in float64."""
    draws = jax.vmap(lambda key: jax.random.normal(key, (N,)))(
        jax.random.split(jax.random.split(KEY)[0], num_samples)
    )
    gradients = np.asarray(draws, np.float64) @ np.asarray(MIXING, np.float64).T
    hessian = np.diag(np.asarray(SLOPES, np.float64).mean(0))
    return hessian, np.cov(gradients.T, bias=True)


def check_exact_part(report, hessian, sigma, rtol):
    """What does not depend on the probes."""
    values, vectors = np.linalg.eigh(sigma)
    top = len(report.eigenvalues)
    values, vectors = values[::-1][:top], vectors[:, ::-1][:, :top]
    np.testing.assert_allclose(report.eigenvalues, values, rtol=rtol)
    found = np.stack([np.asarray(ravel_pytree(v)[0]) for v in rows(report.eigenvectors, top)])
    np.testing.assert_allclose(np.abs(found @ vectors), np.eye(top), atol=10 * rtol)
    curvatures = np.einsum("in,nm,im->i", vectors.T, hessian, vectors.T)
    np.testing.assert_allclose(report.curvatures, curvatures, rtol=10 * rtol)
    np.testing.assert_allclose(report.noise_trace, np.trace(sigma), rtol=rtol)
    np.testing.assert_allclose(report.noise_norm, np.linalg.norm(sigma), rtol=rtol)
    np.testing.assert_allclose(report.product_trace, np.trace(hessian @ sigma), rtol=rtol)


def rows(trees, count):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], trees) for i in range(count)]


def test_diagonal_hessian_and_normal_noise_in_closed_form():
    report = on_diagonal()
    hessian, sigma = matrices_on_diagonal()
    check_exact_part(report, hessian, sigma, rtol=1e-4)
    norms = np.linalg.norm(hessian) * np.linalg.norm(sigma)
    expected = {
        "hessian_trace": np.trace(hessian),
        "hessian_norm": np.linalg.norm(hessian),
        "alignment": np.trace(hessian @ sigma) / norms,
        "null_alignment": np.trace(hessian) * np.trace(sigma) / (N * norms),
    }
    for name, value in expected.items():
        assert float(getattr(report, name)) == pytest.approx(value, rel=1e-4)
        assert float(getattr(report, f"{name}_standard_error")) < 1e-4 * value


def test_null_model_is_that_of_random_eigenvectors():
    hessian, sigma = matrices_on_diagonal()
    hessian, sigma = hessian / np.linalg.norm(hessian), sigma / np.linalg.norm(sigma)
    bases, triangles = np.linalg.qr(RANDOM.normal(size=(20_000, N, N)))
    # The signs of the diagonal make the distribution that of all rotations.
    bases = bases * np.sign(np.diagonal(triangles, axis1=1, axis2=2))[:, None]
    rotated = np.einsum("bij,jk,blk->bil", bases, sigma, bases, optimize=True)
    alignments = np.einsum("ij,bji->b", hessian, rotated)
    report, error = on_diagonal(), alignments.std() / np.sqrt(len(alignments))
    assert float(report.null_alignment) == pytest.approx(alignments.mean(), abs=5 * error)
    # A standard deviation of near-normal samples has the relative error 1 / sqrt(2 R).
    assert float(report.null_std) == pytest.approx(alignments.std(), rel=5 / np.sqrt(4e4))


def test_dropout_of_a_network_against_the_dense_matrices(double):
    problem, dropped = problem_and_dropout()
    report = diagnostics.dropout_noise_alignment(
        loss_fn, dropped, problem.params, *problem.batch,
        key=KEY, num_samples=12, num_directions=4, num_probes=300,
    )  # fmt: skip
    hessian = oracles.dense_hessian(loss_fn, problem.params, *problem.batch)
    mask_key, _ = jax.random.split(KEY)
    factor = curvature.dropout_covariance_factor(
        dropped, problem.params, key=mask_key, num_samples=12
    )
    sigma = np.asarray(factor).T @ np.asarray(factor)
    check_exact_part(report, hessian, sigma, rtol=1e-8)
    norms = np.linalg.norm(hessian) * np.linalg.norm(sigma)
    expected = {
        "hessian_trace": np.trace(hessian),
        "hessian_norm": np.linalg.norm(hessian),
        "alignment": np.trace(hessian @ sigma) / norms,
        "null_alignment": np.trace(hessian) * np.trace(sigma) / (38 * norms),
    }
    for name, value in expected.items():
        error = float(getattr(report, f"{name}_standard_error"))
        assert float(getattr(report, name)) == pytest.approx(value, abs=5 * error)
        assert error < 0.2 * abs(value)


def test_errors_are_those_of_repeated_draws():
    # One direction dominates: the estimates of trace and norm err together.
    slopes = SLOPES[:1] + jnp.asarray(0.3 * RANDOM.normal(size=(10, N)), jnp.float32)

    @jax.jit
    @jax.vmap
    def draw(key):
        report = diagnostics.dropout_noise_alignment(
            projected_loss, Partial(normal_noise, mixing=MIXING), jnp.ones(N), slopes,
            key=key, num_samples=3, num_directions=1, num_probes=50,
        )  # fmt: skip
        # Free of the masks, which follow the key as well.
        noise = report.noise_trace / report.noise_norm
        aligned = report.product_trace / report.noise_norm
        return {
            "trace": (report.hessian_trace, report.hessian_trace_standard_error),
            "norm": (report.hessian_norm, report.hessian_norm_standard_error),
            "null": (report.null_alignment / noise, report.null_alignment_standard_error / noise),
            "alignment": (report.alignment / aligned, report.alignment_standard_error / aligned),
        }

    for values, errors in draw(jax.random.split(KEY, 1000)).values():
        spread = np.std(np.asarray(values), ddof=1)
        # 5 / sqrt(2 * 1000), and what the linearisation of the square root leaves out.
        assert np.sqrt(np.mean(np.asarray(errors) ** 2)) == pytest.approx(spread, rel=0.15)


def test_chunks_and_jit_change_nothing(double):
    problem, dropped = problem_and_dropout()

    def measure(params, chunk_size):
        return diagnostics.dropout_noise_alignment(
            loss_fn, dropped, params, *problem.batch, key=KEY, num_samples=5, num_directions=2,
            num_probes=4, chunk_size=chunk_size,
        )  # fmt: skip

    whole = measure(problem.params, None)
    chunked = jax.jit(functools.partial(measure, chunk_size=3))(problem.params)
    same_sign = lambda leaf: jnp.abs(leaf)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(same_sign(one), same_sign(other), rtol=1e-8, atol=1e-10)


def test_directions_without_noise_have_no_curvature():
    loud = Partial(normal_noise, mixing=MIXING[:, :2])
    measure = functools.partial(
        diagnostics.dropout_noise_alignment, diagonal_loss,
        key=KEY, num_samples=6, num_directions=4, num_probes=1,
    )  # fmt: skip
    report = measure(loud, jnp.ones(N), SLOPES)
    np.testing.assert_array_equal(np.isnan(report.curvatures), [False, False, True, True])
    np.testing.assert_array_equal(report.eigenvectors[2:], np.zeros((2, N)))
    assert np.isnan(report.alignment_standard_error)  # of a single probe
    silent = measure(Partial(normal_noise, mixing=0 * MIXING), jnp.ones(N), SLOPES)
    assert float(silent.noise_norm) == 0
    assert np.isnan(silent.alignment)


def test_more_parameters_than_the_root_of_the_largest_integer():
    size = 50_000
    slopes = jnp.ones((2, size)).at[:, 0].set(300)
    report = diagnostics.dropout_noise_alignment(
        diagonal_loss, lambda w, key: jnp.dot(w, jax.random.normal(key, w.shape)),
        jnp.ones(size), slopes, key=KEY, num_samples=2, num_directions=1, num_probes=2,
    )  # fmt: skip
    # Sigma has one eigenvalue; H has one of 300 and else ones.
    total, norm = size + 299, np.sqrt(size + 300**2 - 1)
    shares = 1 - total**2 / norm**2 / size, 1 - 1 / size
    expected = np.sqrt(2 * shares[0] * shares[1]) / size
    assert float(report.null_std) == pytest.approx(expected, rel=1e-3)


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.tanh(self.first(x))))


@pytest.mark.usefixtures("default_promotion")
def test_a_flax_model():
    problem = oracles.problem(7, 3, 6, 2)
    model = regjax.from_nnx(Net())

    def dropped(params, key):
        outputs, _ = model.apply(params, model.state, problem.inputs, train=True, key=key)
        return oracles.squared_error(outputs, problem.targets)

    loss = regjax.model_loss(model, oracles.squared_error)
    report = diagnostics.dropout_noise_alignment(
        loss, dropped, model.params, *problem.batch, key=KEY, num_samples=8, num_directions=2
    )
    assert report.eigenvectors["first"]["kernel"].shape == (2, 3, 6)
    assert float(report.alignment) > float(report.null_alignment + 5 * report.null_std)


def test_error_texts():
    with pytest.raises(ValueError, match=r"`num_directions` must be between 1 and 2 \(.*\), got 3"):
        on_diagonal(num_samples=3, num_directions=3)
    with pytest.raises(ValueError, match="`num_samples` must be at least 2, got 1"):
        on_diagonal(num_samples=1)
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        on_diagonal(num_probes=0)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        on_diagonal(key=0)
