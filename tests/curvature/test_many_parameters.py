"""More parameters than an int32 counts: traced only, for no array of theirs fits here."""

import jax
import jax.numpy as jnp
import pytest

from regjax import curvature
from regjax._space import Space
from regjax.curvature import _assessment, identity

SIZE = 3_000_000_000
KEY = jax.random.key(0)
SOLVERS = {
    "lanczos": lambda A, start: curvature.lanczos_solver(A, start, 4),
    "top_eigenpairs": lambda A, start: curvature.top_eigenpairs_solver(A, 2, key=KEY, max_basis=8),
    "without search": lambda A, start: curvature.top_eigenpairs_solver(
        A, 2, key=KEY, max_basis=8, search=False
    ),
    "density": lambda A, start: curvature.spectral_density_solver(
        A, key=KEY, num_steps=4, num_probes=2, deflate=0
    ),
    "chosen steps": lambda A, start: curvature.spectral_density_solver(A, key=KEY, deflate=0),
    "trace": lambda A, start: curvature.trace_solver(A, key=KEY, num_matvecs=6),
    "hutch++": lambda A, start: curvature.trace_solver(A, key=KEY, num_matvecs=6, method="hutch++"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_counts_beyond_an_int32(name):
    operator = 2.0 * identity(Space.of(jax.ShapeDtypeStruct((SIZE,), jnp.float32)))

    def run(start):
        solver = SOLVERS[name](operator, start)
        state = solver.init()
        # A restart goes over the columns, of which one device can have 2^31.
        restarts = solver.name == "top_eigenpairs"
        state = _assessment.assess(state) if restarts else solver.step(state)
        return solver.done(state), solver.result(state)

    _, result = jax.eval_shape(run, jax.ShapeDtypeStruct((SIZE,), jnp.float32))
    assert all(leaf.dtype != jnp.int64 for leaf in jax.tree.leaves(result))
