import _thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import curvature
from tests import oracles

OUTLIERS = [20.0, 12.0, 9.0, -4.0]


def spectrum(size=300):
    return np.concatenate([OUTLIERS, np.random.default_rng(0).normal(size=size - 4) ** 3 * 0.05])


def operator_of(eigenvalues):
    diagonal = jnp.asarray(eigenvalues, jnp.float32)
    return curvature.from_matvec(jax.tree_util.Partial(jnp.multiply, diagonal), diagonal)


def solve(eigenvalues, seed=0, **options):
    return curvature.spectral_density(operator_of(eigenvalues), key=jax.random.key(seed), **options)


def total_mass(density):
    return float(density.weights.sum() + density.eigenvalue_weights.sum())


@pytest.mark.parametrize("deflate", [None, 0, 10])
def test_mass_is_one_and_products_are_counted(deflate):
    density = solve(spectrum(), num_steps=12, num_probes=3, deflate=deflate)
    assert total_mass(density) == pytest.approx(1, abs=1e-5)
    assert int(density.num_matvecs) == (24 if deflate is None else deflate) + 36
    assert density.nodes.shape == density.weights.shape == (3, 12)


def test_outliers_are_taken_out_exactly():
    density = solve(spectrum(), num_steps=20)
    found = np.asarray(density.eigenvalues)[: int(density.num_eigenvalues)]
    np.testing.assert_allclose(found[:3], [20, 12, 9], rtol=1e-4)
    np.testing.assert_allclose(found[-1], -4, rtol=1e-3)
    # What is left to the probes is the bulk: no node where the outliers were.
    heavy = np.asarray(density.nodes)[np.asarray(density.weights) > 1e-6]
    assert heavy.max() < 5
    assert heavy.min() > -3


@pytest.mark.parametrize("deflate", [0, 30])
def test_equivariance_under_scaling_and_shift(deflate):
    plain = solve(spectrum(), num_steps=10, deflate=deflate)
    moved = solve(3 * spectrum() + 2, num_steps=10, deflate=deflate)
    np.testing.assert_allclose(moved.nodes, 3 * plain.nodes + 2, rtol=2e-3, atol=2e-3)
    assert int(plain.num_eigenvalues) == int(moved.num_eigenvalues)
    assert float(moved.trace) == pytest.approx(3 * float(plain.trace) + 2 * 300, rel=1e-3)


@pytest.mark.parametrize("deflate", [0, 30])
def test_moments_are_unbiased_and_the_standard_error_is_theirs(deflate):
    # z-scores over seeds have mean 0 and deviation 1: an error too small by 1.5 fails.
    eigenvalues = spectrum()
    compiled = jax.jit(
        lambda seed: solve(eigenvalues, seed, num_steps=25, num_probes=2, deflate=deflate)
    )
    densities = [compiled(seed) for seed in range(40)]
    for function in (lambda x: x, lambda x: x**2, jnp.abs):
        exact = float(np.sum(function(eigenvalues)))
        totals = [curvature.spectral_sum(density, function) for density in densities]
        scores = [(float(total.value) - exact) / float(total.standard_error) for total in totals]
        assert abs(np.mean(scores)) < 5 / np.sqrt(40)
        assert 0.6 < np.std(scores) < 1.5


def test_trace_field_is_the_sum_of_the_identity():
    density = solve(spectrum())
    total = curvature.spectral_sum(density, lambda values: values)
    assert float(density.trace) == float(total.value)
    assert float(density.trace_standard_error) == float(total.standard_error)


def test_deflating_everything_is_exact():
    eigenvalues = np.random.default_rng(1).normal(size=20)
    density = solve(eigenvalues, num_steps=5, deflate=20)
    assert int(density.num_eigenvalues) == 20
    np.testing.assert_allclose(density.eigenvalues, np.sort(eigenvalues)[::-1], atol=1e-5)
    assert total_mass(density) == pytest.approx(1, abs=1e-6)
    assert float(density.trace) == pytest.approx(eigenvalues.sum(), abs=1e-4)
    assert float(density.trace_standard_error) == pytest.approx(0, abs=1e-4)


def test_low_rank_matrix_does_not_break_down():
    density = solve([3.0, 2.0] + [0.0] * 98, num_steps=10, num_probes=2)
    assert np.all(np.isfinite(density.nodes))
    assert total_mass(density) == pytest.approx(1, abs=1e-5)
    assert float(density.trace) == pytest.approx(5, abs=1e-3)


def test_effective_dimension():
    eigenvalues = spectrum()
    exact = np.sum(np.maximum(eigenvalues, 0) / (np.maximum(eigenvalues, 0) + 0.5))
    densities = [solve(eigenvalues, seed, num_steps=40) for seed in range(10)]
    estimates = [curvature.effective_dimension(density, damping=0.5) for density in densities]
    for estimate in estimates:
        assert abs(float(estimate.value) - exact) < 5 * float(estimate.standard_error)
        assert float(estimate.standard_error) < 0.2 * exact
    # |l| in place of max(l, 0) is the wrong version.
    with_modulus = np.sum(np.abs(eigenvalues) / (np.abs(eigenvalues) + 0.5))
    mean = np.mean([float(estimate.value) for estimate in estimates])
    assert abs(mean - exact) < abs(mean - with_modulus)


def test_compiled_loop_gives_the_host_driven_result():
    operator = operator_of(spectrum())

    def run(operator, key):
        return curvature.spectral_density(operator, key=key, num_steps=8, num_probes=2)

    driven, compiled = run(operator, jax.random.key(0)), jax.jit(run)(operator, jax.random.key(0))
    assert float(driven.trace) == pytest.approx(float(compiled.trace), rel=1e-3)
    assert int(driven.num_matvecs) == int(compiled.num_matvecs)


