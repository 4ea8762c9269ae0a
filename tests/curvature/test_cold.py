"""What a first call compiles, and how often pairs are assessed."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import _on_host, curvature
from regjax.curvature import _assessment
from tests.compilations import programs


def operator(size):
    """A matrix of an order that no other test has, so that nothing is compiled already."""
    values = jnp.linspace(-1, 1, size) ** 3 * 10
    return curvature.hessian(lambda w: 0.5 * jnp.sum(values * w**2), jnp.zeros(size))


def test_the_first_eigenpairs_are_few_programs():
    matrix, key = operator(1237), jax.random.key(0)
    with programs() as names:
        result = curvature.top_eigenpairs(matrix, 4, key=key, max_basis=20)
    assert result.complete
    assert sorted(set(names)) == sorted(names)
    large = {"_normal", "_large", "_scale", "_step", "_recombined", "drawn_outside", "_vectors"}
    assert large <= set(names)
    # A product and what it keeps, and the type of the result's numbers.
    small = {"_product", "_linear_map", "stage", "convert_element_type", "jaxpr_as_fun"}
    assert set(names) - large <= small


def test_the_first_density_is_few_programs():
    matrix, key = operator(1239), jax.random.key(0)
    with programs() as names:
        density = curvature.spectral_density(matrix, key=key)
    assert int(density.num_matvecs) > 160
    large = ["_normal", "_large", "_large", "_scale", "_step", "_step", "combined", "outside"]
    small = {"_product", "_linear_map", "stage", "convert_element_type"}
    assert sorted(name for name in names if name not in small) == sorted(large)


def test_a_second_call_compiles_nothing():
    matrix, key = operator(1241), jax.random.key(0)
    first = curvature.top_eigenpairs(matrix, 2, key=key)
    with programs() as names:
        second = curvature.top_eigenpairs(matrix, 2, key=key)
    assert names == []
    np.testing.assert_array_equal(first.values, second.values)


@contextlib.contextmanager
def assessed_each_time(monkeypatch):
    """Without waiting, as if each product could end the run."""
    _on_host._traced.cache_clear()
    with monkeypatch.context() as patch:
        decided = _assessment._decided
        at_once = lambda state, *rest: dataclasses.replace(
            decided(state, *rest), next_assessment=state.num_matvecs
        )
        patch.setattr(_assessment, "_decided", at_once)
        yield
    _on_host._traced.cache_clear()


def spectrum(kind, size=300):
    rng = np.random.default_rng(5)
    if kind == "outliers":
        values = np.concatenate([rng.normal(size=size - 12) * 0.02, np.geomspace(0.3, 9, 12)])
    elif kind == "bulk":
        values = rng.uniform(-1, 1, size)
    else:
        values = np.repeat(rng.uniform(0.5, 9, size // 4), 4)
    values = jnp.asarray(values, jnp.float32)
    return curvature.hessian(lambda w: 0.5 * jnp.sum(values * w**2), jnp.zeros(size))


@pytest.mark.parametrize("kind", ["outliers", "bulk", "multiple"])
@pytest.mark.parametrize("search", [True, False])
def test_assessing_in_time_finds_what_assessing_each_time_does(kind, search, monkeypatch):
    matrix, seen = spectrum(kind), {False: [], True: []}

    def solve(always):
        note = lambda done, total, progress: seen[always].append(progress.result)
        return curvature.top_eigenpairs(
            matrix, 10, key=jax.random.key(2), search=search, max_matvecs=250,
            callback=note if kind == "outliers" else None,
        )  # fmt: skip

    with assessed_each_time(monkeypatch):
        expected = solve(always=True)
    found = solve(always=False)
    # No product is wasted but the few that a pair converged before it was looked at.
    assert 0 <= int(found.num_matvecs) - int(expected.num_matvecs) <= _assessment._MOST_WAITING
    np.testing.assert_array_equal(found.converged, expected.converged)
    assert found.complete == expected.complete
    assert abs(float(found.miss_probability - expected.miss_probability)) < 0.01
    largest = float(jnp.max(jnp.abs(expected.values)))
    np.testing.assert_allclose(found.values, expected.values, atol=2e-3 * largest)
    # Whoever asks in between gets the result of all products so far.
    for one, other in zip(seen[False], seen[True], strict=False):
        assert one.num_matvecs == other.num_matvecs
        np.testing.assert_allclose(one.values, other.values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(one.converged, other.converged)


def test_nothing_is_assessed_before_there_are_k_pairs_nor_after_each_product():
    solver = curvature.top_eigenpairs_solver(spectrum("bulk"), 20, key=jax.random.key(0))
    state, assessed = solver.init(), []
    for _ in range(60):
        state = solver.step(state)
        assessed.append(int(state.num_assessed))
    times = sorted(set(assessed) - {0})
    assert times[0] == 20
    assert len(times) < 25


def test_assessing_in_time_inside_of_a_program():
    matrix, key = spectrum("outliers"), jax.random.key(2)
    solve = lambda key: curvature.top_eigenpairs(matrix, 5, key=key)
    found, expected = jax.jit(solve)(key), solve(key)
    assert found.num_matvecs == expected.num_matvecs
    np.testing.assert_array_equal(found.converged, expected.converged)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-4)
