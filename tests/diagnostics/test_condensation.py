"""Layers whose directions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import diagnostics

RANDOM = np.random.default_rng(0)


def at_angles(degrees, norms):
    """Neurons of a layer with two inputs at these angles: a kernel (2, m)."""
    radians = np.deg2rad(degrees)
    return jnp.asarray(np.stack([np.cos(radians), np.sin(radians)]) * norms, jnp.float32)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("num_directions", [1, 4])
def test_repeated_directions_with_noise(num_directions, wrap):
    directions = np.linalg.qr(RANDOM.normal(size=(6, num_directions)))[0]
    copies = np.repeat(directions, 5, axis=1) + 0.02 * RANDOM.normal(size=(6, 5 * num_directions))
    vectors = RANDOM.permutation(copies * RANDOM.uniform(0.1, 3, 5 * num_directions), axis=1)
    vectors = jnp.asarray(vectors, jnp.float32)
    # The bias counts: it is the last entry of a neuron's vector.
    report = wrap(diagnostics.condensation)(vectors[:-1], vectors[-1])
    assert int(report.effective_number) == num_directions
    assert float(report.effective_ratio) == pytest.approx(1 / 5)
    norms = np.linalg.norm(vectors, axis=0)
    np.testing.assert_allclose(report.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(
        report.cosines, (vectors.T @ vectors) / np.outer(norms, norms), atol=1e-6
    )


def test_opposite_neurons_are_two_directions():
    kernel = jnp.asarray([[1.0, -2.0, 3.0], [2.0, -4.0, 6.0]])
    assert int(diagnostics.condensation(kernel).effective_number) == 2


def test_neurons_that_differ_in_the_bias_alone_are_apart():
    kernel = jnp.ones((1, 2))
    assert int(diagnostics.condensation(kernel).effective_number) == 1
    assert int(diagnostics.condensation(kernel, jnp.asarray([3.0, -3.0])).effective_number) == 2


@pytest.mark.parametrize(("norms", "number"), [((1, 3, 2), 1), ((3, 2, 1), 2), ((1, 2, 3), 2)])
def test_the_largest_neuron_stands_first(norms, number):
    # 15 degrees apart: the cosine of neighbours is .966, that of the outer two .866.
    report = diagnostics.condensation(at_angles([0, 15, 30], norms))
    assert int(report.effective_number) == number


def test_covers_do_not_chain():
    # Twelve neurons 15 degrees apart from large to small: each covers the next and no more.
    report = diagnostics.condensation(at_angles(15 * np.arange(12), np.arange(12, 0, -1)))
    assert int(report.effective_number) == 6


def test_the_threshold_is_of_the_cosine():
    kernel = at_angles([0, 40], [1, 1])
    assert int(diagnostics.condensation(kernel, threshold=0.75).effective_number) == 1
    assert int(diagnostics.condensation(kernel, threshold=0.77).effective_number) == 2
    # Rounding puts no neuron outside of its own neighbourhood.
    assert int(diagnostics.condensation(kernel, threshold=1.0).effective_number) == 2


def test_dead_and_small_neurons_are_dropped():
    kernel = at_angles([0, 0, 90, 180], [1, 0, 1e-4, 2])
    report = diagnostics.condensation(kernel)
    assert not np.any(np.isnan(report.cosines))
    np.testing.assert_array_equal(report.cosines[1], np.zeros(4))
    assert int(report.effective_number) == 3
    report = diagnostics.condensation(kernel, min_norm=1e-3)
    assert int(report.effective_number) == 2
    assert float(report.effective_ratio) == pytest.approx(2 / 4)
    with jax.debug_nans(True):
        assert int(diagnostics.condensation(jnp.zeros((2, 3))).effective_number) == 0


def test_kernels_of_convolutions_and_half_precision():
    kernel = RANDOM.normal(size=(3, 3, 2, 1)) * np.asarray([1.0, 2, -1, 0.5])
    report = diagnostics.condensation(jnp.asarray(kernel, jnp.bfloat16), jnp.zeros(4, jnp.bfloat16))
    assert int(report.effective_number) == 2
    assert report.norms.dtype == jnp.float32


def test_error_texts():
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(..., m\), got \(3,\)"):
        diagnostics.condensation(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`bias` must have shape \(3,\), got \(2,\)"):
        diagnostics.condensation(jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match=r"`threshold` must be between -1 and 1, got 1.5"):
        diagnostics.condensation(jnp.ones((2, 3)), threshold=1.5)
    with pytest.raises(ValueError, match="`min_norm` must be non-negative, got -1"):
        diagnostics.condensation(jnp.ones((2, 3)), min_norm=-1)