def test_stages_by_hand_are_the_plain_function():
    operator = operator_of(spectrum())
    options = {"key": jax.random.key(0), "num_steps": 6, "num_probes": 2, "deflate": 10}
    solver = curvature.spectral_density_solver(operator, **options)
    assert (solver.max_steps, solver.later_steps) == (10, 2 * 6)
    state = solver.init()
    for _ in range(solver.max_steps):
        state = solver.step(state)
    probes, state = solver.then(state)
    for _ in range(probes.max_steps):
        state = probes.step(state)
    plain = curvature.spectral_density(operator, **options)
    for ours, theirs in zip(probes.result(state), plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_small_matrices_need_no_options():
    for size in (1, 2, 39, 60):
        eigenvalues = np.random.default_rng(size).normal(size=size)
        density = solve(eigenvalues)
        assert float(density.trace) == pytest.approx(eigenvalues.sum(), abs=1e-4)
        assert total_mass(density) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_steps_are_as_many_as_the_numbers_need():
    # A spectrum of three values is known after a few steps, one crowded at 0 needs all of them.
    easy = solve([3.0] * 100 + [2.0] * 100 + [1.0] * 100)
    assert np.asarray(easy.num_steps).tolist() == [40, 40]
    cubes = np.random.default_rng(0).normal(size=2000) ** 3
    crowded = solve(cubes, num_probes=1)
    assert np.asarray(crowded.num_steps).tolist() == [320]
    assert int(crowded.num_matvecs) == 80 + 320
    some = solve(np.linspace(-1, 5, 600))
    steps = np.asarray(some.num_steps)
    assert np.all((steps >= 40) & (steps < 320))
    assert int(some.num_matvecs) == 80 + steps.sum()
    # Beyond a probe's own steps there are copies of its last node.
    beyond = np.arange(320) >= steps[:, None]
    last = np.take_along_axis(np.asarray(some.nodes), steps[:, None] - 1, 1)
    assert np.all(np.where(beyond, some.nodes == last, True))
    assert np.all(np.asarray(some.weights)[beyond] == 0)
    # Stopped where the bounds are as narrow as the probes' own error, and not before.
    count = curvature.eigenvalue_count(some, high=1.0)
    half = (count.upper_bound - count.lower_bound) / 2
    assert float(half) < 2 * float(count.standard_error)


def test_chosen_steps_inside_of_a_compiled_program():
    operator = operator_of(np.linspace(-1, 5, 90))
    run = lambda operator, key: curvature.spectral_density(operator, key=key, num_probes=1)
    driven, compiled = run(operator, jax.random.key(0)), jax.jit(run)(operator, jax.random.key(0))
    assert int(driven.num_matvecs) == int(compiled.num_matvecs)
    np.testing.assert_array_equal(driven.num_steps, compiled.num_steps)
    assert float(driven.trace) == pytest.approx(float(compiled.trace), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"num_steps": 8}, {"deflate": 0, "num_steps": 8}])
def test_nothing_is_filled_with_what_debugging_forbids(options):
    eigenvalues = [3.0, 2.0] + [0.0] * 98  # breaks down, and little is taken out
    with jax.debug_nans(True), jax.debug_infs(True):
        density = solve(eigenvalues, **options)
        curvature.eigenvalue_count(density, [-jnp.inf, 1.0], [1.0, jnp.inf])
        curvature.density_curve(density)
    assert all(np.all(np.isfinite(array)) for array in density)


def test_error_texts():
    density = solve(spectrum(), num_steps=4, num_probes=1, deflate=0)
    with pytest.raises(ValueError, match=r"`num_steps` must be between 1 and 300 \(.*\), got 301"):
        solve(spectrum(), num_steps=301)
    with pytest.raises(ValueError, match=r"`deflate` must be between 0 and 300 \(.*\), got -1"):
        solve(spectrum(), deflate=-1)
    with pytest.raises(ValueError, match="`damping` must be positive, got 0"):
        curvature.effective_dimension(density, damping=0)


def test_hessian_density_of_a_network_against_the_dense_spectrum():
    problem = oracles.problem(num_examples=50, num_inputs=8, width=20)
    operator = curvature.hessian(oracles.loss_fn, problem.params, *problem.batch)
    exact = np.asarray(curvature.exact_spectrum(operator))
    density = curvature.spectral_density(operator, key=jax.random.key(0))
    assert abs(float(density.trace) - exact.sum()) <= 5 * float(density.trace_standard_error) + 1e-3
    np.testing.assert_allclose(density.eigenvalues[:3], exact[::-1][:3], rtol=1e-3)


@pytest.mark.parametrize(("after", "finished"), [(5, 0), (10, 0), (17, 1)])
def test_interrupted_it_says_what_was_done(after, finished):
    def callback(count, total, progress):
        assert total == 10 + 2 * 6
        if count == after:
            _thread.interrupt_main()

    with pytest.raises(regjax.Interrupted) as caught:
        solve(spectrum(), num_steps=6, num_probes=2, deflate=10, callback=callback)
    found = caught.value.result
    assert int(found.num_matvecs) == after
    # Of a deflation cut short nothing is taken out; before the first probe nothing is known.
    assert (int(found.num_eigenvalues) > 0) == (after >= 10)
    if finished:
        assert total_mass(found) == pytest.approx(1, abs=1e-5)
    assert np.isnan(total_mass(found)) == np.isnan(float(found.trace)) == (not finished)
