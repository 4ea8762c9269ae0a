"""What a method makes of products is summed in full float32, whatever the model multiplies in."""

import jax
import jax.numpy as jnp
import pytest

from regjax import _jaxprs, curvature

SIZE = 4096  # in lanes on a CPU, as matrix products elsewhere
KEY = jax.random.key(0)
SOLVERS = {
    "top_eigenpairs": lambda A: curvature.top_eigenpairs_solver(A, 2, key=KEY),
    "both ends": lambda A: curvature.top_eigenpairs_solver(A, 2, key=KEY, which="BE"),
    "lanczos": lambda A: curvature.lanczos_solver(A, jnp.ones(SIZE), 8),
    "compensated": lambda A: curvature.lanczos_solver(
        A, jnp.ones(SIZE), 8, accumulation="compensated"
    ),
    "density": lambda A: curvature.spectral_density_solver(A, key=KEY, num_steps=8, num_probes=2),
    "hutch++": lambda A: curvature.trace_solver(A, key=KEY, num_matvecs=9, method="hutch++"),
    "diagonal": lambda A: curvature.diagonal_solver(A, key=KEY, num_matvecs=3),
}


def products(function, *arguments):
    """The precision of each matrix product in a traced function."""
    traced = jax.make_jaxpr(function)(*arguments)
    equations = _jaxprs.equations(traced.jaxpr)
    return [eqn.params["precision"] for eqn in equations if eqn.primitive.name == "dot_general"]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_method_never_multiplies_as_the_model_does(name):
    diagonal = jnp.arange(1.0, SIZE + 1)
    operator = curvature.from_matvec(lambda v: diagonal * v, jnp.zeros(SIZE))
    highest = (jax.lax.Precision.HIGHEST,) * 2
    with jax.default_matmul_precision("bfloat16"):
        solver = SOLVERS[name](operator)
        state = jax.eval_shape(solver.init)
        found = products(solver.init)
        found += products(lambda state: solver.update(state, solver.vectors(state)), state)
        found += products(solver.beside, state)
    assert set(found) <= {highest}
    assert found or name in ("diagonal",)
