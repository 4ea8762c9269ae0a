"""What an error says to do: how a vector becomes a tree, and where a bound comes from."""

import jax
import jax.numpy as jnp
import pytest

from regjax import _checks, curvature, diagnostics

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


def test_no_examples_are_refused_before_their_mean_is_nan():
    loss_fn = lambda w, x: jnp.mean((x @ w) ** 2)
    for use in (
        lambda x: curvature.hessian(loss_fn, jnp.ones(2), x),
        lambda x: diagnostics.gradient_noise(loss_fn, jnp.ones(2), x, batch_size=1),
        lambda x: curvature.hessian(loss_fn, jnp.ones(2), x, chunk_size=2),
    ):
        with pytest.raises(ValueError, match="`batch` must hold at least one example, got 0"):
            use(jnp.ones((0, 2)))


def test_static_arguments_are_to_be_bound():
    loss_fn = jax.jit(lambda w, x, n: jnp.sum(w) * n, static_argnums=2)
    with pytest.raises(ValueError, match="static arguments") as error:
        curvature.hessian(loss_fn, jnp.ones(2), jnp.ones(3), 3)
    assert "functools.partial(loss_fn, n=3)" in error.value.__notes__[-1]


def test_a_number_is_no_operator():
    with pytest.raises(TypeError, match=r"got a number; .* `c \* curvature\.identity"):
        matrix() + 0.1
    matrix() + 0.1 * curvature.identity(matrix().space)


def test_influence_names_its_own_argument():
    loss_fn = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    good, bad = (jnp.ones((4, 2)), jnp.ones(4)), (jnp.ones((4, 2)), jnp.ones(3))
    for train, test, name in ((bad, good, "train"), (good, bad, "test")):
        with pytest.raises(ValueError, match=f"`{name}` must have one leading axis of examples"):
            diagnostics.influence(loss_fn, jnp.ones(2), train, test, damping=0.1)


@pytest.mark.parametrize("use", [
    lambda: curvature.top_eigenpairs(matrix(), 7, key=KEY),
    lambda: curvature.lanczos(matrix(), PARAMS, 7),
    lambda: curvature.spectral_density(matrix(), key=KEY, deflate=7),
])  # fmt: skip
def test_a_bound_says_where_it_comes_from(use):
    with pytest.raises(ValueError, match=r"and 6 \(the order of the matrix, .* number of param"):
        use()
