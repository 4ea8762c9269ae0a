import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import _numerics
from regjax._one_program import one_program


def test_division_is_guarded_with_its_derivative():
    denominators = jnp.array([2.0, 0.0, -4.0])
    found = _numerics.divide(jnp.ones(3), denominators, otherwise=7)
    np.testing.assert_array_equal(found, [0.5, 7, -0.25])
    slope = jax.grad(lambda d: jnp.sum(_numerics.divide(jnp.ones(3), d)))(denominators)
    np.testing.assert_array_equal(slope, [-0.25, 0, -0.0625])


def test_division_takes_its_condition():
    allowed = jnp.array([True, False])
    found = _numerics.divide(jnp.ones(2), jnp.array([0.0, 2.0]), where=allowed)
    np.testing.assert_array_equal(found, [np.inf, 0])


def test_mean_and_error_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    mean, error = _numerics.mean_and_error(jnp.asarray(values))
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(error, values.std(0, ddof=1) / np.sqrt(7), rtol=1e-5)


def test_part_outside_is_that_of_the_projector():
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.normal(size=(6, 2)))[0].T.astype(np.float32)
    vectors = rng.normal(size=(4, 6)).astype(np.float32)
    found = _numerics.part_outside(jnp.asarray(vectors), jnp.asarray(rows))
    np.testing.assert_allclose(found, vectors @ (np.eye(6) - rows.T @ rows), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_between_hits_both_ends(dtype):
    # start + 1 (end - start) misses the end by a rounding for one pair in three.
    keys = jax.random.split(jax.random.key(0))
    one, other = ({"a": jax.random.normal(key, (100,), dtype)} for key in keys)
    for share, end in ((0.0, one), (1.0, other)):
        found = _numerics.between(one, other, share)["a"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, end["a"])
    middle = _numerics.between(one, other, 0.5)["a"]
    exact = (one["a"].astype(jnp.float32) + other["a"].astype(jnp.float32)) / 2
    np.testing.assert_array_equal(middle, exact.astype(dtype))


SIZES = [1e-36, 1e-25, 1e-20, 1.0, 1e25, 3e37]


@pytest.mark.parametrize("size", SIZES)
def test_scaled_norms_and_powers_of_two(size):
    array = jnp.asarray([3.0, 4.0], jnp.float32) * size
    np.testing.assert_allclose(_numerics.scaled_norm(array), 5 * size, rtol=1e-6)
    power = float(_numerics.power_of_two(jnp.float32(size)))
    assert np.log2(power) % 1 == 0
    assert 0.4 < size * power <= 1 or abs(np.log2(power)) == 120
    for nothing in (0.0, np.nan, np.inf):
        assert float(_numerics.power_of_two(jnp.float32(nothing))) == 0
    assert float(_numerics.scaled_norm(jnp.zeros(3))) == 0


@pytest.mark.parametrize("size", SIZES)
def test_norms_of_trees_have_one_scale_and_their_derivative(size):
    tree = {"a": size * jnp.asarray([[2.0], [1.0]]), "b": jnp.float32(-2 * size), "c": jnp.zeros(2)}
    norm, slope = jax.value_and_grad(_numerics.scaled_norm)(tree)
    np.testing.assert_allclose(norm, 3 * size, rtol=1e-6)
    unit = {"a": [[2 / 3], [1 / 3]], "b": -2 / 3, "c": [0, 0]}
    for found in (slope, _numerics.unit(tree)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, {
            name: jnp.asarray(value) for name, value in unit.items()
        })  # fmt: skip
    other = {**tree, "b": -tree["b"]}
    np.testing.assert_allclose(_numerics.cosine(tree, other), (5 - 4) / 9, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-10, 1.1e-10, 1.0, 1e18])
def test_what_needs_no_scaling_is_what_scaling_gives(size):
    """On both sides of the size from which squares are summed as they are, and far beyond."""
    array = jnp.asarray([[3.0, 2.0], [4.0, -1.0]]) * size
    square = np.asarray(array, np.float64) ** 2
    unit = np.asarray(array) / np.sqrt(square.sum(0))
    np.testing.assert_allclose(_numerics.units_along(array, (0,)), unit, rtol=1e-6)
    cosine = 2 / np.sqrt(25 * 5)
    np.testing.assert_allclose(_numerics.cosine(array[:, 0], array[:, 1]), cosine, rtol=1e-6)
    slope = jax.grad(lambda a: jnp.sum(_numerics.units_along(a, (0,))[0]))(array)
    np.testing.assert_allclose(slope[:, 0] * size, [16 / 125, -12 / 125], rtol=1e-5)


def test_norms_of_nothing_are_zero_with_their_derivative():
    zero = {"a": jnp.zeros(2), "b": jnp.zeros((0, 3))}
    norm, slope = jax.value_and_grad(_numerics.scaled_norm)(zero)
    assert float(norm) == 0
    np.testing.assert_array_equal(slope["a"], 0)
    np.testing.assert_array_equal(_numerics.unit(zero)["a"], 0)
    assert float(_numerics.cosine(zero, {"a": jnp.ones(2), "b": zero["b"]})) == 0
    assert float(_numerics.scaled_norm({})) == 0


def test_norms_that_are_not_finite_say_so():
    assert np.isnan(_numerics.scaled_norm([jnp.asarray([1.0, np.nan]), jnp.ones(1)]))
    assert np.isinf(_numerics.scaled_norm([jnp.asarray([1.0, np.inf])]))


def test_norms_are_as_wide_as_the_widest_leaf():
    half = jnp.full(300, 1e-25, jnp.bfloat16)
    assert _numerics.scaled_norm(half).dtype == jnp.float32
    np.testing.assert_allclose(_numerics.scaled_norm(half), 300**0.5 * 1e-25, rtol=1e-2)
    with jax.enable_x64(True):
        norm = _numerics.scaled_norm([jnp.full(3, 1e-200), jnp.full(1, 1e-30, jnp.float32)])
        assert norm.dtype == jnp.float64
        np.testing.assert_allclose(norm, 1e-30, rtol=1e-6)
        np.testing.assert_allclose(_numerics.scaled_norm(jnp.full(4, 1e-200)), 2e-200, rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_norms_of_groups_have_a_scale_each(size):
    array = jnp.asarray([[3.0, 0.0, 3.0], [4.0, 0.0, -4.0]]) * jnp.asarray([[size, 1.0, 1.0]])
    norms = _numerics.norms_along(array, (0,))
    np.testing.assert_allclose(norms, [[5 * size, 0, 5]], rtol=1e-6)
    units = _numerics.units_along(array, (0,))
    np.testing.assert_allclose(units, [[0.6, 0, 0.6], [0.8, 0, -0.8]], rtol=1e-6)
    slope = jax.grad(lambda a: jnp.sum(_numerics.norms_along(a, (0,))))(array)
    np.testing.assert_allclose(slope, units, rtol=1e-6)


def test_a_function_of_several_operations_is_one_program_outside_and_none_inside():
    @one_program(static="power")
    def rooted(x, power):
        return jnp.sqrt(x) + jnp.exp(x) ** power

    np.testing.assert_allclose(rooted(jnp.ones(3), power=2), 1 + np.e**2, rtol=1e-6)
    assert rooted._cache_size() == 1
    inside = jax.jit(lambda x: rooted(x, power=2)).lower(1.0).as_text()
    assert "exponential" in inside
    assert "call @" not in inside
