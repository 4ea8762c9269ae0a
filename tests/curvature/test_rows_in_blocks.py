"""Whole methods on bases in several blocks, as those of large networks are; rows are few here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from tests import oracles

pytestmark = pytest.mark.usefixtures("in_blocks")


class Stopped(Exception):
    pass


def operator_of(eigenvalues):
    matrix = oracles.symmetric(eigenvalues)
    return curvature.from_matvec(oracles.matvec_of(matrix), jnp.zeros(len(matrix)))


@pytest.mark.parametrize("num_steps", [10, 40])
def test_rows_of_lanczos_and_their_padding(num_steps):
    operator = operator_of(np.linspace(0, 1, 60))
    result = curvature.lanczos(operator, jnp.linspace(1.0, 2.0, 60), num_steps)
    assert result.basis.shape == (num_steps, 60)
    np.testing.assert_allclose(result.basis @ result.basis.T, np.eye(num_steps), atol=2e-6)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_eigenpairs_through_restarts(is_compiled):
    eigenvalues = np.sort(np.random.default_rng(3).normal(size=120))
    operator, key = operator_of(eigenvalues), jax.random.key(0)
    find = lambda key: curvature.top_eigenpairs(operator, 4, key=key, tol=1e-4, max_basis=34)
    solver = curvature.top_eigenpairs_solver(operator, 4, key=key, max_basis=34)
    assert len(solver.init().krylov.basis.blocks) == 5
    result = (jax.jit(find) if is_compiled else find)(key)
    assert bool(result.complete)
    assert int(result.num_matvecs) > 34
    np.testing.assert_allclose(result.values, eigenvalues[::-1][:4], atol=1e-4 * 3)
    np.testing.assert_allclose(result.vectors @ result.vectors.T, np.eye(4), atol=1e-5)


def test_a_density_and_what_it_takes_out():
    eigenvalues = np.concatenate([[20.0, -10.0], np.random.default_rng(0).normal(size=98) * 0.1])
    density = curvature.spectral_density(
        operator_of(eigenvalues), num_steps=20, num_probes=2, deflate=40, key=jax.random.key(0)
    )
    found = np.asarray(density.eigenvalues)[: int(density.num_eigenvalues)]
    np.testing.assert_allclose([found[0], found[-1]], [20, -10], rtol=1e-4)
    assert float(density.weights.sum() + density.eigenvalue_weights.sum()) == pytest.approx(1)
    assert np.abs(np.asarray(density.nodes)[np.asarray(density.weights) > 1e-6]).max() < 1


def test_a_run_in_two_pieces_gives_the_bits_of_one(tmp_path):
    operator, start = operator_of(np.linspace(0, 1, 60)), jnp.linspace(1.0, 2.0, 60)
    checkpoint = curvature.Checkpoint(tmp_path, every=3)

    def stop(step, *_):
        if step == 20:
            raise Stopped

    with pytest.raises(Stopped):
        curvature.lanczos(operator, start, 40, checkpoint=checkpoint, callback=stop)
    result = curvature.lanczos(operator, start, 40, checkpoint=checkpoint)
    expected = curvature.lanczos(operator, start, 40)
    for one, other in zip(result, expected, strict=True):
        np.testing.assert_array_equal(one, other)
