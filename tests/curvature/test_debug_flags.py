"""Under jax_debug_nans and jax_debug_infs nothing of a finite problem is NaN or infinite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature, transforms
from tests.curvature.test_density import operator_of

MATRICES = {
    "outliers": [9.0, 5.0, 5.0, 3.0, *(0.1 * np.random.default_rng(0).normal(size=96))],
    "breaks down": [3.0, 2.0] + [0.0] * 98,
    "tiny": [1.0, 2.0, 3.0],
    "zero": [0.0] * 100,  # of one size: they share programs
}
KEY = jax.random.key(0)


def start(operator):
    return operator.space.unravel(jnp.ones(operator.space.size))


SOLVERS = {
    **{
        f"eigenpairs {which}": lambda o, which=which: curvature.top_eigenpairs(
            o, 2, key=KEY, which=which
        )
        for which in ("LA", "SA", "LM", "BE")
    },
    "eigenpairs without search": lambda o: curvature.top_eigenpairs(o, 2, key=KEY, search=False),
    "density": lambda o: curvature.spectral_density(o, key=KEY),
    "one run": lambda o: curvature.lanczos(o, start(o), 3, key=KEY),
    "ritz pairs": lambda o: curvature.ritz_pairs(curvature.lanczos(o, start(o), 3)),
    **{
        f"solve by {method}": lambda o, method=method: curvature.solve(
            o, start(o), method=method, damping=0.1
        )._replace(error_bound=0.0)  # of a given product nothing is known
        for method in ("cg", "minres")
    },
    "function": lambda o: curvature.apply_function(jnp.exp, o, start(o), num_steps=3),
    **{
        f"{method} {of}": lambda o, of=of, method=method: getattr(curvature, of)(
            o, key=KEY, num_matvecs=9, method=method
        )
        for method in ("hutchinson", "hutch++")
        for of in ("trace", "diagonal")
    },
}


@pytest.fixture(autouse=True)
def flags():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_solvers_run_and_their_results_are_finite(name, matrix):
    result = SOLVERS[name](operator_of(MATRICES[matrix]))
    for leaf in jax.tree.leaves(result):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("solver", ["eigenpairs BE", "density"])
def test_compiled_solvers_run(solver):
    jax.block_until_ready(jax.jit(SOLVERS[solver])(operator_of(MATRICES["breaks down"])))


def test_restarts_and_searches_run():
    operator = operator_of(MATRICES["outliers"])
    result = curvature.top_eigenpairs(operator, 3, key=KEY, max_basis=8, max_matvecs=100)
    np.testing.assert_allclose(result.values, [9, 5, 5], rtol=1e-3)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_an_unknown_error_is_still_nan(method):
    operator = operator_of(MATRICES["tiny"])
    count = {"hutchinson": 1, "hutch++": 3}[method]
    result = curvature.trace(operator, key=KEY, num_matvecs=count, method=method)
    assert np.isnan(np.asarray(result.standard_error))
    assert np.isfinite(np.asarray(result.value))


def test_what_is_drawn_is_made():
    density = curvature.spectral_density(operator_of(MATRICES["outliers"]), key=KEY)
    curvature.eigenvalue_count(density, high=1.0)
    for scale in ("linear", "symlog"):
        curvature.density_curve(density, axis_scale=scale)


def test_the_controller_runs():
    tx = transforms.spectral_controller(key=KEY, initial_learning_rate=0.01, every=1, num_steps=5)
    grad_fn = lambda params, i: jax.tree.map(lambda leaf: 2 * leaf, params)
    params = {"w": jnp.ones(12)}
    state = jax.jit(tx.init)(params)
    for _ in range(3):
        _, state = tx.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
    assert state.refresh_ok
