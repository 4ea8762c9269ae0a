"""What an error says to do: how a vector becomes a tree, and where a bound comes from."""

import jax
import jax.numpy as jnp
import pytest

from regjax import _checks, curvature

PARAMS = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
KEY = jax.random.key(0)


def matrix():
    return curvature.hessian(lambda p: jnp.sum(p["a"] ** 4) + jnp.sum(p["b"] ** 4), PARAMS)


@pytest.mark.parametrize("use", [
    lambda vector: matrix().matvec(vector),
    lambda vector: matrix() @ vector,
    lambda vector: curvature.solve(matrix(), vector),
    lambda vector: curvature.lanczos(matrix(), vector, 2),
    lambda vector: matrix().scaled(vector),
])  # fmt: skip
def test_a_flat_vector_is_told_of_unravel(use):
    with pytest.raises(ValueError, match=r"shape \(6,\)\. `operator\.space\.unravel\(vector\)`"):
        use(jnp.ones(6))
    use(matrix().space.unravel(jnp.ones(6)))


def test_a_tree_is_told_of_ravel():
    flat = curvature.from_matvec(lambda v: 2 * v, jnp.ones(6))
    with pytest.raises(ValueError, match=r"with .*\. `operator\.space\.ravel\(tree\)`"):
        flat.matvec(PARAMS)
    table = curvature.from_matvec(lambda v: 2 * v, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(6,\)\. `operator\.space\.unravel"):
        table.matvec(jnp.ones(6))
    # No hint where that would not help.
    with pytest.raises(ValueError, match=r"got a single array of shape \(5,\)\.$"):
        matrix().matvec(jnp.ones(5))


def test_the_leaves_that_differ_are_named():
    large = {f"layer_{i}": jnp.ones(2) for i in range(40)}
    other = {name: leaf for name, leaf in large.items() if name != "layer_7"} | {"head": 1.0}
    message = r"of 40 leaves, got one without \['layer_7'\] and with \['head'\]\.$"
    with pytest.raises(ValueError, match=message):
        _checks.same_tree("vector", other, large)


@pytest.mark.parametrize("use", [
    lambda: curvature.top_eigenpairs(matrix(), 7, key=KEY),
    lambda: curvature.lanczos(matrix(), PARAMS, 7),
    lambda: curvature.spectral_density(matrix(), key=KEY, deflate=7),
])  # fmt: skip
def test_a_bound_says_where_it_comes_from(use):
    with pytest.raises(ValueError, match=r"and 6 \(the order of the matrix, .* number of param"):
        use()
