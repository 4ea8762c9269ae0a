"""On a mesh what a branch gives says where it lies: else XLA for CUDA has it whole on each chip."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from regjax import _jaxprs
from regjax._space import Space
from regjax.curvature import _krylov

LENGTH = 4096


def given_vectors(jaxpr):
    """For each vector that a branch gives, the name of the operation that makes it."""
    for equation in _jaxprs.equations(jaxpr):
        if equation.primitive.name != "cond":
            continue
        for branch in equation.params["branches"]:
            made = {out: each.primitive.name for each in branch.jaxpr.eqns for out in each.outvars}
            for out in branch.jaxpr.outvars:
                if out.aval.shape[-1:] == (LENGTH,):
                    yield made.get(out)


def test_vectors_that_branches_give_are_constrained(in_blocks):
    mesh = jax.make_mesh((1,), ("chips",), axis_types=(AxisType.Auto,))
    space = Space.of(jnp.zeros(LENGTH), mesh)

    def step(start, image):
        krylov = _krylov.empty(space, start, 20, jax.random.key(0))
        return _krylov.renewed(_krylov.absorb(krylov, image))

    vector = jax.ShapeDtypeStruct((LENGTH,), jnp.float32)
    found = list(given_vectors(jax.make_jaxpr(step)(vector, vector).jaxpr))
    assert len(found) >= 6
    assert set(found) == {"sharding_constraint"}
