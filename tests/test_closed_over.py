"""Functions in somebody's jit that closed over all of their arguments: the same numbers."""

import jax
import numpy as np
import pytest

from regjax import diagnostics, pruning
from tests import calls

CALLS = {**calls.PRUNING, **calls.DIAGNOSTICS}


def test_every_public_function_has_a_call():
    assert calls.public(pruning) == set(calls.PRUNING)
    assert calls.public(diagnostics) == set(calls.DIAGNOSTICS) | calls.ELSEWHERE


# What solves for eigenvalues is slow to compile, and takes the same ways as the others; a structure
# has no arrays.
NOT_HERE = {"lambda_max_between", "sharpness_reduction_flow", "find_structure"}


@pytest.mark.parametrize("name", sorted(CALLS.keys() - NOT_HERE))
def test_under_jit_with_everything_closed_over(name):
    expected = CALLS[name]()
    found = jax.jit(lambda: CALLS[name]())()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
